// Pooling of scores.

#include "wkv-ranking.h"

#include <algorithm>

namespace wkv {

// the largest of those from `before` places before to `after` places behind; one pass over falling candidates
template <typename T>
static std::vector<T> max_pool(const T * score, int32_t n, int64_t before, int64_t after) {
    std::vector<T>       res(n);
    std::vector<int32_t> best; // from `first` on: places within the span, their scores fall
    size_t  first = 0;
    int32_t next  = 0;
    for (int32_t i = 0; i < n; ++i) {
        for (; next < n && next <= i + after; ++next) {
            while (best.size() > first && score[best.back()] <= score[next]) {
                best.pop_back();
            }
            best.push_back(next);
        }
        while (best[first] < i - before) {
            ++first;
        }
        res[i] = score[best[first]];
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
