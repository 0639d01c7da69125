// Carries out a checked plan.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "plan.hpp"

namespace lmcache {

// Moves every chunk of the plan and returns the checksum of each.
std::vector<std::uint64_t> copy(const Plan& plan, const Kernels& kernels);

}  // namespace lmcache
