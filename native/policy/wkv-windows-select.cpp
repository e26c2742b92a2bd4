// Windows of all heads: groups of layers that share them, heads that compete, single tokens beside them.
//
// Everything is phrased as an order of cells of which a budget takes a prefix, so that layers of one group share an order and still
// hold exactly their own budgets. Orders live for one head, or one group of layers, at a time.

#include "wkv-windows.h"

#include <algorithm>
#include <functional>

namespace wkv {

// the ranking of the shared set for the cells that this head holds; what the set lacks comes last, newest first
static ranking translate(const cache_view & view, int32_t il, int32_t ih, const std::vector<int32_t> & set, const ranking & shared) {
    const int32_t   n   = view.n_cells(il, ih);
    const int32_t * pos = view.pos(il, ih);

    ranking res;
    std::vector<uint8_t> seen(n, 0);
    std::vector<int32_t> n_held = { 0 }; // of the first places of the shared order, those that this head holds
    res.order.reserve(n);
    for (const int32_t i : shared.order) {
        const auto * it = std::lower_bound(pos, pos + n, set[i]);
        if (it != pos + n && *it == set[i]) {
            seen[it - pos] = 1;
            res.order.push_back(it - pos);
        }
        n_held.push_back(res.order.size());
    }
    for (int32_t i = n - 1; i >= 0; --i) {
        if (!seen[i]) {
            res.order.push_back(i);
        }
    }

    res.n_whole      = n_held[shared.n_whole];
    res.keys.n_cells = n;
    res.keys.n_stays = n_held[shared.keys.n_stays];
    for (size_t i = 0; i < shared.keys.run.size(); ++i) {
        res.keys.run.push_back(shared.keys.run[i]);
        res.keys.end.push_back(n_held[shared.keys.end[i]]);
    }
    return res;
}

std::string windows_misfit(const cache_view & view) {
    for (int32_t il = 0; view.policy.selection.scope == WKV_SCOPE_LAYER && il < view.shapes.n_layer; ++il) {
        const int32_t n = view.n_cells(il, 0);
        for (int32_t ih = 1; ih < view.shapes.n_head_kv; ++ih) {
            if (view.n_cells(il, ih) != n || !std::equal(view.pos(il, 0), view.pos(il, 0) + n, view.pos(il, ih))) {
                return "scope = layer needs heads that hold the same positions, but those of layer " + std::to_string(il) +
                    " differ: another policy compacted this cache, clear it first";
            }
        }
    }
    return "";
}

// calls fn(il, ih, ranking) for the heads of the layers il0 to il1 - 1, which are whole groups of gamma layers
template <typename F>
static void rank_groups(const cache_view & view, const std::vector<int32_t> & own, int32_t il0, int32_t il1, F fn) {
    const wkv_selection & p         = view.policy.selection;
    const int32_t         n_head_kv = view.shapes.n_head_kv;
    const bool            per_layer = p.scope == WKV_SCOPE_LAYER;

    for (int32_t first = il0; first < il1; first += std::min(p.gamma, il1 - first)) {
        const int32_t last = first + std::min(p.gamma, il1 - first);

        for (int32_t is = 0; is < (per_layer ? 1 : n_head_kv); ++is) {
            cell_set cells = p.share == WKV_SHARE_MEAN ? mean_cells(view, first, last, is) : cells_of(view, first, is);

            const std::vector<int32_t> set    = cells.pos;
            const ranking              shared = rank_windows(std::move(cells), view.policy, own[view.index(first, is)], true);

            for (int32_t il = first; il < last; ++il) {
                const int32_t n    = view.n_cells(il, is);
                const bool    same = n == int32_t(set.size()) && std::equal(set.begin(), set.end(), view.pos(il, is));

                const ranking   own_res = same ? ranking() : translate(view, il, is, set, shared);
                const ranking & res     = same ? shared : own_res;
                for (int32_t ih = is; ih < (per_layer ? n_head_kv : is + 1); ++ih) {
                    fn(il, ih, res);
                }
            }
        }
    }
}

// Windows first, then single tokens: a part of the budget is spent as if there were no more, and what is left goes to the best
// tokens by the attention of more queries. Windows keep an answer whole, tokens what the text as a whole attends to. Returns the
// cells of each head that come before single tokens; heads of the layers il0 to il1 - 1 compete for them.
static std::vector<int32_t> cells_before_tokens(const cache_view & view, const std::vector<int32_t> & own, int32_t il0, int32_t il1) {
    const wkv_policy    & policy    = view.policy;
    const wkv_selection & p         = policy.selection;
    const int32_t         n_head_kv = view.shapes.n_head_kv;
    const bool            competes  = policy.allocation.heads == WKV_HEADS_SCORE;

    std::vector<int32_t>     res;
    std::vector<ranked_keys> keys;
    for (int32_t i = il0*n_head_kv; i < il1*n_head_kv; ++i) {
        const int32_t n_recent = n_recent_of(view.shapes.cells[i], p, own[i]);
        const int32_t n_rest   = std::max(0, own[i] - n_recent);

        res.push_back(n_recent + std::max(std::min(n_rest, p.window_floor), int32_t(n_rest*(1.0 - p.token_share))));
        if (competes) {
            keys.push_back(rank_windows(cells_of(view, i/n_head_kv, i%n_head_kv), policy, own[i], false).keys);
        }
    }
    if (competes) {
        const std::vector<int32_t> first = res;
        compete(keys.data(), first.data(), first.size(), policy.allocation.alpha_safeguard, 1, res.data());
    }
    return res;
}

// the first n cells of a head's windows, set in keep; what is left, in the order of the cells
static std::vector<int32_t> take_windows(
        const cache_view & view, int32_t il, int32_t ih, int32_t budget, int32_t n, uint8_t * keep) {
    const auto order = rank_windows(cells_of(view, il, ih), view.policy, budget, true).order;
    for (int32_t i = 0; i < n; ++i) {
        keep[order[i]] = 1;
    }

    std::vector<int32_t> res;
    for (size_t i = 0; i < order.size(); ++i) {
        if (!keep[i]) {
            res.push_back(i);
        }
    }
    return res;
}

// windows, each as a whole but for the last one
static void select_whole(const cache_view & view, const head_budgets & budgets, uint8_t * keep) {
    rank_groups(view, budgets.own, 0, view.shapes.n_layer, [&](int32_t il, int32_t ih, const ranking & res) {
        const size_t  i   = view.index(il, ih);
        uint8_t     * own = keep + view.offsets[i];

        const bool    whole = view.policy.selection.whole_windows;
        const int32_t n     = whole ? res.n_whole : budgets.n_cells[i];
        for (int32_t j = 0; j < n; ++j) {
            own[res.order[j]] = 1;
        }
        if (whole && n == 0 && view.n_cells(il, ih) > 0) {
            own[view.n_cells(il, ih) - 1] = 1; // it holds nothing of what the group keeps: its newest cell
        }
    });
}

void select_windows(const cache_view & view, const head_budgets & budgets, uint8_t * keep) {
    if (view.policy.selection.token_share == 0.0) {
        select_whole(view, budgets, keep);
        return;
    }

    const int32_t n_layer   = view.shapes.n_layer;
    const int32_t n_head_kv = view.shapes.n_head_kv;
    const int32_t n_step    = competes_in_model(view.policy.allocation) ? n_layer : 1;

    // heads that competed were ranked for it, with what stays before single tokens
    std::vector<int32_t> n_first = budgets.n_stays;
    for (int32_t il = 0; il < n_layer && budgets.n_stays.empty(); il += n_step) {
        const auto cur = cells_before_tokens(view, budgets.own, il, il + n_step);
        n_first.insert(n_first.end(), cur.begin(), cur.end());
    }
    for (int32_t il = 0; il < n_layer; ++il) {
        for (int32_t ih = 0; ih < n_head_kv; ++ih) {
            const size_t  i     = view.index(il, ih);
            uint8_t     * own   = keep + view.offsets[i];
            const int32_t first = std::min(n_first[i], budgets.n_cells[i]);

            auto rest = take_windows(view, il, ih, budgets.own[i], first, own);
            take_best(view.token_score(il, ih), rest, budgets.n_cells[i] - first, own);
        }
    }
}

void keys_windows(const cache_view & view, const std::vector<int32_t> & own, int32_t il0, int32_t il1, ranked_keys * keys) {
    const int32_t n_head_kv = view.shapes.n_head_kv;
    const size_t  i0        = view.index(il0, 0);

    if (view.policy.selection.token_share == 0.0) {
        rank_groups(view, own, il0, il1, [&](int32_t il, int32_t ih, const ranking & res) { keys[view.index(il, ih) - i0] = res.keys; });
        return;
    }

    const auto n_first = cells_before_tokens(view, own, il0, il1);
    for (size_t j = 0; j < n_first.size(); ++j) {
        const int32_t il = il0 + j/n_head_kv;
        const int32_t ih = j%n_head_kv;

        ranked_keys & res = keys[j];
        res.n_cells = view.n_cells(il, ih);
        res.n_stays = std::min(res.n_cells, n_first[j]);

        res.place.reserve(res.n_cells - res.n_stays);

        std::vector<uint8_t> taken(res.n_cells, 0);
        for (const int32_t i : take_windows(view, il, ih, own[i0 + j], res.n_stays, taken.data())) {
            res.place.push_back(view.token_score(il, ih)[i]);
        }
        std::sort(res.place.begin(), res.place.end(), std::greater<float>());
    }
}

} // namespace wkv
