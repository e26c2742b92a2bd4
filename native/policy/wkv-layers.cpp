// Allocation: what layers hold.

#include "wkv-parts.h"

#include <algorithm>
#include <cmath>

namespace wkv {

std::vector<choice> layers_choices(const wkv_allocation & p) {
    return { { "layers", p.layers, WKV_LAYERS_COUNT } };
}

bool layers_use_beta(const wkv_allocation & p) {
    return p.layers == WKV_LAYERS_PYRAMID;
}

std::string layers_error(const wkv_policy & policy) {
    const wkv_allocation & p = policy.allocation;

    if (p.layers == WKV_LAYERS_ARITHMETIC && policy.selection.kind != WKV_KIND_WINDOWS) {
        return "layers = arithmetic falls over groups of gamma layers, it needs kind = windows";
    }
    if (p.layers == WKV_LAYERS_ARITHMETIC && !(p.lam > 0.0 && std::isfinite(p.lam))) {
        return range("lam", p.lam, "a positive number, and a finite one");
    }
    if (p.layers != WKV_LAYERS_ARITHMETIC && p.lam != 0.0) {
        return range("lam", p.lam, "0, layers = arithmetic alone uses it");
    }
    if (p.layers == WKV_LAYERS_PYRAMID && !is_at_least(p.beta, 1.0)) {
        return range("beta", p.beta, "at least 1 and finite");
    }
    return "";
}

// n values that fall linearly from first to last
static std::vector<int64_t> fall(int64_t first, int64_t last, int64_t n) {
    std::vector<int64_t> res(n);
    for (int64_t i = 0; i < n; ++i) {
        res[i] = n == 1 ? (first + last)/2 : first - (first - last)*i/(n - 1);
    }
    return res;
}

// PyramidKV (arXiv 2406.02069, eq. 5): the recent tokens are on top of an arithmetic sequence over the layers
static std::vector<int64_t> want_pyramid(const wkv_policy & policy, int64_t n_layer, int64_t n_cells) {
    const int64_t recent = std::min<int64_t>(policy.selection.n_recent, n_cells);
    const int64_t mean   = n_cells - recent;
    const int64_t last   = std::min(mean, int64_t(std::floor(double(mean)/policy.allocation.beta)));

    auto res = fall(2*mean - last, last, n_layer);
    for (auto & b : res) {
        b += recent;
    }
    return res;
}

// The same as the authors' code has it: equal integer steps, and what the first layers cannot hold is given to the last ones
static std::vector<int64_t> paper_pyramid(const wkv_policy & policy, const std::vector<int64_t> & hi, int64_t n_cells) {
    const int64_t n_layer = hi.size();
    const int64_t recent  = policy.selection.n_recent;
    const int64_t mean    = n_cells - recent;
    const int64_t review  = *std::max_element(hi.begin(), hi.end()) - recent;

    std::vector<int64_t> res(n_layer, n_cells);
    if (mean > 0 && n_layer > 1) {
        int64_t last  = floor_div(mean, policy.allocation.beta);
        int64_t first = 2*mean - last;
        if (first >= review) {
            first = review;
            last  = 2*mean - review;
        }
        const int64_t step = first >= last ? (first - last)/(n_layer - 1) : 0; // all stays if they rise
        for (int64_t il = 0; il < n_layer; ++il) {
            res[il] = recent + first - il*step;
        }
    }
    return res;
}

// WindowKV (arXiv 2503.17922, section 3.4): one budget per group of gamma layers, falling over the groups
static std::vector<int64_t> want_arithmetic(const wkv_policy & policy, int64_t n_layer, int64_t n_cells) {
    const bool    paper    = policy.allocation.accounting == WKV_ACCOUNTING_PAPER;
    const double  lam      = policy.allocation.lam;
    const int64_t gamma    = policy.selection.gamma;
    const int64_t n_groups = (n_layer + gamma - 1)/gamma;

    std::vector<int64_t> groups(n_groups, n_cells);
    if (n_groups > 1) {
        // a lambda under gamma would let the groups rise; compared as doubles, for the quotient can be any size
        const double  most  = double(n_cells)*double(gamma);
        const int64_t last  = most/lam >= double(n_cells) ? n_cells : paper ? floor_div(most, lam) : int64_t(std::floor(most/lam));
        const int64_t first = 2*n_cells - last;

        groups = fall(first, last, n_groups);

        // the authors' code takes equal integer steps and sets the last group by itself
        if (paper) {
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

std::vector<int64_t> layer_budgets(const wkv_policy & policy, const std::vector<int64_t> & hi, int64_t n_cells) {
    const wkv_selection & sel     = policy.selection;
    const int64_t         n_layer = hi.size();
    const bool            paper   = policy.allocation.accounting == WKV_ACCOUNTING_PAPER;

    std::vector<int64_t> want(n_layer, n_cells);
    switch (wkv_layers(policy.allocation.layers)) {
        case WKV_LAYERS_PYRAMID:
            want = paper ? paper_pyramid(policy, hi, n_cells) : want_pyramid(policy, n_layer, n_cells);
            break;
        case WKV_LAYERS_ARITHMETIC:
            want = want_arithmetic(policy, n_layer, n_cells);
            break;
        case WKV_LAYERS_FLAT:
        case WKV_LAYERS_COUNT:
            break;
    }

    if (paper) {
        // no authors give to others what a layer does not hold; WindowKV's keep the observation window on top of the budget
        const int64_t on_top = sel.kind == WKV_KIND_WINDOWS ? policy.scoring.window_size : 0;
        for (int64_t il = 0; il < n_layer; ++il) {
            want[il] = std::min(std::max<int64_t>(1, want[il] + on_top), hi[il]);
        }
        return want;
    }

    // every layer holds its recent tokens and one choice
    std::vector<int64_t> lo(n_layer);
    for (int64_t il = 0; il < n_layer; ++il) {
        lo[il] = std::min({ int64_t(sel.n_recent) + std::max(1, sel.omega), n_cells, hi[il] });
    }
    return apportion(want, lo, hi, n_cells*n_layer);
}

} // namespace wkv
