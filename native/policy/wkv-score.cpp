// Pooling of scores.

#include "wkv-ranking.h"

#include <algorithm>

namespace wkv {

// the largest of those from `before` places before to `after` places behind
template <typename T>
static std::vector<T> max_pool(const T * score, int64_t n, int64_t before, int64_t after) {
    if (before + after == 0) {
        return { score, score + n };
    }

    std::vector<T> res(n);

    // spans that begin with the first place
    int64_t next = 0;
    T       best = n > 0 ? score[0] : T(0);
    for (int64_t i = 0; i < std::min(before, n); ++i) {
        for (; next <= std::min(n - 1, i + after); ++next) {
            best = std::max(best, score[next]);
        }
        res[i] = best;
    }

    // spans that end with the last one
    next = n - 1;
    best = n > 0 ? score[n - 1] : T(0);
    for (int64_t i = n - 1; i >= std::max(before, n - after); --i) {
        for (; next >= i - before; --next) {
            best = std::max(best, score[next]);
        }
        res[i] = best;
    }

    // Whole spans: two that overlap, whose length is a power of two. Lengths are doubled in place, in loops that vectorise.
    const int64_t span = before + after + 1;
    if (n >= span) {
        std::vector<T> cur(score, score + n);
        int64_t length = 1;
        for (; 2*length <= span; length *= 2) {
            for (int64_t i = 0; i + length < n; ++i) {
                cur[i] = std::max(cur[i], cur[i + length]);
            }
        }
        for (int64_t i = before; i < n - after; ++i) {
            res[i] = std::max(cur[i - before], cur[i + after + 1 - length]);
        }
    }
    return res;
}

template <typename T>
static std::vector<T> max_pool_of(const scoring & scoring, const T * score, int32_t n) {
    const bool centred = scoring.pooling == pooling::max;
    return max_pool<T>(score, n, centred ? scoring.kernel_size/2 : scoring.kernel_size - 1, centred ? scoring.kernel_size/2 : 0);
}

std::vector<float> max_pool(const scoring & scoring, const float * score, int32_t n) {
    return max_pool_of(scoring, score, n);
}

std::vector<double> max_pool(const scoring & scoring, const double * score, int32_t n) {
    return max_pool_of(scoring, score, n);
}

} // namespace wkv
