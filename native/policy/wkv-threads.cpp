// Work that is cut into independent pieces.

#include "wkv-threads.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace wkv {

void for_each(int32_t n_threads, size_t n, const std::function<void(size_t)> & fn) {
    if (n_threads <= 1 || n <= 1) {
        for (size_t i = 0; i < n; ++i) {
            fn(i);
        }
        return;
    }

    std::atomic<size_t> next(0);
    std::mutex          mutex;
    std::exception_ptr  error;

    const auto work = [&] {
        try {
            for (size_t i = next++; i < n; i = next++) {
                fn(i);
            }
        } catch (...) {
            next = n;
            const std::lock_guard<std::mutex> lock(mutex);
            error = error ? error : std::current_exception();
        }
    };

    std::vector<std::thread> team;
    try {
        const size_t n_more = std::min<size_t>(n_threads, n) - 1;
        team.reserve(n_more);
        while (team.size() < n_more) {
            team.emplace_back(work);
        }
    } catch (const std::exception &) {
        // the threads that there are take its share
    }
    work();
    for (auto & thread : team) {
        thread.join();
    }
    if (error) {
        std::rethrow_exception(error);
    }
}

} // namespace wkv
