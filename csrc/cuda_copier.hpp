// Copies between an engine's paged memory on a GPU and the pool: made once, then only enqueues.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "plan.hpp"

namespace lmcache::cuda {

// Every plan that may be under way is; the caller waits for one of them, or does without this one.
class Busy : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Extents up to this size are reached by kernels themselves: a DMA costs some microseconds to start, in which PCIe
// moves as much, while a kernel that reaches over PCIe keeps its share of the GPU busy for as long as that takes. The
// value is a guess, not measured so far: tests/gpu/test_device_figures.py measures it where a GPU is.
inline constexpr std::uint64_t kDirectBytesMax = 256 * 1024;

struct CopierLimits {
    int device;                // number of the GPU
    std::uint64_t staging_bytes;  // of device memory, and at least as much pinned memory of the host
    unsigned plans_max;           // under way at a time
    unsigned thread_blocks_max;   // of one kernel: what is left of the GPU is the engine's
    std::uint64_t direct_bytes_max;  // extents up to this size are reached by the kernel itself, larger ones by DMA
};

// Any thread may call anything; calls for one stream must not race each other. Only the constructor, the destructor and
// the calls that (un)register allocate, or wait for a device. After a failure of CUDA every call throws.
class DeviceCopier {
public:
    // `pool` must outlive the copier.
    DeviceCopier(std::vector<Plane> planes, std::vector<Group> groups, std::uint8_t* pool, std::uint64_t pool_bytes,
                 const CopierLimits& limits);
    ~DeviceCopier();
    DeviceCopier(const DeviceCopier&) = delete;
    DeviceCopier& operator=(const DeviceCopier&) = delete;

    std::uint64_t extent_bytes() const;

    // Chunks that one plan may have.
    std::size_t chunks_max() const;

    // Lets the device reach a range of the pool, which takes milliseconds. Extents that lie in no registered range are
    // copied through pinned memory: a retrieve of them takes a memcpy on entry, a store one in finish().
    void register_range(std::uint64_t offset, std::uint64_t bytes);

    // Enqueues one plan on `stream` (a cudaStream_t) and returns its ticket. The engine's blocks may be reused by what
    // is enqueued on `stream` afterwards; the extents are done when finish() says so. A retrieve needs checksums; a
    // block id of kNoBlock is checked but not written. Throws std::invalid_argument where check() of plan.hpp does, and
    // Busy.
    std::uint64_t submit(Direction direction, std::vector<std::int64_t> blocks, std::vector<std::uint64_t> offsets,
                         std::vector<std::uint64_t> seeds, std::vector<std::uint64_t> checksums, void* stream);

    // Ends a plan: nothing while it is under way, then once the checksum of each chunk (store), or 1 where the bytes
    // had the expected one and 0 elsewhere (retrieve). Never waits.
    std::optional<std::vector<std::uint64_t>> finish(std::uint64_t ticket);

private:
    class Engine;
    std::unique_ptr<Engine> engine_;
};

}  // namespace lmcache::cuda
