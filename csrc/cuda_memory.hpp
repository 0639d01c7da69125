// Owners of what the CUDA runtime hands out, and its errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace lmcache::cuda {

inline void demand(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current for this thread, and the one before again. Where that fails, whatever is called next does.
class OnDevice {
public:
    explicit OnDevice(int device) {
        cudaGetDevice(&before_);
        cudaSetDevice(device);
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
};

// One thing of the runtime's, given back at the end; movable.
template <class Handle, cudaError_t (*GiveBack)(Handle)>
class Owner {
public:
    Owner() = default;
    explicit Owner(Handle handle) : handle_(handle) {}
    Owner(Owner&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Owner& operator=(Owner&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Owner() {
        if (handle_ != nullptr) GiveBack(handle_);
    }
    Handle get() const { return handle_; }
    template <class T>
    T* as() const {
        return static_cast<T*>(handle_);
    }

private:
    Handle handle_ = nullptr;
};

using DeviceMemory = Owner<void*, cudaFree>;
using PinnedMemory = Owner<void*, cudaFreeHost>;
using Event = Owner<cudaEvent_t, cudaEventDestroy>;
using Stream = Owner<cudaStream_t, cudaStreamDestroy>;

inline DeviceMemory device_memory(std::size_t bytes) {
    void* memory = nullptr;
    demand(cudaMalloc(&memory, bytes), "allocate device memory");
    return DeviceMemory(memory);
}

// Memory of the host that every device reaches at the host's own addresses.
inline PinnedMemory pinned_memory(std::size_t bytes) {
    void* memory = nullptr;
    demand(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped), "allocate pinned memory");
    return PinnedMemory(memory);
}

inline Event make_event() {
    cudaEvent_t event = nullptr;
    demand(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "make an event");
    return Event(event);
}

inline Stream make_stream() {
    cudaStream_t stream = nullptr;
    demand(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "make a stream");
    return Stream(stream);
}

}  // namespace lmcache::cuda
