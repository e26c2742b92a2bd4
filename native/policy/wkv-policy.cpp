// What a valid policy is, and what it needs.

#include "wkv-policy.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace wkv {

static std::string range(const char * name, int64_t got, const char * want) {
    return std::string(name) + " is " + std::to_string(got) + ", expected " + want;
}

static std::string range(const char * name, double got, const char * want) {
    return std::string(name) + " is " + std::to_string(got) + ", expected " + want;
}

static std::string unused(const char * name, const char * where) {
    return std::string(name) + " is given, but " + where + ": expected 0";
}

static bool is_share(double x) {
    return x >= 0.0 && x <= 1.0;
}

static std::string scoring_error(const scoring & p, const selection & sel) {
    const bool by_position = sel.kind == kind::full || sel.kind == kind::recent;
    if (by_position) {
        return p.window_size == 0 && p.token_window_size == 0 && p.kernel_size == 0 && p.pooling == pooling::max &&
            p.query_heads == query_heads::mean ? "" : unused("scoring", "this kind of selection looks at positions alone");
    }
    if (p.window_size < 1) {
        return range("window_size", int64_t(p.window_size), "at least 1");
    }
    if (p.kernel_size < 1 || (p.pooling == pooling::max && p.kernel_size % 2 == 0)) {
        return range("kernel_size", int64_t(p.kernel_size), p.pooling == pooling::max ? "an odd number" : "at least 1");
    }
    return "";
}

// the second plane, and rows for every query head
static std::string planes_error(const scoring & p, const selection & sel) {
    if (sel.token_share > 0.0 && p.token_window_size < 1) {
        return range("token_window_size", int64_t(p.token_window_size), "at least 1");
    }
    if (sel.token_share == 0.0 && p.token_window_size != 0) {
        return unused("token_window_size", "token_share is 0");
    }
    if (p.query_heads == query_heads::each &&
            (sel.kind != kind::windows || p.kernel_size != 1 || sel.share != share::first || sel.token_share > 0.0)) {
        return "query_heads = each needs windows, kernel_size = 1, share = first and token_share = 0";
    }
    return "";
}

static std::string windows_error(const selection & p) {
    if (p.omega < 1) {
        return range("omega", int64_t(p.omega), "at least 1");
    }
    if (p.top_p < 1 || p.top_p > p.omega) {
        return range("top_p", int64_t(p.top_p), "1 to omega");
    }
    if (p.gamma < 1) {
        return range("gamma", int64_t(p.gamma), "at least 1");
    }
    if (!(p.recent_share > 0.0 && p.recent_share <= 1.0)) {
        return range("recent_share", p.recent_share, "over 0 and up to 1");
    }
    if (!is_share(p.token_share)) {
        return range("token_share", p.token_share, "0 to 1");
    }
    if (p.window_floor < 0) {
        return range("window_floor", int64_t(p.window_floor), "at least 0");
    }
    if (p.token_share == 0.0 && p.window_floor != 0) {
        return unused("window_floor", "token_share is 0");
    }
    if (p.token_share > 0.0 && (p.scope != scope::head || p.gamma != 1)) {
        return "token_share needs scope = head and gamma = 1";
    }
    if (p.token_share > 0.0 && p.whole_windows) {
        return "whole_windows leaves nothing for single tokens, expected token_share = 0";
    }
    return "";
}

static std::string selection_error(const selection & p, const scoring & sco) {
    if (p.kind != kind::recent && p.n_sink != 0) {
        return unused("n_sink", "only kind = recent keeps sinks");
    }
    if (p.n_sink < 0) {
        return range("n_sink", int64_t(p.n_sink), "at least 0");
    }
    if (p.n_recent < 0 || p.n_recent > sco.window_size) {
        return range("n_recent", int64_t(p.n_recent), "0 to window_size");
    }
    if (p.kind == kind::windows) {
        return windows_error(p);
    }
    if (p.omega != 0 || p.top_p != 0 || p.gamma != 0 || p.share != share::first || p.scope != scope::layer || p.protect_first ||
            p.whole_windows || p.recent_share != 0.0 || p.token_share != 0.0 || p.window_floor != 0) {
        return unused("an option of windows", "kind is not windows");
    }
    return "";
}

static std::string allocation_error(const allocation & p, const selection & sel) {
    const bool by_score = p.heads == heads::score;
    if (sel.kind == kind::full && (p.layers != layers::flat || p.heads != heads::equal)) {
        return "kind = full keeps every cell, expected layers = flat and heads = equal";
    }
    if (sel.kind == kind::recent && by_score) {
        return "heads compete with scores, kind = recent has none: expected heads = equal or importance";
    }
    if (p.layers == layers::arithmetic && sel.kind != kind::windows) {
        return "layers = arithmetic falls over groups of gamma layers, it needs kind = windows";
    }
    if (p.layers == layers::arithmetic ? !(p.lam > 0.0) : p.lam != 0.0) {
        return range("lam", p.lam, p.layers == layers::arithmetic ? "a positive number" : "0, layers = arithmetic alone uses it");
    }
    if (p.layers != layers::flat && p.heads == heads::importance) {
        return "importance decides what layers hold, heads = importance needs layers = flat";
    }
    if (p.layers != layers::flat && p.competes_in_model()) {
        return "heads that compete over the model decide what layers hold, across = model needs layers = flat";
    }
    if (!by_score && p.across != across::layer) {
        return unused("across", "heads do not compete");
    }
    if (p.layers == layers::pyramid || p.heads == heads::importance) {
        if (!(p.beta >= 1.0)) {
            return range("beta", p.beta, "at least 1");
        }
    } else if (p.competes_in_model()) {
        if (p.beta != 0.0 && !(p.beta >= 1.0)) {
            return range("beta", p.beta, "0 or at least 1");
        }
    } else if (p.beta != 0.0) {
        return range("beta", p.beta, by_score ? "0: heads that compete divide by importance over the model only, across = model"
                                              : "0, layers = pyramid and heads = importance alone use it");
    }
    if (by_score ? !is_share(p.alpha_safeguard) : p.alpha_safeguard != 0.0) {
        return range("alpha_safeguard", p.alpha_safeguard, by_score ? "0 to 1" : "0, heads do not compete");
    }
    if (p.importance_floor < 0) {
        return range("importance_floor", int64_t(p.importance_floor), "at least 0");
    }
    if (!p.divides() && (p.importance_floor != 0 || p.importance || p.n_importance != 0)) {
        return unused("importance", "nothing is divided by it");
    }
    if (sel.kind == kind::windows && sel.scope == scope::layer && p.heads != heads::equal) {
        return "scope = layer gives all heads of a layer the same cells, head budgets need scope = head";
    }
    if (sel.whole_windows && p.heads != heads::equal) {
        return "whole_windows needs heads = equal";
    }
    if (p.accounting == accounting::paper && (p.across == across::model || p.importance_floor != 0)) {
        return "accounting = paper knows neither across = model nor importance_floor";
    }
    if (p.accounting == accounting::paper && by_score && p.layers != layers::flat) {
        return "accounting = paper knows heads that compete with layers = flat only";
    }
    if (p.accounting == accounting::paper && sel.kind == kind::windows && p.heads != heads::equal) {
        return "accounting = paper knows windows with heads = equal only";
    }
    return "";
}

std::string policy_error(const policy & p) {
    for (const std::string & error : {
            scoring_error(p.scoring, p.selection),
            selection_error(p.selection, p.scoring),
            planes_error(p.scoring, p.selection),
            allocation_error(p.allocation, p.selection) }) {
        if (!error.empty()) {
            return error;
        }
    }
    return "";
}

std::string shapes_error(const policy & policy, const shapes & shapes) {
    if (shapes.n_layer < 1 || shapes.n_head_kv < 1 || shapes.n_past < 0 || !shapes.cells) {
        return "shapes need n_layer >= 1, n_head_kv >= 1, n_past >= 0 and cells";
    }
    if (shapes.n_gqa < 1 && policy.scoring.query_heads == query_heads::each) {
        return range("n_gqa", int64_t(shapes.n_gqa), "at least 1 with query_heads = each");
    }

    const int64_t n = int64_t(shapes.n_layer)*shapes.n_head_kv;
    for (int64_t i = 0; i < n; ++i) {
        if (shapes.cells[i] < 0) {
            return "cells of layer " + std::to_string(i/shapes.n_head_kv) + " are negative";
        }
    }

    const allocation & p = policy.allocation;
    if (p.divides()) {
        if (!p.importance || p.n_importance != n) {
            return "importance holds " + std::to_string(p.importance ? p.n_importance : 0) + " scores, expected " +
                std::to_string(shapes.n_layer) + " layers x " + std::to_string(shapes.n_head_kv) + " kv heads";
        }
        for (int64_t i = 0; i < n; ++i) {
            if (!(p.importance[i] >= 0.0 && std::isfinite(p.importance[i]))) {
                return "importance of layer " + std::to_string(i/shapes.n_head_kv) + " is negative or not a number";
            }
        }
    }
    return "";
}

std::vector<int32_t> window_sizes(const policy & policy) {
    std::vector<int32_t> res;
    for (const int32_t size : { policy.scoring.window_size, policy.scoring.token_window_size }) {
        if (size > 0) {
            res.push_back(size);
        }
    }
    return res;
}

bool needs_scores_for_budgets(const policy & policy) {
    return policy.allocation.heads == heads::score;
}

bool fits(const shapes & shapes, int64_t n_cells) {
    n_cells = std::min<int64_t>(n_cells, INT32_MAX); // no head holds more

    for (int32_t il = 0; il < shapes.n_layer; ++il) {
        const int32_t * cells = shapes.cells + size_t(il)*shapes.n_head_kv;
        if (std::accumulate(cells, cells + shapes.n_head_kv, int64_t(0)) > n_cells*shapes.n_head_kv) {
            return false;
        }
    }
    return true;
}

cache_view::cache_view(const wkv::policy & policy, const wkv::shapes & shapes, const int32_t * positions, const float * scores) :
    policy(policy), shapes(shapes), positions(positions), scores(scores) {
    const size_t n = size_t(shapes.n_layer)*shapes.n_head_kv;

    offsets.resize(n + 1, 0);
    for (size_t i = 0; i < n; ++i) {
        offsets[i + 1] = offsets[i] + shapes.cells[i];
    }
}

static std::string not_finite(int32_t il, int32_t ih) {
    return "the scores of layer " + std::to_string(il) + ", kv head " + std::to_string(ih) +
        " are not finite: keys or queries of this prompt overflow in the type of the cells, try f32 cells or a model without a policy";
}

std::string scores_error(const cache_view & view) {
    const auto finite = [](const float * first, size_t n) {
        return std::all_of(first, first + n, [](float x) { return std::isfinite(x); });
    };
    for (int32_t il = 0; il < view.shapes.n_layer; ++il) {
        for (int32_t ih = 0; ih < view.shapes.n_head_kv; ++ih) {
            const size_t n = view.n_cells(il, ih);
            if (!finite(view.score(il, ih), n*view.n_rows()) ||
                    (view.policy.scoring.token_window_size > 0 && !finite(view.token_score(il, ih), n))) {
                return not_finite(il, ih);
            }
        }
    }
    return "";
}

std::string selection_error(const shapes & shapes, int64_t n_cells, const uint8_t * keep) {
    const int64_t n_heads = int64_t(shapes.n_layer)*shapes.n_head_kv;

    int64_t n_kept = 0;
    for (int64_t i = 0; i < n_heads; ++i) {
        const int64_t n = shapes.cells[i];

        const int64_t n_own = n - std::count(keep, keep + n, 0);
        if (n > 0 && n_own == 0) {
            return "the selection keeps no cell of layer " + std::to_string(i/shapes.n_head_kv) + ", kv head " +
                std::to_string(i%shapes.n_head_kv) + ", expected at least one";
        }
        n_kept += n_own;
        keep   += n;
    }

    const int64_t n_max = std::min<int64_t>(n_cells, INT32_MAX)*n_heads;
    if (n_kept > n_max) {
        return "the selection keeps " + std::to_string(n_kept) + " cells over all heads, expected at most " + std::to_string(n_max);
    }
    return "";
}

} // namespace wkv
