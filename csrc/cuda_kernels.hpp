// What the host hands to the kernels, and how it starts them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_layout.hpp"

namespace lmcache::cuda {

inline constexpr std::uint32_t kThreadsPerBlock = 256;
inline constexpr std::uint32_t kWarpsPerBlock = kThreadsPerBlock / 32;

// A last leaf of at most 240 bytes is a case of its own in XXH3: the kernel hands its bytes out, the host hashes them.
inline constexpr std::uint32_t kShortLeafRoom = 256;

// Leaves first .. end - 1 of a plan, counted through its chunks. All pointers are a device's.
struct Job {
    const DevicePlane* planes;
    const DeviceLeaf* leaves;    // of an extent
    const std::int32_t* blocks;  // [num_chunks, blocks_per_chunk]
    const std::uint64_t* extents;  // [num_chunks]: address of each; null where they follow from the next two
    std::uint64_t extents_base;    // address of the extent of chunk 0, may wrap around
    std::uint64_t extents_stride;
    std::uint64_t extent_bytes;
    std::uint64_t* hashes;        // [num_chunks, leaves_per_chunk]
    unsigned char* short_leaves;  // [num_chunks, kShortLeafRoom]
    std::uint32_t leaves_per_chunk;
    std::uint32_t blocks_per_chunk;
    std::uint32_t first;
    std::uint32_t end;
};

// Enqueues one kernel of at most `blocks_max` thread blocks.
cudaError_t launch(Direction direction, const Job& job, std::uint32_t blocks_max, cudaStream_t stream);

}  // namespace lmcache::cuda
