// Allocation: what heads hold, and budgets() as a whole.

#include "wkv-parts.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace wkv {

std::vector<choice> heads_choices(const wkv_allocation & p) {
    return {
        { "heads",      p.heads,      WKV_HEADS_COUNT      },
        { "across",     p.across,     WKV_ACROSS_COUNT     },
        { "accounting", p.accounting, WKV_ACCOUNTING_COUNT },
    };
}

bool competes_in_model(const wkv_allocation & p) {
    return p.heads == WKV_HEADS_SCORE && p.across == WKV_ACROSS_MODEL;
}

// by importance, before heads compete or instead of it
static bool divides(const wkv_allocation & p) {
    return p.heads == WKV_HEADS_IMPORTANCE || (competes_in_model(p) && p.beta > 0.0);
}

bool needs_scores_for_budgets(const wkv_policy & policy) {
    return policy.allocation.heads == WKV_HEADS_SCORE;
}

int64_t select_bytes(const cache_view & view) {
    const auto & shapes = view.shapes;
    const auto & policy = view.policy;

    const size_t  n_heads   = size_t(shapes.n_layer)*shapes.n_head_kv;
    const int64_t n_most    = *std::max_element(shapes.cells, shapes.cells + n_heads);
    const int32_t n_step    = competes_in_model(policy.allocation) ? shapes.n_layer : std::min(shapes.n_layer, n_layers_ranked(view));

    int64_t n_compete = 0; // at the same time
    for (int32_t il0 = 0; needs_scores_for_budgets(policy) && il0 < shapes.n_layer; il0 += n_step) {
        const int32_t il1 = std::min(shapes.n_layer, il0 + n_step);
        n_compete = std::max(n_compete, int64_t(view.offsets[view.index(il1, 0)] - view.offsets[view.index(il0, 0)]));
    }

    // Every thread ranks a head at a time: two copies of its scores while they are pooled, or a mean over heads or layers in double
    // precision and what it is made from; and windows, of 16 bytes each. Layers whose heads differ have a mean over the union of their
    // cells. Counts and the last keys take at most 3/8 of a byte for every cell of heads that compete.
    const wkv_selection & p = policy.selection;

    const bool    differ = std::any_of(shapes.cells, shapes.cells + n_heads, [&](int32_t n) { return n != n_most; });
    const bool    mean   = p.scope == WKV_SCOPE_LAYER || p.share == WKV_SHARE_MEAN || policy.scoring.query_heads == WKV_QUERY_HEADS_EACH;
    const int64_t n_mean = !mean ? 8 : differ && p.share == WKV_SHARE_MEAN ? 64*std::min(p.gamma, shapes.n_layer) : 24;
    const int64_t n_cell = p.kind == WKV_KIND_WINDOWS ? n_mean + 16/std::min(p.omega, 16) : p.kind == WKV_KIND_TOKENS ? 8 : p.kind == WKV_KIND_BEST ? 4 : 0;
    return n_cell*n_most*view.n_threads_for(0, n_step) + 3*n_compete/8;
}

static std::string beta_error(const wkv_allocation & p) {
    const bool by_score = p.heads == WKV_HEADS_SCORE;
    if (p.heads == WKV_HEADS_IMPORTANCE) {
        return is_at_least(p.beta, 1.0) ? "" : range("beta", p.beta, "at least 1 and finite");
    }
    if (competes_in_model(p)) {
        return p.beta == 0.0 || is_at_least(p.beta, 1.0) ? "" : range("beta", p.beta, "0, or at least 1 and finite");
    }
    if (layers_use_beta(p) || p.beta == 0.0) {
        return "";
    }
    return range("beta", p.beta, by_score ? "0: heads that compete divide by importance over the model only, across = model"
                                          : "0, layers = pyramid and heads = importance alone use it");
}

static std::string paper_error(const wkv_allocation & p, const wkv_selection & sel) {
    if (p.across == WKV_ACROSS_MODEL || p.importance_floor != 0) {
        return "accounting = paper knows neither across = model nor importance_floor";
    }
    if (p.heads == WKV_HEADS_SCORE && p.layers != WKV_LAYERS_FLAT) {
        return "accounting = paper knows heads that compete with layers = flat only";
    }
    if (p.heads != WKV_HEADS_EQUAL && sel.kind == WKV_KIND_WINDOWS) {
        return "accounting = paper knows windows with heads = equal only";
    }
    return "";
}

std::string heads_error(const wkv_policy & policy) {
    const wkv_allocation & p        = policy.allocation;
    const wkv_selection  & sel      = policy.selection;
    const bool             by_score = p.heads == WKV_HEADS_SCORE;

    if (by_score && sel.kind == WKV_KIND_BEST) {
        return "heads compete with the scores of cells before the observation window, kind = best looks at all: expected heads = equal or importance";
    }
    if (by_score && sel.kind == WKV_KIND_RECENT) {
        return "heads compete with scores, kind = recent has none: expected heads = equal or importance";
    }
    if (p.layers != WKV_LAYERS_FLAT && p.heads == WKV_HEADS_IMPORTANCE) {
        return "importance decides what layers hold, heads = importance needs layers = flat";
    }
    if (p.layers != WKV_LAYERS_FLAT && competes_in_model(p)) {
        return "heads that compete over the model decide what layers hold, across = model needs layers = flat";
    }
    if (!by_score && p.across != WKV_ACROSS_LAYER) {
        return unused("across", "heads do not compete");
    }
    const std::string error = beta_error(p);
    if (!error.empty()) {
        return error;
    }
    if (by_score ? !is_share(p.alpha_safeguard) : p.alpha_safeguard != 0.0) {
        return range("alpha_safeguard", p.alpha_safeguard, by_score ? "0 to 1" : "0, heads do not compete");
    }
    if (p.importance_floor < 0) {
        return range("importance_floor", int64_t(p.importance_floor), "at least 0");
    }
    if (!divides(p) && (p.importance_floor != 0 || p.importance || p.n_importance != 0)) {
        return unused("importance", "nothing is divided by it");
    }
    if (sel.kind == WKV_KIND_WINDOWS && sel.scope == WKV_SCOPE_LAYER && p.heads != WKV_HEADS_EQUAL) {
        return "scope = layer gives all heads of a layer the same cells, head budgets need scope = head";
    }
    if (sel.whole_windows && p.heads != WKV_HEADS_EQUAL) {
        return "whole_windows needs heads = equal";
    }
    return p.accounting == WKV_ACCOUNTING_PAPER ? paper_error(p, sel) : "";
}

std::string importance_error(const wkv_policy & policy, const wkv_shapes & shapes) {
    const wkv_allocation & p = policy.allocation;
    if (!divides(p)) {
        return "";
    }
    const int64_t n = int64_t(shapes.n_layer)*shapes.n_head_kv;
    if (!p.importance || p.n_importance != n) {
        return "importance holds " + std::to_string(p.importance ? p.n_importance : 0) + " scores, expected " +
            std::to_string(shapes.n_layer) + " layers x " + std::to_string(shapes.n_head_kv) + " kv heads";
    }
    for (int64_t i = 0; i < n; ++i) {
        if (!is_at_least(p.importance[i], 0.0)) {
            return "importance of layer " + std::to_string(i/shapes.n_head_kv) + " is negative or not a number";
        }
    }
    return "";
}

// HeadKV's authors round and cut, what exceeds a head is lost
static std::vector<int64_t> paper_importance(const wkv_policy & policy, const std::vector<int64_t> & hi, int64_t n_cells) {
    const wkv_allocation & p = policy.allocation;

    const auto    weight = to_scale({ p.importance, p.importance + hi.size() }, 0);
    const double  sum    = std::accumulate(weight.begin(), weight.end(), 0.0);
    const int64_t recent = policy.selection.n_recent;
    const int64_t mean   = n_cells - recent;
    const bool    fits   = std::all_of(hi.begin(), hi.end(), [&](int64_t n) { return n < n_cells; });

    std::vector<int64_t> res(hi.size(), n_cells);
    if (mean > 0 && sum > 0.0 && !fits) {
        const int64_t divided = floor_div(mean, p.beta);
        const double  total   = double(divided)*double(hi.size());
        for (size_t i = 0; i < hi.size(); ++i) {
            // to even, as round() of Python does in the default rounding mode
            res[i] = recent + std::llrint(std::min(weight[i]/sum*total + double(mean - divided), double(hi[i])));
        }
    }
    for (size_t i = 0; i < hi.size(); ++i) {
        res[i] = std::min(std::max<int64_t>(1, res[i]), hi[i]);
    }
    return res;
}

// HeadKV (arXiv 2410.19258, section 3.2): 1/beta of the cells is divided by importance, the rest equally, among heads that hold the
// cells hi, [n_layer*n_head_kv]
static std::vector<int64_t> importance_budgets(const cache_view & view, const std::vector<int64_t> & hi, int64_t n_cells) {
    const wkv_policy     & policy = view.policy;
    const wkv_allocation & p      = policy.allocation;
    const size_t           n      = view.offsets.size() - 1;

    if (p.accounting == WKV_ACCOUNTING_PAPER) {
        return paper_importance(policy, hi, n_cells);
    }

    std::vector<int64_t> lo(n);
    for (size_t i = 0; i < n; ++i) {
        lo[i] = std::min({ std::max<int64_t>(1, policy.selection.n_recent), n_cells, hi[i] });
    }
    std::vector<double> weight(n, 0.0);
    if (divides(p)) {
        weight.assign(p.importance, p.importance + n);
    }
    const int64_t n_divided = std::max<int64_t>(0, n_cells - p.importance_floor);
    const double  share     = p.beta > 0.0 ? 1.0/p.beta : 0.0;

    return water_fill(double(n_cells) - double(n_divided)*share, weight, lo, hi, n_cells*int64_t(n));
}

// own and, where heads compete, due: the cells of the whole model are divided
static void divide_model(const cache_view & view, int64_t n_cells, head_budgets & res) {
    const size_t n = view.offsets.size() - 1;

    std::vector<int64_t> hi(view.shapes.cells, view.shapes.cells + n);
    const auto own = importance_budgets(view, hi, n_cells);
    res.own.assign(own.begin(), own.end());
    if (competes_in_model(view.policy.allocation)) {
        hi.assign(n, view.shapes.n_past);
        for (const int64_t whole : importance_budgets(view, hi, n_cells)) {
            res.due.push_back(std::max<int64_t>(res.own[res.due.size()], whole));
        }
    }
}

// heads inside the budgets of their layers: equal ones, [n_layer*n_head_kv]
static std::vector<int64_t> even_budgets(const cache_view & view, int64_t n_cells) {
    const int64_t n_layer   = view.shapes.n_layer;
    const int64_t n_head_kv = view.shapes.n_head_kv;

    // heads that hold equally many go on doing so; heads that compete can use all that their layer holds
    std::vector<int64_t> hi(n_layer);
    for (int64_t il = 0; il < n_layer; ++il) {
        const int32_t * first = view.shapes.cells + il*n_head_kv;
        const int32_t * last  = first + n_head_kv;
        hi[il] = view.policy.allocation.heads == WKV_HEADS_EQUAL ? *std::min_element(first, last)
                                                                 : std::accumulate(first, last, int64_t(0))/n_head_kv;
    }

    const auto layers = layer_budgets(view.policy, hi, n_cells);

    std::vector<int64_t> res(n_layer*n_head_kv);
    for (size_t i = 0; i < res.size(); ++i) {
        res[i] = layers[i/n_head_kv];
    }
    return res;
}

competition competition_of(const cache_view & view, const head_budgets & budgets, int32_t il0, int32_t il1) {
    const size_t i0 = view.index(il0, 0);
    const size_t n  = view.index(il1, 0) - i0;

    competition res = {};
    res.n               = n;
    res.n_group         = competes_in_model(view.policy.allocation) ? n : view.shapes.n_head_kv;
    res.n_cells         = view.shapes.cells + i0;
    res.own             = budgets.own.data() + i0;
    res.due             = budgets.due.empty() ? nullptr : budgets.due.data() + i0;
    res.alpha_safeguard = view.policy.allocation.alpha_safeguard;
    res.n_least         = 1;
    res.n_threads       = view.n_threads_for(il0, il1);
    return res;
}

// heads of single tokens that compete; n_stays: of each head the newest cells, which are sure
static void compete_tokens(const cache_view & view, competition c, int32_t il0, int32_t n_stays, int32_t * res) {
    const int32_t n_head_kv = view.shapes.n_head_kv;

    c.n_units = c.n;
    c.runs    = [&](size_t i, const run_fn & fn) {
        const key_run stays = { KEY_STAYS, std::min(c.n_cells[i], n_stays) };
        fn(i, &stays, 1);

        const auto pooled = pooled_review(view, il0 + i/n_head_kv, i%n_head_kv);
        each_run(i, pooled.size(), fn, [&](int32_t ic) { return key_run { pooled[ic], 1 }; });
    };
    compete(c, res);
}

// AdaKV's authors let all cells before the observation window compete, those too that the safeguard keeps, and round
static void paper_compete(const cache_view & view, int32_t il, int64_t n_cells, int32_t * res) {
    const int32_t n_head_kv = view.shapes.n_head_kv;
    const int32_t recent    = view.policy.selection.n_recent;
    const double  safeguard = view.policy.allocation.alpha_safeguard;
    const int64_t mean      = n_cells - recent;

    std::vector<int32_t> n_review(n_head_kv);
    bool fits = true;
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        n_review[ih] = std::max(0, view.n_cells(il, ih) - view.policy.scoring.window_size);

        fits    = fits && mean > n_review[ih];
        res[ih] = std::min<int64_t>(n_cells, view.n_cells(il, ih));
    }
    if (mean <= 0 || fits) {
        return;
    }

    const std::vector<int32_t> own(n_head_kv, mean);
    std::vector<int32_t>       won(n_head_kv);

    competition c = {};
    c.n         = n_head_kv;
    c.n_group   = n_head_kv;
    c.n_cells   = n_review.data();
    c.own       = own.data();
    c.n_threads = view.n_threads_for(il, il + 1);
    compete_tokens(view, c, il, 0, won.data());
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        const volatile float part = float(won[ih])*float(1.0 - safeguard); // rounded by itself, not fused with the sum
        const float          sum  = part + float(int64_t(mean*safeguard));
        res[ih] = std::min<int64_t>(std::max<int64_t>(1, recent + std::llrint(sum)), view.n_cells(il, ih)); // to even
    }
}

void compete_layers(const cache_view & view, int32_t il0, int32_t il1, head_budgets & res) {
    if (view.policy.allocation.accounting == WKV_ACCOUNTING_PAPER) {
        for (int32_t il = il0; il < il1; ++il) {
            paper_compete(view, il, res.mean, res.n_cells.data() + view.index(il, 0));
        }
    } else if (view.policy.selection.kind == WKV_KIND_WINDOWS) {
        budget_windows(view, il0, il1, res);
    } else {
        compete_tokens(view, competition_of(view, res, il0, il1), il0, view.policy.selection.n_recent,
                res.n_cells.data() + view.index(il0, 0));
    }
}

void own_budgets(const cache_view & view, int64_t n_cells, head_budgets & res) {
    n_cells = std::min<int64_t>(n_cells, INT32_MAX); // no head holds more

    const wkv_allocation & p = view.policy.allocation;

    res = {};
    res.mean = n_cells;
    if (view.policy.selection.kind == WKV_KIND_FULL) {
        res.own.assign(view.shapes.cells, view.shapes.cells + view.offsets.size() - 1);
    } else if (p.heads == WKV_HEADS_IMPORTANCE || competes_in_model(p)) {
        divide_model(view, n_cells, res);
    } else {
        const auto own = even_budgets(view, n_cells);
        res.own.assign(own.begin(), own.end());
    }
    res.n_cells = res.own;
}

std::string budgets(const cache_view & view, int64_t n_cells, head_budgets & res) {
    const int32_t n_layer = view.shapes.n_layer;

    own_budgets(view, n_cells, res);
    if (!needs_scores_for_budgets(view.policy)) {
        return "";
    }
    std::string error = scores_error(view, 0, n_layer);
    if (error.empty()) {
        error = selection_misfit(view, 0, n_layer);
    }
    if (!error.empty()) {
        return error;
    }

    const int32_t n_step = competes_in_model(view.policy.allocation) ? n_layer : n_layers_ranked(view);
    for (int32_t il0 = 0; il0 < n_layer; il0 += n_step) {
        compete_layers(view, il0, std::min(n_layer, il0 + n_step), res);
    }
    if (view.policy.selection.token_share > 0.0) {
        marks keep(view.shapes.cells, res.own.size());
        mark_windows (view, res, 0, n_layer, keep);
        budget_tokens(view, 0, n_layer, keep, res);
    }
    return "";
}

std::string given_budgets(const cache_view & view, const int32_t * n_cells, head_budgets & res) {
    const int64_t n_head_kv = view.shapes.n_head_kv;
    const size_t  n         = view.offsets.size() - 1;

    res = {};
    res.n_cells.assign(n_cells, n_cells + n);
    for (size_t i = 0; i < n; ++i) {
        if (n_cells[i] < 0) {
            return "the budget of layer " + std::to_string(i/n_head_kv) + ", kv head " + std::to_string(i%n_head_kv) + " is " +
                std::to_string(n_cells[i]) + ", expected at least 0";
        }
    }

    res.own = res.n_cells;
    if (competes_in_model(view.policy.allocation)) {
        // what the heads hold together tells what each would hold by itself
        divide_model(view, std::accumulate(n_cells, n_cells + n, int64_t(0))/int64_t(n), res);
    } else if (view.policy.allocation.heads == WKV_HEADS_SCORE) {
        for (auto first = res.own.begin(); first != res.own.end(); first += n_head_kv) {
            std::fill(first, first + n_head_kv, int32_t(std::accumulate(first, first + n_head_kv, int64_t(0))/n_head_kv));
        }
    }
    for (size_t i = 0; i < n; ++i) {
        res.n_cells[i] = std::min(res.n_cells[i], view.shapes.cells[i]);
    }
    return "";
}

} // namespace wkv
