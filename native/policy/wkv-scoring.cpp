// Scoring: its options, which planes of scores it needs, and pooling.

#include "wkv-parts.h"

#include <algorithm>
#include <deque>

namespace wkv {

std::vector<choice> scoring_choices(const wkv_scoring & p) {
    return { { "pooling", p.pooling, WKV_POOLING_COUNT }, { "query_heads", p.query_heads, WKV_QUERY_HEADS_COUNT },
        { "reduce", p.reduce, WKV_REDUCE_COUNT } };
}

std::string scoring_error(const wkv_policy & policy) {
    const wkv_scoring   & p   = policy.scoring;
    const wkv_selection & sel = policy.selection;

    if (sel.kind == WKV_KIND_FULL || sel.kind == WKV_KIND_RECENT) {
        return p.window_size == 0 && p.token_window_size == 0 && p.kernel_size == 0 && p.pooling == WKV_POOLING_MAX &&
            p.query_heads == WKV_QUERY_HEADS_MEAN && p.reduce == WKV_REDUCE_MEAN ? "" : unused("scoring", "this kind of selection looks at positions alone");
    }
    if (p.window_size < 1) {
        return range("window_size", int64_t(p.window_size), "at least 1");
    }
    if (p.kernel_size < 1 || (p.pooling == WKV_POOLING_MAX && p.kernel_size % 2 == 0)) {
        return range("kernel_size", int64_t(p.kernel_size), p.pooling == WKV_POOLING_MAX ? "an odd number" : "at least 1");
    }
    if (p.query_heads == WKV_QUERY_HEADS_EACH &&
            (sel.kind != WKV_KIND_WINDOWS || p.kernel_size != 1 || sel.share != WKV_SHARE_FIRST || sel.token_share > 0.0)) {
        return "query_heads = each needs windows, kernel_size = 1, share = first and token_share = 0";
    }
    if ((p.reduce == WKV_REDUCE_MAX || p.reduce == WKV_REDUCE_SUM) && sel.kind != WKV_KIND_BEST) {
        return "reduce = max and reduce = sum need kind = best";
    }
    if (p.reduce == WKV_REDUCE_REPLAY && (p.query_heads == WKV_QUERY_HEADS_EACH || p.token_window_size != 0)) {
        return "reduce = replay gives one score per cell, expected query_heads = mean and token_window_size = 0";
    }
    if (sel.kind == WKV_KIND_BEST && p.kernel_size != 1) {
        return range("kernel_size", int64_t(p.kernel_size), "1 with kind = best");
    }
    return "";
}

std::vector<int32_t> window_sizes(const wkv_policy & policy) {
    std::vector<int32_t> res;
    for (const int32_t size : { policy.scoring.window_size, policy.scoring.token_window_size }) {
        if (size > 0) {
            res.push_back(size);
        }
    }
    return res;
}

// the largest of those from `before` places before to `after` places behind
template <typename T>
static void max_pool(const T * score, int64_t n, int64_t before, int64_t after, T * res) {
    if (before + after == 0) {
        std::copy(score, score + n, res);
        return;
    }

    // spans that begin with the first place
    int64_t next = 0;
    T       best = n > 0 ? score[0] : T(0);
    for (int64_t i = 0; i < std::min(before, n); ++i) {
        for (; next <= std::min(n - 1, i + after); ++next) {
            best = std::max(best, score[next]);
        }
        res[i] = best;
    }

    // spans that end with the last one
    next = n - 1;
    best = n > 0 ? score[n - 1] : T(0);
    for (int64_t i = n - 1; i >= std::max(before, n - after); --i) {
        for (; next >= i - before; --next) {
            best = std::max(best, score[next]);
        }
        res[i] = best;
    }

    // Whole spans: two that overlap, whose length is a power of two. Lengths are doubled in place, in loops that vectorise.
    const int64_t span = before + after + 1;
    if (n >= span) {
        std::vector<T> cur(score, score + n);
        int64_t length = 1;
        for (; 2*length <= span; length *= 2) {
            for (int64_t i = 0; i + length < n; ++i) {
                cur[i] = std::max(cur[i], cur[i + length]);
            }
        }
        for (int64_t i = before; i < n - after; ++i) {
            res[i] = std::max(cur[i - before], cur[i + after + 1 - length]);
        }
    }
}

// the largest of the cells at the same position or up to `before` positions before
template <typename T>
static void carry(const T * score, const cell_positions & pos, int64_t n, int64_t before, T * res) {
    // where no position is missing, places are positions
    const int64_t n_listed = std::min<int64_t>(n, pos.n_listed);
    max_pool(score + n_listed, n - n_listed, before, 0, res + n_listed);
    if (n_listed == 0 || before == 0) {
        std::copy(score, score + n_listed, res);
        return;
    }

    std::deque<int32_t> best; // those in reach that no later one exceeds
    for (int32_t i = 0; i < std::min(n, n_listed + before); ++i) {
        while (!best.empty() && score[best.back()] <= score[i]) {
            best.pop_back();
        }
        best.push_back(i);
        while (int64_t(pos[i]) - pos[best.front()] > before) {
            best.pop_front();
        }
        res[i] = score[best.front()];
    }
}

template <typename T>
static std::vector<T> pool_of(const wkv_scoring & p, const T * score, const cell_positions & pos, int32_t n) {
    std::vector<T> res(n);
    switch (wkv_pooling(p.pooling)) {
        case WKV_POOLING_MAX:
            max_pool(score, n, p.kernel_size/2, p.kernel_size/2, res.data());
            break;
        case WKV_POOLING_CARRY:
            carry(score, pos, n, p.kernel_size - 1, res.data());
            break;
        case WKV_POOLING_COUNT:
            break; // refused by policy_error(), as in every switch over a choice
    }
    return res;
}

std::vector<float> pool(const wkv_scoring & scoring, const float * score, const cell_positions & pos, int32_t n) {
    return pool_of(scoring, score, pos, n);
}

std::vector<double> pool(const wkv_scoring & scoring, const double * score, const cell_positions & pos, int32_t n) {
    return pool_of(scoring, score, pos, n);
}

} // namespace wkv
