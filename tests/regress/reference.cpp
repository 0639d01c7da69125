// The yardstick of instruction counts: XXH3's stripe loop and a copy, 8 bytes at a time, as plainly as it can be written.
// Compiled without vector instructions, by the compiler that compiles the copy engine.
#include <cstdint>
#include <cstring>

std::uint64_t copy_and_hash_plainly(std::uint8_t* dst, const std::uint8_t* src, std::size_t bytes) {
    std::uint64_t lanes[8] = {};
    for (std::size_t at = 0; at < bytes; at += 64) {
        for (std::size_t lane = 0; lane < 8; ++lane) {
            std::uint64_t word;
            std::memcpy(&word, src + at + 8 * lane, 8);
            std::memcpy(dst + at + 8 * lane, &word, 8);
            const std::uint64_t mixed = word ^ (0x9E3779B185EBCA87U + at);
            lanes[lane ^ 1] += word;
            lanes[lane] += (mixed & 0xFFFFFFFFU) * (mixed >> 32);
        }
    }
    std::uint64_t sum = 0;
    for (const std::uint64_t lane : lanes) sum = sum * 31 + lane;
    return sum;
}
