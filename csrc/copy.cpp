#include "copy.hpp"

#include <algorithm>
#include <atomic>

#include "leaf.hpp"
#include "threads.hpp"
#include "xxh3.hpp"

namespace lmcache {

namespace {

// Work is handed out in runs of this many leaves, 512 KiB: small enough that one chunk is shared by all threads, large
// enough that finding a run's first fragment and taking the next run cost nothing.
constexpr std::size_t kRunLeaves = 32;

constexpr std::size_t kRunBlocks = kRunLeaves * kLeafBlocks;
constexpr std::size_t kNextBlocks = 2 * kLeafBlocks;  // behind a run: those that a Pair fetches ahead

bool in_lines(const std::uint8_t* at) { return reinterpret_cast<std::uintptr_t>(at) % 64 == 0; }

// Whether every block of a leaf lies within one run of the engine's memory.
bool has_whole_blocks(const Plan& plan) {
    return std::all_of(plan.planes.begin(), plan.planes.end(),
                       [](const Plane& plane) { return plane.run % kBlockBytes == 0; });
}

class Copy {
public:
    Copy(const Plan& plan, const Kernels& kernels)
        : plan_(plan),
          kernels_(kernels),
          leaves_per_chunk_((plan.extent_bytes + kLeafBytes - 1) / kLeafBytes),
          runs_per_chunk_((leaves_per_chunk_ + kRunLeaves - 1) / kRunLeaves),
          has_whole_blocks_(has_whole_blocks(plan)),
          hashes_(leaves_per_chunk_ * plan.num_chunks()) {}

    std::size_t num_runs() const { return runs_per_chunk_ * plan_.num_chunks(); }

    // Takes runs until none is left; any number of threads at once.
    void work() {
        for (std::size_t run = next_++; run < num_runs(); run = next_++) {
            const std::size_t first = run % runs_per_chunk_ * kRunLeaves;
            move(run / runs_per_chunk_, first, std::min(first + kRunLeaves, leaves_per_chunk_));
        }
        kernels_.fence();
    }

    std::vector<std::uint64_t> checksums() const {
        std::vector<std::uint64_t> sums(plan_.num_chunks());
        for (std::size_t chunk = 0; chunk < sums.size(); ++chunk) {
            const std::uint64_t* leaves = hashes_.data() + chunk * leaves_per_chunk_;
            sums[chunk] = checksum_of(kernels_, leaves, leaves_per_chunk_, plan_.seeds[chunk]);
        }
        return sums;
    }

private:
    void move(std::size_t chunk, std::size_t first, std::size_t end) {
        first = move_pairs(chunk, first, end);
        if (first == end) return;
        std::uint64_t at = first * kLeafBytes;
        Fragments fragments(plan_, chunk, at);
        std::uint8_t* extent = plan_.pool + plan_.offsets[chunk];
        for (std::size_t leaf = first; leaf < end; ++leaf, at += kLeafBytes) {
            const std::size_t bytes = std::min<std::uint64_t>(kLeafBytes, plan_.extent_bytes - at);
            hashes_[chunk * leaves_per_chunk_ + leaf] =
                plan_.direction == Direction::store ? store_leaf(kernels_, fragments, extent + at, bytes)
                                                    : retrieve_leaf(kernels_, extent + at, fragments, bytes);
        }
    }

    // Moves as many leaves as can go in pairs; returns the first that is left.
    std::size_t move_pairs(std::size_t chunk, std::size_t first, std::size_t end) {
        const std::size_t count = (std::min(end, plan_.extent_bytes / kLeafBytes) - first) / 2 * 2;
        std::uint8_t* const extent = plan_.pool + plan_.offsets[chunk] + first * kLeafBytes;
        if (kernels_.pair == nullptr || !has_whole_blocks_ || count == 0 || !in_lines(extent)) return first;
        std::uint8_t* engine[kRunBlocks + kNextBlocks];
        std::uint8_t* pool[kRunBlocks + kNextBlocks];
        const std::size_t num_blocks = count * kLeafBlocks;
        if (!locate(chunk, first * kLeafBytes, num_blocks, engine)) return first;
        for (std::size_t i = 0; i < num_blocks + kNextBlocks; ++i) pool[i] = extent + i * kBlockBytes;
        const bool stores = plan_.direction == Direction::store;
        std::uint64_t* const hashes = hashes_.data() + chunk * leaves_per_chunk_ + first;
        for (std::size_t leaf = 0; leaf < count; leaf += 2) {
            const std::size_t block = leaf * kLeafBlocks;
            xxh3_64_pair(kernels_.pair, (stores ? engine : pool) + block, (stores ? pool : engine) + block,
                         hashes + leaf);
        }
        return first + count;
    }

    // Where the blocks from byte `at` of a chunk on lie in the engine's memory, and kNextBlocks behind them; behind the
    // end of the chunk the last one again. False where one is written nowhere, or not in whole lines.
    bool locate(std::size_t chunk, std::uint64_t at, std::size_t num_blocks, std::uint8_t** blocks) const {
        Fragments fragments(plan_, chunk, at);
        const std::size_t left = (plan_.extent_bytes - at) / kBlockBytes;
        const std::size_t known = std::min(num_blocks + kNextBlocks, left);
        for (std::size_t block = 0; block < known;) {
            std::uint8_t* const here = fragments.here();
            if (here == nullptr || (plan_.direction == Direction::retrieve && !in_lines(here))) return false;
            const std::size_t piece = std::min<std::uint64_t>(fragments.left() / kBlockBytes, known - block);
            for (std::size_t i = 0; i < piece; ++i) blocks[block + i] = here + i * kBlockBytes;
            fragments.advance(piece * kBlockBytes);
            block += piece;
        }
        std::fill(blocks + known, blocks + num_blocks + kNextBlocks, blocks[known - 1]);
        return true;
    }

    const Plan& plan_;
    const Kernels& kernels_;
    const std::size_t leaves_per_chunk_;
    const std::size_t runs_per_chunk_;
    const bool has_whole_blocks_;
    std::vector<std::uint64_t> hashes_;
    std::atomic<std::size_t> next_ = 0;
};

}  // namespace

std::vector<std::uint64_t> copy(const Plan& plan, const Kernels& kernels) {
    if (plan.num_chunks() == 0) return {};
    Copy job(plan, kernels);
    fan_out(static_cast<unsigned>(std::min<std::size_t>(plan.threads, job.num_runs())), [&job] { job.work(); });
    return job.checksums();
}

}  // namespace lmcache
