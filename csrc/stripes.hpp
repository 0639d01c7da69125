// Shape of XXH3's long-input loop, shared by the instruction sets. Only kernels_*.cpp include this.
//
// Everything here has internal linkage: the linker must not merge a template that was compiled with different -m flags.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.hpp"

namespace lmcache {
namespace {

enum class Write { none, plain, stream };

constexpr std::size_t kStripeBytes = 64;
constexpr std::size_t kStripesPerBlock = 16;  // (secret of 192 bytes - stripe) / 8 bytes that each stripe moves on
constexpr std::size_t kBlockBytes = kStripeBytes * kStripesPerBlock;
constexpr std::size_t kScrambleAt = 128;   // in the secret
constexpr std::size_t kLastStripeAt = 121;  // in the secret

// Bytes ahead of a load: into L2 a page away, where the hardware's prefetcher, which stops at page ends, is not yet;
// into L1 eight lines away. Into L1 alone: 9.3 GB/s, into L2 alone: 10.3, both: 10.7 (store, 64 KiB fragments, one
// thread of a 2-core Xeon with AVX-512, where memcpy runs at 7.0). A prefetch may reach past what is mapped.
constexpr std::size_t kFarBytes = 4096;
constexpr std::size_t kNearBytes = 512;

inline void prefetch(const std::uint8_t* src) {
    __builtin_prefetch(src + kFarBytes, 0, 2);
    __builtin_prefetch(src + kNearBytes, 0, 3);
}

// dst is null where nothing is written, and must then not be moved.
template <Write W>
std::uint8_t* forward(std::uint8_t* dst, std::size_t bytes) {
    return W == Write::none ? dst : dst + bytes;
}

template <class Lanes, Write W>
void accumulate(std::uint64_t* lanes, const std::uint8_t* src, std::uint8_t* dst, std::size_t bytes,
                const std::uint8_t* secret) {
    Lanes acc(lanes);
    const std::size_t num_blocks = (bytes - 1) / kBlockBytes;
    for (std::size_t block = 0; block < num_blocks; ++block) {
        for (std::size_t i = 0; i < kStripesPerBlock; ++i) {
            acc.template stripe<W>(src + i * kStripeBytes, forward<W>(dst, i * kStripeBytes), secret + 8 * i);
        }
        acc.scramble(secret + kScrambleAt);
        src += kBlockBytes;
        dst = forward<W>(dst, kBlockBytes);
    }
    const std::size_t rest = bytes - num_blocks * kBlockBytes;  // 1 .. kBlockBytes
    const std::size_t num_stripes = (rest - 1) / kStripeBytes;
    for (std::size_t i = 0; i < num_stripes; ++i) {
        acc.template stripe<W>(src + i * kStripeBytes, forward<W>(dst, i * kStripeBytes), secret + 8 * i);
    }
    acc.template stripe<W>(src + rest - kStripeBytes, forward<W>(dst, rest - kStripeBytes), secret + kLastStripeAt);
    acc.save(lanes);
}

// Copies with `Lanes::stream_line` where dst is aligned, and with memcpy before and after.
template <class Lanes>
void stream_bytes(std::uint8_t* dst, const std::uint8_t* src, std::size_t bytes) {
    std::size_t head = (kStripeBytes - reinterpret_cast<std::uintptr_t>(dst) % kStripeBytes) % kStripeBytes;
    if (head > bytes) head = bytes;
    std::memcpy(dst, src, head);
    std::size_t done = head;
    for (; done + kStripeBytes <= bytes; done += kStripeBytes) Lanes::stream_line(dst + done, src + done);
    std::memcpy(dst + done, src + done, bytes - done);
}

}  // namespace
}  // namespace lmcache
