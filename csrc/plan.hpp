// What one copy is about, checked before the first byte moves.
//
// One formula says where every byte is. A plane is what one layer, or a part of it, has in each block; byte i of run
// (i0, i1, i2) of a plane in block b lies at
//
//     address + b * block_stride + i0 * s0 + i1 * s1 + i2 * s2 + i
//
// An extent has, for each group of planes, for each plane, for each block of the chunk, for i0, i1, i2: the run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace lmcache {

inline constexpr std::int64_t kNoBlock = -1;
inline constexpr unsigned kThreadsMax = 256;
inline constexpr std::size_t kDims = 3;

struct Dim {
    std::uint64_t count;
    std::uint64_t stride;  // wraps around where it is negative
};

// As Python's tables have it: outermost dim first; one that is not there counts 1.
struct Plane {
    std::uint64_t address;
    std::uint64_t block_stride;
    Dim dims[kDims];
    std::uint64_t run;
};

// Planes whose block ids come from one list, those after the planes of the group before.
struct Group {
    std::uint64_t num_planes;
    std::uint64_t num_blocks;
    std::uint64_t blocks_per_chunk;
};

inline std::uint64_t block_bytes(const Plane& plane) {
    return plane.dims[0].count * plane.dims[1].count * plane.dims[2].count * plane.run;
}

// The formula, up to the byte in the run. Wraps around on its way where strides are negative, never in its result.
inline std::uint64_t run_address(const Plane& plane, std::uint64_t block, std::uint64_t i0, std::uint64_t i1,
                                 std::uint64_t i2) {
    return plane.address + block * plane.block_stride + i0 * plane.dims[0].stride + i1 * plane.dims[1].stride +
           i2 * plane.dims[2].stride;
}

enum class Direction { store, retrieve };

// Copies of the caller's tables: it may change its own while the GIL is released.
struct Plan {
    Direction direction;
    std::uint8_t* pool;
    std::uint64_t pool_bytes;
    std::vector<Plane> planes;
    std::vector<Group> groups;
    std::vector<std::int64_t> blocks;  // num_chunks rows
    std::vector<std::uint64_t> offsets;
    std::vector<std::uint64_t> seeds;
    std::vector<std::uint64_t> checksums;  // retrieve only
    unsigned threads;

    // Filled by check().
    std::vector<std::uint64_t> starts;     // of each plane's part of an extent
    std::vector<std::size_t> first_block;  // of each plane, in the row of a chunk
    std::size_t blocks_per_chunk = 0;      // over all groups
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
