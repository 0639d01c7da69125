// A layout as the kernels read it: the affine map, prepared once, so that no thread of a GPU ever divides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan.hpp"

#ifdef __CUDACC__
#define LMCACHE_ANYWHERE __host__ __device__
#else
#define LMCACHE_ANYWHERE
#endif

namespace lmcache::cuda {

// Offsets inside the part of an extent that one plane has stay below this.
inline constexpr std::uint64_t kPlaneBytesMax = std::uint64_t{1} << 31;

// Division of numbers below 2^31 by a constant: one multiplication. With 2^(L-1) < d <= 2^L and m = ceil(2^(31+L) / d),
// n * m exceeds n * 2^(31+L) / d by less than n / 2^31 * 2^(31+L) / d, too little to reach the next quotient.
struct Divisor {
    std::uint32_t divisor;
    std::uint32_t multiplier;
    std::uint32_t shift;

    LMCACHE_ANYWHERE std::uint32_t divide(std::uint32_t number) const {
        return static_cast<std::uint32_t>(std::uint64_t{number} * multiplier >> shift);
    }
};

Divisor make_divisor(std::uint64_t divisor);

// One plane, beside where its bytes lie in an extent.
struct DevicePlane {
    std::uint64_t address;
    std::uint64_t block_stride;  // strides wrap around: they may be negative
    std::uint64_t strides[3];
    std::uint64_t start;  // in the extent
    std::uint64_t end;
    Divisor block;       // bytes of a block in this plane
    Divisor inner[3];    // bytes of one step of each dim; the last is the run
    std::uint32_t first_block;  // of its group, in the block ids of a chunk
    std::uint32_t is_run;       // whether a block is one run

    // run_address() of plan.hpp, for byte `offset` of this plane's part of an extent; `id` is the block that the chunk
    // has as its `nth_block`, which is block.divide(offset).
    LMCACHE_ANYWHERE std::uint64_t place(std::uint32_t offset, std::uint32_t nth_block, std::uint32_t id) const {
        std::uint32_t rest = offset - nth_block * block.divisor;
        std::uint64_t at = address + id * block_stride;
        if (!is_run) {
            for (int dim = 0; dim < 3; ++dim) {
                const std::uint32_t index = inner[dim].divide(rest);
                rest -= index * inner[dim].divisor;
                at += index * strides[dim];
            }
        }
        return at + rest;
    }
};

// What is known of a leaf by its number in the extent.
struct DeviceLeaf {
    std::uint32_t first_plane;
    std::uint32_t width;  // bytes of the widest loads that stay aligned and inside runs: 16, 8, 4, 2 or 1
};

struct DeviceLayout {
    std::vector<DevicePlane> planes;
    std::vector<DeviceLeaf> leaves;
    std::uint64_t extent_bytes;
    std::uint32_t blocks_per_chunk;
};

// Throws std::invalid_argument, one sentence, where a number is too large for the kernels.
DeviceLayout make_device_layout(const std::vector<Plane>& planes, const std::vector<Group>& groups);

}  // namespace lmcache::cuda
