#include "threads.hpp"

#include <sched.h>
#include <unistd.h>

#include <memory>
#include <system_error>
#include <thread>
#include <vector>

namespace lmcache {

namespace {

struct FreeCpuSet {
    void operator()(cpu_set_t* set) const { CPU_FREE(set); }
};

// The kernel intersects the request with the cpuset of the process; where it refuses, the thread stays where it is.
void leave_inherited_affinity(int num_cpus) {
    const std::unique_ptr<cpu_set_t, FreeCpuSet> cpus(CPU_ALLOC(num_cpus));
    if (cpus == nullptr) return;
    const std::size_t set_bytes = CPU_ALLOC_SIZE(num_cpus);
    CPU_ZERO_S(set_bytes, cpus.get());
    for (int cpu = 0; cpu < num_cpus; ++cpu) CPU_SET_S(static_cast<std::size_t>(cpu), set_bytes, cpus.get());
    sched_setaffinity(0, set_bytes, cpus.get());
}

}  // namespace

void fan_out(unsigned count, const std::function<void()>& work) {
    const int num_cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_CONF));
    std::vector<std::jthread> threads;
    threads.reserve(count);
    try {
        for (unsigned i = 0; i < count; ++i) {
            threads.emplace_back([&work, num_cpus] {
                if (num_cpus > 0) leave_inherited_affinity(num_cpus);
                work();
            });
        }
    } catch (const std::system_error&) {
        // The machine gives no further thread (a limit on processes): fewer do the same work, at worst only the caller.
        if (threads.empty()) work();
    }
}

}  // namespace lmcache
