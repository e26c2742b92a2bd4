// Whole cells between bounds, with a sum that is met exactly.

#include "wkv-parts.h"

#include <algorithm>
#include <numeric>

namespace wkv {

std::vector<int64_t> apportion(
        const std::vector<int64_t> & want,
        const std::vector<int64_t> & lo,
        const std::vector<int64_t> & hi,
                         int64_t     total) {
    const size_t n = want.size();

    std::vector<int64_t> res(n);
    for (size_t i = 0; i < n; ++i) {
        res[i] = std::clamp(want[i], lo[i], hi[i]);
    }

    const auto sum = [](const std::vector<int64_t> & v) { return std::accumulate(v.begin(), v.end(), int64_t(0)); };

    total = std::clamp(total, sum(lo), sum(hi));

    int64_t diff = total - sum(res);
    while (diff != 0) {
        const int64_t sign = diff > 0 ? 1 : -1;

        std::vector<size_t> open;
        for (size_t i = 0; i < n; ++i) {
            if (sign > 0 ? res[i] < hi[i] : res[i] > lo[i]) {
                open.push_back(i);
            }
        }

        const int64_t share = std::max<int64_t>(1, sign*diff/int64_t(open.size()));
        for (const size_t i : open) {
            const int64_t room = sign > 0 ? hi[i] - res[i] : res[i] - lo[i];
            const int64_t step = sign*std::min({ share, room, sign*diff });

            res[i] += step;
            diff   -= step;
        }
    }

    return res;
}

std::vector<double> to_scale(std::vector<double> weight, int exponent) {
    int cur = 0;
    std::frexp(*std::max_element(weight.begin(), weight.end()), &cur);
    for (auto & w : weight) {
        w = std::ldexp(w, exponent - cur);
    }
    return weight;
}

std::vector<int64_t> water_fill(
                          double     base,
        const std::vector<double>  & share,
        const std::vector<int64_t> & lo,
        const std::vector<int64_t> & hi,
                         int64_t     total) {
    const size_t n = share.size();

    // With the largest weight at 2^900 and none under 2^-900, the level that fills a head of the smallest one is no more than a
    // double holds.
    std::vector<double> weight = to_scale(share, 900);
    for (size_t i = 0; i < n; ++i) {
        weight[i] = share[i] > 0.0 ? std::max(weight[i], std::ldexp(1.0, -900)) : 0.0;
    }

    const auto at = [&](double level, size_t i) {
        return std::clamp(base + level*weight[i], double(lo[i]), double(hi[i]));
    };
    const auto spent = [&](double level) {
        double sum = 0.0;
        for (size_t i = 0; i < n; ++i) {
            sum += at(level, i);
        }
        return sum;
    };

    // the largest level that does not overspend
    double least = 0.0; // of the weights over 0
    double most  = 0.0;
    for (size_t i = 0; i < n; ++i) {
        if (weight[i] > 0.0) {
            least = least > 0.0 ? std::min(least, weight[i]) : weight[i];
        }
        most = std::max(most, double(hi[i]));
    }
    double below = 0.0;
    double above = least > 0.0 ? most/least : 0.0;
    while (true) {
        const double mid = below + 0.5*(above - below);
        if (mid <= below || mid >= above) {
            break; // neighbours, after some 2,000 steps at most
        }
        (spent(mid) <= double(total) ? below : above) = mid;
    }

    std::vector<int64_t> res(n);
    std::vector<double>  part(n);
    for (size_t i = 0; i < n; ++i) {
        const double cur = at(below, i);
        res[i]  = int64_t(std::floor(cur));
        part[i] = cur - std::floor(cur);
    }

    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return part[a] > part[b]; });

    int64_t rest = total - std::accumulate(res.begin(), res.end(), int64_t(0));
    for (const size_t i : order) {
        if (rest > 0 && part[i] > 0.0 && res[i] < hi[i]) {
            res[i]++;
            rest--;
        }
    }
    return apportion(res, lo, hi, total);
}

} // namespace wkv
