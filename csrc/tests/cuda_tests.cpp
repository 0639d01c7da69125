// Random plans for the emulated GPU against a naive copy and the host's hash; under ASan and UBSan.
// Usage: cuda_tests [number of worlds] [seed]
#include <cuda_runtime.h>

#include <map>

#include "cuda_copier.hpp"
#include "cuda_layout.hpp"
#include "cuda_world.hpp"
#include "leaf.hpp"
#include "xxh3.hpp"

namespace {

u64 checksum(const u8* extent, u64 bytes, u64 seed) {
    const std::vector<u64> hashes = leaf_hashes(portable_kernels, extent, bytes);
    return checksum_of(portable_kernels, hashes.data(), hashes.size(), seed);
}

// One plan under way, and what must come of it.
struct Running {
    Direction direction;
    std::vector<std::int64_t> blocks;
    std::vector<u64> offsets, seeds;
    std::vector<Bytes> extents;  // store: filled when the plan's turn on its stream comes; retrieve: from the start
    std::vector<u64> good;       // retrieve: whether the expected checksum is right
    u64 ticket = 0;
};

class Episode {
public:
    explicit Episode(World& world) : world_(world) {
        cuda::CopierLimits limits{};
        limits.staging_bytes = below(3) == 0 ? 1 : kLeafBytes * below(40);
        limits.plans_max = 1 + static_cast<unsigned>(below(4));
        limits.thread_blocks_max = 1 + static_cast<unsigned>(below(3));
        limits.direct_bytes_max = coin() ? 0 : ~u64{0};
        plans_max_ = limits.plans_max;
        copier_ = std::make_unique<cuda::DeviceCopier>(world.planes, world.groups, world.pool.get(),
                                                       World::kExtents * world.room, limits);
        REQUIRE(copier_->extent_bytes() == world.extent_bytes);
        // Ranges of whole extents; what is in none of them goes another way.
        for (u64 i = 0; i < World::kExtents; i += 3) {
            if (below(4) != 0) copier_->register_range(i * world.room, 3 * world.room);
        }
        for (cudaStream_t& stream : streams_) REQUIRE(cudaStreamCreateWithFlags(&stream, 0) == cudaSuccess);
    }

    ~Episode() {
        copier_.reset();
        while (emulation::step()) {
        }
        for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    }

    void run() {
        world_.begin_episode();
        emulation::forbid_slow_calls(true);
        for (u64 todo = 2 + below(6); todo > 0 || !running_.empty();) {
            if (todo > 0 && coin()) {
                begin(coin() ? Direction::store : Direction::retrieve);
                --todo;
            }
            for (u64 steps = below(12); steps > 0; --steps) emulation::step();
            end_some();
            if (todo == 0 && running_.empty()) break;
        }
        emulation::forbid_slow_calls(false);
    }

private:
    void begin(Direction direction) {
        const std::size_t most = std::min(copier_->chunks_max(), world_.free_extents.size());
        if (most == 0) return;
        auto plan = std::make_unique<Running>();
        const std::size_t num_chunks = 1 + below(std::min<u64>(most, 3));
        plan->direction = direction;
        for (std::size_t i = 0; i < num_chunks; ++i) {
            plan->offsets.push_back(world_.free_extents.back());
            plan->seeds.push_back(random_words());
            world_.free_extents.pop_back();
        }
        plan->blocks = world_.some_blocks(direction, num_chunks);
        plan->extents.resize(num_chunks, Bytes(world_.extent_bytes));
        direction == Direction::store ? begin_store(*plan) : begin_retrieve(*plan);
        if (plan->ticket != 0) running_.push_back(std::move(plan));
    }

    // What is enqueued before and after sees, and spoils, the blocks in the order of the stream.
    void begin_store(Running& plan) {
        const cudaStream_t stream = streams_[0];
        auto expected = std::make_shared<std::vector<Bytes>>(std::move(plan.extents));
        expected_[&plan] = expected;
        emulation::enqueue(stream, [this, expected, blocks = plan.blocks] {
            for (std::size_t i = 0; i < expected->size(); ++i) {
                world_.gather(blocks.data() + i * world_.blocks_per_chunk(), (*expected)[i].data());
            }
        });
        submit(plan, {}, stream);
        emulation::enqueue(stream, [this] { world_.scribble(); });
    }

    void begin_retrieve(Running& plan) {
        std::vector<u64> checksums;
        for (std::size_t i = 0; i < plan.offsets.size(); ++i) {
            u8* extent = world_.pool.get() + plan.offsets[i];
            fill(extent, world_.extent_bytes);
            checksums.push_back(checksum(extent, world_.extent_bytes, plan.seeds[i]));
            plan.good.push_back(below(3) != 0);
            if (plan.good.back() == 0) extent[below(world_.extent_bytes)] ^= static_cast<u8>(1 + below(255));
            plan.extents[i].assign(extent, extent + world_.extent_bytes);
        }
        submit(plan, checksums, streams_[1 + below(2)]);
    }

    void submit(Running& plan, const std::vector<u64>& checksums, cudaStream_t stream) {
        try {
            plan.ticket = copier_->submit(plan.direction, plan.blocks, plan.offsets, plan.seeds, checksums, stream);
            REQUIRE(running_.size() < plans_max_);
        } catch (const cuda::Busy&) {
            plan.ticket = 0;
        }
    }

    void end_some() {
        for (std::size_t i = 0; i < running_.size();) {
            const auto sums = copier_->finish(running_[i]->ticket);
            if (!sums) {
                ++i;
                continue;
            }
            running_[i]->direction == Direction::store ? check_store(*running_[i], *sums)
                                                       : check_retrieve(*running_[i], *sums);
            running_.erase(running_.begin() + static_cast<std::ptrdiff_t>(i));
        }
    }

    void check_store(const Running& plan, const std::vector<u64>& sums) {
        const std::vector<Bytes>& expected = *expected_[&plan];
        REQUIRE(sums.size() == plan.offsets.size());
        for (std::size_t i = 0; i < sums.size(); ++i) {
            const u8* extent = world_.pool.get() + plan.offsets[i];
            REQUIRE(std::memcmp(extent, expected[i].data(), world_.extent_bytes) == 0);
            REQUIRE(sums[i] == checksum(extent, world_.extent_bytes, plan.seeds[i]));
        }
    }

    void check_retrieve(const Running& plan, const std::vector<u64>& verdicts) {
        REQUIRE(verdicts == plan.good);
        for (std::size_t i = 0; i < verdicts.size(); ++i) {
            world_.each_run(plan.blocks.data() + i * world_.blocks_per_chunk(), [&](u8* place, u64 at, u64 bytes) {
                if (place != nullptr) REQUIRE(std::memcmp(place, plan.extents[i].data() + at, bytes) == 0);
            });
        }
    }

    World& world_;
    std::unique_ptr<cuda::DeviceCopier> copier_;
    cudaStream_t streams_[3] = {};
    std::size_t plans_max_ = 0;
    std::vector<std::unique_ptr<Running>> running_;
    std::map<const Running*, std::shared_ptr<std::vector<Bytes>>> expected_;
};

void division_is_exact() {
    for (u64 i = 0; i < 20000; ++i) {
        const u64 divisor = 1 + (coin() ? below(300) : below(cuda::kPlaneBytesMax - 1));
        const cuda::Divisor by = cuda::make_divisor(divisor);
        const u64 multiple = (cuda::kPlaneBytesMax - 1) / divisor * divisor;
        for (const u64 number : {below(cuda::kPlaneBytesMax), multiple, multiple - 1, cuda::kPlaneBytesMax - 1}) {
            if (number >= cuda::kPlaneBytesMax) continue;  // a multiple of 0, less one
            REQUIRE(by.divide(static_cast<std::uint32_t>(number)) == number / divisor);
        }
    }
}

// Bytes between the blocks, and blocks that no plan names, stay as they are.
void a_retrieve_writes_nothing_else() {
    World world;
    cuda::DeviceCopier copier(world.planes, world.groups, world.pool.get(), World::kExtents * world.room,
                              {0, 1 << 20, 1, 2, ~u64{0}});
    world.begin_episode();
    const std::vector<std::int64_t> blocks = world.some_blocks(Direction::retrieve, 1);
    const u64 ticket = copier.submit(Direction::retrieve, blocks, {0}, {7}, {7}, nullptr);
    std::vector<Bytes> expected = world.memory();
    world.each_run(blocks.data(), [&](u8* place, u64 at, u64 bytes) {
        for (std::size_t i = 0; place != nullptr && i < world.sheets.size(); ++i) {
            const u8* start = world.sheets[i].memory.get();
            if (place < start || place >= start + world.sheets[i].bytes) continue;
            std::memcpy(expected[i].data() + (place - start), world.pool.get() + at, bytes);
        }
    });
    while (emulation::step()) {
    }
    REQUIRE(copier.finish(ticket).has_value());
    REQUIRE(world.memory() == expected);
}

}  // namespace

int main(int argc, char** argv) {
    const int num_worlds = argc > 1 ? std::atoi(argv[1]) : 150;
    random_words.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 20260601);
    emulation::seed(random_words());
    division_is_exact();
    for (int i = 0; i < num_worlds; ++i) {
        World world;
        for (int j = 0; j < 3; ++j) Episode(world).run();
        if (i % 4 == 0) a_retrieve_writes_nothing_else();
    }
    std::printf("%d worlds passed on the emulated GPU\n", num_worlds);
}
