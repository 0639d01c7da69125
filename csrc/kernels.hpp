// Inner loops, one set per instruction set, chosen once per process by what the CPU and the kernel support.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace lmcache {

// The long-input loop of XXH3 (inputs above 240 bytes): folds all of `src` into eight lanes. The variants that also
// write need a whole number of 64-byte stripes; each is loaded once, and that load feeds both the lanes and the store.
using Accumulate = void (*)(std::uint64_t* lanes, const std::uint8_t* src, std::uint8_t* dst, std::size_t bytes,
                            const std::uint8_t* secret);

inline constexpr std::size_t kAheadBytes = 4096;

// A run of bytes among others; null: these bytes are written nowhere.
struct Piece {
    std::uint8_t* at;
    std::size_t bytes;
};

// What Accumulate does for bytes that lie in pieces on one side, each a whole number of stripes. A Gather finds behind
// its `count` pieces those that will be read next, kAheadBytes of them, and fetches these ahead.
using Gather = void (*)(std::uint64_t* lanes, const Piece* pieces, std::size_t count, std::uint8_t* dst,
                        const std::uint8_t* secret);
using Scatter = void (*)(std::uint64_t* lanes, const std::uint8_t* src, const Piece* pieces, std::size_t count,
                         const std::uint8_t* secret);

inline constexpr std::size_t kBlockBytes = 1024;  // of XXH3's long loop: (secret - stripe) / 8 = 16 stripes
inline constexpr std::size_t kLeafBlocks = 16;
inline constexpr std::size_t kAheadBlocks = kAheadBytes / kBlockBytes;

// Accumulate of two leaves of kLeafBlocks blocks at once, into lanes[0..7] and lanes[8..15]; block i of the first is
// read from src[i] and written to dst[i], of the second at kLeafBlocks + i. src goes on with the next two leaves, whose
// first kAheadBlocks blocks are fetched ahead.
using Pair = void (*)(std::uint64_t* lanes, const std::uint8_t* const* src, std::uint8_t* const* dst,
                      const std::uint8_t* secret);

struct Kernels {
    const char* name;
    Accumulate hash;    // writes nothing, dst is ignored
    Accumulate copy;    // ordinary stores, dst at any address
    Accumulate stream;  // non-temporal stores, dst on a 64-byte boundary
    Gather gather;      // non-temporal stores, dst on a 64-byte boundary
    Scatter scatter;    // non-temporal stores where a piece is on a 64-byte boundary
    Pair pair;          // non-temporal stores, dst on 64-byte boundaries; null where it does not pay
    void (*stream_bytes)(std::uint8_t* dst, const std::uint8_t* src, std::size_t bytes);  // any address, any length
    void (*fence)();    // orders the non-temporal stores of this thread before what it does next
};

extern const Kernels portable_kernels;
#ifdef LMCACHE_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// Every set that runs on this machine, best first; never empty.
std::span<const Kernels* const> available_kernels();

inline const Kernels& best_kernels() { return *available_kernels().front(); }

}  // namespace lmcache
