#include "copy.hpp"

#include <algorithm>
#include <atomic>

#include "leaf.hpp"
#include "threads.hpp"

namespace lmcache {

namespace {

// Work is handed out in runs of this many leaves, 512 KiB: small enough that one chunk is shared by all threads, large
// enough that finding a run's first fragment and taking the next run cost nothing.
constexpr std::size_t kRunLeaves = 32;

class Copy {
public:
    Copy(const Plan& plan, const Kernels& kernels)
        : plan_(plan),
          kernels_(kernels),
          leaves_per_chunk_((plan.extent_bytes + kLeafBytes - 1) / kLeafBytes),
          runs_per_chunk_((leaves_per_chunk_ + kRunLeaves - 1) / kRunLeaves),
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

    const Plan& plan_;
    const Kernels& kernels_;
    const std::size_t leaves_per_chunk_;
    const std::size_t runs_per_chunk_;
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
