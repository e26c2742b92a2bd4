#include "wkv-policy.h"

#include <algorithm>
#include <cmath>
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

// n values that fall linearly from first to last
static std::vector<int64_t> fall(int64_t first, int64_t last, int64_t n) {
    std::vector<int64_t> res(n);
    for (int64_t i = 0; i < n; ++i) {
        res[i] = n == 1 ? (first + last)/2 : first - (first - last)*i/(n - 1);
    }
    return res;
}

// PyramidKV (arXiv 2406.02069, eq. 5): the suffix is on top of an arithmetic sequence over the layers
static std::vector<int64_t> want_pyramidkv(const wkv_policy & policy, int64_t n_layer, int64_t n_cells) {
    const int64_t suffix = std::min<int64_t>(policy.suffix, n_cells);
    const int64_t mean   = n_cells - suffix;
    const int64_t last   = std::min(mean, int64_t(std::floor(double(mean)/policy.slope)));

    auto res = fall(2*mean - last, last, n_layer);
    for (auto & b : res) {
        b += suffix;
    }
    return res;
}

// WindowKV (arXiv 2503.17922, section 3.4): one budget per group of gamma layers, falling over the groups
static std::vector<int64_t> want_windowkv(const wkv_policy & policy, int64_t n_layer, int64_t n_cells) {
    const int64_t gamma    = policy.gamma;
    const int64_t n_groups = (n_layer + gamma - 1)/gamma;

    std::vector<int64_t> groups(n_groups, n_cells);
    if (policy.shape == WKV_SHAPE_ARITHMETIC && n_groups > 1) {
        const int64_t last  = std::min(n_cells, int64_t(std::floor(double(n_cells*gamma)/policy.slope)));
        const int64_t first = 2*n_cells - last;

        groups = fall(first, last, n_groups);

        // the authors' code takes equal integer steps and sets the last group by itself
        if (policy.accounting == WKV_ACCOUNTING_PAPER) {
            const int64_t step = (first - last)/(n_groups - 1);
            for (int64_t g = 0; g < n_groups - 1; ++g) {
                groups[g] = first - g*step;
            }
        }
    }

    std::vector<int64_t> res(n_layer);
    for (int64_t il = 0; il < n_layer; ++il) {
        res[il] = groups[il/gamma];
    }
    return res;
}

std::vector<int32_t> budgets(const wkv_policy & policy, const wkv_shapes & shapes, int64_t n_cells) {
    const int64_t n_layer = shapes.n_layer;

    n_cells = std::min<int64_t>(n_cells, INT32_MAX); // no head holds more

    std::vector<int64_t> hi(shapes.cells, shapes.cells + n_layer);
    std::vector<int64_t> res;

    if (policy.kind == WKV_KIND_FULL) {
        res = hi;
    } else if (policy.kind == WKV_KIND_WINDOWKV && policy.accounting == WKV_ACCOUNTING_PAPER) {
        // the authors keep the observation window on top of the budget and do not correct the mean
        res = want_windowkv(policy, n_layer, n_cells);
        for (int64_t il = 0; il < n_layer; ++il) {
            res[il] = std::min(res[il] + policy.alpha, hi[il]);
        }
    } else {
        std::vector<int64_t> want(n_layer, n_cells);
        int64_t floor = 1;

        if (policy.kind == WKV_KIND_PYRAMIDKV) {
            want  = want_pyramidkv(policy, n_layer, n_cells);
            floor = policy.suffix + 1;
        } else if (policy.kind == WKV_KIND_WINDOWKV) {
            want  = want_windowkv(policy, n_layer, n_cells);
            floor = policy.suffix + policy.omega;
        }

        std::vector<int64_t> lo(n_layer);
        for (int64_t il = 0; il < n_layer; ++il) {
            lo[il] = std::min({ floor, n_cells, hi[il] });
        }

        res = apportion(want, lo, hi, n_cells*n_layer);
    }

    return std::vector<int32_t>(res.begin(), res.end());
}

} // namespace wkv
