// WindowKV (arXiv 2503.17922, sections 3.2 and 3.3): windows of consecutive tokens compete as a whole.

#include "wkv-windows.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace wkv {

std::string windows_error(const wkv_policy & policy) {
    const wkv_selection & p      = policy.selection;
    const int32_t         second = policy.scoring.token_window_size;

    if (p.kind != WKV_KIND_WINDOWS) {
        const bool given = p.omega != 0 || p.top_p != 0 || p.gamma != 0 || p.share != WKV_SHARE_FIRST || p.scope != WKV_SCOPE_LAYER ||
            p.protect_first || p.whole_windows || p.recent_share != 0.0 || p.token_share != 0.0 || p.window_floor != 0 || second != 0;
        return given ? unused("an option of windows", "kind is not windows") : "";
    }
    if (p.omega < 1) {
        return range("omega", int64_t(p.omega), "at least 1");
    }
    if (p.top_p < 1 || p.top_p > p.omega) {
        return range("top_p", int64_t(p.top_p), "1 to omega");
    }
    if (p.gamma < 1) {
        return range("gamma", int64_t(p.gamma), "at least 1");
    }
    for (const auto & [name, flag] : { std::make_pair("protect_first", p.protect_first), { "whole_windows", p.whole_windows } }) {
        if (flag != 0 && flag != 1) {
            return range(name, int64_t(flag), "0 or 1");
        }
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
    if (p.token_share == 0.0) {
        return p.window_floor != 0 ? unused("window_floor", "token_share is 0") :
               second         != 0 ? unused("token_window_size", "token_share is 0") : "";
    }
    if (p.scope != WKV_SCOPE_HEAD || p.gamma != 1) {
        return "token_share needs scope = head and gamma = 1";
    }
    if (p.whole_windows) {
        return "whole_windows leaves nothing for single tokens, expected token_share = 0";
    }
    return second < 1 ? range("token_window_size", int64_t(second), "at least 1") : "";
}

struct window {
    int32_t i0; // first and one past the last cell
    int32_t i1;
    double  score;
};

cell_set cells_of(const cache_view & view, int32_t il, int32_t ih) {
    const bool    per_layer = view.policy.selection.scope == WKV_SCOPE_LAYER;
    const bool    each      = view.policy.scoring.query_heads == WKV_QUERY_HEADS_EACH;
    const int32_t n         = view.n_cells(il, ih);

    cell_set res;
    res.pos.assign(view.pos(il, ih), view.pos(il, ih) + n);
    res.score.assign(n, 0.0);

    // summed in the order of the heads
    int32_t n_rows = 0;
    for (int32_t jh = per_layer ? 0 : ih; jh < (per_layer ? view.shapes.n_head_kv : ih + 1); ++jh) {
        for (int32_t ir = 0; ir < view.n_rows(); ++ir) {
            const float * score = view.score(il, jh, ir);
            for (int32_t i = 0; i < n; ++i) {
                res.score[i] += score[i];
            }
            if (each) {
                res.rows.push_back(score);
            }
            ++n_rows;
        }
    }
    for (auto & s : res.score) {
        s /= n_rows;
    }
    return res;
}

cell_set mean_cells(const cache_view & view, int32_t il0, int32_t il1, int32_t ih) {
    cell_set res = cells_of(view, il0, ih);
    std::vector<int32_t> n_summed(res.pos.size(), 1);

    for (int32_t il = il0 + 1; il < il1; ++il) {
        const cell_set own = cells_of(view, il, ih);

        cell_set             sum;
        std::vector<int32_t> n_sum;
        for (size_t i = 0, j = 0; i < res.pos.size() || j < own.pos.size();) {
            const bool has_res = i < res.pos.size() && (j == own.pos.size() || res.pos[i] <= own.pos[j]);
            const bool has_own = j < own.pos.size() && (i == res.pos.size() || own.pos[j] <= res.pos[i]);

            sum.pos.push_back(has_res ? res.pos[i] : own.pos[j]);
            sum.score.push_back((has_res ? res.score[i] : 0.0) + (has_own ? own.score[j] : 0.0));
            n_sum.push_back((has_res ? n_summed[i] : 0) + has_own);

            i += has_res;
            j += has_own;
        }
        res      = std::move(sum);
        n_summed = std::move(n_sum);
    }
    for (size_t i = 0; i < res.pos.size(); ++i) {
        res.score[i] /= n_summed[i];
    }
    return res;
}

// mean of the top_p best scores, summed from the best downwards; sorts them
static double top_mean(std::vector<double> & score, int32_t top_p) {
    std::sort(score.begin(), score.end(), std::greater<double>());
    const size_t n = std::min<size_t>(score.size(), top_p);
    return std::accumulate(score.begin(), score.begin() + n, 0.0)/double(n);
}

// Windows before the observation window, best first. They stand on a fixed grid of positions, so that what one compaction kept whole
// stays together in the next.
static std::vector<window> best_windows(const cell_set & cells, int32_t n_review, const wkv_selection & p) {
    std::vector<window> res;
    std::vector<double> score;
    for (int32_t i0 = 0; i0 < n_review;) {
        int32_t i1 = i0 + 1;
        while (i1 < n_review && cells.pos[i1]/p.omega == cells.pos[i0]/p.omega) {
            ++i1;
        }

        double sum = 0.0;
        for (const float * row : cells.rows) {
            score.assign(row + i0, row + i1);
            sum += top_mean(score, p.top_p);
        }
        if (cells.rows.empty()) {
            score.assign(cells.score.begin() + i0, cells.score.begin() + i1);
            sum = top_mean(score, p.top_p);
        }
        res.push_back({ i0, i1, sum/double(std::max<size_t>(1, cells.rows.size())) });
        i0 = i1;
    }

    std::sort(res.begin() + (p.protect_first && !res.empty()), res.end(), [](const window & a, const window & b) {
        return a.score != b.score ? a.score > b.score : a.i0 < b.i0;
    });
    return res;
}

int32_t n_recent_of(int32_t n, const wkv_selection & p, int32_t budget) {
    return std::min({ n, p.n_recent, std::max(1, int32_t(budget*p.recent_share)) });
}

// cells of whole windows that stay beside n_recent, given windows that are sorted; a short one at the end counts as a whole one
static int32_t n_whole(const std::vector<window> & windows, int32_t n_review, int32_t omega, int64_t budget) {
    int64_t n_drop = n_review - std::min<int64_t>(n_review, budget);
    int32_t res    = n_review;
    for (size_t i = windows.size(); i-- > 0 && n_drop > 0;) {
        const int32_t n = windows[i].i1 - windows[i].i0;

        n_drop -= windows[i].i1 == n_review ? omega : n;
        res    -= n;
    }
    return res;
}

ranking rank_windows(cell_set cells, const wkv_policy & policy, int32_t budget, bool with_order) {
    const wkv_selection & p = policy.selection;

    const int32_t n        = cells.pos.size();
    const int32_t n_review = std::max(0, n - policy.scoring.window_size);
    const int32_t n_recent = n_recent_of(n, p, budget);

    // what follows an attended token is often what the answer needs next
    const auto pooled = pool(policy.scoring, cells.score.data(), n_review);
    std::copy(pooled.begin(), pooled.end(), cells.score.begin());

    const auto windows = best_windows(cells, n_review, p);

    ranking res;
    res.keys.n_cells = n;
    res.keys.n_stays = n_recent;
    res.n_whole      = n_recent + n_whole(windows, n_review, p.omega, int64_t(budget) - n_recent);

    res.keys.run.reserve(windows.size()); // keys are kept: no more than that
    res.keys.end.reserve(windows.size());

    int32_t end = n_recent;
    for (const window & w : windows) {
        end += w.i1 - w.i0;
        if (p.protect_first && &w == &windows[0]) {
            res.keys.n_stays = end;
            continue;
        }
        if (!res.keys.run.empty() && res.keys.run.back() == w.score) {
            res.keys.end.back() = end;
        } else {
            res.keys.run.push_back(w.score);
            res.keys.end.push_back(end);
        }
    }
    if (!with_order) {
        return res;
    }

    res.order.reserve(n);
    for (int32_t i = 0; i < n_recent; ++i) {
        res.order.push_back(n - 1 - i);
    }
    for (const window & w : windows) {
        for (int32_t i = w.i0; i < w.i1; ++i) {
            res.order.push_back(i);
        }
        std::sort(res.order.end() - (w.i1 - w.i0), res.order.end(), [&](int32_t a, int32_t b) {
            return cells.score[a] != cells.score[b] ? cells.score[a] > cells.score[b] : a < b;
        });
    }
    for (int32_t i = n - 1 - n_recent; i >= n_review; --i) {
        res.order.push_back(i);
    }
    return res;
}

} // namespace wkv
