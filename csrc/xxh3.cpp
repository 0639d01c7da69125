#include "xxh3.hpp"

#include <bit>
#include <cstring>

namespace lmcache {

static_assert(std::endian::native == std::endian::little, "the checksum's words are little-endian");

namespace {

using u8 = std::uint8_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr u64 kPrime32_1 = 0x9E3779B1U;
constexpr u64 kPrime32_2 = 0x85EBCA77U;
constexpr u64 kPrime32_3 = 0xC2B2AE3DU;
constexpr u64 kPrime64_1 = 0x9E3779B185EBCA87U;
constexpr u64 kPrime64_2 = 0xC2B2AE3D27D4EB4FU;
constexpr u64 kPrime64_3 = 0x165667B19E3779F9U;
constexpr u64 kPrime64_4 = 0x85EBCA77C2B2AE63U;
constexpr u64 kPrime64_5 = 0x27D4EB2F165667C5U;
constexpr u64 kPrimeMx1 = 0x165667919E3779F9U;
constexpr u64 kPrimeMx2 = 0x9FB21C651E98DF25U;

constexpr std::size_t kSecretBytes = 192;
constexpr std::size_t kMergeAt = 11;  // in the secret

alignas(64) constexpr u8 kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

u32 read32(const u8* at) {
    u32 value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

u64 read64(const u8* at) {
    u64 value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

u64 fold(u64 a, u64 b) {
    __extension__ using u128 = unsigned __int128;
    const u128 product = static_cast<u128>(a) * b;
    return static_cast<u64>(product) ^ static_cast<u64>(product >> 64);
}

u64 avalanche(u64 hash) {
    hash = (hash ^ (hash >> 37)) * kPrimeMx1;
    return hash ^ (hash >> 32);
}

u64 avalanche_xxh64(u64 hash) {
    hash = (hash ^ (hash >> 33)) * kPrime64_2;
    hash = (hash ^ (hash >> 29)) * kPrime64_3;
    return hash ^ (hash >> 32);
}

u64 hash_1_to_3(const u8* data, std::size_t bytes, u64 seed) {
    const u64 first = data[0];
    const u64 middle = data[bytes / 2];
    const u64 last = data[bytes - 1];
    const u64 combined = first << 16 | middle << 24 | last | static_cast<u64>(bytes) << 8;
    return avalanche_xxh64(combined ^ ((read32(kSecret) ^ read32(kSecret + 4)) + seed));
}

u64 hash_4_to_8(const u8* data, std::size_t bytes, u64 seed) {
    seed ^= static_cast<u64>(__builtin_bswap32(static_cast<u32>(seed))) << 32;
    const u64 combined = read32(data + bytes - 4) + (static_cast<u64>(read32(data)) << 32);
    u64 hash = combined ^ ((read64(kSecret + 8) ^ read64(kSecret + 16)) - seed);
    hash = (hash ^ std::rotl(hash, 49) ^ std::rotl(hash, 24)) * kPrimeMx2;
    hash = (hash ^ ((hash >> 35) + bytes)) * kPrimeMx2;
    return hash ^ (hash >> 28);
}

u64 hash_9_to_16(const u8* data, std::size_t bytes, u64 seed) {
    const u64 low = read64(data) ^ ((read64(kSecret + 24) ^ read64(kSecret + 32)) + seed);
    const u64 high = read64(data + bytes - 8) ^ ((read64(kSecret + 40) ^ read64(kSecret + 48)) - seed);
    return avalanche(bytes + __builtin_bswap64(low) + high + fold(low, high));
}

u64 mix16(const u8* data, const u8* secret, u64 seed) {
    return fold(read64(data) ^ (read64(secret) + seed), read64(data + 8) ^ (read64(secret + 8) - seed));
}

u64 hash_17_to_128(const u8* data, std::size_t bytes, u64 seed) {
    u64 hash = bytes * kPrime64_1;
    for (std::size_t i = (bytes - 1) / 32 + 1; i-- > 0;) {
        hash += mix16(data + 16 * i, kSecret + 32 * i, seed);
        hash += mix16(data + bytes - 16 * (i + 1), kSecret + 32 * i + 16, seed);
    }
    return avalanche(hash);
}

u64 hash_129_to_240(const u8* data, std::size_t bytes, u64 seed) {
    u64 hash = bytes * kPrime64_1;
    for (std::size_t i = 0; i < 8; ++i) hash += mix16(data + 16 * i, kSecret + 16 * i, seed);
    hash = avalanche(hash);
    for (std::size_t i = 8; i < bytes / 16; ++i) hash += mix16(data + 16 * i, kSecret + 16 * (i - 8) + 3, seed);
    return avalanche(hash + mix16(data + bytes - 16, kSecret + 136 - 17, seed));
}

u64 hash_short(const u8* data, std::size_t bytes, u64 seed) {
    if (bytes > 128) return hash_129_to_240(data, bytes, seed);
    if (bytes > 16) return hash_17_to_128(data, bytes, seed);
    if (bytes > 8) return hash_9_to_16(data, bytes, seed);
    if (bytes > 3) return hash_4_to_8(data, bytes, seed);
    if (bytes > 0) return hash_1_to_3(data, bytes, seed);
    return avalanche_xxh64(seed ^ read64(kSecret + 56) ^ read64(kSecret + 64));
}

constexpr u64 kLanes[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                           kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};

u64 merged(const u64* lanes, std::size_t bytes, const u8* secret) {
    u64 hash = bytes * kPrime64_1;
    for (std::size_t i = 0; i < 4; ++i) {
        const u8* with = secret + kMergeAt + 16 * i;
        hash += fold(lanes[2 * i] ^ read64(with), lanes[2 * i + 1] ^ read64(with + 8));
    }
    return avalanche(hash);
}

// `fold_in` folds all bytes into the lanes.
template <class FoldIn>
u64 hash_long(std::size_t bytes, const u8* secret, FoldIn fold_in) {
    alignas(64) u64 lanes[8];
    std::memcpy(lanes, kLanes, sizeof lanes);
    fold_in(lanes);
    return merged(lanes, bytes, secret);
}

}  // namespace

std::uint64_t xxh3_64(const Kernels& kernels, const std::uint8_t* data, std::size_t bytes, std::uint64_t seed) {
    if (bytes <= kShortBytesMax) return hash_short(data, bytes, seed);
    if (seed == 0) return xxh3_64_through(kernels.hash, data, nullptr, bytes);
    alignas(64) u8 secret[kSecretBytes];
    for (std::size_t i = 0; i < kSecretBytes; i += 16) {
        const u64 words[2] = {read64(kSecret + i) + seed, read64(kSecret + i + 8) - seed};
        std::memcpy(secret + i, words, sizeof words);
    }
    return hash_long(bytes, secret, [&](u64* lanes) { kernels.hash(lanes, data, nullptr, bytes, secret); });
}

std::uint64_t xxh3_64_through(Accumulate kernel, const std::uint8_t* src, std::uint8_t* dst, std::size_t bytes) {
    return hash_long(bytes, kSecret, [&](u64* lanes) { kernel(lanes, src, dst, bytes, kSecret); });
}

std::uint64_t xxh3_64_gather(Gather kernel, const Piece* pieces, std::size_t count, std::uint8_t* dst,
                             std::size_t bytes) {
    return hash_long(bytes, kSecret, [&](u64* lanes) { kernel(lanes, pieces, count, dst, kSecret); });
}

std::uint64_t xxh3_64_scatter(Scatter kernel, const std::uint8_t* src, const Piece* pieces, std::size_t count,
                              std::size_t bytes) {
    return hash_long(bytes, kSecret, [&](u64* lanes) { kernel(lanes, src, pieces, count, kSecret); });
}

void xxh3_64_pair(Pair kernel, const std::uint8_t* const* src, std::uint8_t* const* dst, std::uint64_t* hashes) {
    alignas(64) u64 lanes[16];
    std::memcpy(lanes, kLanes, sizeof kLanes);
    std::memcpy(lanes + 8, kLanes, sizeof kLanes);
    kernel(lanes, src, dst, kSecret);
    for (std::size_t i = 0; i < 2; ++i) hashes[i] = merged(lanes + 8 * i, kLeafBlocks * kBlockBytes, kSecret);
}

}  // namespace lmcache
