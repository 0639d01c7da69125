#include "plan.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace lmcache {

namespace {

using u64 = std::uint64_t;

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

void check_segment(const Plan& plan, std::size_t index) {
    const Segment& segment = plan.segments[index];
    const std::string name = "segment " + std::to_string(index);
    if (segment.address == 0) refuse(name + " has a null address");
    if (segment.bytes == 0) refuse(name + " has no bytes");
    if (plan.num_blocks > 1 && segment.stride < segment.bytes) {
        refuse(name + " is longer than the distance from a block to the next");
    }
    u64 end;
    if (__builtin_mul_overflow(segment.stride, plan.num_blocks - 1, &end) ||
        __builtin_add_overflow(end, segment.bytes, &end) || __builtin_add_overflow(end, segment.address, &end)) {
        refuse(name + " reaches beyond the address space");
    }
}

void check_segments(Plan& plan) {
    if (plan.segments.empty()) refuse("a plan needs at least one segment");
    for (std::size_t i = 0; i < plan.segments.size(); ++i) {
        check_segment(plan, i);
        if (__builtin_add_overflow(plan.block_bytes, plan.segments[i].bytes, &plan.block_bytes)) {
            refuse("the segments of one block are longer than the address space");
        }
        plan.ends.push_back(plan.block_bytes);
    }
}

void check_shapes(Plan& plan) {
    const std::size_t num_chunks = plan.num_chunks();
    if (plan.seeds.size() != num_chunks) {
        refuse(std::to_string(num_chunks) + " offsets but " + std::to_string(plan.seeds.size()) + " seeds");
    }
    if (plan.direction == Direction::retrieve && plan.checksums.size() != num_chunks) {
        refuse(std::to_string(num_chunks) + " offsets but " + std::to_string(plan.checksums.size()) + " checksums");
    }
    if (num_chunks == 0) {
        if (!plan.blocks.empty()) refuse("block ids without an extent");
        return;
    }
    if (plan.blocks.empty() || plan.blocks.size() % num_chunks != 0) {
        const std::string num_ids = std::to_string(plan.blocks.size());
        refuse(num_ids + " block ids do not divide into " + std::to_string(num_chunks) + " chunks");
    }
    plan.blocks_per_chunk = plan.blocks.size() / num_chunks;
    if (__builtin_mul_overflow(plan.block_bytes, plan.blocks_per_chunk, &plan.extent_bytes)) {
        refuse("one chunk is longer than the address space");
    }
}

void check_blocks(const Plan& plan) {
    const bool may_skip = plan.direction == Direction::retrieve;
    for (const std::int64_t id : plan.blocks) {
        if (may_skip && id == kNoBlock) continue;
        if (id < 0 || static_cast<u64>(id) >= plan.num_blocks) {
            refuse("block id " + std::to_string(id) + " is not among " + std::to_string(plan.num_blocks) + " blocks");
        }
    }
}

void check_extents(const Plan& plan) {
    for (const u64 offset : plan.offsets) {
        if (offset > plan.pool_bytes || plan.extent_bytes > plan.pool_bytes - offset) {
            refuse("an extent of " + std::to_string(plan.extent_bytes) + " bytes at offset " + std::to_string(offset) +
                   " reaches outside the pool of " + std::to_string(plan.pool_bytes) + " bytes");
        }
    }
}

// Two threads writing to one place would leave bytes there that no checksum describes.
void check_targets(const Plan& plan) {
    if (plan.direction == Direction::store) {
        std::vector<u64> sorted = plan.offsets;
        std::sort(sorted.begin(), sorted.end());
        for (std::size_t i = 1; i < sorted.size(); ++i) {
            if (sorted[i] - sorted[i - 1] < plan.extent_bytes) {
                refuse("the extents at offsets " + std::to_string(sorted[i - 1]) + " and " + std::to_string(sorted[i]) +
                       " overlap");
            }
        }
        return;
    }
    std::vector<std::int64_t> sorted = plan.blocks;
    std::sort(sorted.begin(), sorted.end());
    for (std::size_t i = 1; i < sorted.size(); ++i) {
        if (sorted[i] == sorted[i - 1] && sorted[i] != kNoBlock) {
            refuse("block " + std::to_string(sorted[i]) + " would be written twice");
        }
    }
}

}  // namespace

void check(Plan& plan) {
    if (plan.threads < 1 || plan.threads > kThreadsMax) {
        refuse("threads must be between 1 and " + std::to_string(kThreadsMax));
    }
    if (plan.num_blocks < 1) refuse("num_blocks must be at least 1");
    check_segments(plan);
    check_shapes(plan);
    check_blocks(plan);
    check_extents(plan);
    check_targets(plan);
}

}  // namespace lmcache
