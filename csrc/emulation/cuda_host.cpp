#include "cuda_host.hpp"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

namespace {

constexpr std::size_t kStackBytes = 256 * 1024;

[[noreturn]] void wrong(const char* sentence) {
    std::fprintf(stderr, "emulated GPU, block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, sentence);
    std::abort();
}

// A stack to run on, in the words of ASan, which must be told of every change of stacks.
struct Fiber {
    ucontext_t context{};
    const void* stack = nullptr;
    std::size_t stack_bytes = 0;
    void* fake_stack = nullptr;
};

// `leaving` never runs again: its fake stack is given back.
void change(Fiber& leaving, Fiber& entering, bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &leaving.fake_stack, entering.stack, entering.stack_bytes);
#else
    (void)for_good;
#endif
    swapcontext(&leaving.context, &entering.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(leaving.fake_stack, nullptr, nullptr);
#endif
}

class Warp {
public:
    static Warp& instance() {
        static Warp warp;
        return warp;
    }

    void run(const std::function<void()>& kernel, unsigned first_thread) {
        kernel_ = &kernel;
        for (unsigned i = 0; i < kWarpLanes; ++i) begin(lanes_[i]);
        for (bool alive = true; alive;) {
            alive = false;
            for (lane_ = 0; lane_ < kWarpLanes; ++lane_) {
                threadIdx.x = first_thread + lane_;
                change(main_, lanes_[lane_].fiber);
                alive = alive || !lanes_[lane_].done;
            }
            if (alive) check_meeting();
        }
    }

    std::uint64_t meet(unsigned what, std::uint64_t word, unsigned from) {
        Lane& me = lanes_[lane_];
        me.what = what;
        me.words[round(me)] = word;
        change(me.fiber, main_);
        const std::uint64_t result = lanes_[from].words[round(me)];
        ++me.meetings;
        return result;
    }

    unsigned lane() const { return lane_; }

private:
    struct Lane {
        Fiber fiber;
        std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
        bool done = false;
        unsigned what = 0;
        unsigned meetings = 0;
        std::uint64_t words[2] = {};  // of this meeting and the one before: lanes leave a meeting one after another
    };

    static unsigned round(const Lane& lane) { return lane.meetings % 2; }

    static void body() {
        Warp& warp = instance();
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(nullptr, &warp.main_.stack, &warp.main_.stack_bytes);
#endif
        (*warp.kernel_)();
        Lane& me = warp.lanes_[warp.lane_];
        me.done = true;
        change(me.fiber, warp.main_, true);
    }

    static void begin(Lane& lane) {
        lane.fiber = Fiber{};
        lane.fiber.stack = lane.stack.get();
        lane.fiber.stack_bytes = kStackBytes;
        lane.done = false;
        lane.what = lane.meetings = 0;
        getcontext(&lane.fiber.context);
        lane.fiber.context.uc_stack.ss_sp = lane.stack.get();
        lane.fiber.context.uc_stack.ss_size = kStackBytes;
        makecontext(&lane.fiber.context, body, 0);
    }

    void check_meeting() const {
        for (const Lane& lane : lanes_) {
            if (lane.done) wrong("a lane has ended while its warp waits for it");
            if (lane.what != lanes_[0].what) wrong("lanes of a warp have met different collectives");
        }
    }

    Fiber main_;
    Lane lanes_[kWarpLanes];
    unsigned lane_ = 0;
    const std::function<void()>* kernel_ = nullptr;
};

}  // namespace

void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    if (block.x % kWarpLanes != 0 || block.y != 1 || block.z != 1 || grid.y != 1 || grid.z != 1) {
        wrong("only grids of one dimension and whole warps are emulated");
    }
    gridDim = grid;
    blockDim = block;
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        for (unsigned first = 0; first < block.x; first += kWarpLanes) Warp::instance().run(kernel, first);
    }
    blockIdx.x = threadIdx.x = 0;
}

void meet(unsigned mask, unsigned what) { exchange(mask, what, 0, 0); }

std::uint64_t exchange(unsigned mask, unsigned what, std::uint64_t word, unsigned from) {
    if (mask != 0xffffffffU) wrong("a collective of part of a warp");
    return Warp::instance().meet(what, word, from);
}

unsigned lane() { return Warp::instance().lane(); }

}  // namespace emulation
