#include "leaf.hpp"

#include <algorithm>
#include <cstring>

#include "xxh3.hpp"

namespace lmcache {

namespace {

using u8 = std::uint8_t;
using u64 = std::uint64_t;

constexpr std::size_t kLineBytes = 64;

// The writing kernels take whole stripes, and only in the length class that has stripes at all.
bool fusable(std::size_t bytes) { return bytes > kShortBytesMax && bytes % kLineBytes == 0; }

bool aligned(const u8* at) { return reinterpret_cast<std::uintptr_t>(at) % kLineBytes == 0; }

// Hash of bytes at src, which are at dst afterwards; src is loaded once, and may change meanwhile.
u64 load(const Kernels& kernels, const u8* src, u8* dst, std::size_t bytes) {
    if (fusable(bytes)) return xxh3_64_through(kernels.copy, src, dst, bytes);
    std::memcpy(dst, src, bytes);
    asm volatile("" ::: "memory");  // the hash reads what was written to dst, never src again
    return xxh3_64(kernels, dst, bytes, 0);
}

template <class Copy>
void each_piece(Fragments& fragments, std::size_t bytes, Copy copy) {
    for (std::size_t at = 0; at < bytes;) {
        const std::size_t piece = std::min<u64>(fragments.left(), bytes - at);
        copy(at, fragments.here(), piece);
        fragments.advance(piece);
        at += piece;
    }
}

}  // namespace

Fragments::Fragments(const Plan& plan, std::size_t chunk, std::uint64_t at)
    : plan_(&plan), row_(plan.row(chunk)), block_(static_cast<std::size_t>(at / plan.block_bytes)) {
    const u64 in_block = at % plan.block_bytes;
    const auto end = std::upper_bound(plan.ends.begin(), plan.ends.end(), in_block);
    segment_ = static_cast<std::size_t>(end - plan.ends.begin());
    done_ = in_block - (*end - plan.segments[segment_].bytes);
}

std::uint8_t* Fragments::here() const {
    const std::int64_t id = row_[block_];
    if (id == kNoBlock) return nullptr;
    const Segment& segment = plan_->segments[segment_];
    return reinterpret_cast<u8*>(segment.address + static_cast<u64>(id) * segment.stride + done_);
}

void Fragments::advance(std::uint64_t bytes) {
    done_ += bytes;
    if (done_ < plan_->segments[segment_].bytes) return;
    done_ = 0;
    if (++segment_ < plan_->segments.size()) return;
    segment_ = 0;
    ++block_;
}

std::uint64_t store_leaf(const Kernels& kernels, Fragments& from, std::uint8_t* pool, std::size_t bytes) {
    alignas(kLineBytes) u8 buffer[kLeafBytes];
    const bool streams = fusable(bytes) && aligned(pool);
    if (from.left() >= bytes) {
        const u8* src = from.here();
        from.advance(bytes);
        if (streams) return xxh3_64_through(kernels.stream, src, pool, bytes);
        const u64 hash = load(kernels, src, buffer, bytes);
        kernels.stream_bytes(pool, buffer, bytes);
        return hash;
    }
    each_piece(from, bytes, [&](std::size_t at, const u8* src, std::size_t piece) {
        std::memcpy(buffer + at, src, piece);
    });
    if (streams) return xxh3_64_through(kernels.stream, buffer, pool, bytes);
    kernels.stream_bytes(pool, buffer, bytes);
    return xxh3_64(kernels, buffer, bytes, 0);
}

std::uint64_t retrieve_leaf(const Kernels& kernels, const std::uint8_t* pool, Fragments& to, std::size_t bytes) {
    if (to.left() >= bytes && to.here() == nullptr) {
        to.advance(bytes);
        return xxh3_64(kernels, pool, bytes, 0);
    }
    if (to.left() >= bytes && fusable(bytes)) {
        u8* dst = to.here();
        to.advance(bytes);
        // Non-temporal stores win here too: benchmarks/verified_copy.py, retrieve of 64 KiB fragments, 1.6 x memcpy
        // with them and 0.9 x with ordinary ones, which first read the lines they overwrite. So do they for pieces of a
        // leaf, from 512 bytes (0.65 against 0.45) to 8 KiB (1.2 against 0.76).
        return xxh3_64_through(aligned(dst) ? kernels.stream : kernels.copy, pool, dst, bytes);
    }
    alignas(kLineBytes) u8 buffer[kLeafBytes];
    const u64 hash = load(kernels, pool, buffer, bytes);
    each_piece(to, bytes, [&](std::size_t at, u8* dst, std::size_t piece) {
        if (dst != nullptr) kernels.stream_bytes(dst, buffer + at, piece);
    });
    return hash;
}

std::uint64_t checksum_of(const Kernels& kernels, const std::uint64_t* hashes, std::size_t count, std::uint64_t seed) {
    return xxh3_64(kernels, reinterpret_cast<const u8*>(hashes), count * sizeof *hashes, seed);
}

std::vector<std::uint64_t> leaf_hashes(const Kernels& kernels, const std::uint8_t* data, std::size_t bytes) {
    std::vector<u64> hashes;
    hashes.reserve(bytes / kLeafBytes + 1);
    for (std::size_t at = 0; at < bytes; at += kLeafBytes) {
        hashes.push_back(xxh3_64(kernels, data + at, std::min(kLeafBytes, bytes - at), 0));
    }
    return hashes;
}

}  // namespace lmcache
