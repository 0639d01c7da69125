// An engine's memory of random planes, a pool, and what a copy between them must do. Only cuda_tests.cpp includes this.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "plan.hpp"

using namespace lmcache;

namespace {

using u8 = std::uint8_t;
using u64 = std::uint64_t;
using Bytes = std::vector<u8>;

constexpr u64 kPage = 4096;

std::mt19937_64 random_words;

#define REQUIRE(condition)                                                               \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                \
        }                                                                                \
    } while (false)

u64 below(u64 limit) { return random_words() % limit; }
bool coin() { return below(2) != 0; }

void fill(u8* memory, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) memory[i] = static_cast<u8>(random_words());
}

struct Free {
    void operator()(u8* memory) const { std::free(memory); }
};

// Of exactly this size, so that ASan sees one byte too many.
std::unique_ptr<u8, Free> noise(std::size_t bytes, std::size_t alignment) {
    void* memory = nullptr;
    REQUIRE(posix_memalign(&memory, alignment, bytes) == 0);
    fill(static_cast<u8*>(memory), bytes);
    return std::unique_ptr<u8, Free>(static_cast<u8*>(memory));
}

// Runs and strides of one plane are multiples of this.
u64 some_unit() {
    static const u64 units[] = {1, 2, 3, 4, 8, 16, 24, 64, 128, 132, 256, 576};
    return units[below(std::size(units))];
}

// The memory of one plane: of an own allocation, and just as long as its blocks reach.
struct Sheet {
    Sheet(u64 num_blocks, u64 unit) {
        static const u64 run_units[] = {1, 1, 2, 3, 16, 61};
        plane.run = unit * run_units[below(std::size(run_units))];
        u64 span = plane.run;
        u64 reach = plane.run;
        // Dims nest at random: what is outermost in the extent may be innermost in memory.
        std::size_t order[3] = {0, 1, 2};
        std::shuffle(order, order + 3, random_words);
        const bool blocks_inside = below(4) == 0;  // K and V of older engines lie outside their blocks
        const auto nest = [&](u64 count, u64& stride) {
            stride = count == 1 ? below(1000) : span + (coin() ? 0 : unit * below(3));
            reach += stride * (count - 1);
            if (count > 1) span = std::max(span, stride * (count - 1) + span);
        };
        if (blocks_inside) nest(num_blocks, plane.block_stride);
        for (const std::size_t dim : order) {
            plane.dims[dim].count = coin() ? 1 : 1 + below(5);
            if (plane.run * plane.dims[dim].count * 4 > 100000) plane.dims[dim].count = 1;
            if (plane.dims[dim].count == 1) {
                plane.dims[dim].stride = 0;
            } else {
                nest(plane.dims[dim].count, plane.dims[dim].stride);
            }
        }
        if (!blocks_inside) nest(num_blocks, plane.block_stride);
        const u64 skew = coin() ? 0 : unit * below(4);
        bytes = skew + reach;
        memory = noise(bytes, 64);
        plane.address = reinterpret_cast<u64>(memory.get()) + skew;
        // Now and then the other way around: a stride may be negative.
        Dim& turned = plane.dims[below(3)];
        if (turned.count > 1 && below(4) == 0) {
            plane.address += turned.stride * (turned.count - 1);
            turned.stride = -turned.stride;
        }
    }

    u64 block_bytes() const {
        return plane.dims[0].count * plane.dims[1].count * plane.dims[2].count * plane.run;
    }

    Plane plane{};
    u64 bytes = 0;
    std::unique_ptr<u8, Free> memory;
};

struct World {
    World() {
        const std::size_t num_groups = coin() ? 1 : 1 + below(3);
        for (std::size_t i = 0; i < num_groups; ++i) {
            const Group group{1 + below(4), 4 + below(12), 1 + below(4)};
            groups.push_back(group);
            const u64 unit = some_unit();
            for (u64 j = 0; j < group.num_planes; ++j) {
                sheets.emplace_back(group.num_blocks, below(5) == 0 ? some_unit() : unit);
                planes.push_back(sheets.back().plane);
                extent_bytes += sheets.back().block_bytes() * group.blocks_per_chunk;
            }
        }
        room = (extent_bytes + kPage - 1) / kPage * kPage;
        pool = noise(kExtents * room, kPage);
    }

    // Block ids of one plan, taken from those that are left for retrieves, or any of those that stores may read.
    std::vector<std::int64_t> some_blocks(Direction direction, std::size_t num_chunks) {
        std::vector<std::int64_t> ids;
        for (std::size_t chunk = 0; chunk < num_chunks; ++chunk) {
            for (std::size_t i = 0; i < groups.size(); ++i) {
                for (u64 j = 0; j < groups[i].blocks_per_chunk; ++j) {
                    if (direction == Direction::store) {
                        ids.push_back(static_cast<std::int64_t>(below(groups[i].num_blocks / 2)));
                    } else if (unwritten[i].empty() || below(4) == 0) {
                        ids.push_back(kNoBlock);
                    } else {
                        ids.push_back(unwritten[i].back());
                        unwritten[i].pop_back();
                    }
                }
            }
        }
        return ids;
    }

    // From now on retrieves may write every block of the upper half again.
    void begin_episode() {
        unwritten.clear();
        for (const Group& group : groups) {
            std::vector<std::int64_t> ids;
            for (u64 id = group.num_blocks / 2; id < group.num_blocks; ++id) {
                ids.push_back(static_cast<std::int64_t>(id));
            }
            std::shuffle(ids.begin(), ids.end(), random_words);
            unwritten.push_back(std::move(ids));
        }
        free_extents.clear();
        for (u64 i = 0; i < kExtents; ++i) free_extents.push_back(i * room);
        std::shuffle(free_extents.begin(), free_extents.end(), random_words);
    }

    // The runs of one block in one plane, in the order of an extent.
    static void each_run_of(const Plane& p, std::int64_t id, const std::function<void(u8*, u64)>& visit) {
        for (u64 i = 0; i < p.dims[0].count; ++i) {
            for (u64 j = 0; j < p.dims[1].count; ++j) {
                for (u64 k = 0; k < p.dims[2].count; ++k) {
                    const u64 place = p.address + static_cast<u64>(id) * p.block_stride + i * p.dims[0].stride +
                                      j * p.dims[1].stride + k * p.dims[2].stride;
                    visit(id == kNoBlock ? nullptr : reinterpret_cast<u8*>(place), p.run);
                }
            }
        }
    }

    // The definition: the runs of a chunk (null: none in the engine's memory), each with its place in the extent.
    void each_run(const std::int64_t* ids, const std::function<void(u8*, u64, u64)>& visit) const {
        u64 at = 0;
        std::size_t nth = 0;
        for (const Group& group : groups) {
            for (u64 i = 0; i < group.num_planes; ++i, ++nth) {
                for (u64 block = 0; block < group.blocks_per_chunk; ++block) {
                    each_run_of(planes[nth], ids[block], [&](u8* place, u64 bytes) {
                        visit(place, at, bytes);
                        at += bytes;
                    });
                }
            }
            ids += group.blocks_per_chunk;
        }
        REQUIRE(at == extent_bytes);
    }

    void gather(const std::int64_t* ids, u8* to) const {
        each_run(ids, [&](u8* from, u64 at, u64 bytes) { std::memcpy(to + at, from, bytes); });
    }

    std::size_t blocks_per_chunk() const {
        u64 sum = 0;
        for (const Group& group : groups) sum += group.blocks_per_chunk;
        return sum;
    }

    std::vector<Bytes> memory() const {
        std::vector<Bytes> copies;
        for (const Sheet& sheet : sheets) copies.emplace_back(sheet.memory.get(), sheet.memory.get() + sheet.bytes);
        return copies;
    }

    // New bytes in every block that stores may read.
    void scribble() {
        std::size_t nth = 0;
        for (const Group& group : groups) {
            for (u64 i = 0; i < group.num_planes; ++i, ++nth) {
                for (u64 id = 0; id < group.num_blocks / 2; ++id) {
                    each_run_of(planes[nth], static_cast<std::int64_t>(id),
                                [](u8* at, u64 bytes) { std::memset(at, static_cast<int>(below(256)), bytes); });
                }
            }
        }
    }

    static constexpr u64 kExtents = 9;

    std::vector<Group> groups;
    std::vector<Plane> planes;
    std::vector<Sheet> sheets;
    u64 extent_bytes = 0;
    u64 room = 0;
    std::unique_ptr<u8, Free> pool;
    std::vector<std::vector<std::int64_t>> unwritten;  // by group
    std::vector<u64> free_extents;
};

}  // namespace
