#include "plan.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>

namespace lmcache {

namespace {

using i64 = std::int64_t;
using u64 = std::uint64_t;
__extension__ using i128 = __int128;

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

// Steps of one stride: also of that from a block to the next.
struct Steps {
    u64 count;
    i64 stride;
};

std::array<Steps, kDims + 1> steps_of(const Plane& plane, u64 num_blocks) {
    std::array<Steps, kDims + 1> steps{};
    for (std::size_t i = 0; i < kDims; ++i) steps[i] = {plane.dims[i].count, static_cast<i64>(plane.dims[i].stride)};
    steps[kDims] = {num_blocks, static_cast<i64>(plane.block_stride)};
    return steps;
}

// Every byte of every block lies in the address space, so that the formula never wraps around by accident.
void check_reach(const Plane& plane, u64 num_blocks, const std::string& name) {
    i128 low = plane.address;
    i128 high = low + plane.run;
    for (const Steps& steps : steps_of(plane, num_blocks)) {
        i64 reach = 0;
        if (steps.count - 1 > std::numeric_limits<i64>::max() ||
            __builtin_mul_overflow(static_cast<i64>(steps.count - 1), steps.stride, &reach)) {
            refuse(name + " reaches beyond the address space");
        }
        (reach < 0 ? low : high) += reach;
    }
    if (low <= 0 || high > std::numeric_limits<u64>::max()) refuse(name + " reaches beyond the address space");
}

// Strides nest: what one step of a stride skips is at least as long as all that smaller strides reach. That holds for
// every layout of an engine, and then no two runs share a byte.
void check_nesting(const Plane& plane, u64 num_blocks, const std::string& name) {
    const auto size = [](const Steps& one) {
        return one.stride < 0 ? u64{0} - static_cast<u64>(one.stride) : static_cast<u64>(one.stride);
    };
    std::array<Steps, kDims + 1> steps = steps_of(plane, num_blocks);
    std::sort(steps.begin(), steps.end(), [&](const Steps& a, const Steps& b) { return size(a) < size(b); });
    u64 span = plane.run;
    for (const Steps& one : steps) {
        if (one.count == 1) continue;
        if (size(one) < span) refuse(name + " has runs that overlap");
        span += size(one) * (one.count - 1);
    }
}

void check_plane(const Plane& plane, u64 num_blocks, const std::string& name) {
    if (plane.address == 0) refuse(name + " has a null address");
    if (plane.run == 0) refuse(name + " has no bytes");
    u64 bytes = plane.run;
    for (const Dim& dim : plane.dims) {
        if (dim.count == 0) refuse(name + " has a dimension that counts nothing");
        if (__builtin_mul_overflow(bytes, dim.count, &bytes)) refuse(name + " reaches beyond the address space");
    }
    check_reach(plane, num_blocks, name);
    check_nesting(plane, num_blocks, name);
}

// Bytes of a chunk in one plane.
u64 chunk_bytes(const Plane& plane, u64 blocks_per_chunk, u64 before) {
    u64 end = 0;
    if (__builtin_mul_overflow(block_bytes(plane), blocks_per_chunk, &end) ||
        __builtin_add_overflow(end, before, &end)) {
        refuse("one chunk is longer than the address space");
    }
    return end - before;
}

void check_groups(Plan& plan) {
    if (plan.groups.empty()) refuse("a plan needs at least one group of planes");
    plan.starts.clear();
    plan.first_block.clear();
    plan.blocks_per_chunk = 0;
    plan.extent_bytes = 0;
    for (const Group& group : plan.groups) {
        if (group.num_planes < 1 || group.num_planes > plan.planes.size() - plan.starts.size()) {
            refuse("the groups have more planes than there are, or one has none");
        }
        if (group.num_blocks < 1) refuse("a group has no block");
        if (group.blocks_per_chunk < 1) refuse("a chunk has no block of a group");
        for (u64 nth = 0; nth < group.num_planes; ++nth) {
            const std::size_t index = plan.starts.size();
            const Plane& plane = plan.planes[index];
            check_plane(plane, group.num_blocks, "plane " + std::to_string(index));
            plan.starts.push_back(plan.extent_bytes);
            plan.first_block.push_back(plan.blocks_per_chunk);
            plan.extent_bytes += chunk_bytes(plane, group.blocks_per_chunk, plan.extent_bytes);
        }
        if (__builtin_add_overflow(plan.blocks_per_chunk, group.blocks_per_chunk, &plan.blocks_per_chunk)) {
            refuse("a chunk has more blocks than there are numbers");
        }
    }
    if (plan.starts.size() != plan.planes.size()) {
        refuse(std::to_string(plan.planes.size()) + " planes, but the groups have " +
               std::to_string(plan.starts.size()));
    }
}

void check_shapes(const Plan& plan) {
    const std::size_t num_chunks = plan.num_chunks();
    if (plan.seeds.size() != num_chunks) {
        refuse(std::to_string(num_chunks) + " offsets but " + std::to_string(plan.seeds.size()) + " seeds");
    }
    if (plan.direction == Direction::retrieve && plan.checksums.size() != num_chunks) {
        refuse(std::to_string(num_chunks) + " offsets but " + std::to_string(plan.checksums.size()) + " checksums");
    }
    u64 num_ids = 0;
    if (__builtin_mul_overflow(num_chunks, plan.blocks_per_chunk, &num_ids) || plan.blocks.size() != num_ids) {
        refuse(std::to_string(plan.blocks.size()) + " block ids are not " + std::to_string(plan.blocks_per_chunk) +
               " for each of " + std::to_string(num_chunks) + " chunks");
    }
}

void check_id(i64 id, const Plan& plan, std::size_t group) {
    if (plan.direction == Direction::retrieve && id == kNoBlock) return;
    if (id < 0 || static_cast<u64>(id) >= plan.groups[group].num_blocks) {
        const std::string num_blocks = std::to_string(plan.groups[group].num_blocks);
        refuse("block id " + std::to_string(id) + " is not among " + num_blocks + " blocks of group " +
               std::to_string(group));
    }
}

// Two threads writing to one place would leave bytes there that no checksum describes.
void check_written_once(std::vector<i64>& ids, std::size_t group) {
    std::sort(ids.begin(), ids.end());
    for (std::size_t i = 1; i < ids.size(); ++i) {
        if (ids[i] == ids[i - 1] && ids[i] != kNoBlock) {
            refuse("block " + std::to_string(ids[i]) + " would be written twice, in group " + std::to_string(group));
        }
    }
}

void check_blocks(const Plan& plan) {
    std::vector<i64> ids;
    std::size_t first = 0;
    for (std::size_t group = 0; group < plan.groups.size(); ++group) {
        ids.clear();
        for (std::size_t chunk = 0; chunk < plan.num_chunks(); ++chunk) {
            for (const i64 id : plan.row(chunk).subspan(first, plan.groups[group].blocks_per_chunk)) {
                check_id(id, plan, group);
                ids.push_back(id);
            }
        }
        if (plan.direction == Direction::retrieve) check_written_once(ids, group);
        first += plan.groups[group].blocks_per_chunk;
    }
}

void check_extents(const Plan& plan) {
    for (const u64 offset : plan.offsets) {
        if (offset > plan.pool_bytes || plan.extent_bytes > plan.pool_bytes - offset) {
            refuse("an extent of " + std::to_string(plan.extent_bytes) + " bytes at offset " + std::to_string(offset) +
                   " reaches outside the pool of " + std::to_string(plan.pool_bytes) + " bytes");
        }
    }
    if (plan.direction == Direction::retrieve) return;
    std::vector<u64> sorted = plan.offsets;
    std::sort(sorted.begin(), sorted.end());
    for (std::size_t i = 1; i < sorted.size(); ++i) {
        if (sorted[i] - sorted[i - 1] < plan.extent_bytes) {
            refuse("the extents at offsets " + std::to_string(sorted[i - 1]) + " and " + std::to_string(sorted[i]) +
                   " overlap");
        }
    }
}

}  // namespace

void check(Plan& plan) {
    if (plan.threads < 1 || plan.threads > kThreadsMax) {
        refuse("threads must be between 1 and " + std::to_string(kThreadsMax));
    }
    check_groups(plan);
    check_shapes(plan);
    check_blocks(plan);
    check_extents(plan);
}

}  // namespace lmcache
