// Windows of all heads: groups of layers that share them, heads that compete, single tokens beside them.
//
// Everything is phrased as an order of cells of which a budget takes a prefix, so that layers of one group share an order and still
// hold exactly their own budgets. No order is ever made as a whole: a budget needs what is better than its last window.

#include "wkv-threads.h"
#include "wkv-windows.h"

#include <algorithm>

namespace wkv {

std::string windows_misfit(const cache_view & view, int32_t il0, int32_t il1) {
    for (int32_t il = il0; view.policy.selection.scope == WKV_SCOPE_LAYER && il < il1; ++il) {
        for (int32_t ih = 1; ih < view.shapes.n_head_kv; ++ih) {
            if (!same_cells(view.pos(il, 0), view.n_cells(il, 0), view.pos(il, ih), view.n_cells(il, ih))) {
                return "scope = layer needs heads that hold the same positions, but those of layer " + std::to_string(il) +
                    " differ: another policy compacted this cache, clear it first";
            }
        }
    }
    return "";
}

static held_cells held_of(const cache_view & view, int32_t il, int32_t ih, const window_set & set) {
    const int32_t n   = view.n_cells(il, ih);
    const auto  & pos = view.pos(il, ih);

    held_cells res;
    if (same_cells(set.pos, set.n, pos, n)) {
        return res;
    }
    res.at.assign(set.n, -1);
    res.before.assign(1, 0);
    int32_t j = 0;
    for (int32_t i = 0; i < set.n; ++i) {
        for (; j < n && pos[j] < set.pos[i]; ++j) {
            res.others.push_back(j);
        }
        if (j < n && pos[j] == set.pos[i]) {
            res.at[i] = j++;
        }
        res.before.push_back(res.before.back() + (res.at[i] >= 0));
    }
    for (; j < n; ++j) {
        res.others.push_back(j);
    }
    return res;
}

// Sets of windows of the layers il0 to il1 - 1, which are whole groups of gamma layers: one for every group and kv head, or for every
// group with scope = layer.
struct window_groups {
    int32_t il0;
    int32_t il1;
    int32_t gamma;
    int32_t n_sets; // of a group

    window_groups(const cache_view & view, int32_t il0, int32_t il1) : il0(il0), il1(il1),
        gamma (std::min(view.policy.selection.gamma, il1 - il0)),
        n_sets(view.policy.selection.scope == WKV_SCOPE_LAYER ? 1 : view.shapes.n_head_kv) {
    }

    size_t  n() const { return size_t((il1 - il0 + gamma - 1)/gamma)*n_sets; }
    int32_t head (size_t i) const { return i%n_sets; }
    int32_t first(size_t i) const { return il0 + int32_t(i/n_sets)*gamma; }
    int32_t last (size_t i) const { return std::min(il1, first(i) + gamma); } // one past it
};

// budgets of heads that compete with the keys of their windows
static void compete_windows(const cache_view & view, competition c, const std::vector<int32_t> & own, int32_t il0, int32_t il1, int32_t * res) {
    const bool          protect_first = view.policy.selection.protect_first;
    const window_groups groups(view, il0, il1);

    c.n_units = groups.n();
    c.runs    = [&](size_t iu, const run_fn & fn) {
        const int32_t ih  = groups.head(iu);
        const auto    set = windows_of(view, groups.first(iu), groups.last(iu), ih, own[view.index(groups.first(iu), ih)]);
        for (int32_t il = groups.first(iu); il < groups.last(iu); ++il) {
            const auto   held  = held_of(view, il, ih, set);
            const auto   count = [&](int32_t i0, int32_t i1) { return held.before.empty() ? i1 - i0 : held.before[i1] - held.before[i0]; };
            const size_t i     = size_t(il - il0)*view.shapes.n_head_kv + ih;

            const key_run stays = { KEY_STAYS, count(set.n - set.n_recent, set.n) };
            fn(i, &stays, 1);
            each_run(i, set.windows.size(), fn, [&](int32_t iw) {
                const window & w = set.windows[iw];
                return key_run { protect_first && iw == 0 ? KEY_STAYS : w.score, count(w.i0, w.i1) };
            });
        }
    };
    compete(c, res);
}

// Windows first, then single tokens: a part of the budget is spent as if there were no more, and what is left goes to the best
// tokens by the attention of more queries. Windows keep an answer whole, tokens what the text as a whole attends to. Returns the
// cells of a head that come before single tokens.
int32_t n_before_tokens(const cache_view & view, const std::vector<int32_t> & own, size_t i) {
    const wkv_selection & p = view.policy.selection;

    const int32_t n_recent = n_recent_of(view.shapes.cells[i], p, own[i]);
    const int32_t n_rest   = std::max(0, own[i] - n_recent);
    return n_recent + std::max(std::min(n_rest, p.window_floor), int32_t(n_rest*(1.0 - p.token_share)));
}

std::vector<int32_t> n_before_tokens(const cache_view & view, const std::vector<int32_t> & own, size_t i0, size_t i1) {
    std::vector<int32_t> res;
    for (size_t i = i0; i < i1 && !own.empty(); ++i) {
        res.push_back(n_before_tokens(view, own, i));
    }
    return res;
}

void budget_windows(const cache_view & view, int32_t il0, int32_t il1, head_budgets & res) {
    const size_t i0 = view.index(il0, 0);
    const size_t i1 = view.index(il1, 0);

    const auto c = competition_of(view, res, il0, il1);
    if (view.policy.selection.token_share == 0.0) {
        compete_windows(view, c, res.own, il0, il1, res.n_cells.data() + i0);
        return;
    }

    const auto own = n_before_tokens(view, res.own, i0, i1);
    const auto due = n_before_tokens(view, res.due, i0, i1);

    competition before = c;
    before.own = own.data();
    before.due = due.empty() ? nullptr : due.data();

    res.n_windows.resize(i1);
    compete_windows(view, before, res.own, il0, il1, res.n_windows.data() + i0);
    compete_with_stays(c, res.n_windows.data() + i0, res.n_cells.data() + i0);
}

void mark_windows(const cache_view & view, const head_budgets & budgets, int32_t il0, int32_t il1, marks & keep) {
    const wkv_selection & p         = view.policy.selection;
    const int32_t         n_head_kv = view.shapes.n_head_kv;
    const window_groups   groups(view, il0, il1);

    const auto n_of = [&](size_t i) {
        return p.token_share == 0.0 ? budgets.n_cells[i] :
            std::min(budgets.n_cells[i], budgets.n_windows.empty() ? n_before_tokens(view, budgets.own, i) : budgets.n_windows[i]);
    };

    for_each(view.n_threads_for(il0, il1), groups.n(), [&](size_t iu) {
        const int32_t ih = groups.head(iu);

        auto set = windows_of(view, groups.first(iu), groups.last(iu), ih, budgets.own[view.index(groups.first(iu), ih)]);
        const int32_t n_shared = p.whole_windows ? n_whole(set, p) : 0;
        for (int32_t il = groups.first(iu); il < groups.last(iu); ++il) {
            const auto   held  = held_of(view, il, ih, set);
            const size_t first = view.index(il, ih);
            const size_t last  = p.scope == WKV_SCOPE_LAYER ? first + n_head_kv : first + 1;
            for (size_t i = first; i < last; ++i) {
                const int32_t n = p.whole_windows ? n_shared : n_of(i);
                if (i > first && n == (p.whole_windows ? n_shared : n_of(i - 1))) {
                    keep.copy(i, i - 1);
                    continue;
                }
                mark_best(set, p, held, p.whole_windows, n, keep.row(i));
                if (p.whole_windows && view.shapes.cells[i] > 0 && keep.count(i) == 0) {
                    keep.row(i).set(view.shapes.cells[i] - 1); // it holds nothing of what the group keeps: its newest cell
                }
            }
        }
    });
}

void budget_tokens(const cache_view & view, int32_t il0, int32_t il1, const marks & keep, head_budgets & res) {
    const int32_t n_head_kv = view.shapes.n_head_kv;
    const size_t  i0        = view.index(il0, 0);

    competition c = competition_of(view, res, il0, il1);
    if (std::find(res.n_cells.begin() + i0, res.n_cells.begin() + i0 + c.n, BUDGET_OPEN) == res.n_cells.begin() + i0 + c.n) {
        return;
    }
    c.n_units = c.n;
    c.runs    = [&](size_t j, const run_fn & fn) {
        const size_t  i     = i0 + j;
        const auto    score = view.token_score(i/n_head_kv, i%n_head_kv);

        const key_run stays = { KEY_STAYS, std::min(res.n_windows[i], view.shapes.cells[i]) };
        fn(j, &stays, 1);
        each_run(j, view.shapes.cells[i], fn, [&](int32_t ic) { return key_run { score[ic], !keep.get(i, ic) }; });
    };

    std::vector<int32_t> n_cells(c.n);
    compete(c, n_cells.data());
    std::copy(n_cells.begin(), n_cells.end(), res.n_cells.begin() + i0);
}

void mark_tokens(const cache_view & view, const head_budgets & budgets, int32_t il0, int32_t il1, marks & keep) {
    const size_t i0 = view.index(il0, 0);
    for_each(view.n_threads_for(il0, il1), view.index(il1, 0) - i0, [&](size_t j) {
        const size_t i = i0 + j;
        take_best(view.token_score(i/view.shapes.n_head_kv, i%view.shapes.n_head_kv), view.shapes.cells[i],
                budgets.n_cells[i] - keep.count(i), keep.row(i));
    });
}

} // namespace wkv
