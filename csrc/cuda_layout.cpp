#include "cuda_layout.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "leaf.hpp"

namespace lmcache::cuda {

namespace {

using u64 = std::uint64_t;

constexpr std::uint32_t kWidthMax = 16;

// The widest power of two, at most 16, that divides all that was merged into it.
class Width {
public:
    void merge(u64 value) { bits_ |= value; }
    std::uint32_t value() const {
        std::uint32_t width = kWidthMax;
        while (bits_ % width != 0) width /= 2;
        return width;
    }

private:
    u64 bits_ = 0;
};

std::uint32_t width_of(const Plane& plane, u64 start) {
    Width width;
    width.merge(plane.address);
    width.merge(plane.block_stride);
    for (const Dim& dim : plane.dims) {
        if (dim.count > 1) width.merge(dim.stride);
    }
    width.merge(plane.run);
    width.merge(start);
    return width.value();
}

DevicePlane device_plane(const Plane& plane, u64 start, u64 first_block, u64 blocks_per_chunk) {
    DevicePlane result{};
    result.address = plane.address;
    result.block_stride = plane.block_stride;
    u64 step = plane.run;
    for (std::size_t dim = 3; dim-- > 0;) {
        result.strides[dim] = plane.dims[dim].stride;
        result.inner[dim] = make_divisor(step);
        step *= plane.dims[dim].count;
    }
    result.is_run = step == plane.run;
    result.block = make_divisor(step);
    result.start = start;
    result.end = start + step * blocks_per_chunk;
    result.first_block = static_cast<std::uint32_t>(first_block);
    return result;
}

void check_size(u64 block_bytes, const Group& group) {
    if (block_bytes >= kPlaneBytesMax || block_bytes * group.blocks_per_chunk >= kPlaneBytesMax) {
        throw std::invalid_argument("a chunk has more than " + std::to_string(kPlaneBytesMax - 1) +
                                    " bytes in one plane, which is more than a GPU copies");
    }
    if (group.num_blocks > kPlaneBytesMax) {
        throw std::invalid_argument(std::to_string(group.num_blocks) + " blocks are more than a GPU's copy can number");
    }
}

void number_leaves(DeviceLayout& layout, const std::vector<std::uint32_t>& widths) {
    std::size_t first = 0;
    for (u64 start = 0; start < layout.extent_bytes; start += kLeafBytes) {
        const u64 end = std::min<u64>(start + kLeafBytes, layout.extent_bytes);
        while (layout.planes[first].end <= start) ++first;
        std::uint32_t width = kWidthMax;
        for (std::size_t plane = first; plane < layout.planes.size() && layout.planes[plane].start < end; ++plane) {
            width = std::min(width, widths[plane]);
        }
        layout.leaves.push_back({static_cast<std::uint32_t>(first), width});
    }
}

}  // namespace

Divisor make_divisor(u64 divisor) {
    std::uint32_t log = 0;
    while ((u64{1} << log) < divisor) ++log;
    const u64 power = u64{1} << (31 + log);
    return {static_cast<std::uint32_t>(divisor), static_cast<std::uint32_t>((power + divisor - 1) / divisor), 31 + log};
}

DeviceLayout make_device_layout(const std::vector<Plane>& planes, const std::vector<Group>& groups) {
    DeviceLayout layout{};
    std::vector<std::uint32_t> widths;
    auto plane = planes.begin();
    u64 first_block = 0;
    for (const Group& group : groups) {
        for (u64 i = 0; i < group.num_planes; ++i, ++plane) {
            check_size(block_bytes(*plane), group);
            layout.planes.push_back(device_plane(*plane, layout.extent_bytes, first_block, group.blocks_per_chunk));
            widths.push_back(width_of(*plane, layout.extent_bytes));
            layout.extent_bytes = layout.planes.back().end;
        }
        first_block += group.blocks_per_chunk;
    }
    if (layout.extent_bytes / kLeafBytes >= kPlaneBytesMax || first_block >= kPlaneBytesMax) {
        throw std::invalid_argument("one chunk is longer than a GPU copies");
    }
    layout.blocks_per_chunk = static_cast<std::uint32_t>(first_block);
    number_leaves(layout, widths);
    return layout;
}

}  // namespace lmcache::cuda
