// One leaf: at most 16 KiB of an extent, moved and hashed by the same loads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "plan.hpp"

namespace lmcache {

inline constexpr std::size_t kLeafBytes = 16384;

// Walks the bytes of one chunk, in the order of its extent, through the engine's fragments (a segment of a block each).
class Fragments {
public:
    Fragments(const Plan& plan, std::size_t chunk, std::uint64_t at);

    // Where the next byte lies in the engine's memory; null where the block is kNoBlock.
    std::uint8_t* here() const;
    // Bytes until the end of this fragment.
    std::uint64_t left() const { return plan_->segments[segment_].bytes - done_; }
    // Moves on by at most left() bytes.
    void advance(std::uint64_t bytes);

private:
    const Plan* plan_;
    std::span<const std::int64_t> row_;
    std::size_t block_;
    std::size_t segment_;
    std::uint64_t done_;  // in the fragment
};

// Hash of a leaf that was gathered from the fragments into the pool.
std::uint64_t store_leaf(const Kernels& kernels, Fragments& from, std::uint8_t* pool, std::size_t bytes);

// Hash of a leaf that was scattered from the pool to the fragments.
std::uint64_t retrieve_leaf(const Kernels& kernels, const std::uint8_t* pool, Fragments& to, std::size_t bytes);

// XXH3-64, seeded, over the little-endian leaf hashes: the checksum of an extent.
std::uint64_t checksum_of(const Kernels& kernels, const std::uint64_t* hashes, std::size_t count, std::uint64_t seed);

// Leaf hashes of bytes that stay where they are.
std::vector<std::uint64_t> leaf_hashes(const Kernels& kernels, const std::uint8_t* data, std::size_t bytes);

}  // namespace lmcache
