// One leaf: at most 16 KiB of an extent, moved and hashed by the same loads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "plan.hpp"

namespace lmcache {

inline constexpr std::size_t kLeafBytes = 16384;

// Walks the bytes of one chunk, in the order of its extent, through the runs of the engine's memory.
class Fragments {
public:
    Fragments(const Plan& plan, std::size_t chunk, std::uint64_t at);

    // Where the next byte lies in the engine's memory; null where the block is kNoBlock.
    std::uint8_t* here() const { return is_block_ ? reinterpret_cast<std::uint8_t*>(run_ + done_) : nullptr; }
    // Bytes until the end of this run.
    std::uint64_t left() const { return plane_->run - done_; }
    // Moves on by at most left() bytes.
    void advance(std::uint64_t bytes) {
        done_ += bytes;
        if (done_ == plane_->run) next_run();
    }

private:
    void next_run() {
        done_ = 0;
        if (++index_[2] < plane_->dims[2].count) {
            run_ += plane_->dims[2].stride;
        } else {
            carry();
        }
    }
    // From the last run of the innermost dim on to the next of all others.
    void carry();
    // Settles in a plane of the chunk, at its block `block_` and run `index_`.
    void enter_plane(std::size_t plane);
    void locate();

    const Plan* plan_;
    const Plane* plane_;
    std::span<const std::int64_t> row_;   // of the chunk
    std::span<const std::int64_t> ids_;   // of the plane's group
    std::size_t block_ = 0;               // in ids_
    std::uint64_t index_[kDims] = {};
    std::uint64_t run_;   // its address
    std::uint64_t done_;  // bytes of the run
    bool is_block_;
};

static_assert(kLeafBytes == kLeafBlocks * kBlockBytes);

// Hash of a leaf that was gathered from the fragments into the pool.
std::uint64_t store_leaf(const Kernels& kernels, Fragments& from, std::uint8_t* pool, std::size_t bytes);

// Hash of a leaf that was scattered from the pool to the fragments.
std::uint64_t retrieve_leaf(const Kernels& kernels, const std::uint8_t* pool, Fragments& to, std::size_t bytes);

// XXH3-64, seeded, over the little-endian leaf hashes: the checksum of an extent.
std::uint64_t checksum_of(const Kernels& kernels, const std::uint64_t* hashes, std::size_t count, std::uint64_t seed);

// Leaf hashes of bytes that stay where they are.
std::vector<std::uint64_t> leaf_hashes(const Kernels& kernels, const std::uint8_t* data, std::size_t bytes);

}  // namespace lmcache
