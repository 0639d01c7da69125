#include "guard.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>

namespace lmcache {

namespace {

// What is replaced at a time: extents do not straddle this, and the kernel's list of a process's mappings stays short.
constexpr std::uintptr_t kPieceBytes = std::uintptr_t{64} << 20;
constexpr int kSlots = 64;

struct Range {
    std::atomic<std::uintptr_t> begin{0};
    std::atomic<std::uintptr_t> end{0};  // 0: a free slot
    std::atomic<bool> lost{false};
};

// The handler reads these: no lock, no allocation, never freed.
Range ranges[kSlots];
std::mutex changing;
struct sigaction former;
bool installed = false;

Range* around(std::uintptr_t at) {
    for (Range& range : ranges) {
        if (at < range.end.load(std::memory_order_acquire) && at >= range.begin.load(std::memory_order_relaxed)) {
            return &range;
        }
    }
    return nullptr;
}

bool replace(Range& range, std::uintptr_t at) {
    const auto page_bytes = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const std::uintptr_t begin = at / page_bytes * page_bytes;
    const std::uintptr_t base = range.begin.load(std::memory_order_relaxed);
    const std::uintptr_t piece_end = base + (begin - base) / kPieceBytes * kPieceBytes + kPieceBytes;
    const std::uintptr_t end = std::min(range.end.load(std::memory_order_relaxed), piece_end);
    range.lost.store(true);
    void* fresh = mmap(reinterpret_cast<void*>(begin), end - begin, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    return fresh != MAP_FAILED;
}

void on_bus_error(int number, siginfo_t* info, void* context) {
    const int before = errno;
    const bool by_kernel = info->si_code > 0;
    Range* range = by_kernel ? around(reinterpret_cast<std::uintptr_t>(info->si_addr)) : nullptr;
    const bool healed = range != nullptr && replace(*range, reinterpret_cast<std::uintptr_t>(info->si_addr));
    errno = before;
    if (healed) return;
    // Python's faulthandler, once it has spoken, raises the signal again for us: the fault itself will come back.
    if (info->si_code == SI_TKILL && info->si_pid == getpid()) return;
    if ((former.sa_flags & SA_SIGINFO) != 0 && former.sa_sigaction != nullptr) {
        former.sa_sigaction(number, info, context);
    } else if (former.sa_handler != SIG_DFL && former.sa_handler != SIG_IGN) {
        former.sa_handler(number);
    } else {
        signal(number, SIG_DFL);  // returning repeats the fault, which then ends the process as it would have
        if (!by_kernel) raise(number);
    }
}

}  // namespace

int guard(const void* begin, std::size_t bytes) {
    const std::lock_guard<std::mutex> alone(changing);
    if (!installed) {
        struct sigaction action = {};
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        if (sigaction(SIGBUS, &action, &former) != 0) return -1;
        installed = true;
    }
    for (int slot = 0; slot < kSlots; ++slot) {
        Range& range = ranges[slot];
        if (range.end.load() != 0) continue;
        const auto start = reinterpret_cast<std::uintptr_t>(begin);
        range.lost.store(false);
        range.begin.store(start);
        range.end.store(start + bytes, std::memory_order_release);
        return slot;
    }
    return -1;
}

void unguard(int slot) {
    const std::lock_guard<std::mutex> alone(changing);
    if (slot >= 0 && slot < kSlots) ranges[slot].end.store(0);
}

bool lost(const void* at) {
    const Range* range = around(reinterpret_cast<std::uintptr_t>(at));
    return range != nullptr && range->lost.load();
}

}  // namespace lmcache
