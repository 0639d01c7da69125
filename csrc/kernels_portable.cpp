// Plain C++: for CPUs without AVX2 and for other architectures. Its stores are ordinary ones.
#include "stripes.hpp"

namespace lmcache {
namespace {

constexpr std::uint64_t kPrime32 = 0x9E3779B1U;

std::uint64_t read64(const std::uint8_t* at) {
    std::uint64_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

class PortableLanes {
public:
    explicit PortableLanes(const std::uint64_t* from) { std::memcpy(acc_, from, sizeof acc_); }

    void save(std::uint64_t* to) const { std::memcpy(to, acc_, sizeof acc_); }

    template <Write W>
    void stripe(const std::uint8_t* src, std::uint8_t* dst, const std::uint8_t* secret) {
        std::uint64_t data[8];
        std::memcpy(data, src, sizeof data);
        asm volatile("" : "+m"(data));  // src may change under us: from here on only this one load counts
        for (std::size_t i = 0; i < 8; ++i) {
            const std::uint64_t mixed = data[i] ^ read64(secret + 8 * i);
            acc_[i ^ 1] += data[i];
            acc_[i] += (mixed & 0xFFFFFFFFU) * (mixed >> 32);
        }
        if constexpr (W != Write::none) std::memcpy(dst, data, sizeof data);
    }

    void scramble(const std::uint8_t* secret) {
        for (std::size_t i = 0; i < 8; ++i) {
            acc_[i] = (acc_[i] ^ (acc_[i] >> 47) ^ read64(secret + 8 * i)) * kPrime32;
        }
    }

private:
    std::uint64_t acc_[8];
};

void copy_bytes(std::uint8_t* dst, const std::uint8_t* src, std::size_t bytes) { std::memcpy(dst, src, bytes); }

void no_fence() {}

}  // namespace

const Kernels portable_kernels{
    "portable",
    accumulate<PortableLanes, Write::none>,
    accumulate<PortableLanes, Write::plain>,
    accumulate<PortableLanes, Write::plain>,
    gather<PortableLanes>,
    scatter<PortableLanes>,
    nullptr,  // two leaves at once need more registers than a processor without AVX2 has
    copy_bytes,
    no_fence,
};

}  // namespace lmcache
