// What one copy is about, checked before the first byte moves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace lmcache {

inline constexpr std::int64_t kNoBlock = -1;
inline constexpr unsigned kThreadsMax = 256;

// A byte range that every block of the engine's memory has: at `address` in block 0, `stride` further in the next.
struct Segment {
    std::uint64_t address;
    std::uint64_t stride;
    std::uint64_t bytes;
};

enum class Direction { store, retrieve };

// Copies of the caller's tables: it may change its own while the GIL is released.
struct Plan {
    Direction direction;
    std::uint8_t* pool;
    std::uint64_t pool_bytes;
    std::vector<Segment> segments;
    std::uint64_t num_blocks;
    std::vector<std::int64_t> blocks;  // num_chunks rows
    std::vector<std::uint64_t> offsets;
    std::vector<std::uint64_t> seeds;
    std::vector<std::uint64_t> checksums;  // retrieve only
    unsigned threads;

    // Filled by check().
    std::vector<std::uint64_t> ends;  // of each segment, counted from the start of its block's bytes
    std::size_t blocks_per_chunk = 0;
    std::uint64_t block_bytes = 0;
    std::uint64_t extent_bytes = 0;

    std::size_t num_chunks() const { return offsets.size(); }
    std::span<const std::int64_t> row(std::size_t chunk) const {
        return std::span(blocks).subspan(chunk * blocks_per_chunk, blocks_per_chunk);
    }
};

// Fills the derived fields. Throws std::invalid_argument, one sentence, where a copy would reach outside the pool or
// the engine's blocks, where two of its writes would meet, or where the tables do not fit each other.
void check(Plan& plan);

}  // namespace lmcache
