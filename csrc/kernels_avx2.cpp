// 256-bit lanes: two registers hold the eight, two stores fill a cache line. Compiled with -mavx2.
#include <immintrin.h>

#include "stripes.hpp"

namespace lmcache {
namespace {

__m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

class Avx2Lanes {
public:
    explicit Avx2Lanes(const std::uint64_t* from) : low_(load(from)), high_(load(from + 4)) {}

    void save(std::uint64_t* to) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low_);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4), high_);
    }

    template <Write W>
    void stripe(const std::uint8_t* src, std::uint8_t* dst, const std::uint8_t* secret) {
        __m256i low = load(src);
        __m256i high = load(src + 32);
        asm volatile("" : "+x"(low), "+x"(high));  // src may change under us: keeps the compiler from loading it again
        low_ = mix(low_, low, load(secret));
        high_ = mix(high_, high, load(secret + 32));
        auto* to = reinterpret_cast<__m256i*>(dst);
        if constexpr (W == Write::plain) {
            _mm256_storeu_si256(to, low);
            _mm256_storeu_si256(to + 1, high);
        }
        if constexpr (W == Write::stream) {
            _mm256_stream_si256(to, low);
            _mm256_stream_si256(to + 1, high);
        }
    }

    void scramble(const std::uint8_t* secret) {
        low_ = scrambled(low_, load(secret));
        high_ = scrambled(high_, load(secret + 32));
    }

    static void stream_line(std::uint8_t* dst, const std::uint8_t* src) {
        auto* to = reinterpret_cast<__m256i*>(dst);
        const __m256i low = load(src);
        const __m256i high = load(src + 32);
        _mm256_stream_si256(to, low);
        _mm256_stream_si256(to + 1, high);
    }

private:
    static __m256i mix(__m256i acc, __m256i data, __m256i secret) {
        const __m256i mixed = _mm256_xor_si256(data, secret);
        const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
        const __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
        return _mm256_add_epi64(acc, _mm256_add_epi64(product, swapped));
    }

    static __m256i scrambled(__m256i acc, __m256i secret) {
        const __m256i prime = _mm256_set1_epi64x(0x9E3779B1);
        const __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), secret);
        const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
        return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
    }

    __m256i low_;
    __m256i high_;
};

void fence() { _mm_sfence(); }

}  // namespace

const Kernels avx2_kernels{
    "avx2",
    accumulate<Avx2Lanes, Write::none>,
    accumulate<Avx2Lanes, Write::plain>,
    accumulate<Avx2Lanes, Write::stream>,
    gather<Avx2Lanes>,
    scatter<Avx2Lanes>,
    pair<Avx2Lanes>,
    stream_bytes<Avx2Lanes>,
    fence,
};

}  // namespace lmcache
