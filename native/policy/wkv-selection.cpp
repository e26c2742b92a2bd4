// Selection: its options, tokens that stay one by one, and select() as a whole.

#include "wkv-device.h"
#include "wkv-parts.h"
#include "wkv-threads.h"

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
    if (p.kind == WKV_KIND_BEST) {
        if (p.n_recent < 0 || (p.n_recent > 0 && p.recent_share != 0.0)) {
            return range("n_recent", int64_t(p.n_recent), "at least 0, and 0 where recent_share is given");
        }
        if (!is_share(p.recent_share)) {
            return range("recent_share", p.recent_share, "0 to 1");
        }
    } else if (p.n_recent < 0 || p.n_recent > policy.scoring.window_size) {
        return range("n_recent", int64_t(p.n_recent), "0 to window_size");
    }
    return windows_error(policy);
}

// floats in their order as integers; the two zeros are one
static uint32_t score_index(float x) {
    x += 0.0f;
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits >> 31 ? ~bits : bits | (uint32_t(1) << 31);
}

// Puts the n best in front, the worst of them last, and any behind. Scores are counted by their first bits before, so that only the
// best are looked at more than twice.
static void put_best_first(std::vector<float> & score, int32_t n) {
    constexpr int n_bits = 11;
    constexpr int n_sums = 4; // neighbours are alike, and a count waits for the one before

    std::vector<int32_t> counts(n_sums << n_bits, 0);
    const int32_t n_score = score.size();
    for (int32_t i = 0; i < n_score; ++i) {
        counts[(score_index(score[i]) >> (32 - n_bits))*n_sums + i%n_sums]++;
    }
    uint32_t digit = 1 << n_bits;
    for (int32_t n_all = 0; n_all < n;) {
        --digit;
        n_all += std::accumulate(counts.begin() + digit*n_sums, counts.begin() + (digit + 1)*n_sums, 0);
    }

    int32_t n_from = 0;
    for (const float x : score) {
        score[n_from] = x;
        n_from += score_index(x) >> (32 - n_bits) >= digit;
    }
    std::nth_element(score.begin(), score.begin() + n - 1, score.begin() + n_from, std::greater<float>());
}

void take_best(const float * score, int32_t n_cells, int32_t n, mark_row keep) {
    if (n <= 0) {
        return;
    }
    // without a branch for every cell, as in the loops below
    std::vector<float> rest(n_cells);
    int32_t n_rest = 0;
    for (int32_t i0 = 0; i0 < n_cells; i0 += 64) {
        const int32_t  i1   = std::min(n_cells, i0 + 64);
        const uint64_t word = keep.words[i0 >> 6];
        if (word == 0) {
            std::copy(score + i0, score + i1, rest.begin() + n_rest);
            n_rest += i1 - i0;
            continue;
        }
        for (int32_t i = i0; i < i1; ++i) {
            rest[n_rest] = score[i];
            n_rest += !(word >> (i - i0) & 1);
        }
    }
    if (n >= n_rest) {
        keep.set(0, n_cells);
        return;
    }
    rest.resize(n_rest);
    put_best_first(rest, n);

    // of those that are as good as the last one, the first
    const float last   = rest[n - 1];
    int64_t     n_tied = std::count(rest.begin(), rest.begin() + n, last);
    for (int32_t i0 = 0; i0 < n_cells; i0 += 64) {
        const int32_t i1 = std::min(n_cells, i0 + 64);

        uint64_t over = 0;
        uint64_t tied = 0;
        for (int32_t i = i0; i < i1; ++i) {
            over |= uint64_t(score[i] >  last) << (i - i0);
            tied |= uint64_t(score[i] == last) << (i - i0);
        }

        uint64_t & word = keep.words[i0 >> 6];
        for (tied &= ~word; tied != 0 && n_tied > 0; tied &= tied - 1) {
            over |= tied & ~(tied - 1);
            --n_tied;
        }
        word |= over;
    }
}

// StreamingLLM (arXiv 2309.17453, section 3.2): the newest token, the first ones, the newest others
static void mark_recent(const cache_view & view, int32_t il, int32_t ih, int32_t budget, mark_row keep) {
    const int32_t n   = view.n_cells(il, ih);
    const auto  & pos = view.pos(il, ih);

    const auto take = [&](int32_t i) {
        if (budget-- > 0) {
            keep.set(i);
        }
    };
    if (n > 0) {
        take(n - 1);
    }
    int32_t n_sink = 0;
    for (; n_sink < n - 1 && pos[n_sink] < view.policy.selection.n_sink; ++n_sink) {
        take(n_sink);
    }
    for (int32_t i = n - 2; i >= n_sink && budget > 0; --i) {
        take(i);
    }
}

std::vector<float> pooled_review(const cache_view & view, int32_t il, int32_t ih) {
    const int32_t n_review = std::max(0, view.n_cells(il, ih) - view.policy.scoring.window_size);
    return pool(view.policy.scoring, view.score(il, ih), view.positions.empty() ? cell_positions() : view.pos(il, ih), n_review);
}

// SnapKV (arXiv 2404.14469, section 3): the newest tokens, then those before the observation window by pooled score, then what is
// left of it
static void mark_tokens_of(const cache_view & view, int32_t il, int32_t ih, int32_t budget, mark_row keep) {
    const int32_t n        = view.n_cells(il, ih);
    const int32_t n_recent = std::min({ n, view.policy.selection.n_recent, budget });
    const auto    pooled   = pooled_review(view, il, ih);
    const int32_t n_review = pooled.size();
    const int32_t n_best   = std::min(n_review, budget - n_recent);
    const int32_t n_rest   = std::min(n - n_recent - n_review, budget - n_recent - n_best);

    take_best(pooled.data(), n_review, n_best, keep);
    keep.set(n - n_recent - n_rest, n);
}

// H2O (arXiv 2306.14048, section 4.3) and CORM (arXiv 2404.15949, section 4.2): the newest tokens, then the best of all others
static void mark_best_of(const cache_view & view, int32_t il, int32_t ih, int32_t budget, mark_row keep) {
    const wkv_selection & p = view.policy.selection;

    const int32_t n        = view.n_cells(il, ih);
    const int32_t n_asked  = p.recent_share > 0.0 ? int32_t(budget*p.recent_share) : p.n_recent;
    const int32_t n_recent = std::min({ n, budget, std::max(1, n_asked) });

    keep.set(n - n_recent, n);
    take_best(view.score(il, ih), n - n_recent, budget - n_recent, keep);
}

std::string selection_misfit(const cache_view & view, int32_t il0, int32_t il1) {
    return view.policy.selection.kind == WKV_KIND_WINDOWS ? windows_misfit(view, il0, il1) : "";
}

int32_t n_layers_ranked(const cache_view & view) {
    return view.policy.selection.kind == WKV_KIND_WINDOWS ? std::min(view.policy.selection.gamma, view.shapes.n_layer) : 1;
}

// calls fn(view, il, ih, budget, keep) for every head
template <typename F>
static void for_heads(const cache_view & view, const head_budgets & budgets, int32_t il0, int32_t il1, marks & keep, F fn) {
    const size_t i0 = view.index(il0, 0);
    for_each(view.n_threads_for(il0, il1), view.index(il1, 0) - i0, [&](size_t j) {
        const size_t i = i0 + j;
        fn(view, i/view.shapes.n_head_kv, i%view.shapes.n_head_kv, budgets.n_cells[i], keep.row(i));
    });
}

// marks by budgets that are known, beside windows that are marked already where single tokens are left
static void mark(const cache_view & view, const head_budgets & budgets, int32_t il0, int32_t il1, marks & keep) {
    switch (wkv_kind(view.policy.selection.kind)) {
        case WKV_KIND_FULL:
            for_heads(view, budgets, il0, il1, keep, [](const cache_view & view, int32_t il, int32_t ih, int32_t, mark_row keep) {
                keep.set(0, view.n_cells(il, ih));
            });
            break;
        case WKV_KIND_RECENT:
            for_heads(view, budgets, il0, il1, keep, mark_recent);
            break;
        case WKV_KIND_TOKENS:
            for_heads(view, budgets, il0, il1, keep, mark_tokens_of);
            break;
        case WKV_KIND_WINDOWS:
            mark_windows(view, budgets, il0, il1, keep);
            break;
        case WKV_KIND_BEST:
            for_heads(view, budgets, il0, il1, keep, mark_best_of);
            break;
        case WKV_KIND_COUNT:
            break;
    }
}

static std::string inputs_error(const cache_view & view, int32_t il0, int32_t il1) {
    const std::string error = view.policy.scoring.window_size > 0 ? scores_error(view, il0, il1) : "";
    return error.empty() ? selection_misfit(view, il0, il1) : error;
}

std::string select(const cache_view & view, const head_budgets & budgets, marks & keep) {
    const int32_t n_layer = view.shapes.n_layer;

    const std::string error = inputs_error(view, 0, n_layer);
    if (!error.empty()) {
        return error;
    }

    head_budgets own = budgets;
    if (view.policy.selection.token_share > 0.0 && needs_scores_for_budgets(view.policy) && own.n_windows.empty()) {
        budget_windows(view, 0, n_layer, own);
        own.n_cells = budgets.n_cells;
    }
    mark(view, own, 0, n_layer, keep);
    if (view.policy.selection.token_share > 0.0) {
        mark_tokens(view, own, 0, n_layer, keep);
    }
    return "";
}

std::string select_cells(cache_view & view, int64_t n_cells, const scores_fn & scores, marks & keep, device_keys * devices) {
    head_budgets own;
    own_budgets(view, n_cells, own);

    const bool    in_model = competes_in_model(view.policy.allocation);
    const bool    has_mean = view.policy.selection.share == WKV_SHARE_MEAN;
    const int32_t n_layer  = view.shapes.n_layer;
    const int32_t n_step   = in_model ? n_layer : n_layers_ranked(view);
    for (int32_t il0 = 0; il0 < n_layer; il0 += n_step) {
        const int32_t il1    = std::min(n_layer, il0 + n_step);
        const int32_t il_own = in_model || has_mean ? il1 : il0 + 1; // one past those whose scores are looked at

        std::string error;
        if (devices && fits_devices(view, il0, il1) && devices->hold(il0, il1)) {
            error = select_on_devices(view, *devices, il0, il1, own, keep);
            if (!error.empty()) {
                return error;
            }
            continue;
        }
        if (!window_sizes(view.policy).empty()) {
            view.set_plane(il0, 0, scores(il0, il_own, 0));
            error = scores_error(view, il0, il_own);
        }
        if (error.empty()) {
            error = selection_misfit(view, il0, il1);
        }
        if (!error.empty()) {
            return error;
        }
        if (needs_scores_for_budgets(view.policy)) {
            compete_layers(view, il0, il1, own);
        }
        mark(view, own, il0, il1, keep);
        if (view.policy.selection.token_share > 0.0) {
            view.set_plane(il0, 1, scores(il0, il1, 1));
            error = scores_error(view, il0, il1);
            if (!error.empty()) {
                return error;
            }
            budget_tokens(view, il0, il1, keep, own);
            mark_tokens(view, own, il0, il1, keep);
        }
    }
    return "";
}

wkv_policy replay_policy() {
    wkv_policy res = {};
    res.scoring.window_size = 1;
    res.scoring.kernel_size = 1;
    res.scoring.reduce      = WKV_REDUCE_REPLAY;
    res.allocation.heads    = WKV_HEADS_SCORE;
    res.allocation.across   = WKV_ACROSS_MODEL;
    res.selection.kind      = WKV_KIND_TOKENS;
    res.selection.n_recent  = 1;
    return res;
}

std::string add_replayed(const cache_view & view, int64_t n_cells, float * scores, marks & keep) {
    constexpr float STAYS = 3.0f; // more than a cell has that was not replayed

    for (size_t i = 0; i + 1 < view.offsets.size(); ++i) {
        keep.for_runs(i, [&](int32_t i0, int32_t i1) { std::fill(scores + view.offsets[i] + i0, scores + view.offsets[i] + i1, STAYS); });
        keep.clear(i);
    }

    const wkv_policy policy = replay_policy();

    cache_view own(policy, view.shapes, view.positions);
    own.n_threads      = view.n_threads;
    own.n_cells_thread = view.n_cells_thread;

    return select_cells(own, n_cells, [&](int32_t, int32_t, int32_t) { return scores; }, keep);
}

} // namespace wkv
