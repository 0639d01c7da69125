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

// The pieces of a leaf, joined where they lie side by side.
class Pieces {
public:
    // Moves `fragments` on by `bytes`; what follows is kept, too, for a Gather. False, and nothing moved, where a piece
    // is no whole number of stripes.
    bool collect(Fragments& fragments, std::size_t bytes, std::size_t ahead_bytes) {
        Fragments next = fragments;
        if (!add(next, bytes)) return false;
        count_ = end_;
        Fragments ahead = next;  // behind the last byte of a chunk it goes on anywhere: it is only fetched
        if (!add(ahead, ahead_bytes)) return false;
        fragments = next;
        return true;
    }
    const Piece* begin() const { return pieces_; }
    std::size_t count() const { return count_; }

private:
    bool add(Fragments& fragments, std::size_t bytes) {
        const std::size_t first = end_;
        for (std::size_t piece = 0; bytes != 0; bytes -= piece) {
            piece = std::min<u64>(fragments.left(), bytes);
            u8* const here = fragments.here();
            if (piece % kLineBytes != 0) return false;
            fragments.advance(piece);
            if (end_ > first && follows(pieces_[end_ - 1], here)) {
                pieces_[end_ - 1].bytes += piece;
            } else {
                pieces_[end_++] = {here, piece};
            }
        }
        return true;
    }
    static bool follows(const Piece& piece, const u8* here) {
        return here == nullptr ? piece.at == nullptr : piece.at != nullptr && here == piece.at + piece.bytes;
    }

    Piece pieces_[(kLeafBytes + kAheadBytes) / kLineBytes];
    std::size_t end_ = 0;
    std::size_t count_ = 0;
};

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

Fragments::Fragments(const Plan& plan, std::size_t chunk, std::uint64_t at) : plan_(&plan), row_(plan.row(chunk)) {
    const auto after = std::upper_bound(plan.starts.begin(), plan.starts.end(), at);
    const auto plane = static_cast<std::size_t>(after - plan.starts.begin()) - 1;
    u64 rest = at - plan.starts[plane];
    enter_plane(plane);
    block_ = static_cast<std::size_t>(rest / block_bytes(*plane_));
    rest %= block_bytes(*plane_);
    done_ = rest % plane_->run;
    rest /= plane_->run;
    for (std::size_t dim = kDims; dim-- > 0; rest /= plane_->dims[dim].count) {
        index_[dim] = rest % plane_->dims[dim].count;
    }
    locate();
}

void Fragments::enter_plane(std::size_t plane) {
    const std::size_t end = plane + 1 < plan_->planes.size() ? plan_->starts[plane + 1] : plan_->extent_bytes;
    plane_ = &plan_->planes[plane];
    const std::size_t num_blocks = (end - plan_->starts[plane]) / block_bytes(*plane_);
    ids_ = row_.subspan(plan_->first_block[plane], num_blocks);
}

void Fragments::locate() {
    const std::int64_t id = ids_[block_];
    is_block_ = id != kNoBlock;
    run_ = run_address(*plane_, static_cast<u64>(id), index_[0], index_[1], index_[2]);
}

void Fragments::carry() {
    index_[2] = 0;
    if (++index_[1] == plane_->dims[1].count) {
        index_[1] = 0;
        if (++index_[0] == plane_->dims[0].count) {
            index_[0] = 0;
            if (++block_ == ids_.size()) {
                block_ = 0;
                const auto plane = static_cast<std::size_t>(plane_ - plan_->planes.data()) + 1;
                if (plane == plan_->planes.size()) return;  // the end of the chunk
                enter_plane(plane);
            }
        }
    }
    locate();
}

std::uint64_t store_leaf(const Kernels& kernels, Fragments& from, std::uint8_t* pool, std::size_t bytes) {
    alignas(kLineBytes) u8 buffer[kLeafBytes];
    const bool streams = fusable(bytes) && aligned(pool);
    if (streams && from.left() < bytes + kAheadBytes) {
        // One pass over the pieces with a scout ahead: store of 1 KiB fragments 1.2 x memcpy, of 4 KiB 1.3; a pass that
        // gathers into a buffer before one that hashes: 0.68 and 0.69 (benchmarks/verified_copy.py, EPYC with AVX-512).
        Pieces pieces;
        if (pieces.collect(from, bytes, kAheadBytes)) {
            return xxh3_64_gather(kernels.gather, pieces.begin(), pieces.count(), pool, bytes);
        }
    }
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
    if (fusable(bytes)) {
        Pieces pieces;
        if (pieces.collect(to, bytes, 0)) {
            return xxh3_64_scatter(kernels.scatter, pool, pieces.begin(), pieces.count(), bytes);
        }
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
