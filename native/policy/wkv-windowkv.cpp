// WindowKV (arXiv 2503.17922, sections 3.2 and 3.3): windows of consecutive tokens compete as a whole.
//
// Everything is phrased as an order of cells of which a budget takes a prefix, so that layers of one group share
// an order and still hold exactly their own budgets.

#include "wkv-policy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

namespace wkv {

// the cells that one order is made from: ascending positions with their scores
struct cell_set {
    std::vector<int32_t> pos;
    std::vector<double>  score;
};

struct window {
    int32_t i0; // first and one past the last cell
    int32_t i1;
    double  score;
};

// mean over the kv heads of a layer, summed in head order
static cell_set layer_cells(const cache_view & view, int32_t il) {
    const size_t n = view.n_cells(il, 0);

    cell_set res;
    res.pos.assign(view.pos(il, 0), view.pos(il, 0) + n);
    res.score.assign(n, 0.0);
    for (int32_t ih = 0; ih < view.shapes.n_head_kv; ++ih) {
        const float * score = view.score(il, ih);
        for (size_t i = 0; i < n; ++i) {
            res.score[i] += score[i];
        }
    }
    for (auto & s : res.score) {
        s /= view.shapes.n_head_kv;
    }
    return res;
}

static cell_set head_cells(const cache_view & view, int32_t il, int32_t ih) {
    const size_t n = view.n_cells(il, ih);

    cell_set res;
    res.pos.assign(view.pos(il, ih), view.pos(il, ih) + n);
    res.score.assign(view.score(il, ih), view.score(il, ih) + n);
    return res;
}

static cell_set cells_of(const cache_view & view, int32_t il, int32_t ih) {
    return view.policy.scope == WKV_SCOPE_LAYER ? layer_cells(view, il) : head_cells(view, il, ih);
}

// union of the layers' cells; a score is the mean over the layers that hold the cell, summed in layer order
static cell_set mean_cells(const cache_view & view, int32_t il0, int32_t il1, int32_t ih) {
    std::map<int32_t, std::pair<double, int32_t>> sums;
    for (int32_t il = il0; il < il1; ++il) {
        const cell_set cur = cells_of(view, il, ih);
        for (size_t i = 0; i < cur.pos.size(); ++i) {
            auto & sum = sums[cur.pos[i]];
            sum.first  += cur.score[i];
            sum.second += 1;
        }
    }

    cell_set res;
    for (const auto & [pos, sum] : sums) {
        res.pos.push_back(pos);
        res.score.push_back(sum.first/sum.second);
    }
    return res;
}

// mean of the top_p best token scores, summed from the best downwards
static double window_score(const cell_set & cells, int32_t i0, int32_t i1, int32_t top_p) {
    std::vector<double> score(cells.score.begin() + i0, cells.score.begin() + i1);
    std::sort(score.begin(), score.end(), std::greater<double>());
    score.resize(std::min<size_t>(score.size(), top_p));

    return std::accumulate(score.begin(), score.end(), 0.0)/double(score.size());
}

// windows stand on a fixed grid of positions, so that what one compaction kept whole stays together in the next
static std::vector<window> make_windows(const cell_set & cells, int32_t n_review, const wkv_policy & policy) {
    std::vector<window> res;
    for (int32_t i0 = 0; i0 < n_review;) {
        int32_t i1 = i0 + 1;
        while (i1 < n_review && cells.pos[i1]/policy.omega == cells.pos[i0]/policy.omega) {
            ++i1;
        }
        res.push_back({ i0, i1, window_score(cells, i0, i1, policy.top_p) });
        i0 = i1;
    }
    return res;
}

// what follows an attended token is often what the answer needs next: each token takes the best score of itself and
// of the carry tokens before it
static void carry_scores(cell_set & cells, int32_t n_review, int32_t carry) {
    for (int32_t i = n_review - 1; carry > 0 && i >= 0; --i) {
        cells.score[i] = *std::max_element(cells.score.begin() + std::max(0, i - carry), cells.score.begin() + i + 1);
    }
}

// newest cells that stay of a head with n cells and this budget
static int32_t suffix_of(int32_t n, const wkv_policy & policy, int32_t budget) {
    const int32_t n_share = std::max(1, int32_t(std::floor(budget*policy.suffix_share)));
    return std::min({ n, policy.suffix, n_share });
}

// all cells, most important first, as indices into the set; budget is that of the head whose cells they are
static ranking rank_windows(cell_set cells, const wkv_policy & policy, int32_t budget) {
    const int32_t n        = cells.pos.size();
    const int32_t n_review = std::max(0, n - policy.alpha);
    const int32_t n_suffix = suffix_of(n, policy, budget);

    carry_scores(cells, n_review, policy.carry);

    auto windows = make_windows(cells, n_review, policy);

    const auto better = [](const window & a, const window & b) { return a.score > b.score; };
    const size_t n_held = policy.protect_first && !windows.empty() ? 1 : 0;
    std::stable_sort(windows.begin() + n_held, windows.end(), better);

    ranking res;
    res.order.reserve(n);
    res.key.reserve(n);
    for (int32_t i = 0; i < n_suffix; ++i) {
        res.order.push_back(n - 1 - i);
    }
    res.key.assign(n_suffix, std::numeric_limits<double>::infinity());
    for (size_t iw = 0; iw < windows.size(); ++iw) {
        const window & w = windows[iw];

        const size_t i0 = res.order.size();
        for (int32_t i = w.i0; i < w.i1; ++i) {
            res.order.push_back(i);
        }
        std::stable_sort(res.order.begin() + i0, res.order.end(),
                [&](int32_t a, int32_t b) { return cells.score[a] > cells.score[b]; });
        res.key.resize(res.order.size(), iw < n_held ? std::numeric_limits<double>::infinity() : w.score);
    }
    for (int32_t i = n - 1 - n_suffix; i >= n_review; --i) {
        res.order.push_back(i);
    }
    res.key.resize(n, -std::numeric_limits<double>::infinity());
    return res;
}

// the ranking of the shared set for the cells that this head holds; what the set lacks comes last, newest first
static ranking translate(const cache_view & view, int32_t il, int32_t ih, const cell_set & cells, const ranking & shared) {
    const size_t    n   = view.n_cells(il, ih);
    const int32_t * pos = view.pos(il, ih);

    if (n == cells.pos.size() && std::equal(pos, pos + n, cells.pos.begin())) {
        return shared;
    }

    ranking res;
    std::vector<uint8_t> seen(n, 0);
    res.order.reserve(n);
    for (size_t j = 0; j < shared.order.size(); ++j) {
        const int32_t cur = cells.pos[shared.order[j]];
        const auto * it = std::lower_bound(pos, pos + n, cur);
        if (it != pos + n && *it == cur) {
            seen[it - pos] = 1;
            res.order.push_back(it - pos);
            res.key.push_back(shared.key[j]);
        }
    }
    for (int32_t i = int32_t(n) - 1; i >= 0; --i) {
        if (!seen[i]) {
            res.order.push_back(i);
        }
    }
    res.key.resize(n, -std::numeric_limits<double>::infinity());
    return res;
}

static bool heads_agree(const cache_view & view, int32_t il) {
    const size_t n = view.n_cells(il, 0);
    for (int32_t ih = 1; ih < view.shapes.n_head_kv; ++ih) {
        if (view.n_cells(il, ih) != n || !std::equal(view.pos(il, 0), view.pos(il, 0) + n, view.pos(il, ih))) {
            return false;
        }
    }
    return true;
}

// Windows first, then single tokens: a part of the budget is spent as if there were no more, and what is left goes to the best
// tokens by the attention of more queries. Windows keep an answer whole, tokens what the text as a whole attends to. Heads of the
// layers il0 to il1 - 1 compete in both parts.
static void rank_windows_and_tokens(const cache_view & view, const std::vector<int32_t> & own, int32_t il0, int32_t il1, const rank_fn & fn) {
    const wkv_policy & policy    = view.policy;
    const int32_t      n_head_kv = view.shapes.n_head_kv;

    std::vector<std::vector<int32_t>> order; // windows of all heads
    std::vector<std::vector<double>>  key;
    std::vector<int32_t>              n_first; // cells of each that come before single tokens
    for (int32_t i = il0*n_head_kv; i < il1*n_head_kv; ++i) {
        ranking windows = rank_windows(head_cells(view, i/n_head_kv, i%n_head_kv), policy, own[i]);

        const int32_t n_suffix = suffix_of(windows.order.size(), policy, own[i]);
        const int32_t n_rest   = std::max(0, own[i] - n_suffix);
        n_first.push_back(n_suffix + std::max(std::min(n_rest, policy.window_floor), int32_t(std::floor(n_rest*(1.0 - policy.tokens)))));
        order.push_back(std::move(windows.order));
        key.push_back(std::move(windows.key));
    }
    if (policy.heads == WKV_HEADS_SCORE) {
        n_first = compete(key, n_first, policy.floor_share);
    }
    key.clear();

    for (int32_t i = il0*n_head_kv; i < il1*n_head_kv; ++i) {
        const int32_t il    = i/n_head_kv;
        const int32_t ih    = i%n_head_kv;
        const int32_t n     = view.n_cells(il, ih);
        const auto    first = std::min(n, n_first[i - il0*n_head_kv]);
        const float * score = view.token_score(il, ih);

        ranking res;
        res.order = std::move(order[i - il0*n_head_kv]);
        res.order.resize(first);
        res.key.assign(first, std::numeric_limits<double>::infinity());

        std::vector<uint8_t> taken(n, 0);
        for (const int32_t j : res.order) {
            taken[j] = 1;
        }
        for (int32_t j = 0; j < n; ++j) {
            if (!taken[j]) {
                res.order.push_back(j);
            }
        }
        std::stable_sort(res.order.begin() + first, res.order.end(), [&](int32_t a, int32_t b) { return score[a] > score[b]; });
        for (int32_t j = first; j < n; ++j) {
            res.key.push_back(score[res.order[j]]);
        }
        fn(il, ih, res);
    }
}

std::string rank_windowkv(const cache_view & view, const int32_t * budgets, const rank_fn & fn) {
    const wkv_policy & policy    = view.policy;
    const int32_t      n_head_kv = view.shapes.n_head_kv;
    const bool         per_layer = policy.scope == WKV_SCOPE_LAYER;

    for (int32_t il = 0; per_layer && il < view.shapes.n_layer; ++il) {
        if (!heads_agree(view, il)) {
            return "scope = layer needs heads that hold the same positions, but those of layer " + std::to_string(il) +
                " differ: another policy compacted this cache, clear it first";
        }
    }

    const auto    own     = rank_budgets(view, budgets);
    const int32_t n_group = policy.heads == WKV_HEADS_SCORE && policy.span == WKV_SPAN_MODEL ? view.shapes.n_layer : 1;
    for (int32_t il = 0; policy.tokens > 0.0 && il < view.shapes.n_layer; il += n_group) {
        rank_windows_and_tokens(view, own, il, il + n_group, fn);
    }

    for (int32_t il0 = 0; policy.tokens == 0.0 && il0 < view.shapes.n_layer; il0 += policy.gamma) {
        const int32_t il1 = std::min(view.shapes.n_layer, il0 + policy.gamma);

        for (int32_t is = 0; is < (per_layer ? 1 : n_head_kv); ++is) {
            const cell_set cells  = policy.share == WKV_SHARE_MEAN ? mean_cells(view, il0, il1, is) : cells_of(view, il0, is);
            const ranking  shared = rank_windows(cells, policy, own[view.index(il0, is)]);

            for (int32_t il = il0; il < il1; ++il) {
                const ranking own = translate(view, il, is, cells, shared);

                for (int32_t ih = is; ih < (per_layer ? n_head_kv : is + 1); ++ih) {
                    fn(il, ih, own);
                }
            }
        }
    }
    return "";
}

} // namespace wkv
