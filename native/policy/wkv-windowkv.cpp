// WindowKV (arXiv 2503.17922, sections 3.2 and 3.3): windows of consecutive tokens compete as a whole.
//
// Everything is phrased as an order of cells of which a budget takes a prefix, so that layers of one group share
// an order and still hold exactly their own budgets.

#include "wkv-policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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
static cell_set layer_cells(const selection & sel, int32_t il) {
    const size_t n = sel.n_cells(il);

    cell_set res;
    res.pos.assign(sel.positions + sel.at(il, 0), sel.positions + sel.at(il, 0) + n);
    res.score.assign(n, 0.0);
    for (int32_t ih = 0; ih < sel.shapes.n_head_kv; ++ih) {
        const float * score = sel.scores + sel.at(il, ih);
        for (size_t i = 0; i < n; ++i) {
            res.score[i] += score[i];
        }
    }
    for (auto & s : res.score) {
        s /= sel.shapes.n_head_kv;
    }
    return res;
}

static cell_set head_cells(const selection & sel, int32_t il, int32_t ih) {
    const size_t n = sel.n_cells(il);

    cell_set res;
    res.pos.assign(sel.positions + sel.at(il, ih), sel.positions + sel.at(il, ih) + n);
    res.score.assign(sel.scores + sel.at(il, ih), sel.scores + sel.at(il, ih) + n);
    return res;
}

static cell_set cells_of(const selection & sel, int32_t il, int32_t ih) {
    return sel.policy.scope == WKV_SCOPE_LAYER ? layer_cells(sel, il) : head_cells(sel, il, ih);
}

// union of the layers' cells; a score is the mean over the layers that hold the cell, summed in layer order
static cell_set mean_cells(const selection & sel, int32_t il0, int32_t il1, int32_t ih) {
    std::map<int32_t, std::pair<double, int32_t>> sums;
    for (int32_t il = il0; il < il1; ++il) {
        const cell_set cur = cells_of(sel, il, ih);
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

// all cells, most important first, as indices into the set; budget is that of the layer whose cells they are
static std::vector<int32_t> window_order(cell_set cells, const wkv_policy & policy, int32_t budget) {
    const int32_t n        = cells.pos.size();
    const int32_t n_review = std::max(0, n - policy.alpha);
    const int32_t n_share  = std::max(1, int32_t(std::floor(budget*policy.suffix_share)));
    const int32_t n_suffix = std::min({ n, policy.suffix, n_share });

    carry_scores(cells, n_review, policy.carry);

    auto windows = make_windows(cells, n_review, policy);

    const auto better = [](const window & a, const window & b) { return a.score > b.score; };
    std::stable_sort(windows.begin() + (policy.protect_first && !windows.empty() ? 1 : 0), windows.end(), better);

    std::vector<int32_t> order;
    order.reserve(n);
    for (int32_t i = 0; i < n_suffix; ++i) {
        order.push_back(n - 1 - i);
    }
    for (const auto & w : windows) {
        const size_t i0 = order.size();
        for (int32_t i = w.i0; i < w.i1; ++i) {
            order.push_back(i);
        }
        std::stable_sort(order.begin() + i0, order.end(),
                [&](int32_t a, int32_t b) { return cells.score[a] > cells.score[b]; });
    }
    for (int32_t i = n - 1 - n_suffix; i >= n_review; --i) {
        order.push_back(i);
    }
    return order;
}

// the order of the shared set, translated to the cells that this head holds; what the set lacks comes last, newest first
static std::vector<int32_t> translate(
        const selection & sel, int32_t il, int32_t ih, const cell_set & cells, const std::vector<int32_t> & order) {
    const size_t    n   = sel.n_cells(il);
    const int32_t * pos = sel.positions + sel.at(il, ih);

    if (n == cells.pos.size() && std::equal(pos, pos + n, cells.pos.begin())) {
        return order;
    }

    std::vector<int32_t> res;
    std::vector<uint8_t> seen(n, 0);
    res.reserve(n);
    for (const int32_t i : order) {
        const auto * it = std::lower_bound(pos, pos + n, cells.pos[i]);
        if (it != pos + n && *it == cells.pos[i]) {
            seen[it - pos] = 1;
            res.push_back(it - pos);
        }
    }
    for (int32_t i = int32_t(n) - 1; i >= 0; --i) {
        if (!seen[i]) {
            res.push_back(i);
        }
    }
    return res;
}

static bool heads_agree(const selection & sel, int32_t il) {
    const size_t n = sel.n_cells(il);
    for (int32_t ih = 1; ih < sel.shapes.n_head_kv; ++ih) {
        if (memcmp(sel.positions + sel.at(il, 0), sel.positions + sel.at(il, ih), n*sizeof(int32_t)) != 0) {
            return false;
        }
    }
    return true;
}

std::string select_windowkv(selection & sel) {
    const wkv_policy & policy    = sel.policy;
    const int32_t      n_head_kv = sel.shapes.n_head_kv;
    const bool         per_layer = policy.scope == WKV_SCOPE_LAYER;

    for (int32_t il = 0; per_layer && il < sel.shapes.n_layer; ++il) {
        if (!heads_agree(sel, il)) {
            return "scope = layer needs heads that hold the same positions, but those of layer " + std::to_string(il) +
                " differ: another policy compacted this cache, clear it first";
        }
    }

    for (int32_t il0 = 0; il0 < sel.shapes.n_layer; il0 += policy.gamma) {
        const int32_t il1 = std::min(sel.shapes.n_layer, il0 + policy.gamma);

        for (int32_t is = 0; is < (per_layer ? 1 : n_head_kv); ++is) {
            const cell_set cells = policy.share == WKV_SHARE_MEAN ? mean_cells(sel, il0, il1, is) : cells_of(sel, il0, is);
            const auto     order = window_order(cells, policy, sel.budgets[il0]);

            for (int32_t il = il0; il < il1; ++il) {
                const auto own = translate(sel, il, is, cells, order);

                for (int32_t ih = is; ih < (per_layer ? n_head_kv : is + 1); ++ih) {
                    keep_first(sel, il, ih, own);
                }
            }
        }
    }
    return "";
}

} // namespace wkv
