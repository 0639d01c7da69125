// Random plans against a naive copy, on every instruction set of this machine; under ASan and UBSan (LMCACHE_SANITIZE).
// Usage: native_tests [number of plans] [seed]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#include "copy.hpp"
#include "leaf.hpp"
#include "xxh3.hpp"

using namespace lmcache;

namespace {

using u8 = std::uint8_t;
using u64 = std::uint64_t;
using Bytes = std::vector<u8>;

std::mt19937_64 random_words;

#define REQUIRE(condition)                                                               \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                \
        }                                                                                \
    } while (false)

u64 below(u64 limit) { return random_words() % limit; }

Bytes noise(std::size_t count) {
    Bytes bytes(count);
    for (u8& byte : bytes) byte = static_cast<u8>(random_words());
    return bytes;
}

// Lengths where the code takes another turn: XXH3's classes, stripes, leaves.
std::size_t some_length() {
    static const std::size_t edges[] = {1, 3, 8, 16, 64, 128, 240, 241, 256, 1024, 4096, 16320, 16384, 16385, 32768};
    switch (below(3)) {
        case 0: return edges[below(std::size(edges))];
        case 1: return 1 + below(300);
        default: return 1 + below(40000);
    }
}

// An engine's memory and a pool; no allocation is longer than the plan may touch, so that ASan sees one byte too many.
struct World {
    explicit World(Direction direction) {
        plan.direction = direction;
        // A retrieve names each block at most once; a store may read one twice.
        const std::size_t num_chunks = 1 + below(3);
        const std::size_t num_groups = 1 + below(2);
        for (std::size_t i = 0; i < num_groups; ++i) add_group(num_chunks);
        std::vector<std::vector<std::int64_t>> ids(num_groups);
        for (std::size_t i = 0; i < num_groups; ++i) ids[i] = some_ids(plan.groups[i], num_chunks);
        for (std::size_t chunk = 0; chunk < num_chunks; ++chunk) {
            for (std::size_t i = 0; i < num_groups; ++i) {
                const auto per_chunk = static_cast<std::ptrdiff_t>(plan.groups[i].blocks_per_chunk);
                const auto first = ids[i].begin() + static_cast<std::ptrdiff_t>(chunk) * per_chunk;
                plan.blocks.insert(plan.blocks.end(), first, first + per_chunk);
            }
        }
        const std::size_t gap = below(2) != 0 ? 64 - extent_bytes % 64 : below(100);
        const std::size_t start = below(2) != 0 ? 0 : below(100);
        for (std::size_t i = 0; i < num_chunks; ++i) {
            plan.offsets.push_back(start + i * (extent_bytes + gap));
            plan.seeds.push_back(random_words());
        }
        std::shuffle(plan.offsets.begin(), plan.offsets.end(), random_words);
        pool = noise(start + num_chunks * (extent_bytes + gap) - gap);
        plan.pool = pool.data();
        plan.pool_bytes = pool.size();
        plan.checksums.resize(direction == Direction::retrieve ? num_chunks : 0);
        plan.threads = 1 + static_cast<unsigned>(below(3));
        check(plan);
        REQUIRE(plan.extent_bytes == extent_bytes);
    }

    void add_group(std::size_t num_chunks) {
        Group group{1 + below(3), 0, 1 + below(3)};
        group.num_blocks = num_chunks * group.blocks_per_chunk + below(3);
        for (std::size_t i = 0; i < group.num_planes; ++i) {
            plan.planes.push_back(some_plane(group.num_blocks));
            extent_bytes += block_bytes(plan.planes.back()) * group.blocks_per_chunk;
        }
        plan.groups.push_back(group);
    }

    // Blocks and dims lie around the run in any order, with gaps, forwards or backwards.
    Plane some_plane(u64 num_blocks) {
        Plane plane{};
        plane.run = in_blocks ? kBlockBytes * (1 + below(20)) : in_lines ? 64 * (1 + below(80)) : some_length();
        Dim blocks{num_blocks, 0};
        std::vector<Dim*> order{&blocks};
        for (Dim& dim : plane.dims) {
            dim.count = plane.run > 2000 || below(2) != 0 ? 1 : 1 + below(4);
            order.push_back(&dim);
        }
        std::shuffle(order.begin(), order.end(), random_words);
        u64 reach = plane.run;
        u64 first = below(2) != 0 ? 0 : below(64);
        for (Dim* dim : order) {
            dim->stride = reach + (below(2) != 0 ? 0 : 64 * below(4) + (in_lines ? 0 : below(64)));
            reach += (dim->count - 1) * dim->stride;
        }
        if (in_lines) first = 63;
        memory.push_back(noise(first + reach));
        if (in_lines) first -= (reinterpret_cast<u64>(memory.back().data()) + first) % 64;
        for (Dim* dim : order) {
            if (below(4) != 0) continue;
            first += (dim->count - 1) * dim->stride;
            dim->stride = 0 - dim->stride;
        }
        plane.address = reinterpret_cast<u64>(memory.back().data()) + first;
        plane.block_stride = blocks.stride;
        return plane;
    }

    std::vector<std::int64_t> some_ids(const Group& group, std::size_t num_chunks) const {
        std::vector<std::int64_t> ids(group.num_blocks);
        for (std::size_t i = 0; i < ids.size(); ++i) {
            ids[i] = static_cast<std::int64_t>(plan.direction == Direction::store ? below(group.num_blocks) : i);
        }
        std::shuffle(ids.begin(), ids.end(), random_words);
        ids.resize(num_chunks * group.blocks_per_chunk);
        if (plan.direction == Direction::retrieve) {
            for (std::int64_t& id : ids) id = below(in_blocks ? 20 : 3) == 0 ? kNoBlock : id;
        }
        return ids;
    }

    // Calls back for each run of a chunk: (engine's address or null, pool's address, bytes).
    void each(std::size_t chunk, const std::function<void(u8*, u8*, std::size_t)>& visit) {
        u8* at = pool.data() + plan.offsets[chunk];
        const std::int64_t* row = plan.row(chunk).data();
        const Plane* plane = plan.planes.data();
        for (const Group& group : plan.groups) {
            for (const Plane* end = plane + group.num_planes; plane != end; ++plane) {
                for (u64 block = 0; block < group.blocks_per_chunk; ++block) {
                    each_run(*plane, row[block], [&](u8* here) {
                        visit(here, at, plane->run);
                        at += plane->run;
                    });
                }
            }
            row += group.blocks_per_chunk;
        }
    }

    static void each_run(const Plane& plane, std::int64_t id, const std::function<void(u8*)>& visit) {
        for (u64 i = 0; i < plane.dims[0].count; ++i) {
            for (u64 j = 0; j < plane.dims[1].count; ++j) {
                for (u64 k = 0; k < plane.dims[2].count; ++k) {
                    const u64 at = plane.address + static_cast<u64>(id) * plane.block_stride +
                                   i * plane.dims[0].stride + j * plane.dims[1].stride + k * plane.dims[2].stride;
                    visit(id == kNoBlock ? nullptr : reinterpret_cast<u8*>(at));
                }
            }
        }
    }

    u64 checksum(std::size_t chunk) const {
        const Bytes extent(pool.begin() + static_cast<std::ptrdiff_t>(plan.offsets[chunk]),
                           pool.begin() + static_cast<std::ptrdiff_t>(plan.offsets[chunk] + plan.extent_bytes));
        const std::vector<u64> hashes = leaf_hashes(portable_kernels, extent.data(), extent.size());
        return checksum_of(portable_kernels, hashes.data(), hashes.size(), plan.seeds[chunk]);
    }

    Plan plan{};
    std::vector<Bytes> memory;
    Bytes pool;
    std::size_t extent_bytes = 0;
    const bool in_lines = below(2) != 0;  // all of the engine's runs are whole cache lines
    const bool in_blocks = in_lines && below(2) != 0;  // and whole blocks of the hash
};

void hashes_agree_on_every_instruction_set() {
    REQUIRE(xxh3_64(portable_kernels, nullptr, 0, 0) == 0x2D06800538D394C2U);
    for (std::size_t length = 1; length < 70000; length += 1 + length / 40) {
        const Bytes data = noise(length);
        const u64 seed = length % 3 == 0 ? 0 : random_words();
        const u64 expected = xxh3_64(portable_kernels, data.data(), length, seed);
        for (const Kernels* kernels : available_kernels()) {
            REQUIRE(xxh3_64(*kernels, data.data(), length, seed) == expected);
        }
    }
}

void a_store_writes_its_extents_and_nothing_else(const Kernels& kernels) {
    World world(Direction::store);
    Bytes expected = world.pool;
    for (std::size_t chunk = 0; chunk < world.plan.num_chunks(); ++chunk) {
        world.each(chunk, [&](u8* engine, u8* pool, std::size_t bytes) {
            std::memcpy(expected.data() + (pool - world.pool.data()), engine, bytes);
        });
    }
    const std::vector<Bytes> memory = world.memory;
    const std::vector<u64> sums = copy(world.plan, kernels);
    REQUIRE(world.pool == expected);
    REQUIRE(world.memory == memory);
    for (std::size_t chunk = 0; chunk < sums.size(); ++chunk) REQUIRE(sums[chunk] == world.checksum(chunk));
}

void a_retrieve_writes_its_blocks_and_nothing_else(const Kernels& kernels) {
    World world(Direction::retrieve);
    const std::vector<Bytes> before = world.memory;
    const Bytes pool = world.pool;
    for (std::size_t chunk = 0; chunk < world.plan.num_chunks(); ++chunk) {
        world.each(chunk, [&](u8* engine, u8* from, std::size_t bytes) {
            if (engine != nullptr) std::memcpy(engine, from, bytes);
        });
    }
    const std::vector<Bytes> expected = world.memory;
    for (std::size_t i = 0; i < before.size(); ++i) {
        std::copy(before[i].begin(), before[i].end(), world.memory[i].begin());
    }
    const std::vector<u64> sums = copy(world.plan, kernels);
    REQUIRE(world.memory == expected);
    REQUIRE(world.pool == pool);
    for (std::size_t chunk = 0; chunk < sums.size(); ++chunk) REQUIRE(sums[chunk] == world.checksum(chunk));
}

void a_changed_byte_changes_its_own_checksum_only(const Kernels& kernels) {
    World world(Direction::retrieve);
    const std::vector<u64> good = copy(world.plan, kernels);
    const std::size_t victim = below(world.plan.num_chunks());
    world.pool[world.plan.offsets[victim] + below(world.plan.extent_bytes)] ^= static_cast<u8>(1 + below(255));
    const std::vector<u64> bad = copy(world.plan, kernels);
    for (std::size_t chunk = 0; chunk < good.size(); ++chunk) REQUIRE((good[chunk] == bad[chunk]) == (chunk != victim));
}

void a_plan_that_does_not_fit_is_refused() {
    const std::function<void(Plan&)> spoilers[] = {
        [](Plan& plan) { plan.threads = 0; },
        [](Plan& plan) { plan.groups.clear(); },
        [](Plan& plan) { plan.planes.clear(); },
        [](Plan& plan) { plan.planes.push_back(plan.planes[0]); },
        [](Plan& plan) { plan.groups[0].num_planes = 0; },
        [](Plan& plan) { plan.groups[0].num_planes = ~u64{0}; },
        [](Plan& plan) { plan.groups[0].num_blocks = 0; },
        [](Plan& plan) { plan.groups[0].num_blocks = ~u64{0}; },
        [](Plan& plan) { plan.groups[0].blocks_per_chunk = 0; },
        [](Plan& plan) { plan.groups[0].blocks_per_chunk = ~u64{0}; },
        [](Plan& plan) { plan.planes[0].address = 0; },
        [](Plan& plan) { plan.planes[0].run = 0; },
        [](Plan& plan) { plan.planes[0].run = ~u64{0}; },
        [](Plan& plan) { plan.planes[0].dims[1].count = 0; },
        [](Plan& plan) { plan.planes[0].dims[2] = {~u64{0}, 1 << 20}; },
        [](Plan& plan) { plan.planes[0].dims[0] = {2, plan.planes[0].run - 1}; },
        [](Plan& plan) { plan.planes[0].dims[0] = {2, u64{1} << 63}; },
        [](Plan& plan) { plan.seeds.pop_back(); },
        [](Plan& plan) { plan.blocks.clear(); },
        [](Plan& plan) { plan.blocks[0] = static_cast<std::int64_t>(plan.groups[0].num_blocks); },
        [](Plan& plan) { plan.blocks[0] = -2; },
        [](Plan& plan) { plan.offsets[0] = plan.pool_bytes; },
        [](Plan& plan) { plan.offsets[0] = ~u64{0}; },
    };
    for (const auto& spoil : spoilers) {
        World world(below(2) != 0 ? Direction::store : Direction::retrieve);
        world.plan.starts.clear();
        world.plan.first_block.clear();
        world.plan.blocks_per_chunk = world.plan.extent_bytes = 0;
        spoil(world.plan);
        bool refused = false;
        try {
            check(world.plan);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        REQUIRE(refused);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int num_plans = argc > 1 ? std::atoi(argv[1]) : 300;
    const u64 seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
    random_words.seed(seed);
    std::printf("seed %llu, on", static_cast<unsigned long long>(seed));
    for (const Kernels* kernels : available_kernels()) std::printf(" %s", kernels->name);
    std::printf("\n");
    hashes_agree_on_every_instruction_set();
    a_plan_that_does_not_fit_is_refused();
    for (int i = 0; i < num_plans; ++i) {
        for (const Kernels* kernels : available_kernels()) {
            a_store_writes_its_extents_and_nothing_else(*kernels);
            a_retrieve_writes_its_blocks_and_nothing_else(*kernels);
            a_changed_byte_changes_its_own_checksum_only(*kernels);
        }
    }
    std::printf("%d plans copied on each\n", num_plans);
    return 0;
}
