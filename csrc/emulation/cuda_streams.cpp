#include "cuda_streams.hpp"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

struct CUevent_st {
    unsigned recorded = 0;
    unsigned completed = 0;
};

namespace {

struct Operation {
    std::function<bool()> ready;
    std::function<void()> run;
};

}  // namespace

struct CUstream_st {
    std::deque<Operation> operations;
};

namespace {

std::recursive_mutex runtime;  // of all below, of events and of streams
std::mt19937_64 choices;
std::vector<CUstream_st*> streams;
std::map<const char*, std::size_t> pinned;  // memory of the host that a device can reach, by its start
bool slow_calls_are_forbidden = false;

[[noreturn]] void wrong(const char* sentence) {
    std::fprintf(stderr, "emulated CUDA runtime: %s\n", sentence);
    std::abort();
}

void slow_call() {
    if (slow_calls_are_forbidden) wrong("a copy allocates, registers or waits");
}

bool is_pinned(const void* memory, std::size_t bytes) {
    const std::lock_guard lock(runtime);
    const char* start = static_cast<const char*>(memory);
    auto range = pinned.upper_bound(start);
    if (range == pinned.begin()) return false;
    --range;
    return start + bytes <= range->first + range->second;
}

// Memory of a device is nobody's zeros.
void* garbage(std::size_t bytes) {
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (memory != nullptr) std::memset(memory, 0xA5, (bytes + 255) / 256 * 256);
    return memory;
}

CUstream_st* known(cudaStream_t stream) {
    const std::lock_guard lock(runtime);
    static CUstream_st of_null;
    if (stream != nullptr) return stream;
    if (streams.empty() || streams.front() != &of_null) streams.insert(streams.begin(), &of_null);
    return &of_null;
}

void push(cudaStream_t stream, std::function<bool()> ready, std::function<void()> run) {
    const std::lock_guard lock(runtime);
    known(stream)->operations.push_back({std::move(ready), std::move(run)});
}

bool always() { return true; }

}  // namespace

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "emulated error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    slow_call();
    *memory = garbage(bytes);
    return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
    slow_call();
    std::free(memory);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned) {
    if (cudaMalloc(memory, bytes) != cudaSuccess) return cudaErrorMemoryAllocation;
    const std::lock_guard lock(runtime);
    pinned[static_cast<const char*>(*memory)] = bytes;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
    const std::lock_guard lock(runtime);
    pinned.erase(static_cast<const char*>(memory));
    return cudaFree(memory);
}

cudaError_t cudaHostRegister(void* memory, std::size_t bytes, unsigned) {
    const std::lock_guard lock(runtime);
    slow_call();
    if (is_pinned(memory, 1)) return cudaErrorHostMemoryAlreadyRegistered;
    pinned[static_cast<const char*>(memory)] = bytes;
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* memory) {
    const std::lock_guard lock(runtime);
    slow_call();
    return pinned.erase(static_cast<const char*>(memory)) == 1 ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
    *device = host;
    return is_pinned(host, 1) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    const std::lock_guard lock(runtime);
    slow_call();
    streams.push_back(*stream = new CUstream_st);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const std::lock_guard lock(runtime);
    slow_call();
    if (!stream->operations.empty()) wrong("a stream is destroyed before its work is done");
    std::erase(streams, stream);
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    const std::lock_guard lock(runtime);
    push(stream, [event, until = event->recorded] { return event->completed >= until; }, [] {});
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    slow_call();
    *event = new CUevent_st;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    slow_call();
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const std::lock_guard lock(runtime);
    push(stream, always, [event, now = ++event->recorded] { event->completed = now; });
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    const std::lock_guard lock(runtime);
    return event->completed == event->recorded ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    slow_call();
    while (cudaEventQuery(event) != cudaSuccess) {
        if (!emulation::step()) wrong("an event is waited for that nobody will complete");
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
    slow_call();
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    const void* host = kind == cudaMemcpyDeviceToHost ? to : from;
    if (!is_pinned(host, bytes)) wrong("a DMA with memory that is not pinned waits");
    push(stream, always, [to, from, bytes] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}

namespace emulation {

void enqueue(cudaStream_t stream, std::function<void()> operation) { push(stream, always, std::move(operation)); }

bool step() {
    const std::lock_guard lock(runtime);
    std::vector<CUstream_st*> able;
    bool waiting = false;
    for (CUstream_st* stream : streams) {
        if (stream->operations.empty()) continue;
        waiting = true;
        if (stream->operations.front().ready()) able.push_back(stream);
    }
    if (able.empty()) {
        if (waiting) wrong("every stream waits for an event of another");
        return false;
    }
    CUstream_st* stream = able[choices() % able.size()];
    const Operation operation = std::move(stream->operations.front());
    stream->operations.pop_front();
    operation.run();
    return true;
}

void seed(std::uint64_t value) { choices.seed(value); }

void forbid_slow_calls(bool forbidden) { slow_calls_are_forbidden = forbidden; }

}  // namespace emulation
