#include "wkv-policy.h"

#include <algorithm>
#include <cstring>
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
        if (p.shape == WKV_SHAPE_ARITHMETIC && !(p.slope > 0.0)) {
            return "slope (lambda) must be positive";
        }
    }
    return "";
}

std::string shapes_error(const wkv_shapes & shapes) {
    if (shapes.n_layer < 1 || shapes.n_head_kv < 1 || shapes.n_past < 0 || !shapes.cells) {
        return "shapes need n_layer >= 1, n_head_kv >= 1, n_past >= 0 and cells";
    }
    for (int32_t il = 0; il < shapes.n_layer; ++il) {
        if (shapes.cells[il] < 0) {
            return "cells of layer " + std::to_string(il) + " is negative";
        }
    }
    return "";
}

selection::selection(const wkv_policy & policy, const wkv_shapes & shapes, const int32_t * budgets,
                     const int32_t * positions, const float * scores, uint8_t * keep) :
    policy(policy), shapes(shapes), budgets(budgets), positions(positions), scores(scores), keep(keep) {
    offsets.resize(shapes.n_layer + 1, 0);
    for (int32_t il = 0; il < shapes.n_layer; ++il) {
        offsets[il + 1] = offsets[il] + size_t(shapes.n_head_kv)*shapes.cells[il];
    }
}

void keep_first(selection & sel, int32_t il, int32_t ih, const std::vector<int32_t> & order) {
    uint8_t * keep = sel.keep + sel.at(il, ih);

    memset(keep, 0, sel.n_cells(il));

    const size_t n = std::min<size_t>(std::max(0, sel.budgets[il]), order.size());
    for (size_t i = 0; i < n; ++i) {
        keep[order[i]] = 1;
    }
}

std::string select_streamingllm(selection & sel) {
    for (int32_t il = 0; il < sel.shapes.n_layer; ++il) {
        const int32_t n = sel.shapes.cells[il];

        for (int32_t ih = 0; ih < sel.shapes.n_head_kv; ++ih) {
            const int32_t * pos = sel.positions + sel.at(il, ih);

            std::vector<int32_t> order;
            order.reserve(n);
            if (n > 0) {
                order.push_back(n - 1);
            }
            for (int32_t i = 0; i < n - 1 && pos[i] < sel.policy.n_sink; ++i) {
                order.push_back(i);
            }
            for (int32_t i = n - 2; i >= 0 && pos[i] >= sel.policy.n_sink; --i) {
                order.push_back(i);
            }

            keep_first(sel, il, ih, order);
        }
    }
    return "";
}

// SnapKV (arXiv 2404.14469, section 3): max-pooled attention of the observation window, best tokens first
std::string select_snapkv(selection & sel) {
    const int32_t half = sel.policy.kernel/2;

    for (int32_t il = 0; il < sel.shapes.n_layer; ++il) {
        const int32_t n        = sel.shapes.cells[il];
        const int32_t n_review = std::max(0, n - sel.policy.alpha);

        for (int32_t ih = 0; ih < sel.shapes.n_head_kv; ++ih) {
            const float * score = sel.scores + sel.at(il, ih);

            std::vector<float> pooled(n_review);
            for (int32_t i = 0; i < n_review; ++i) {
                const int32_t i0 = std::max(0, i - half);
                const int32_t i1 = std::min(n_review, i + half + 1);

                pooled[i] = *std::max_element(score + i0, score + i1);
            }

            std::vector<int32_t> best(n_review);
            std::iota(best.begin(), best.end(), 0);
            std::stable_sort(best.begin(), best.end(), [&](int32_t a, int32_t b) { return pooled[a] > pooled[b]; });

            const int32_t n_suffix = std::min(n, sel.policy.suffix);

            std::vector<int32_t> order;
            order.reserve(n);
            for (int32_t i = 0; i < n_suffix; ++i) {
                order.push_back(n - 1 - i);
            }
            order.insert(order.end(), best.begin(), best.end());
            for (int32_t i = n - 1 - n_suffix; i >= n_review; --i) {
                order.push_back(i);
            }

            keep_first(sel, il, ih, order);
        }
    }
    return "";
}

std::string select(selection & sel) {
    switch (sel.policy.kind) {
        case WKV_KIND_FULL:         memset(sel.keep, 1, sel.offsets.back()); return "";
        case WKV_KIND_STREAMINGLLM: return select_streamingllm(sel);
        case WKV_KIND_SNAPKV:
        case WKV_KIND_PYRAMIDKV:    return select_snapkv(sel);
        case WKV_KIND_WINDOWKV:     return select_windowkv(sel);
    }
    return "unknown kind";
}

} // namespace wkv
