// What a valid policy is, and the cells it looks at. The options of each part are checked where they are used.

#include "wkv-parts.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace wkv {

std::string range(const char * name, int64_t got, const char * want) {
    return std::string(name) + " is " + std::to_string(got) + ", expected " + want;
}

std::string range(const char * name, double got, const char * want) {
    return std::string(name) + " is " + std::to_string(got) + ", expected " + want;
}

std::string unused(const char * name, const char * where) {
    return std::string(name) + " is given, but " + where + ": expected 0";
}

std::string policy_error(const wkv_policy & policy) {
    for (const auto & part : {
            scoring_choices  (policy.scoring),
            layers_choices   (policy.allocation),
            heads_choices    (policy.allocation),
            selection_choices(policy.selection) }) {
        for (const choice & p : part) {
            if (p.value < 0 || p.value >= p.count) {
                return range(p.name, int64_t(p.value), (std::string("a value of enum wkv_") + p.name).c_str());
            }
        }
    }
    for (const auto error : { scoring_error, selection_error, layers_error, heads_error }) {
        const std::string res = error(policy);
        if (!res.empty()) {
            return res;
        }
    }
    return "";
}

std::string shapes_error(const wkv_policy & policy, const wkv_shapes & shapes) {
    if (shapes.n_layer < 1 || shapes.n_head_kv < 1 || shapes.n_past < 0 || !shapes.cells) {
        return "shapes need n_layer >= 1, n_head_kv >= 1, n_past >= 0 and cells";
    }
    if (shapes.n_gqa < 1 && policy.scoring.query_heads == WKV_QUERY_HEADS_EACH) {
        return range("n_gqa", int64_t(shapes.n_gqa), "at least 1 with query_heads = each");
    }

    const int64_t n = int64_t(shapes.n_layer)*shapes.n_head_kv;
    for (int64_t i = 0; i < n; ++i) {
        if (shapes.cells[i] < 0) {
            return "cells of layer " + std::to_string(i/shapes.n_head_kv) + " are negative";
        }
    }
    return importance_error(policy, shapes);
}

bool fits(const wkv_shapes & shapes, int64_t n_cells) {
    n_cells = std::min<int64_t>(n_cells, INT32_MAX); // no head holds more

    for (int32_t il = 0; il < shapes.n_layer; ++il) {
        const int32_t * cells = shapes.cells + size_t(il)*shapes.n_head_kv;
        if (std::accumulate(cells, cells + shapes.n_head_kv, int64_t(0)) > n_cells*shapes.n_head_kv) {
            return false;
        }
    }
    return true;
}

cache_view::cache_view(const wkv_policy & policy, const wkv_shapes & shapes, const int32_t * positions, const float * scores) :
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

std::string keep_error(const wkv_shapes & shapes, int64_t n_cells, const uint8_t * keep) {
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
