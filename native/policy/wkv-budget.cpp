#include "wkv-policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
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

// budgets of heads that share a layer equally, [n_layer]; hi holds what a head of the layer can take
static std::vector<int64_t> layer_budgets(const wkv_policy & policy, const std::vector<int64_t> & hi, int64_t n_cells) {
    const int64_t n_layer = hi.size();

    if (policy.kind == WKV_KIND_WINDOWKV && policy.accounting == WKV_ACCOUNTING_PAPER) {
        // the authors keep the observation window on top of the budget and do not correct the mean
        auto res = want_windowkv(policy, n_layer, n_cells);
        for (int64_t il = 0; il < n_layer; ++il) {
            res[il] = std::min(res[il] + policy.alpha, hi[il]);
        }
        return res;
    }

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

    return apportion(want, lo, hi, n_cells*n_layer);
}

std::vector<int64_t> pour(
                          double     base,
        const std::vector<double>  & weight,
        const std::vector<int64_t> & lo,
        const std::vector<int64_t> & hi,
                         int64_t     total) {
    const size_t n = weight.size();

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
    for (int i = 0; i < 200; ++i) {
        const double mid = 0.5*(below + above);
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

// HeadKV (arXiv 2410.19258, section 3.2): a part of the cells is shared equally, the pool by importance
static std::vector<int64_t> importance_budgets(const wkv_policy & policy, const std::vector<int64_t> & hi, int64_t n_cells) {
    std::vector<int64_t> lo(hi.size());
    for (size_t i = 0; i < hi.size(); ++i) {
        lo[i] = std::min({ int64_t(policy.suffix), n_cells, hi[i] });
    }
    std::vector<double> weight(hi.size(), 0.0);
    if (policy.pool > 0.0 || policy.heads == WKV_HEADS_IMPORTANCE) {
        weight.assign(policy.importance, policy.importance + hi.size());
    }
    const int64_t n_divided = std::max<int64_t>(0, n_cells - policy.pool_floor);

    return pour(double(n_cells) - double(n_divided)*policy.pool, weight, lo, hi, n_cells*int64_t(hi.size()));
}

std::vector<int32_t> compete(const std::vector<std::vector<double>> & keys, const std::vector<int32_t> & own, double floor) {
    struct candidate {
        double  key;
        int32_t ih;
        int32_t i; // place in the ranking
    };

    const int32_t n_heads = keys.size();

    std::vector<int32_t>   res(n_heads);
    std::vector<candidate> open;

    int64_t rest = 0;
    for (int32_t ih = 0; ih < n_heads; ++ih) {
        const auto &  key     = keys[ih];
        const int64_t n       = key.size();
        const int64_t n_stays = std::min<int64_t>(own[ih], std::count(key.begin(), key.end(), std::numeric_limits<double>::infinity()));
        const int64_t n_sure  = std::min(n, n_stays + int64_t(std::floor((own[ih] - n_stays)*floor)));

        res[ih] = n_sure;
        rest += own[ih] - n_sure;
        for (int64_t i = n_sure; i < n; ++i) {
            open.push_back({ key[i], ih, int32_t(i) });
        }
    }

    rest = std::min<int64_t>(rest, open.size());

    // ties: the earlier place first, then the earlier head
    const auto better = [](const candidate & a, const candidate & b) {
        return a.key != b.key ? a.key > b.key : a.i != b.i ? a.i < b.i : a.ih < b.ih;
    };
    if (rest < (int64_t) open.size()) {
        std::nth_element(open.begin(), open.begin() + rest, open.end(), better);
    }
    for (int64_t i = 0; i < rest; ++i) {
        res[open[i].ih]++;
    }
    return res;
}

std::vector<int32_t> rank_budgets(const cache_view & view, const int32_t * budgets) {
    const int64_t n_head_kv = view.shapes.n_head_kv;
    const size_t  n         = view.offsets.size() - 1;

    std::vector<int32_t> res(budgets, budgets + n);
    if (view.policy.heads != WKV_HEADS_SCORE) {
        return res;
    }
    if (view.policy.span == WKV_SPAN_MODEL) {
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

// own: what each head would hold if none competed
static std::string score_budgets(const cache_view & view, const std::vector<int32_t> & own, std::vector<int32_t> & res) {
    const size_t n_group = view.policy.span == WKV_SPAN_MODEL ? own.size() : view.shapes.n_head_kv;

    // rankings come in any order of layers, each layer's head by head: a group is done with its last head
    std::vector<std::vector<double>> keys(own.size());
    std::vector<size_t>              n_done(own.size()/n_group, 0);

    return rank(view, own.data(), [&](int32_t il, int32_t ih, const ranking & cur) {
        const size_t i  = view.index(il, ih);
        const size_t i0 = i - i%n_group;

        keys[i] = cur.key;
        if (++n_done[i/n_group] == n_group) {
            std::vector<std::vector<double>> group(std::make_move_iterator(keys.begin() + i0), std::make_move_iterator(keys.begin() + i0 + n_group));
            const auto stays = compete(group, { own.begin() + i0, own.begin() + i0 + n_group }, view.policy.floor_share);
            std::copy(stays.begin(), stays.end(), res.begin() + i0);
            std::fill(keys.begin() + i0, keys.begin() + i0 + n_group, std::vector<double>());
        }
    });
}

std::string budgets(const cache_view & view, int64_t n_cells, std::vector<int32_t> & res) {
    const wkv_policy & policy    = view.policy;
    const int64_t      n_layer   = view.shapes.n_layer;
    const int64_t      n_head_kv = view.shapes.n_head_kv;

    n_cells = std::min<int64_t>(n_cells, INT32_MAX); // no head holds more

    const std::vector<int64_t> cells(view.shapes.cells, view.shapes.cells + n_layer*n_head_kv);

    res.assign(cells.begin(), cells.end());
    if (policy.kind == WKV_KIND_FULL) {
        return "";
    }

    const bool over_model = policy.heads == WKV_HEADS_SCORE && policy.span == WKV_SPAN_MODEL;
    if (policy.heads == WKV_HEADS_IMPORTANCE || over_model) {
        const auto own = importance_budgets(policy, cells, n_cells);
        res.assign(own.begin(), own.end());
        return over_model ? score_budgets(view, std::vector<int32_t>(res), res) : "";
    }

    // heads that hold equally many go on doing so; heads that compete can use all that their layer holds
    std::vector<int64_t> hi(n_layer);
    for (int64_t il = 0; il < n_layer; ++il) {
        const auto first = cells.begin() + il*n_head_kv;
        const auto last  = first + n_head_kv;
        hi[il] = policy.heads == WKV_HEADS_EQUAL ? *std::min_element(first, last) : std::accumulate(first, last, int64_t(0))/n_head_kv;
    }

    const auto layers = layer_budgets(policy, hi, n_cells);
    for (size_t i = 0; i < res.size(); ++i) {
        res[i] = layers[i/n_head_kv];
    }
    return policy.heads == WKV_HEADS_SCORE ? score_budgets(view, std::vector<int32_t>(res), res) : "";
}

} // namespace wkv
