// What heads hold.

#include "wkv-ranking.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace wkv {

std::vector<int64_t> water_fill(
                          double     base,
        const std::vector<double>  & share,
        const std::vector<int64_t> & lo,
        const std::vector<int64_t> & hi,
                         int64_t     total) {
    const size_t n = share.size();

    // Any scale will do, and powers of two keep the digits. With the largest weight near the end of a double's range, the level
    // that fills a head of the smallest one is no more than a double holds.
    int exponent = 0;
    std::frexp(*std::max_element(share.begin(), share.end()), &exponent);
    std::vector<double> weight(n);
    for (size_t i = 0; i < n; ++i) {
        weight[i] = std::ldexp(share[i], 900 - exponent);
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
            break; // neighbours, after some 1,100 steps at most
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

// HeadKV's authors round and cut, what exceeds a head is lost
static std::vector<int64_t> paper_importance(const policy & policy, const std::vector<int64_t> & hi, int64_t n_cells) {
    const allocation & p      = policy.allocation;
    const int64_t      recent = policy.selection.n_recent;
    const int64_t      mean   = n_cells - recent;
    const double       sum    = std::accumulate(p.importance, p.importance + hi.size(), 0.0);
    const bool         fits   = std::all_of(hi.begin(), hi.end(), [&](int64_t n) { return n < n_cells; });

    std::vector<int64_t> res(hi.size(), n_cells);
    if (mean > 0 && sum > 0.0 && !fits) {
        const int64_t divided = floor_div(mean, p.beta);
        const double  pool    = double(divided)*double(hi.size());
        for (size_t i = 0; i < hi.size(); ++i) {
            // to even, as round() of Python does in the default rounding mode
            res[i] = recent + std::llrint(std::min(p.importance[i]/sum*pool + double(mean - divided), double(hi[i])));
        }
    }
    for (size_t i = 0; i < hi.size(); ++i) {
        res[i] = std::min(res[i], hi[i]);
    }
    return res;
}

// HeadKV (arXiv 2410.19258, section 3.2): 1/beta of the cells is divided by importance, the rest equally
std::vector<int64_t> importance_budgets(const policy & policy, const std::vector<int64_t> & hi, int64_t n_cells) {
    const allocation & p = policy.allocation;
    if (p.accounting == accounting::paper) {
        return paper_importance(policy, hi, n_cells);
    }

    std::vector<int64_t> lo(hi.size());
    for (size_t i = 0; i < hi.size(); ++i) {
        lo[i] = std::min({ int64_t(policy.selection.n_recent), n_cells, hi[i] });
    }
    std::vector<double> weight(hi.size(), 0.0);
    if (p.divides()) {
        weight.assign(p.importance, p.importance + hi.size());
    }
    const int64_t n_divided = std::max<int64_t>(0, n_cells - p.importance_floor);
    const double  share     = p.beta > 0.0 ? 1.0/p.beta : 0.0;

    return water_fill(double(n_cells) - double(n_divided)*share, weight, lo, hi, n_cells*int64_t(hi.size()));
}

std::vector<int32_t> own_budgets(const cache_view & view, const int32_t * budgets) {
    const int64_t n_head_kv = view.shapes.n_head_kv;
    const size_t  n         = view.offsets.size() - 1;

    std::vector<int32_t> res(budgets, budgets + n);
    if (view.policy.allocation.heads != heads::score) {
        return res;
    }
    if (view.policy.allocation.competes_in_model()) {
        const std::vector<int64_t> cells(view.shapes.cells, view.shapes.cells + n);
        const int64_t total = std::accumulate(res.begin(), res.end(), int64_t(0));
        const auto    own   = importance_budgets(view.policy, cells, total/int64_t(n));
        res.assign(own.begin(), own.end());
        return res;
    }
    for (auto first = res.begin(); first != res.end(); first += n_head_kv) {
        std::fill(first, first + n_head_kv, int32_t(std::accumulate(first, first + n_head_kv, int64_t(0))/n_head_kv));
    }
    return res;
}

} // namespace wkv
