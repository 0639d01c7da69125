// Moves leaves between the paged memory of an engine on a GPU and extents, and hashes them on the way.
//
// One warp takes one leaf: 16 KiB of a chunk's extent, that is some token slots of one layer. Each step moves 2 KiB:
// every thread loads four vectors of 16 bytes, stores them, and gives those same registers to the hash, so that what is
// hashed is what was written. Extents lie in memory of the host that the device has mapped, or in its staging ring.
//
// Hopper's bulk copy engine (cp.async.bulk) is not used: it moves runs from memory to shared memory, never through
// registers, so hashing would read shared memory once more; in canonical form the runs of most layouts are 128 to 512
// bytes; and the bound here is PCIe, which ordinary loads of few warps fill.
#include "cuda_kernels.hpp"
#include "cuda_xxh3.cuh"
#include "leaf.hpp"
#include "xxh3.hpp"

namespace lmcache::cuda {

namespace {

constexpr auto kLeafBytes = static_cast<std::uint32_t>(lmcache::kLeafBytes);
constexpr std::uint32_t kVectorBytes = 16;
constexpr std::uint32_t kRowBytes = 32 * kVectorBytes;  // what a warp moves with one vector a thread

template <std::uint32_t Width>
struct WordOf;
template <>
struct WordOf<1> {
    using type = unsigned char;
};
template <>
struct WordOf<2> {
    using type = unsigned short;
};
template <>
struct WordOf<4> {
    using type = unsigned int;
};
template <>
struct WordOf<8> {
    using type = unsigned long long;
};
template <>
struct WordOf<16> {
    using type = ulonglong2;
};
template <std::uint32_t Width>
using Word = typename WordOf<Width>::type;

// Byte i of a vector, i being a multiple of Width.
template <std::uint32_t Width>
__device__ Word<Width> part_of(const ulonglong2& vector, std::uint32_t i) {
    return static_cast<Word<Width>>((i < 8 ? vector.x : vector.y) >> (8 * (i % 8)));
}

template <std::uint32_t Width>
__device__ void put_part(ulonglong2& vector, std::uint32_t i, Word<Width> part) {
    (i < 8 ? vector.x : vector.y) |= static_cast<unsigned long long>(part) << (8 * (i % 8));
}

// A thread's way through a leaf's planes; positions only grow.
class Pages {
public:
    __device__ Pages(const Job& job, std::uint32_t chunk, const DeviceLeaf& leaf)
        : plane_(job.planes + leaf.first_plane),
          blocks_(job.blocks + static_cast<std::size_t>(chunk) * job.blocks_per_chunk) {}

    // Where byte `at` of the extent lies in the engine's memory; null where its block is kNoBlock.
    __device__ unsigned char* place(u64 at) {
        while (at >= plane_->end) ++plane_;
        const auto offset = static_cast<std::uint32_t>(at - plane_->start);
        const std::uint32_t nth_block = plane_->block.divide(offset);
        const std::int32_t id = blocks_[plane_->first_block + nth_block];
        if (id == kNoBlock) return nullptr;
        return reinterpret_cast<unsigned char*>(plane_->place(offset, nth_block, static_cast<std::uint32_t>(id)));
    }

    // Up to 16 bytes, as many as are left of the leaf.
    template <std::uint32_t Width>
    __device__ ulonglong2 load(u64 at, std::uint32_t bytes) {
        if constexpr (Width == kVectorBytes) {
            return __ldcv(reinterpret_cast<const ulonglong2*>(place(at)));
        } else {
            ulonglong2 vector = make_ulonglong2(0, 0);
#pragma unroll 1
            for (std::uint32_t i = 0; i < kVectorBytes && i < bytes; i += Width) {
                put_part<Width>(vector, i, __ldcv(reinterpret_cast<const Word<Width>*>(place(at + i))));
            }
            return vector;
        }
    }

    template <std::uint32_t Width>
    __device__ void store(u64 at, std::uint32_t bytes, const ulonglong2& vector) {
        if constexpr (Width == kVectorBytes) {
            if (unsigned char* to = place(at)) *reinterpret_cast<ulonglong2*>(to) = vector;
        } else {
#pragma unroll 1
            for (std::uint32_t i = 0; i < kVectorBytes && i < bytes; i += Width) {
                unsigned char* to = place(at + i);
                if (to != nullptr) *reinterpret_cast<Word<Width>*>(to) = part_of<Width>(vector, i);
            }
        }
    }

private:
    const DevicePlane* plane_;
    const std::int32_t* blocks_;
};

// Extents begin on 16-byte boundaries, so only the end of one is ever less than a vector.
__device__ ulonglong2 load_extent(const unsigned char* from, std::uint32_t bytes) {
    if (bytes >= kVectorBytes) return __ldcv(reinterpret_cast<const ulonglong2*>(from));
    ulonglong2 vector = make_ulonglong2(0, 0);
    for (std::uint32_t i = 0; i < bytes; ++i) put_part<1>(vector, i, __ldcv(from + i));
    return vector;
}

__device__ void store_extent(unsigned char* to, std::uint32_t bytes, const ulonglong2& vector) {
    if (bytes >= kVectorBytes) return __stcs(reinterpret_cast<ulonglong2*>(to), vector);
    for (std::uint32_t i = 0; i < bytes; ++i) to[i] = part_of<1>(vector, i);
}

template <Direction Way, std::uint32_t Width>
__device__ ulonglong2 load(Pages& pages, const unsigned char* extent, u64 at, std::uint32_t bytes) {
    if constexpr (Way == Direction::store) return pages.load<Width>(at, bytes);
    return load_extent(extent + at, bytes);
}

template <Direction Way, std::uint32_t Width>
__device__ void store(Pages& pages, unsigned char* extent, u64 at, std::uint32_t bytes, const ulonglong2& vector) {
    if constexpr (Way == Direction::store) return store_extent(extent + at, bytes, vector);
    pages.store<Width>(at, bytes, vector);
}

// One leaf by one warp. Returns its hash, or what finish() makes of nothing where `short_leaf` takes its bytes.
template <Direction Way, std::uint32_t Width>
__device__ u64 move_leaf(const Job& job, std::uint32_t chunk, std::uint32_t nth_leaf, unsigned char* tail) {
    // Narrow loads are many already.
    constexpr std::uint32_t kDepth = Width == kVectorBytes ? 4 : 2;
    const std::uint32_t lane = threadIdx.x % 32;
    const u64 start = static_cast<u64>(nth_leaf) * kLeafBytes;
    const u64 rest = job.extent_bytes - start;
    const std::uint32_t bytes = rest < kLeafBytes ? static_cast<std::uint32_t>(rest) : kLeafBytes;
    const u64 base = job.extents != nullptr ? job.extents[chunk] : job.extents_base + chunk * job.extents_stride;
    unsigned char* extent = reinterpret_cast<unsigned char*>(base);
    Pages loads(job, chunk, job.leaves[nth_leaf]);
    Pages stores = loads;
    WarpHash hash(lane, bytes, tail);
    for (std::uint32_t step = 0; step < bytes; step += kDepth * kRowBytes) {
        ulonglong2 vectors[kDepth];
#pragma unroll
        for (std::uint32_t i = 0; i < kDepth; ++i) {
            const std::uint32_t here = step + i * kRowBytes + lane * kVectorBytes;
            vectors[i] = make_ulonglong2(0, 0);
            if (here < bytes) vectors[i] = load<Way, Width>(loads, extent, start + here, bytes - here);
        }
#pragma unroll
        for (std::uint32_t i = 0; i < kDepth; ++i) {
            const std::uint32_t here = step + i * kRowBytes + lane * kVectorBytes;
            if (here < bytes) store<Way, Width>(stores, extent, start + here, bytes - here, vectors[i]);
        }
        if (bytes <= kShortBytesMax) {
            unsigned char* room = job.short_leaves + static_cast<std::size_t>(chunk) * kShortLeafRoom;
            if (lane < kShortLeafRoom / kVectorBytes) reinterpret_cast<ulonglong2*>(room)[lane] = vectors[0];
            return 0;
        }
#pragma unroll
        for (std::uint32_t i = 0; i < kDepth; i += 2) {
            const std::uint32_t at = step + i * kRowBytes;
            if (at < bytes) hash.add(at, vectors[i], vectors[i + 1]);
        }
    }
    return hash.finish();
}

template <Direction Way>
__device__ void move_leaves(const Job& job) {
    __shared__ __align__(16) unsigned char tails[kWarpsPerBlock][kTailBytes];
    unsigned char* tail = tails[threadIdx.x / 32];
    const std::uint32_t warps = gridDim.x * kWarpsPerBlock;
    for (std::uint32_t item = job.first + blockIdx.x * kWarpsPerBlock + threadIdx.x / 32; item < job.end;
         item += warps) {
        const std::uint32_t chunk = item / job.leaves_per_chunk;
        const std::uint32_t leaf = item - chunk * job.leaves_per_chunk;
        u64 hash = 0;
        switch (job.leaves[leaf].width) {
            case 16: hash = move_leaf<Way, 16>(job, chunk, leaf, tail); break;
            case 8: hash = move_leaf<Way, 8>(job, chunk, leaf, tail); break;
            case 4: hash = move_leaf<Way, 4>(job, chunk, leaf, tail); break;
            case 2: hash = move_leaf<Way, 2>(job, chunk, leaf, tail); break;
            default: hash = move_leaf<Way, 1>(job, chunk, leaf, tail);
        }
        if (threadIdx.x % 32 == 0) job.hashes[item] = hash;
    }
}

__global__ void __launch_bounds__(kThreadsPerBlock) gather(const Job job) { move_leaves<Direction::store>(job); }

__global__ void __launch_bounds__(kThreadsPerBlock) scatter(const Job job) { move_leaves<Direction::retrieve>(job); }

}  // namespace

cudaError_t launch(Direction direction, const Job& job, std::uint32_t blocks_max, cudaStream_t stream) {
    const std::uint32_t blocks = (job.end - job.first + kWarpsPerBlock - 1) / kWarpsPerBlock;
    cudaLaunchConfig_t config{};
    config.gridDim.x = blocks < blocks_max ? blocks : blocks_max;
    config.gridDim.y = config.gridDim.z = 1;
    config.blockDim.x = kThreadsPerBlock;
    config.blockDim.y = config.blockDim.z = 1;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, direction == Direction::store ? gather : scatter, job);
}

}  // namespace lmcache::cuda
