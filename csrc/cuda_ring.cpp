#include "cuda_ring.hpp"

#include <algorithm>

#include "leaf.hpp"

namespace lmcache::cuda {

namespace {

using u64 = std::uint64_t;

void after(cudaStream_t stream, const Event& event) {
    demand(cudaStreamWaitEvent(stream, event.get(), 0), "order two streams");
}

void record(const Event& event, cudaStream_t stream) {
    demand(cudaEventRecord(event.get(), stream), "record an event");
}

}  // namespace

StagingRing::StagingRing(std::uint64_t bytes)
    : window_leaves_(static_cast<std::uint32_t>(std::clamp<u64>(bytes / kWindows / kLeafBytes, 1, 1U << 20))),
      memory_(device_memory(kWindows * window_leaves_ * kLeafBytes)) {}

void StagingRing::enqueue(Direction direction, const Job& plan, const std::vector<std::uint8_t*>& extents,
                          std::uint32_t blocks_max, cudaStream_t stream, cudaEvent_t done) {
    const bool storing = direction == Direction::store;
    const cudaStream_t dma = storing ? to_host_.get() : to_device_.get();
    for (Job part = plan; part.first < plan.end; part.first = part.end) {
        const std::size_t index = next_++ % kWindows;
        const Window& window = windows_[index];
        std::uint8_t* memory = memory_.as<std::uint8_t>() + index * window_leaves_ * kLeafBytes;
        part.end = std::min(plan.end, part.first + window_leaves_);
        part.extents = nullptr;
        part.extents_stride = u64{part.leaves_per_chunk} * kLeafBytes;
        part.extents_base = reinterpret_cast<u64>(memory) - u64{part.first} * kLeafBytes;
        after(storing ? stream : dma, window.drained);
        if (!storing) transfer(direction, part, extents, memory, dma);
        if (storing) demand(launch(direction, part, blocks_max, stream), "launch a gather");
        record(window.filled, storing ? stream : dma);
        after(storing ? dma : stream, window.filled);
        if (storing) transfer(direction, part, extents, memory, dma);
        if (!storing) demand(launch(direction, part, blocks_max, stream), "launch a scatter");
        record(window.drained, storing ? dma : stream);
    }
    demand(cudaEventRecord(done, storing ? dma : stream), "record an event");
}

void StagingRing::transfer(Direction direction, const Job& part, const std::vector<std::uint8_t*>& extents,
                           std::uint8_t* window, cudaStream_t stream) const {
    for (std::uint32_t item = part.first; item < part.end;) {
        const std::uint32_t chunk = item / part.leaves_per_chunk;
        const std::uint32_t leaf = item % part.leaves_per_chunk;
        const std::uint32_t leaves = std::min(part.leaves_per_chunk - leaf, part.end - item);
        const u64 start = u64{leaf} * kLeafBytes;
        const u64 bytes = std::min(u64{leaves} * kLeafBytes, part.extent_bytes - start);
        std::uint8_t* host = extents[chunk] + start;
        std::uint8_t* device = window + u64{item - part.first} * kLeafBytes;
        const bool storing = direction == Direction::store;
        demand(storing ? cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream)
                       : cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream),
               "start a DMA");
        item += leaves;
    }
}

}  // namespace lmcache::cuda
