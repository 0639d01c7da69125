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
constexpr std::size_t kStripesPerBlock = kBlockBytes / kStripeBytes;
constexpr std::size_t kScrambleAt = 128;   // in the secret
constexpr std::size_t kLastStripeAt = 121;  // in the secret

// Bytes ahead of a load: into L2 a page away, where the hardware's prefetcher, which stops at page ends, is not yet;
// into L1 eight lines away. Into L1 alone: 9.3 GB/s, into L2 alone: 10.3, both: 10.7 (store, 64 KiB fragments, one
// thread of a 2-core Xeon with AVX-512, where memcpy runs at 7.0). A prefetch may reach past what is mapped.
constexpr std::size_t kFarBytes = 4096;
constexpr std::size_t kNearBytes = 512;

inline void prefetch_linear(const std::uint8_t* src) {
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
            prefetch_linear(src + i * kStripeBytes);
            acc.template stripe<W>(src + i * kStripeBytes, forward<W>(dst, i * kStripeBytes), secret + 8 * i);
        }
        acc.scramble(secret + kScrambleAt);
        src += kBlockBytes;
        dst = forward<W>(dst, kBlockBytes);
    }
    const std::size_t rest = bytes - num_blocks * kBlockBytes;  // 1 .. kBlockBytes
    const std::size_t num_stripes = (rest - 1) / kStripeBytes;
    for (std::size_t i = 0; i < num_stripes; ++i) {
        prefetch_linear(src + i * kStripeBytes);
        acc.template stripe<W>(src + i * kStripeBytes, forward<W>(dst, i * kStripeBytes), secret + 8 * i);
    }
    acc.template stripe<W>(src + rest - kStripeBytes, forward<W>(dst, rest - kStripeBytes), secret + kLastStripeAt);
    acc.save(lanes);
}

// The loop above for an input that comes in pieces of whole stripes, and ends with add_last().
template <class Lanes>
class Stripes {
public:
    Stripes(std::uint64_t* lanes, const std::uint8_t* secret) : acc_(lanes), secret_(secret) {}

    // `fetch` is called once a stripe.
    template <Write W, class Fetch>
    void add(const std::uint8_t* src, std::uint8_t* dst, std::size_t bytes, Fetch fetch) {
        while (bytes != 0) {
            const std::size_t room = (kStripesPerBlock - next_) * kStripeBytes;
            const std::size_t part = bytes < room ? bytes : room;
            for (std::size_t at = 0; at < part; at += kStripeBytes) {
                fetch(src + at);
                acc_.template stripe<W>(src + at, forward<W>(dst, at), secret_ + 8 * next_++);
            }
            if (next_ == kStripesPerBlock) {
                acc_.scramble(secret_ + kScrambleAt);
                next_ = 0;
            }
            src += part;
            dst = forward<W>(dst, part);
            bytes -= part;
        }
    }

    template <Write W>
    void add_last(const std::uint8_t* src, std::uint8_t* dst, std::uint64_t* lanes) {
        acc_.template stripe<W>(src, dst, secret_ + kLastStripeAt);
        acc_.save(lanes);
    }

private:
    Lanes acc_;
    const std::uint8_t* secret_;
    std::size_t next_ = 0;  // stripe of the block
};

// Runs kAheadBytes in front of the loads, through the pieces: hardware does not foresee where the next one is.
class Scout {
public:
    explicit Scout(const Piece* pieces) : piece_(pieces), at_(pieces->at) {
        for (std::size_t done = 0; done < kAheadBytes; done += kStripeBytes) step();
    }
    void step() {
        __builtin_prefetch(at_, 0, 3);
        at_ += kStripeBytes;
        if (at_ == piece_->at + piece_->bytes) at_ = (++piece_)->at;
    }

private:
    const Piece* piece_;
    const std::uint8_t* at_;
};

template <class Lanes>
void gather(std::uint64_t* lanes, const Piece* pieces, std::size_t count, std::uint8_t* dst,
            const std::uint8_t* secret) {
    Stripes<Lanes> stripes(lanes, secret);
    Scout scout(pieces);
    for (std::size_t i = 0; i < count; ++i) {
        const std::size_t bytes = pieces[i].bytes - (i + 1 == count ? kStripeBytes : 0);
        stripes.template add<Write::stream>(pieces[i].at, dst, bytes, [&](const std::uint8_t*) { scout.step(); });
        dst += bytes;
    }
    const Piece& last = pieces[count - 1];
    stripes.template add_last<Write::stream>(last.at + last.bytes - kStripeBytes, dst, lanes);
}

template <class Lanes>
void scatter(std::uint64_t* lanes, const std::uint8_t* src, const Piece* pieces, std::size_t count,
             const std::uint8_t* secret) {
    Stripes<Lanes> stripes(lanes, secret);
    const auto is_aligned = [](const Piece& piece) {
        return reinterpret_cast<std::uintptr_t>(piece.at) % kStripeBytes == 0;
    };
    for (std::size_t i = 0; i < count; ++i) {
        const Piece& piece = pieces[i];
        const std::size_t bytes = piece.bytes - (i + 1 == count ? kStripeBytes : 0);
        if (piece.at == nullptr) {
            stripes.template add<Write::none>(src, nullptr, bytes, prefetch_linear);
        } else if (is_aligned(piece)) {
            stripes.template add<Write::stream>(src, piece.at, bytes, prefetch_linear);
        } else {
            stripes.template add<Write::plain>(src, piece.at, bytes, prefetch_linear);
        }
        src += bytes;
    }
    const Piece& last = pieces[count - 1];
    if (last.at == nullptr) {
        stripes.template add_last<Write::none>(src, nullptr, lanes);
    } else {
        stripes.template add_last<Write::plain>(src, last.at + last.bytes - kStripeBytes, lanes);
    }
}

// Two leaves side by side keep more loads in flight than one, and every line is fetched 4 KiB before its use, those of
// the next two leaves included, wherever they are: store of 32 KiB fragments 1.20 x memcpy, one leaf after another with
// prefetch_linear 1.04, side by side with prefetch_linear 1.08, one after another with this prefetch 1.13 (one thread
// of a 2-core EPYC of the fifth generation, where a plain copy with non-temporal stores makes 1.11).
template <class Lanes>
void pair(std::uint64_t* lanes, const std::uint8_t* const* src, std::uint8_t* const* dst, const std::uint8_t* secret) {
    Lanes first(lanes), second(lanes + 8);
    for (std::size_t block = 0; block < kLeafBlocks; ++block) {
        const std::size_t next = block + kAheadBlocks;
        const std::uint8_t* const* const ahead = src + (next < kLeafBlocks ? next : next + kLeafBlocks);
        const std::uint8_t* const near[2] = {src[block], src[kLeafBlocks + block]};
        const std::uint8_t* const far[2] = {ahead[0], ahead[kLeafBlocks]};
        std::uint8_t* const to[2] = {dst[block], dst[kLeafBlocks + block]};
        const auto stripe = [&](std::size_t at, const std::uint8_t* with) {
            __builtin_prefetch(far[0] + at, 0, 3);
            __builtin_prefetch(far[1] + at, 0, 3);
            first.template stripe<Write::stream>(near[0] + at, to[0] + at, with);
            second.template stripe<Write::stream>(near[1] + at, to[1] + at, with);
        };
        for (std::size_t i = 0; i + 1 < kStripesPerBlock; ++i) stripe(i * kStripeBytes, secret + 8 * i);
        const bool is_last = block + 1 == kLeafBlocks;
        stripe(kBlockBytes - kStripeBytes, secret + (is_last ? kLastStripeAt : 8 * (kStripesPerBlock - 1)));
        if (!is_last) {
            first.scramble(secret + kScrambleAt);
            second.scramble(secret + kScrambleAt);
        }
    }
    first.save(lanes);
    second.save(lanes + 8);
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
