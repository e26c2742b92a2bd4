// Selection: its options, tokens that stay one by one, and select() as a whole.

#include "wkv-parts.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

namespace wkv {

std::vector<choice> selection_choices(const wkv_selection & p) {
    return { { "kind", p.kind, WKV_KIND_COUNT }, { "scope", p.scope, WKV_SCOPE_COUNT }, { "share", p.share, WKV_SHARE_COUNT } };
}

std::string selection_error(const wkv_policy & policy) {
    const wkv_selection & p = policy.selection;

    if (p.kind == WKV_KIND_FULL && (policy.allocation.layers != WKV_LAYERS_FLAT || policy.allocation.heads != WKV_HEADS_EQUAL)) {
        return "kind = full keeps every cell, expected layers = flat and heads = equal";
    }
    if (p.kind != WKV_KIND_RECENT && p.n_sink != 0) {
        return unused("n_sink", "only kind = recent keeps sinks");
    }
    if (p.n_sink < 0) {
        return range("n_sink", int64_t(p.n_sink), "at least 0");
    }
    if (p.n_recent < 0 || p.n_recent > policy.scoring.window_size) {
        return range("n_recent", int64_t(p.n_recent), "0 to window_size");
    }
    return windows_error(policy);
}

void take_best(const float * score, std::vector<int32_t> & cells, size_t n, uint8_t * keep) {
    n = std::min(n, cells.size());
    if (n < cells.size()) {
        std::nth_element(cells.begin(), cells.begin() + n, cells.end(), [&](int32_t a, int32_t b) {
            return score[a] != score[b] ? score[a] > score[b] : a < b;
        });
    }
    for (size_t i = 0; i < n; ++i) {
        keep[cells[i]] = 1;
    }
}

// StreamingLLM (arXiv 2309.17453, section 3.2): the newest token, the first ones, the newest others
static void select_recent(const cache_view & view, int32_t il, int32_t ih, int32_t budget, uint8_t * keep) {
    const int32_t   n   = view.n_cells(il, ih);
    const int32_t * pos = view.pos(il, ih);

    const auto take = [&](int32_t i) {
        keep[i] = budget-- > 0;
    };
    if (n > 0) {
        take(n - 1);
    }
    int32_t n_sink = 0;
    for (; n_sink < n - 1 && pos[n_sink] < view.policy.selection.n_sink; ++n_sink) {
        take(n_sink);
    }
    for (int32_t i = n - 2; i >= n_sink; --i) {
        take(i);
    }
}

// SnapKV (arXiv 2404.14469, section 3): the newest tokens, then those before the observation window by pooled score, then what is
// left of it
static std::vector<float> pooled_review(const cache_view & view, int32_t il, int32_t ih) {
    const int32_t n_review = std::max(0, view.n_cells(il, ih) - view.policy.scoring.window_size);
    return pool(view.policy.scoring, view.score(il, ih), n_review);
}

ranked_keys keys_tokens(const cache_view & view, int32_t il, int32_t ih) {
    ranked_keys res;
    res.n_cells = view.n_cells(il, ih);
    res.n_stays = std::min(res.n_cells, view.policy.selection.n_recent);
    res.place   = pooled_review(view, il, ih);
    std::sort(res.place.begin(), res.place.end(), std::greater<float>());
    return res;
}

static void select_tokens(const cache_view & view, int32_t il, int32_t ih, int32_t budget, uint8_t * keep) {
    const int32_t n        = view.n_cells(il, ih);
    const int32_t n_recent = std::min({ n, view.policy.selection.n_recent, budget });
    const auto    pooled   = pooled_review(view, il, ih);
    const int32_t n_review = pooled.size();
    const int32_t n_best   = std::min(n_review, budget - n_recent);
    const int32_t n_rest   = std::min(n - n_recent - n_review, budget - n_recent - n_best);

    std::fill(keep + n - n_recent, keep + n, 1);
    std::fill(keep + n - n_recent - n_rest, keep + n - n_recent, 1);

    std::vector<int32_t> cells(n_review);
    std::iota(cells.begin(), cells.end(), 0);
    take_best(pooled.data(), cells, n_best, keep);
}

std::string selection_misfit(const cache_view & view) {
    return view.policy.selection.kind == WKV_KIND_WINDOWS ? windows_misfit(view) : "";
}

int32_t n_layers_ranked(const cache_view & view) {
    return view.policy.selection.kind == WKV_KIND_WINDOWS ? std::min(view.policy.selection.gamma, view.shapes.n_layer) : 1;
}

void rank_keys(const cache_view & view, const std::vector<int32_t> & own, int32_t il0, int32_t il1, ranked_keys * keys) {
    if (view.policy.selection.kind == WKV_KIND_WINDOWS) {
        keys_windows(view, own, il0, il1, keys);
        return;
    }
    for (int32_t il = il0; il < il1; ++il) {
        for (int32_t ih = 0; ih < view.shapes.n_head_kv; ++ih) {
            *keys++ = keys_tokens(view, il, ih);
        }
    }
}

// calls fn(il, ih, budget, keep) for every head
template <typename F>
static void for_heads(const cache_view & view, const head_budgets & budgets, uint8_t * keep, F fn) {
    for (int32_t il = 0; il < view.shapes.n_layer; ++il) {
        for (int32_t ih = 0; ih < view.shapes.n_head_kv; ++ih) {
            const size_t i = view.index(il, ih);
            fn(view, il, ih, budgets.n_cells[i], keep + view.offsets[i]);
        }
    }
}

std::string select(const cache_view & view, const head_budgets & budgets, uint8_t * keep) {
    std::string error = view.policy.scoring.window_size > 0 ? scores_error(view) : "";
    if (error.empty()) {
        error = selection_misfit(view);
    }
    if (!error.empty()) {
        return error;
    }

    memset(keep, 0, view.offsets.back());
    switch (wkv_kind(view.policy.selection.kind)) {
        case WKV_KIND_FULL:
            memset(keep, 1, view.offsets.back());
            break;
        case WKV_KIND_RECENT:
            for_heads(view, budgets, keep, select_recent);
            break;
        case WKV_KIND_TOKENS:
            for_heads(view, budgets, keep, select_tokens);
            break;
        case WKV_KIND_WINDOWS:
            select_windows(view, budgets, keep);
            break;
        case WKV_KIND_COUNT:
            break;
    }
    return "";
}

} // namespace wkv
