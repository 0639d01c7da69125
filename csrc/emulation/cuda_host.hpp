// CUDA C++ as host C++: what kernel sources of this project use of the language, for any C++20 compiler.
//
// The lanes of a warp are fibers. A lane runs until it meets one of the warp's collectives, then the next one does;
// when all have met it, they go on. So kernels keep their natural form, and a lane that takes another way than its
// warp, which hangs or worse on a GPU, ends the program here with a sentence. Warps and blocks run one after another:
// nothing here proves anything about exchange between warps, and kernels of this project have none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};

inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the lane that runs

namespace emulation {

inline constexpr unsigned kWarpLanes = 32;

// Runs `kernel` once for every thread of the grid. Blocks are whole warps.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel);

// Returns when all lanes of the warp have come here. `what` tells collectives apart: all lanes must have met the same.
void meet(unsigned mask, unsigned what);

// As `meet`, and returns the word that lane `from` brought.
std::uint64_t exchange(unsigned mask, unsigned what, std::uint64_t word, unsigned from);

unsigned lane();

}  // namespace emulation

inline void __syncwarp(unsigned mask = 0xffffffffU) { emulation::meet(mask, 1); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(std::uint64_t));
    std::uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    const auto with = static_cast<unsigned>(lane_mask);
    word = emulation::exchange(mask, 2 + with, word, emulation::lane() ^ with);
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    __extension__ using u128 = unsigned __int128;
    return static_cast<unsigned long long>(static_cast<u128>(a) * b >> 64);
}

// Loads that are made anew each time and stores that pass by the caches. UBSan sees an address that is not aligned.
template <class T>
T __ldcv(const T* from) {
    return *const_cast<const volatile T*>(from);
}
inline ulonglong2 __ldcv(const ulonglong2* from) {
    const unsigned char* address = reinterpret_cast<const unsigned char*>(from);
    if (reinterpret_cast<std::uintptr_t>(address) % alignof(ulonglong2) != 0) __builtin_trap();
    return *from;
}
template <class T>
void __stcs(T* to, T value) {
    *to = value;
}
