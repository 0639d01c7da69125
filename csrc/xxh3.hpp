// XXH3-64, written from its published specification (xxhash project, doc/xxhash_spec.md, section "XXH3 algorithm").
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace lmcache {

// Inputs above this length take the striped loop, the only part that is worth vector instructions.
inline constexpr std::size_t kShortBytesMax = 240;

// Hash of any number of bytes.
std::uint64_t xxh3_64(const Kernels& kernels, const std::uint8_t* data, std::size_t bytes, std::uint64_t seed);

// Hash, seed 0, of more than kShortBytesMax bytes through one of the kernels, which may write them to dst on the way.
std::uint64_t xxh3_64_through(Accumulate kernel, const std::uint8_t* src, std::uint8_t* dst, std::size_t bytes);

// The same for bytes that lie in pieces: gathered to dst, or scattered to where the pieces are.
std::uint64_t xxh3_64_gather(Gather kernel, const Piece* pieces, std::size_t count, std::uint8_t* dst,
                             std::size_t bytes);
std::uint64_t xxh3_64_scatter(Scatter kernel, const std::uint8_t* src, const Piece* pieces, std::size_t count,
                              std::size_t bytes);

// Two hashes, of leaves of kLeafBlocks blocks.
void xxh3_64_pair(Pair kernel, const std::uint8_t* const* src, std::uint8_t* const* dst, std::uint64_t* hashes);

}  // namespace lmcache
