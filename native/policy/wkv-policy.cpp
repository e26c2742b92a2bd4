// What a valid policy is, and the cells it looks at. The options of each part are checked where they are used.

#include "wkv-parts.h"
#include "wkv-threads.h"

#include <algorithm>
#include <cstring>
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
    if (!(policy.replay_share >= 0.0 && policy.replay_share < 1.0)) {
        return range("replay_share", policy.replay_share, "0 to less than 1");
    }
    if (policy.replay_share > 0.0 && (policy.scoring.reduce == WKV_REDUCE_REPLAY || policy.selection.kind == WKV_KIND_FULL ||
                policy.allocation.accounting == WKV_ACCOUNTING_PAPER || policy.selection.whole_windows)) {
        return "replay_share divides a number of cells that is met exactly with other scores: not with reduce = replay, kind = full, "
            "accounting = paper or whole_windows";
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
        if (shapes.cells[i] > shapes.n_past) {
            return "layer " + std::to_string(i/shapes.n_head_kv) + " holds " + std::to_string(shapes.cells[i]) + " cells, expected at most n_past = " +
                std::to_string(shapes.n_past);
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

static std::vector<size_t> offsets_of(const wkv_shapes & shapes) {
    std::vector<size_t> res(size_t(shapes.n_layer)*shapes.n_head_kv + 1, 0);
    for (size_t i = 0; i + 1 < res.size(); ++i) {
        res[i + 1] = res[i] + shapes.cells[i];
    }
    return res;
}

cache_view::cache_view(const wkv_policy & policy, const wkv_shapes & shapes, const int32_t * listed, const float * scores) :
    policy(policy), shapes(shapes), offsets(offsets_of(shapes)) {
    for (size_t i = 0; listed && i + 1 < offsets.size(); ++i) {
        positions.push_back({ listed + offsets[i], shapes.cells[i], 0 });
    }
    if (scores) {
        set_scores(0, shapes.n_layer, scores);
    }
}

cache_view::cache_view(const wkv_policy & policy, const wkv_shapes & shapes, std::vector<cell_positions> positions) :
    policy(policy), shapes(shapes), offsets(offsets_of(shapes)), positions(std::move(positions)) {
}

void cache_view::set_scores(int32_t il0, int32_t il1, const float * scores) {
    first = offsets[index(il0, 0)];

    planes[0] = scores;
    planes[1] = policy.scoring.token_window_size > 0 ? scores + (offsets[index(il1, 0)] - first)*n_rows() : nullptr;
}

void cache_view::set_plane(int32_t il0, int32_t plane, const float * scores) {
    first = offsets[index(il0, 0)];

    planes[plane]     = scores;
    planes[1 - plane] = nullptr;
}

int32_t cache_view::n_threads_for(int32_t il0, int32_t il1) const {
    const int64_t n = (offsets[index(il1, 0)] - offsets[index(il0, 0)])/n_cells_thread;
    return std::clamp<int64_t>(n, 1, n_threads);
}

std::string not_finite(int32_t il, int32_t ih) {
    return "the scores of layer " + std::to_string(il) + ", kv head " + std::to_string(ih) +
        " are not finite: keys or queries of this prompt overflow in the type of the cells, try f32 cells or a model without a policy";
}

// without a branch for every score, so that it vectorises
static bool is_finite(const float * score, size_t n) {
    constexpr uint32_t exponent = 0x7f800000;

    uint32_t n_bad = 0;
    for (size_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, score + i, sizeof(bits));
        n_bad += (bits & exponent) == exponent;
    }
    return n_bad == 0;
}

std::string scores_error(const cache_view & view, int32_t il0, int32_t il1) {
    const int32_t n_head_kv = view.shapes.n_head_kv;

    std::vector<uint8_t> ok(size_t(il1 - il0)*n_head_kv, 1);
    for_each(view.n_threads_for(il0, il1), ok.size(), [&](size_t i) {
        const int32_t il = il0 + i/n_head_kv;
        const int32_t ih = i%n_head_kv;
        const size_t  n  = view.n_cells(il, ih);

        ok[i] = (!view.has_plane(0) || is_finite(view.score(il, ih), n*view.n_rows())) &&
                (!view.has_plane(1) || is_finite(view.token_score(il, ih), n));
    });

    const size_t i = std::find(ok.begin(), ok.end(), 0) - ok.begin();
    return i == ok.size() ? "" : not_finite(il0 + i/n_head_kv, i%n_head_kv);
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
