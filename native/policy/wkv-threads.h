#pragma once

// Work that is cut into independent pieces.

#include <cstddef>
#include <cstdint>
#include <functional>

namespace wkv {

// Calls fn(0) to fn(n - 1), each once, on the caller's thread and on n_threads - 1 others. What a call throws is thrown here, after
// all threads have ended; some calls are then left out. Threads that the system refuses are done without.
void for_each(int32_t n_threads, size_t n, const std::function<void(size_t)> & fn);

} // namespace wkv
