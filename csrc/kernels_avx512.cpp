// 512-bit lanes: one register holds all eight, one store fills a cache line. Compiled with -mavx512f.
#include <immintrin.h>

#include "stripes.hpp"

namespace lmcache {
namespace {

class Avx512Lanes {
public:
    explicit Avx512Lanes(const std::uint64_t* from) : acc_(_mm512_loadu_si512(from)) {}

    void save(std::uint64_t* to) const { _mm512_storeu_si512(to, acc_); }

    template <Write W>
    void stripe(const std::uint8_t* src, std::uint8_t* dst, const std::uint8_t* secret) {
        __m512i data = _mm512_loadu_si512(src);
        asm volatile("" : "+v"(data));  // src may change under us: keeps the compiler from loading it a second time
        const __m512i mixed = _mm512_xor_si512(data, _mm512_loadu_si512(secret));
        const __m512i product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
        const __m512i swapped = _mm512_shuffle_epi32(data, _MM_PERM_BADC);
        acc_ = _mm512_add_epi64(acc_, _mm512_add_epi64(product, swapped));
        if constexpr (W == Write::plain) _mm512_storeu_si512(dst, data);
        if constexpr (W == Write::stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), data);
    }

    void scramble(const std::uint8_t* secret) {
        const __m512i prime = _mm512_set1_epi64(0x9E3779B1);
        const __m512i shifted = _mm512_xor_si512(acc_, _mm512_srli_epi64(acc_, 47));
        const __m512i mixed = _mm512_xor_si512(shifted, _mm512_loadu_si512(secret));
        const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
        acc_ = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
    }

    static void stream_line(std::uint8_t* dst, const std::uint8_t* src) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), _mm512_loadu_si512(src));
    }

private:
    __m512i acc_;
};

void fence() { _mm_sfence(); }

}  // namespace

const Kernels avx512_kernels{
    "avx512",
    accumulate<Avx512Lanes, Write::none>,
    accumulate<Avx512Lanes, Write::plain>,
    accumulate<Avx512Lanes, Write::stream>,
    gather<Avx512Lanes>,
    scatter<Avx512Lanes>,
    pair<Avx512Lanes>,
    stream_bytes<Avx512Lanes>,
    fence,
};

}  // namespace lmcache
