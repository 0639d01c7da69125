// XXH3-64, seed 0, of more than 240 bytes, by one warp: see xxh3.hpp for the specification that it follows.
//
// Within a block of 1 KiB the eight lanes of XXH3 are sums over 16 stripes, so every thread adds up what its own
// 16-byte vectors give to two of the lanes, and the warp adds these up at the block's end. From then on each thread
// holds the sums of lanes 2p and 2p + 1, p being its number modulo 4: four pairs, eight times over.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lmcache::cuda {

using u64 = std::uint64_t;

inline constexpr std::uint32_t kWholeWarp = 0xffffffffU;
inline constexpr std::uint32_t kStripeBytes = 64;
inline constexpr std::uint32_t kBlockBytes = 1024;
inline constexpr std::uint32_t kTailBytes = 2 * kBlockBytes;  // the last stripe may begin in the block before the last

// The secret of xxh3.cpp as little-endian words, and the lanes' first values.
__constant__ const u64 kSecret[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb,
    0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088,
    0x4ef90da297486471, 0xd8acdea946ef1938, 0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a,
    0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};
__constant__ const u64 kFirstLanes[8] = {0xC2B2AE3DU,         0x9E3779B185EBCA87U, 0xC2B2AE3D27D4EB4FU,
                                         0x165667B19E3779F9U, 0x85EBCA77C2B2AE63U, 0x85EBCA77U,
                                         0x27D4EB2F165667C5U, 0x9E3779B1U};

inline constexpr std::uint32_t kScrambleAt = 128;  // in the secret
inline constexpr std::uint32_t kLastStripeAt = 121;
inline constexpr std::uint32_t kMergeAt = 11;

__device__ inline u64 secret_at(std::uint32_t byte) {
    const u64 low = kSecret[byte / 8];
    const std::uint32_t shift = byte % 8 * 8;
    return shift == 0 ? low : low >> shift | kSecret[byte / 8 + 1] << (64 - shift);
}

class WarpHash {
public:
    // `tail`: kTailBytes of shared memory of this warp's own, free from now on until finish() returns.
    __device__ WarpHash(std::uint32_t lane, std::uint32_t bytes, unsigned char* tail)
        : bytes_(bytes), stripe_(lane / 4), pair_(lane % 4), tail_(tail), here_(tail + 16 * lane) {
        acc_[0] = kFirstLanes[2 * pair_];
        acc_[1] = kFirstLanes[2 * pair_ + 1];
        for (std::uint32_t i = 0; i < 2; ++i) {
            for (std::uint32_t j = 0; j < 2; ++j) {
                secret_[2 * i + j] = kSecret[stripe_ + 8 * i + 2 * pair_ + j];
            }
        }
    }

    // The block that begins `at` bytes into the input: this thread's 16 bytes of each half of it. A stripe that is not
    // whole, or is the last, does not count here.
    __device__ void add(std::uint32_t at, ulonglong2 first, ulonglong2 second) {
        if (at + kBlockBytes + kStripeBytes > bytes_) keep(at, first, second);
        const std::uint32_t stripes = (bytes_ - 1) / kStripeBytes;
        u64 sums[2] = {0, 0};
        if (at / kStripeBytes + stripe_ < stripes) mix(sums, first, secret_[0], secret_[1]);
        if (at / kStripeBytes + stripe_ + 8 < stripes) mix(sums, second, secret_[2], secret_[3]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
            sums[0] += __shfl_xor_sync(kWholeWarp, sums[0], distance);
            sums[1] += __shfl_xor_sync(kWholeWarp, sums[1], distance);
        }
        acc_[0] += sums[0];
        acc_[1] += sums[1];
        if (at / kBlockBytes < (bytes_ - 1) / kBlockBytes) scramble();
    }

    // The hash, in every thread.
    __device__ u64 finish() {
        __syncwarp();
        const std::uint32_t last = bytes_ - kStripeBytes + 16 * pair_;
        mix(acc_, make_ulonglong2(kept(last), kept(last + 8)), secret_at(kLastStripeAt + 16 * pair_),
            secret_at(kLastStripeAt + 16 * pair_ + 8));
        __syncwarp();
        const u64 a = acc_[0] ^ secret_at(kMergeAt + 16 * pair_);
        const u64 b = acc_[1] ^ secret_at(kMergeAt + 16 * pair_ + 8);
        u64 hash = a * b ^ __umul64hi(a, b);
        hash += __shfl_xor_sync(kWholeWarp, hash, 1);
        hash += __shfl_xor_sync(kWholeWarp, hash, 2);
        hash += bytes_ * 0x9E3779B185EBCA87U;
        hash = (hash ^ hash >> 37) * 0x165667919E3779F9U;
        return hash ^ hash >> 32;
    }

private:
    __device__ static void mix(u64 (&acc)[2], ulonglong2 data, u64 secret_x, u64 secret_y) {
        const u64 x = data.x ^ secret_x;
        const u64 y = data.y ^ secret_y;
        acc[0] += data.y + (x & 0xffffffffU) * (x >> 32);
        acc[1] += data.x + (y & 0xffffffffU) * (y >> 32);
    }

    __device__ void scramble() {
        for (std::uint32_t i = 0; i < 2; ++i) {
            acc_[i] = (acc_[i] ^ acc_[i] >> 47 ^ kSecret[kScrambleAt / 8 + 2 * pair_ + i]) * 0x9E3779B1U;
        }
    }

    __device__ void keep(std::uint32_t at, ulonglong2 first, ulonglong2 second) {
        unsigned char* half = here_ + at % kTailBytes;
        *reinterpret_cast<ulonglong2*>(half) = first;
        *reinterpret_cast<ulonglong2*>(half + kBlockBytes / 2) = second;
    }

    __device__ u64 kept(std::uint32_t at) const {
        u64 word = 0;
        for (std::uint32_t i = 0; i < 8; ++i) word |= u64{tail_[(at + i) % kTailBytes]} << (8 * i);
        return word;
    }

    u64 acc_[2];
    u64 secret_[4];
    std::uint32_t bytes_;
    std::uint32_t stripe_;
    std::uint32_t pair_;
    unsigned char* tail_;
    unsigned char* here_;
};

}  // namespace lmcache::cuda
