// Copying threads: born and gone within one call, so that a fork of the engine finds none.
#pragma once

#include <functional>

namespace lmcache {

// Runs `work` in `count` threads at once and returns when all are done. The threads may use every CPU of the machine:
// the caller is often pinned to one core by its engine, and that core is busy. `work` must not throw, and every run
// must take on whatever the others left, since a machine short of threads starts fewer.
void fan_out(unsigned count, const std::function<void()>& work);

}  // namespace lmcache
