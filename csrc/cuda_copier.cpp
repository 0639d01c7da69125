#include "cuda_copier.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "cuda_kernels.hpp"
#include "cuda_memory.hpp"
#include "cuda_ring.hpp"
#include "leaf.hpp"
#include "xxh3.hpp"

namespace lmcache::cuda {

namespace {

using u8 = std::uint8_t;
using u64 = std::uint64_t;

constexpr u64 kAlignment = 16;  // of extents: the kernels' vectors

constexpr std::size_t kChunksMax = 4096;

// A registered part of the pool.
struct Range {
    u64 bytes;
    u8* device;  // its address for the device
};

u64 up_to(u64 value, u64 multiple) { return (value + multiple - 1) / multiple * multiple; }

// Tickets that no plan has.
constexpr u64 kFree = 0;
constexpr u64 kEnding = ~u64{0};

// Memory that one plan under way has for itself, on both sides, and what finish() needs to know of it.
struct Slot {
    PinnedMemory tables;  // [chunks_max] addresses of extents, then block ids
    DeviceMemory device_tables;
    PinnedMemory hashes;
    PinnedMemory short_leaves;
    Event done = make_event();
    u64 ticket = kFree;
    Plan plan{};
    bool bounced = false;
};

// What check() says of the planes is said here, not at the first plan.
DeviceLayout checked_layout(const std::vector<Plane>& planes, const std::vector<Group>& groups) {
    Plan plan{};
    plan.planes = planes;
    plan.groups = groups;
    plan.threads = 1;
    check(plan);
    return make_device_layout(planes, groups);
}

template <class T>
DeviceMemory uploaded(const std::vector<T>& rows) {
    DeviceMemory memory = device_memory(rows.size() * sizeof(T));
    demand(cudaMemcpy(memory.get(), rows.data(), rows.size() * sizeof(T), cudaMemcpyHostToDevice), "upload a table");
    return memory;
}

}  // namespace

class DeviceCopier::Engine {
public:
    // The device is current while this runs, and while the destructor does.
    Engine(std::vector<Plane> planes, std::vector<Group> groups, u8* pool, u64 pool_bytes, const CopierLimits& limits);
    ~Engine();

    const DeviceLayout& layout() const { return layout_; }
    const CopierLimits& limits() const { return limits_; }
    std::size_t chunks_max() const { return chunks_max_; }
    void register_range(u64 offset, u64 bytes);
    u64 submit(Plan plan, cudaStream_t stream);
    std::optional<std::vector<u64>> finish(u64 ticket);

private:
    Slot make_slot() const;
    void check(Plan& plan) const;
    Slot& free_slot();
    Slot* ended(u64 ticket);
    u8* reached(u64 offset) const;
    std::vector<u8*> place_extents(Slot& slot) const;
    void bounce(const Slot& slot) const;
    void enqueue(Slot& slot, const std::vector<u8*>& places, cudaStream_t stream);
    std::vector<u64> results(const Slot& slot) const;

    const std::vector<Plane> planes_;
    const std::vector<Group> groups_;
    u8* const pool_;
    const u64 pool_bytes_;
    const CopierLimits limits_;
    const DeviceLayout layout_;
    const u64 stride_;  // of extents in the bounce buffer
    const std::size_t chunks_max_;
    const DeviceMemory device_planes_;
    const DeviceMemory device_leaves_;
    const PinnedMemory bounce_;
    StagingRing ring_;
    std::vector<Slot> slots_;

    std::mutex mutex_;  // of all below, of the slots and of the ring
    std::map<u64, Range> ranges_;
    bool bounce_is_taken_ = false;
    bool failed_ = false;
    u64 last_ticket_ = 0;
};

DeviceCopier::Engine::Engine(std::vector<Plane> planes, std::vector<Group> groups, u8* pool, u64 pool_bytes,
                             const CopierLimits& limits)
    : planes_(std::move(planes)),
      groups_(std::move(groups)),
      pool_(pool),
      pool_bytes_(pool_bytes),
      limits_(limits),
      layout_(checked_layout(planes_, groups_)),
      stride_(up_to(layout_.extent_bytes, kLeafBytes)),
      chunks_max_(static_cast<std::size_t>(std::clamp<u64>(limits.staging_bytes / stride_, 1, kChunksMax))),
      device_planes_(uploaded(layout_.planes)),
      device_leaves_(uploaded(layout_.leaves)),
      bounce_(pinned_memory(chunks_max_ * stride_)),
      ring_(limits.staging_bytes) {
    for (unsigned i = 0; i < limits.plans_max; ++i) slots_.push_back(make_slot());
}

DeviceCopier::Engine::~Engine() {
    for (const Slot& slot : slots_) {
        if (slot.ticket != kFree) cudaEventSynchronize(slot.done.get());
    }
    for (const auto& [offset, range] : ranges_) cudaHostUnregister(pool_ + offset);
}

Slot DeviceCopier::Engine::make_slot() const {
    Slot slot;
    const std::size_t table_bytes = chunks_max_ * (sizeof(u64) + layout_.blocks_per_chunk * sizeof(std::int32_t));
    slot.tables = pinned_memory(table_bytes);
    slot.device_tables = device_memory(table_bytes);
    slot.hashes = pinned_memory(chunks_max_ * layout_.leaves.size() * sizeof(u64));
    slot.short_leaves = pinned_memory(chunks_max_ * kShortLeafRoom);
    return slot;
}

void DeviceCopier::Engine::register_range(u64 offset, u64 bytes) {
    if (offset > pool_bytes_ || bytes > pool_bytes_ - offset) {
        throw std::invalid_argument("a range of " + std::to_string(bytes) + " bytes at offset " +
                                    std::to_string(offset) + " reaches outside the pool");
    }
    void* device = nullptr;
    demand(cudaHostRegister(pool_ + offset, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
           "register memory");
    if (const cudaError_t error = cudaHostGetDevicePointer(&device, pool_ + offset, 0); error != cudaSuccess) {
        cudaHostUnregister(pool_ + offset);
        demand(error, "address registered memory");
    }
    const std::lock_guard lock(mutex_);
    ranges_[offset] = {bytes, static_cast<u8*>(device)};
}

void DeviceCopier::Engine::check(Plan& plan) const {
    plan.pool = pool_;
    plan.pool_bytes = pool_bytes_;
    plan.planes = planes_;
    plan.groups = groups_;
    plan.threads = 1;
    lmcache::check(plan);
    if (plan.num_chunks() < 1 || plan.num_chunks() > chunks_max_) {
        throw std::invalid_argument("a plan has 1 to " + std::to_string(chunks_max_) + " chunks, not " +
                                    std::to_string(plan.num_chunks()));
    }
    for (const u64 offset : plan.offsets) {
        if ((reinterpret_cast<u64>(pool_) + offset) % kAlignment != 0) {
            throw std::invalid_argument("the extent at offset " + std::to_string(offset) + " is not aligned to " +
                                        std::to_string(kAlignment) + " bytes");
        }
    }
}

Slot& DeviceCopier::Engine::free_slot() {
    const auto slot = std::find_if(slots_.begin(), slots_.end(), [](const Slot& one) { return one.ticket == kFree; });
    if (slot == slots_.end()) throw Busy(std::to_string(slots_.size()) + " plans are under way already");
    return *slot;
}

// Where the device finds the extent at an offset of the pool; null where it does not.
u8* DeviceCopier::Engine::reached(u64 offset) const {
    auto next = ranges_.upper_bound(offset);
    if (next == ranges_.begin()) return nullptr;
    const auto& [start, range] = *std::prev(next);
    if (offset - start > range.bytes || layout_.extent_bytes > range.bytes - (offset - start)) return nullptr;
    return range.device + (offset - start);
}

// Addresses for the device of all extents, or of their places in the bounce buffer where it cannot reach one of them.
std::vector<u8*> DeviceCopier::Engine::place_extents(Slot& slot) const {
    std::vector<u8*> places;
    for (const u64 offset : slot.plan.offsets) places.push_back(reached(offset));
    slot.bounced = std::find(places.begin(), places.end(), nullptr) != places.end();
    if (!slot.bounced) return places;
    if (bounce_is_taken_) throw Busy("the pool is being registered, and the memory for meanwhile is in use");
    for (std::size_t chunk = 0; chunk < places.size(); ++chunk) places[chunk] = bounce_.as<u8>() + chunk * stride_;
    return places;
}

// Between the extents of a plan and their places in the bounce buffer.
void DeviceCopier::Engine::bounce(const Slot& slot) const {
    for (std::size_t chunk = 0; chunk < slot.plan.num_chunks(); ++chunk) {
        u8* extent = pool_ + slot.plan.offsets[chunk];
        u8* place = bounce_.as<u8>() + chunk * stride_;
        const bool storing = slot.plan.direction == Direction::store;
        std::memcpy(storing ? extent : place, storing ? place : extent, layout_.extent_bytes);
    }
}

u64 DeviceCopier::Engine::submit(Plan plan, cudaStream_t stream) {
    check(plan);
    const std::lock_guard lock(mutex_);
    if (failed_) throw std::runtime_error("CUDA failed before: this copier is over");
    Slot& slot = free_slot();
    slot.plan = std::move(plan);
    const std::vector<u8*> places = place_extents(slot);
    if (slot.bounced && slot.plan.direction == Direction::retrieve) bounce(slot);
    slot.ticket = ++last_ticket_;
    bounce_is_taken_ = bounce_is_taken_ || slot.bounced;
    try {
        enqueue(slot, places, stream);
    } catch (...) {
        failed_ = true;
        throw;
    }
    return slot.ticket;
}

void DeviceCopier::Engine::enqueue(Slot& slot, const std::vector<u8*>& places, cudaStream_t stream) {
    const std::size_t num_chunks = places.size();
    u64* const addresses = slot.tables.as<u64>();
    auto* const ids = reinterpret_cast<std::int32_t*>(addresses + num_chunks);
    for (std::size_t i = 0; i < num_chunks; ++i) addresses[i] = reinterpret_cast<u64>(places[i]);
    const std::vector<std::int64_t>& blocks = slot.plan.blocks;
    for (std::size_t i = 0; i < blocks.size(); ++i) ids[i] = static_cast<std::int32_t>(blocks[i]);
    const std::size_t table_bytes = num_chunks * sizeof(u64) + blocks.size() * sizeof(std::int32_t);
    demand(cudaMemcpyAsync(slot.device_tables.get(), addresses, table_bytes, cudaMemcpyHostToDevice, stream),
           "send a plan");
    Job job{};
    job.planes = device_planes_.as<const DevicePlane>();
    job.leaves = device_leaves_.as<const DeviceLeaf>();
    job.extents = slot.device_tables.as<const u64>();
    job.blocks = reinterpret_cast<const std::int32_t*>(job.extents + num_chunks);
    job.extent_bytes = layout_.extent_bytes;
    job.hashes = slot.hashes.as<u64>();
    job.short_leaves = slot.short_leaves.as<unsigned char>();
    job.leaves_per_chunk = static_cast<std::uint32_t>(layout_.leaves.size());
    job.blocks_per_chunk = layout_.blocks_per_chunk;
    job.end = static_cast<std::uint32_t>(num_chunks * layout_.leaves.size());
    if (layout_.extent_bytes > limits_.direct_bytes_max && !slot.bounced) {
        // The host's own addresses: DMA is told those.
        std::vector<u8*> extents;
        for (const u64 offset : slot.plan.offsets) extents.push_back(pool_ + offset);
        ring_.enqueue(slot.plan.direction, job, extents, limits_.thread_blocks_max, stream, slot.done.get());
        return;
    }
    demand(launch(slot.plan.direction, job, limits_.thread_blocks_max, stream), "launch a copy");
    demand(cudaEventRecord(slot.done.get(), stream), "record an event");
}

Slot* DeviceCopier::Engine::ended(u64 ticket) {
    const std::lock_guard lock(mutex_);
    const auto slot = std::find_if(slots_.begin(), slots_.end(), [&](const Slot& one) { return one.ticket == ticket; });
    if (ticket == kFree || ticket == kEnding || slot == slots_.end()) {
        throw std::invalid_argument("no plan under way has the ticket " + std::to_string(ticket));
    }
    const cudaError_t state = failed_ ? cudaErrorUnknown : cudaEventQuery(slot->done.get());
    if (state == cudaErrorNotReady) return nullptr;
    failed_ = state != cudaSuccess;
    demand(state, "a copy");
    slot->ticket = kEnding;
    return &*slot;
}

std::optional<std::vector<u64>> DeviceCopier::Engine::finish(u64 ticket) {
    Slot* const slot = ended(ticket);
    if (slot == nullptr) return std::nullopt;
    if (slot->bounced && slot->plan.direction == Direction::store) bounce(*slot);
    std::vector<u64> sums = results(*slot);
    const std::lock_guard lock(mutex_);
    if (slot->bounced) bounce_is_taken_ = false;
    slot->ticket = kFree;
    return sums;
}

std::vector<u64> DeviceCopier::Engine::results(const Slot& slot) const {
    const Kernels& kernels = best_kernels();
    const std::size_t num_leaves = layout_.leaves.size();
    const u64 last_bytes = layout_.extent_bytes - (num_leaves - 1) * kLeafBytes;
    std::vector<u64> sums;
    for (std::size_t chunk = 0; chunk < slot.plan.num_chunks(); ++chunk) {
        u64* const hashes = slot.hashes.as<u64>() + chunk * num_leaves;
        if (last_bytes <= kShortBytesMax) {
            hashes[num_leaves - 1] =
                xxh3_64(kernels, slot.short_leaves.as<u8>() + chunk * kShortLeafRoom, last_bytes, 0);
        }
        const u64 sum = checksum_of(kernels, hashes, num_leaves, slot.plan.seeds[chunk]);
        const bool storing = slot.plan.direction == Direction::store;
        sums.push_back(storing ? sum : sum == slot.plan.checksums[chunk]);
    }
    return sums;
}

DeviceCopier::DeviceCopier(std::vector<Plane> planes, std::vector<Group> groups, std::uint8_t* pool,
                           std::uint64_t pool_bytes, const CopierLimits& limits) {
    const OnDevice here(limits.device);
    engine_ = std::make_unique<Engine>(std::move(planes), std::move(groups), pool, pool_bytes, limits);
}

DeviceCopier::~DeviceCopier() {
    const OnDevice here(engine_->limits().device);
    engine_.reset();
}

std::uint64_t DeviceCopier::extent_bytes() const { return engine_->layout().extent_bytes; }

std::size_t DeviceCopier::chunks_max() const { return engine_->chunks_max(); }

void DeviceCopier::register_range(std::uint64_t offset, std::uint64_t bytes) {
    const OnDevice here(engine_->limits().device);
    engine_->register_range(offset, bytes);
}

std::uint64_t DeviceCopier::submit(Direction direction, std::vector<std::int64_t> blocks,
                                   std::vector<std::uint64_t> offsets, std::vector<std::uint64_t> seeds,
                                   std::vector<std::uint64_t> checksums, void* stream) {
    Plan plan{};
    plan.direction = direction;
    plan.blocks = std::move(blocks);
    plan.offsets = std::move(offsets);
    plan.seeds = std::move(seeds);
    plan.checksums = std::move(checksums);
    const OnDevice here(engine_->limits().device);
    return engine_->submit(std::move(plan), static_cast<cudaStream_t>(stream));
}

std::optional<std::vector<std::uint64_t>> DeviceCopier::finish(std::uint64_t ticket) {
    const OnDevice here(engine_->limits().device);
    return engine_->finish(ticket);
}

}  // namespace lmcache::cuda
