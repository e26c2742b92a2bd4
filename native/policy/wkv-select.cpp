#include "wkv-policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace wkv {

std::string policy_error(const wkv_policy & p) {
    const auto range = [](const char * name, int64_t got, const char * want) {
        return std::string(name) + " is " + std::to_string(got) + ", expected " + want;
    };

    if (p.kind < WKV_KIND_FULL || p.kind > WKV_KIND_WINDOWKV) {
        return range("kind", p.kind, "a value of enum wkv_kind");
    }
    if (p.kind == WKV_KIND_FULL) {
        return "";
    }
    if (p.alpha < 1) {
        return range("alpha", p.alpha, "at least 1");
    }
    if (p.suffix < 0 || p.suffix > p.alpha) {
        return range("suffix", p.suffix, "0 to alpha");
    }
    if (p.heads < WKV_HEADS_EQUAL || p.heads > WKV_HEADS_SCORE) {
        return range("heads", p.heads, "a value of enum wkv_heads");
    }
    if (p.span < WKV_SPAN_LAYER || p.span > WKV_SPAN_MODEL) {
        return range("span", p.span, "a value of enum wkv_span");
    }
    if (p.heads != WKV_HEADS_EQUAL && !(p.pool >= 0.0 && p.pool <= 1.0)) {
        return "pool must be 0 to 1";
    }
    if (p.pool_floor < 0) {
        return range("pool_floor", p.pool_floor, "at least 0");
    }
    if (p.heads == WKV_HEADS_SCORE && p.span == WKV_SPAN_LAYER && p.pool > 0.0) {
        return "heads that compete divide a pool by importance over the model only, pool needs span = model";
    }
    if (p.heads == WKV_HEADS_SCORE && p.span == WKV_SPAN_MODEL &&
            (p.kind == WKV_KIND_PYRAMIDKV || (p.kind == WKV_KIND_WINDOWKV && p.shape != WKV_SHAPE_FLAT))) {
        return "heads that compete over the model decide what layers hold, span = model needs flat budgets";
    }
    if (p.heads == WKV_HEADS_SCORE && !(p.floor_share >= 0.0 && p.floor_share <= 1.0)) {
        return "floor_share must be 0 to 1";
    }
    if (p.n_sink < 0) {
        return range("n_sink", p.n_sink, "at least 0");
    }
    if ((p.kind == WKV_KIND_SNAPKV || p.kind == WKV_KIND_PYRAMIDKV) && (p.kernel < 1 || p.kernel % 2 == 0)) {
        return range("kernel", p.kernel, "an odd number");
    }
    if (p.kind == WKV_KIND_PYRAMIDKV && !(p.slope >= 1.0)) {
        return "slope (beta) must be at least 1";
    }
    if (p.kind == WKV_KIND_WINDOWKV) {
        if (p.omega < 1) {
            return range("omega", p.omega, "at least 1");
        }
        if (p.top_p < 1 || p.top_p > p.omega) {
            return range("top_p", p.top_p, "1 to omega");
        }
        if (p.gamma < 1) {
            return range("gamma", p.gamma, "at least 1");
        }
        if (p.carry < 0) {
            return range("carry", p.carry, "at least 0");
        }
        if (!(p.suffix_share > 0.0 && p.suffix_share <= 1.0)) {
            return "suffix_share must be over 0 and up to 1";
        }
        if (!(p.tokens >= 0.0 && p.tokens <= 1.0)) {
            return "tokens must be 0 to 1";
        }
        if (p.window_floor < 0) {
            return range("window_floor", p.window_floor, "at least 0");
        }
        if (p.tokens > 0.0 && p.token_alpha < 1) {
            return range("token_alpha", p.token_alpha, "at least 1");
        }
        if (p.tokens > 0.0 && (p.scope != WKV_SCOPE_HEAD || p.gamma != 1)) {
            return "tokens beside windows need scope = head and gamma = 1";
        }
        if (p.scope == WKV_SCOPE_LAYER && p.heads != WKV_HEADS_EQUAL) {
            return "scope = layer gives all heads of a layer the same cells, head budgets need scope = head";
        }
        if (p.shape == WKV_SHAPE_ARITHMETIC && !(p.slope > 0.0)) {
            return "slope (lambda) must be positive";
        }
    }
    return "";
}

std::string shapes_error(const wkv_policy & policy, const wkv_shapes & shapes) {
    if (shapes.n_layer < 1 || shapes.n_head_kv < 1 || shapes.n_past < 0 || !shapes.cells) {
        return "shapes need n_layer >= 1, n_head_kv >= 1, n_past >= 0 and cells";
    }

    const int64_t n = int64_t(shapes.n_layer)*shapes.n_head_kv;
    for (int64_t i = 0; i < n; ++i) {
        if (shapes.cells[i] < 0) {
            return "cells of layer " + std::to_string(i/shapes.n_head_kv) + " are negative";
        }
    }

    const bool divides = policy.heads == WKV_HEADS_IMPORTANCE || (policy.heads == WKV_HEADS_SCORE && policy.pool > 0.0);
    if (policy.kind != WKV_KIND_FULL && divides) {
        if (!policy.importance || policy.n_importance != n) {
            return "importance holds " + std::to_string(policy.importance ? policy.n_importance : 0) + " scores, expected " +
                std::to_string(shapes.n_layer) + " layers x " + std::to_string(shapes.n_head_kv) + " kv heads";
        }
        for (int64_t i = 0; i < n; ++i) {
            if (!(policy.importance[i] >= 0.0 && std::isfinite(policy.importance[i]))) {
                return "importance of layer " + std::to_string(i/shapes.n_head_kv) + " is negative or not a number";
            }
        }
    }
    return "";
}

cache_view::cache_view(const wkv_policy & policy, const wkv_shapes & shapes, const int32_t * positions, const float * scores) :
    policy(policy), shapes(shapes), positions(positions), scores(scores) {
    const size_t n = size_t(shapes.n_layer)*shapes.n_head_kv;

    offsets.resize(n + 1, 0);
    for (size_t i = 0; i < n; ++i) {
        offsets[i + 1] = offsets[i] + shapes.cells[i];
    }
}

// the newest tokens first, then those that are chosen, then what is left of the observation window
static const double STAYS =  std::numeric_limits<double>::infinity();
static const double GOES  = -std::numeric_limits<double>::infinity();

std::string rank_streamingllm(const cache_view & view, const rank_fn & fn) {
    for (int32_t il = 0; il < view.shapes.n_layer; ++il) {
        for (int32_t ih = 0; ih < view.shapes.n_head_kv; ++ih) {
            const int32_t   n   = view.n_cells(il, ih);
            const int32_t * pos = view.pos(il, ih);

            ranking res;
            res.order.reserve(n);
            if (n > 0) {
                res.order.push_back(n - 1);
            }
            for (int32_t i = 0; i < n - 1 && pos[i] < view.policy.n_sink; ++i) {
                res.order.push_back(i);
            }
            for (int32_t i = n - 2; i >= 0 && pos[i] >= view.policy.n_sink; --i) {
                res.order.push_back(i);
            }
            res.key.assign(n, GOES);

            fn(il, ih, res);
        }
    }
    return "";
}

// SnapKV (arXiv 2404.14469, section 3): max-pooled attention of the observation window, best tokens first
std::string rank_snapkv(const cache_view & view, const rank_fn & fn) {
    const int32_t half = view.policy.kernel/2;

    for (int32_t il = 0; il < view.shapes.n_layer; ++il) {
        for (int32_t ih = 0; ih < view.shapes.n_head_kv; ++ih) {
            const int32_t n        = view.n_cells(il, ih);
            const int32_t n_review = std::max(0, n - view.policy.alpha);
            const int32_t n_suffix = std::min(n, view.policy.suffix);
            const float * score    = view.score(il, ih);

            std::vector<float> pooled(n_review);
            for (int32_t i = 0; i < n_review; ++i) {
                const int32_t i0 = std::max(0, i - half);
                const int32_t i1 = std::min(n_review, i + half + 1);

                pooled[i] = *std::max_element(score + i0, score + i1);
            }

            std::vector<int32_t> best(n_review);
            std::iota(best.begin(), best.end(), 0);
            std::stable_sort(best.begin(), best.end(), [&](int32_t a, int32_t b) { return pooled[a] > pooled[b]; });

            ranking res;
            res.order.reserve(n);
            res.key.assign(n_suffix, STAYS);
            for (int32_t i = 0; i < n_suffix; ++i) {
                res.order.push_back(n - 1 - i);
            }
            for (const int32_t i : best) {
                res.order.push_back(i);
                res.key.push_back(pooled[i]);
            }
            for (int32_t i = n - 1 - n_suffix; i >= n_review; --i) {
                res.order.push_back(i);
            }
            res.key.resize(n, GOES);

            fn(il, ih, res);
        }
    }
    return "";
}

std::string rank(const cache_view & view, const int32_t * budgets, const rank_fn & fn) {
    switch (view.policy.kind) {
        case WKV_KIND_STREAMINGLLM: return rank_streamingllm(view, fn);
        case WKV_KIND_SNAPKV:
        case WKV_KIND_PYRAMIDKV:    return rank_snapkv(view, fn);
        case WKV_KIND_WINDOWKV:     return rank_windowkv(view, budgets, fn);
    }
    return "unknown kind";
}

std::string select(const cache_view & view, const int32_t * budgets, uint8_t * keep) {
    if (view.policy.kind == WKV_KIND_FULL) {
        memset(keep, 1, view.offsets.back());
        return "";
    }

    return rank(view, budgets, [&](int32_t il, int32_t ih, const ranking & res) {
        const size_t i = view.index(il, ih);
        const size_t n = std::min<size_t>(std::max(0, budgets[i]), res.order.size());

        memset(keep + view.offsets[i], 0, view.n_cells(il, ih));
        for (size_t j = 0; j < n; ++j) {
            keep[view.offsets[i] + res.order[j]] = 1;
        }
    });
}

} // namespace wkv
