// The staging ring: kernels move KV between the engine's memory and windows of device memory, DMA moves windows.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda_kernels.hpp"
#include "cuda_memory.hpp"

namespace lmcache::cuda {

class StagingRing {
public:
    // Allocates; `bytes` are rounded down to whole windows of whole leaves, at least one leaf each.
    explicit StagingRing(std::uint64_t bytes);

    // Enqueues a plan of `num_chunks` chunks, whose extents lie at these addresses of pinned memory. What the engine's
    // memory is needed for is enqueued on `stream`, DMA on streams of the ring; `done` comes when all of it has.
    void enqueue(Direction direction, const Job& plan, const std::vector<std::uint8_t*>& extents,
                 std::uint32_t blocks_max, cudaStream_t stream, cudaEvent_t done);

private:
    static constexpr std::size_t kWindows = 4;  // one is filled, one drained, and neither waits for the other's end

    struct Window {
        Event filled = make_event();
        Event drained = make_event();
    };

    void transfer(Direction direction, const Job& part, const std::vector<std::uint8_t*>& extents,
                  std::uint8_t* window, cudaStream_t stream) const;

    std::uint32_t window_leaves_;
    DeviceMemory memory_;
    Window windows_[kWindows];
    Stream to_host_ = make_stream();  // one a direction: PCIe goes both ways at once
    Stream to_device_ = make_stream();
    std::size_t next_ = 0;
};

}  // namespace lmcache::cuda
