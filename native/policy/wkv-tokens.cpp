// Tokens that stay one by one, and select() as a whole.

#include "wkv-ranking.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

namespace wkv {

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
void select_recent(const cache_view & view, int32_t il, int32_t ih, int32_t budget, uint8_t * keep) {
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
    return max_pool(view.policy.scoring, view.score(il, ih), n_review);
}

ranked_keys keys_tokens(const cache_view & view, int32_t il, int32_t ih) {
    ranked_keys res;
    res.n_cells = view.n_cells(il, ih);
    res.n_stays = std::min(res.n_cells, view.policy.selection.n_recent);
    res.place   = pooled_review(view, il, ih);
    std::sort(res.place.begin(), res.place.end(), std::greater<float>());
    return res;
}

void select_tokens(const cache_view & view, int32_t il, int32_t ih, int32_t budget, uint8_t * keep) {
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

std::string select(const cache_view & view, const int32_t * budgets, uint8_t * keep) {
    if (view.policy.selection.kind == kind::full) {
        memset(keep, 1, view.offsets.back());
        return "";
    }

    std::string error = view.policy.scoring.window_size > 0 ? scores_error(view) : "";
    if (error.empty() && view.policy.selection.kind == kind::windows) {
        error = windows_misfit(view);
    }
    if (!error.empty()) {
        return error;
    }

    memset(keep, 0, view.offsets.back());
    if (view.policy.selection.kind == kind::windows) {
        select_windows(view, budgets, keep);
        return "";
    }
    for (int32_t il = 0; il < view.shapes.n_layer; ++il) {
        for (int32_t ih = 0; ih < view.shapes.n_head_kv; ++ih) {
            const size_t  i      = view.index(il, ih);
            const int32_t budget = std::clamp(budgets[i], 0, view.n_cells(il, ih));

            (view.policy.selection.kind == kind::recent ? select_recent : select_tokens)(view, il, ih, budget, keep + view.offsets[i]);
        }
    }
    return "";
}

} // namespace wkv
