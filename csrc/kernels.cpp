#include "kernels.hpp"

#include <vector>

namespace lmcache {

namespace {

std::vector<const Kernels*> detect() {
    std::vector<const Kernels*> found;
#ifdef LMCACHE_X86
    // __builtin_cpu_supports asks cpuid and XGETBV: registers that the kernel does not save count as absent.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found.push_back(&avx512_kernels);
    if (__builtin_cpu_supports("avx2")) found.push_back(&avx2_kernels);
#endif
    found.push_back(&portable_kernels);
    return found;
}

}  // namespace

std::span<const Kernels* const> available_kernels() {
    static const std::vector<const Kernels*> found = detect();
    return found;
}

}  // namespace lmcache
