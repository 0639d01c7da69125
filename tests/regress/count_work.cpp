// Work of the copy engine, to be counted: run under callgrind, it leaves one dump for each case, named
// "INSTRUCTION SET/CASE/BYTES". The case "reference" is reference.cpp, against which the others are judged.
#include <valgrind/callgrind.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "copy.hpp"
#include "leaf.hpp"

std::uint64_t copy_and_hash_plainly(std::uint8_t* dst, const std::uint8_t* src, std::size_t bytes);

using namespace lmcache;

namespace {

using u64 = std::uint64_t;

constexpr std::size_t kChunks = 2, kPlanes = 4, kBlocksPerChunk = 8, kReferenceBytes = 1 << 20;

struct Shape {
    const char* name;
    std::uint64_t rows, run;  // of a block of a plane; rows lie twice as far apart as they are long
};

// Whole leaves and whole blocks in one run, as NHD has them; runs of a head, as HND has them for a part of the heads;
// a few small ones.
constexpr Shape kShapes[] = {{"runs of 32768", 1, 32768}, {"runs of 8192", 1, 8192}, {"runs of 256", 32, 256},
                             {"runs of 64", 64, 64}};

struct World {
    explicit World(Direction direction, const Shape& shape) {
        plan.direction = direction;
        const std::size_t num_blocks = kChunks * kBlocksPerChunk;
        const u64 row_stride = shape.rows == 1 ? shape.run : 2 * shape.run;
        const u64 block_stride = shape.rows * row_stride;
        memory.resize(kPlanes * num_blocks * block_stride + 64);
        pool.resize(kChunks * kPlanes * kBlocksPerChunk * shape.rows * shape.run + 64);
        u64 at = aligned(memory);
        for (std::size_t plane = 0; plane < kPlanes; ++plane, at += num_blocks * block_stride) {
            plan.planes.push_back({at, block_stride, {{shape.rows, row_stride}, {1, 0}, {1, 0}}, shape.run});
        }
        plan.groups.push_back({kPlanes, num_blocks, kBlocksPerChunk});
        for (std::size_t block = 0; block < num_blocks; ++block) {
            plan.blocks.push_back(static_cast<std::int64_t>(block * 7 % num_blocks));
        }
        plan.pool = reinterpret_cast<std::uint8_t*>(aligned(pool));
        plan.pool_bytes = pool.size() - 64;
        for (std::size_t chunk = 0; chunk < kChunks; ++chunk) {
            plan.offsets.push_back(chunk * plan.pool_bytes / kChunks);
            plan.seeds.push_back(chunk);
        }
        plan.checksums.resize(direction == Direction::retrieve ? kChunks : 0);
        plan.threads = 1;
        check(plan);
    }

    static u64 aligned(const std::vector<std::uint8_t>& bytes) {
        return (reinterpret_cast<u64>(bytes.data()) + 63) / 64 * 64;
    }

    Plan plan{};
    std::vector<std::uint8_t> memory, pool;
};

template <typename Work>
void count(const std::string& name, std::size_t bytes, const Work& work) {
    work();  // what happens once in a process
    const std::string whole = name + "/" + std::to_string(bytes);
    CALLGRIND_ZERO_STATS;
    work();
    CALLGRIND_DUMP_STATS_AT(whole.c_str());
}

void count_set(const Kernels& kernels) {
    const std::string set = kernels.name;
    for (const Shape& shape : kShapes) {
        for (const Direction direction : {Direction::store, Direction::retrieve}) {
            const World world(direction, shape);
            const std::string verb = direction == Direction::store ? "store, " : "retrieve, ";
            count(set + "/" + verb + shape.name, world.plan.pool_bytes, [&] { copy(world.plan, kernels); });
        }
    }
    const std::vector<std::uint8_t> data(kReferenceBytes, 1);
    count(set + "/hash", data.size(), [&] { leaf_hashes(kernels, data.data(), data.size()); });
}

}  // namespace

int main() {
    for (const Kernels* kernels : available_kernels()) count_set(*kernels);
    const std::vector<std::uint8_t> src(kReferenceBytes, 1);
    std::vector<std::uint8_t> dst(kReferenceBytes);
    u64 sum = 0;
    count("plain/reference", src.size(), [&] { sum += copy_and_hash_plainly(dst.data(), src.data(), src.size()); });
    std::printf("%llu\n", static_cast<unsigned long long>(sum));
}
