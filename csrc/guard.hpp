// Memory that somebody else may take away: a shared file can be cut while it is mapped, and touching what is gone is a
// SIGBUS, which ends a process. Inside guarded ranges it does not.
#pragma once

#include <cstddef>

namespace lmcache {

// Guards [begin, begin + bytes) for as long as the returned slot is held; -1 when there is no slot left. The first call
// installs the process's handler of SIGBUS. A page of a guarded range that is gone is replaced by zeros of this process's
// own, so that whatever touched it, here or in any library, goes on; `lost` tells of it afterwards. Faults elsewhere, and
// signals that somebody sent, are the business of the handler that was there before.
int guard(const void* begin, std::size_t bytes);

// Ends it; to be called before the range is unmapped.
void unguard(int slot);

// Whether any page of the guarded range around `at` was replaced. False for memory that is not guarded.
bool lost(const void* at);

}  // namespace lmcache
