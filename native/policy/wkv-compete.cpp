// Heads that compete with the scores of their cells, and budgets() as a whole.

#include "wkv-ranking.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace wkv {

int32_t ranked_keys::n_over(double key) const {
    if (key == std::numeric_limits<double>::infinity()) {
        return 0;
    }
    if (!run.empty()) {
        const auto it = std::partition_point(run.begin(), run.end(), [&](double x) { return x > key; });
        return it == run.begin() ? n_stays : end[it - run.begin() - 1];
    }
    return n_stays + (std::partition_point(place.begin(), place.end(), [&](float x) { return x > key; }) - place.begin());
}

int32_t ranked_keys::n_from(double key) const {
    if (key == -std::numeric_limits<double>::infinity()) {
        return n_cells;
    }
    if (!run.empty()) {
        const auto it = std::partition_point(run.begin(), run.end(), [&](double x) { return x >= key; });
        return it == run.begin() ? n_stays : end[it - run.begin() - 1];
    }
    return n_stays + (std::partition_point(place.begin(), place.end(), [&](float x) { return x >= key; }) - place.begin());
}

// doubles in their order as integers, so that bisection reaches each
static double nth_double(uint64_t i) {
    const uint64_t bits = i >> 63 ? i ^ (uint64_t(1) << 63) : ~i;
    double res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

static uint64_t double_index(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
}

// the last of the integers from lo to hi for which ok holds; it holds for lo, and for none behind the first for which it does not
template <typename F>
static uint64_t last_ok(uint64_t lo, uint64_t hi, F ok) {
    while (lo < hi) {
        const uint64_t mid = hi - (hi - lo)/2;
        if (ok(mid)) {
            lo = mid;
        } else {
            hi = mid - 1;
        }
    }
    return lo;
}

void compete(const ranked_keys * keys, const int32_t * own, size_t n, double alpha_safeguard, int32_t * res) {
    int64_t rest = 0;
    int64_t open = 0;
    for (size_t i = 0; i < n; ++i) {
        const int32_t n_stays = std::min(own[i], keys[i].n_stays);

        res[i] = std::min(keys[i].n_cells, n_stays + int32_t(std::floor((own[i] - n_stays)*alpha_safeguard)));
        rest += own[i] - res[i];
        open += keys[i].n_cells - res[i];
    }
    rest = std::min(rest, open);
    if (rest <= 0) {
        return;
    }

    // The key of the last cell that is won, found by counting in rankings that are sorted already: a list of candidates would take
    // more memory than the scores.
    const double inf = std::numeric_limits<double>::infinity();
    const double key = nth_double(last_ok(double_index(-inf), double_index(inf), [&](uint64_t x) {
        int64_t n_won = 0;
        for (size_t i = 0; i < n; ++i) {
            n_won += std::max(0, keys[i].n_from(nth_double(x)) - res[i]);
        }
        return n_won >= rest;
    }));

    std::vector<int32_t> tied(n); // end of the places with this key
    int64_t most = 0;
    for (size_t i = 0; i < n; ++i) {
        const int32_t won = std::max(res[i], keys[i].n_over(key));
        tied[i] = std::max(won, keys[i].n_from(key));
        rest   -= won - res[i];
        res[i]  = won;
        most    = std::max<int64_t>(most, tied[i]);
    }

    // of these all up to some place, and of that place the first heads
    const auto n_before = [&](int64_t place, size_t i) { return std::clamp<int64_t>(place - res[i], 0, tied[i] - res[i]); };

    const int64_t place = last_ok(0, most, [&](uint64_t x) {
        int64_t n_tied = 0;
        for (size_t i = 0; i < n; ++i) {
            n_tied += n_before(x, i);
        }
        return n_tied <= rest;
    });
    for (size_t i = 0; i < n; ++i) {
        const int64_t cur = n_before(place, i);
        rest   -= cur;
        res[i] += cur;
    }
    for (size_t i = 0; i < n && rest > 0; ++i) {
        if (res[i] == place && res[i] < tied[i]) {
            res[i]++;
            rest--;
        }
    }
}

// AdaKV's authors let all cells before the observation window compete, those too that the safeguard keeps, and round
static void paper_compete(const cache_view & view, int32_t il, int64_t n_cells, int32_t * res) {
    const int32_t n_head_kv = view.shapes.n_head_kv;
    const int32_t recent    = view.policy.selection.n_recent;
    const double  safeguard = view.policy.allocation.alpha_safeguard;
    const int64_t mean      = n_cells - recent;

    std::vector<ranked_keys> keys(n_head_kv);
    bool fits = true;
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        keys[ih] = keys_tokens(view, il, ih);
        keys[ih].n_stays = 0;
        keys[ih].n_cells = keys[ih].place.size();

        fits    = fits && mean > keys[ih].n_cells;
        res[ih] = std::min<int64_t>(n_cells, view.n_cells(il, ih));
    }
    if (mean <= 0 || fits) {
        return;
    }

    std::vector<int32_t> won(n_head_kv);
    compete(keys.data(), std::vector<int32_t>(n_head_kv, mean).data(), n_head_kv, 0.0, won.data());
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        const volatile float part = float(won[ih])*float(1.0 - safeguard); // rounded by itself, not fused with the sum
        const float          sum  = part + float(int64_t(mean*safeguard));
        res[ih] = std::min<int64_t>(recent + std::llrint(sum), view.n_cells(il, ih)); // to even
    }
}

// own: what each head would hold if none competed
static void score_budgets(const cache_view & view, const std::vector<int32_t> & own, std::vector<int32_t> & res) {
    const policy & policy    = view.policy;
    const int32_t  n_layer   = view.shapes.n_layer;
    const int32_t  n_head_kv = view.shapes.n_head_kv;
    const bool     windows   = policy.selection.kind == kind::windows;

    // layers whose keys have to be there at the same time
    const int32_t n_step = policy.allocation.competes_in_model() ? n_layer : windows ? std::min(policy.selection.gamma, n_layer) : 1;

    for (int32_t il0 = 0; il0 < n_layer; il0 += n_step) {
        const int32_t il1 = std::min(n_layer, il0 + n_step);
        const size_t  n   = size_t(il1 - il0)*n_head_kv;

        std::vector<ranked_keys> keys(n);
        if (windows) {
            keys_windows(view, own, il0, il1, keys.data());
        } else {
            for (size_t i = 0; i < n; ++i) {
                keys[i] = keys_tokens(view, il0 + i/n_head_kv, i%n_head_kv);
            }
        }

        const size_t i0      = view.index(il0, 0);
        const size_t n_group = policy.allocation.competes_in_model() ? n : n_head_kv;
        for (size_t i = 0; i < n; i += n_group) {
            compete(keys.data() + i, own.data() + i0 + i, n_group, policy.allocation.alpha_safeguard, res.data() + i0 + i);
        }
    }
}

std::string budgets(const cache_view & view, int64_t n_cells, std::vector<int32_t> & res) {
    const allocation & p         = view.policy.allocation;
    const int64_t      n_layer   = view.shapes.n_layer;
    const int64_t      n_head_kv = view.shapes.n_head_kv;

    n_cells = std::min<int64_t>(n_cells, INT32_MAX); // no head holds more

    const std::vector<int64_t> cells(view.shapes.cells, view.shapes.cells + n_layer*n_head_kv);

    res.assign(cells.begin(), cells.end());
    if (view.policy.selection.kind == kind::full) {
        return "";
    }
    if (needs_scores_for_budgets(view.policy)) {
        std::string error = scores_error(view);
        if (error.empty() && view.policy.selection.kind == kind::windows) {
            error = windows_misfit(view);
        }
        if (!error.empty()) {
            return error;
        }
    }

    if (p.heads == heads::importance || p.competes_in_model()) {
        const auto own = importance_budgets(view.policy, cells, n_cells);
        res.assign(own.begin(), own.end());
    } else {
        // heads that hold equally many go on doing so; heads that compete can use all that their layer holds
        std::vector<int64_t> hi(n_layer);
        for (int64_t il = 0; il < n_layer; ++il) {
            const auto first = cells.begin() + il*n_head_kv;
            const auto last  = first + n_head_kv;
            hi[il] = p.heads == heads::equal ? *std::min_element(first, last) : std::accumulate(first, last, int64_t(0))/n_head_kv;
        }

        const auto layers = layer_budgets(view.policy, hi, n_cells);
        for (size_t i = 0; i < res.size(); ++i) {
            res[i] = layers[i/n_head_kv];
        }
        if (p.heads == heads::score && p.accounting == accounting::paper) {
            for (int32_t il = 0; il < n_layer; ++il) {
                paper_compete(view, il, n_cells, res.data() + il*n_head_kv);
            }
            return "";
        }
    }
    if (p.heads == heads::score) {
        score_budgets(view, std::vector<int32_t>(res), res);
    }
    return "";
}

} // namespace wkv
