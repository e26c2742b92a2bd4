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
            p.protect_first || p.whole_windows || (p.recent_share != 0.0 && p.kind != WKV_KIND_BEST) || p.token_share != 0.0 || p.window_floor != 0 || second != 0;
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

// whether two heads hold the same n positions
static bool same_positions(const cell_positions & a, const cell_positions & b, int32_t n) {
    const int32_t n_a = std::min(n, a.n_listed);
    const int32_t n_b = std::min(n, b.n_listed);
    if (n_a == n_b) {
        return (n_a == n || a.next == b.next) && (a.listed == b.listed || std::equal(a.listed, a.listed + n_a, b.listed));
    }
    for (int32_t i = 0; i < n; ++i) {
        if (a[i] != b[i]) {
            return false;
        }
    }
    return true;
}

bool same_cells(const cell_positions & a, int32_t n_a, const cell_positions & b, int32_t n_b) {
    return n_a == n_b && same_positions(a, b, n_a);
}

namespace {

// the cells that one ranking is made from: ascending positions with their scores
struct cell_set {
    int32_t        n = 0;
    cell_positions pos;

    std::vector<int32_t> listed; // what pos lists, if that is no head's

    const float *        single = nullptr; // scores if there is one row of them, else
    std::vector<double>  mean;             // their mean over the rows

    std::vector<const float *> rows; // query_heads = each: [cells] of every query head
};

} // namespace

// the cells of a head, or of a layer with scope = layer, whatever head is given then
static cell_set cells_of(const cache_view & view, int32_t il, int32_t ih, bool as_mean) {
    const bool per_layer = view.policy.selection.scope == WKV_SCOPE_LAYER;
    const bool each      = view.policy.scoring.query_heads == WKV_QUERY_HEADS_EACH;

    cell_set res;
    res.n   = view.n_cells(il, ih);
    res.pos = view.pos(il, ih);

    // summed in the order of the heads
    const int32_t jh0 = per_layer ? 0 : ih;
    const int32_t jh1 = per_layer ? view.shapes.n_head_kv : ih + 1;
    const int32_t n_rows = (jh1 - jh0)*view.n_rows();
    if (n_rows == 1 && !as_mean) {
        res.single = view.score(il, ih);
    } else {
        res.mean.assign(res.n, 0.0);
    }
    for (int32_t ir = 0; ir < n_rows; ++ir) {
        const float * score = view.score(il, jh0 + ir/view.n_rows(), ir%view.n_rows());
        if (each) {
            res.rows.push_back(score);
        }
        for (size_t i = 0; i < res.mean.size(); ++i) {
            res.mean[i] += score[i];
        }
    }
    for (auto & s : res.mean) {
        s /= n_rows;
    }
    return res;
}

// union of the cells of the layers il0 to il1 - 1; a score is the mean over the layers that hold the cell, summed in their order
static cell_set mean_cells(const cache_view & view, int32_t il0, int32_t il1, int32_t ih) {
    cell_set res = cells_of(view, il0, ih, true);

    std::vector<int32_t> n_summed(res.n, 1);
    for (int32_t il = il0 + 1; il < il1; ++il) {
        const cell_set own = cells_of(view, il, ih, true);
        if (same_cells(res.pos, res.n, own.pos, own.n)) {
            for (int32_t i = 0; i < res.n; ++i) {
                res.mean[i] += own.mean[i];
                n_summed[i]++;
            }
            continue;
        }

        cell_set             sum;
        std::vector<int32_t> n_sum;
        for (int32_t i = 0, j = 0; i < res.n || j < own.n;) {
            const bool has_res = i < res.n && (j == own.n || res.pos[i] <= own.pos[j]);
            const bool has_own = j < own.n && (i == res.n || own.pos[j] <= res.pos[i]);

            sum.listed.push_back(has_res ? res.pos[i] : own.pos[j]);
            sum.mean.push_back((has_res ? res.mean[i] : 0.0) + (has_own ? own.mean[j] : 0.0));
            n_sum.push_back((has_res ? n_summed[i] : 0) + has_own);

            i += has_res;
            j += has_own;
        }
        sum.n   = sum.listed.size();
        sum.pos = { sum.listed.data(), sum.n, 0 };

        res      = std::move(sum);
        n_summed = std::move(n_sum);
    }
    for (int32_t i = 0; i < res.n; ++i) {
        res.mean[i] /= n_summed[i];
    }
    return res;
}

// mean of the top_p best scores, summed from the best downwards; best is for its use
template <typename T>
static double top_mean(const T * score, int32_t n, int32_t top_p, std::vector<T> & best) {
    if (n == 1) {
        return score[0];
    }
    if (n == 2) {
        return top_p == 1 ? double(std::max(score[0], score[1])) : (double(score[0]) + double(score[1]))/2.0;
    }
    const int32_t n_best = std::min(n, top_p);
    if (n == 4) {
        // sorted without a branch
        T x[4] = { score[0], score[1], score[2], score[3] };
        for (const auto & [i, j] : { std::make_pair(0, 1), { 2, 3 }, { 0, 2 }, { 1, 3 }, { 1, 2 } }) {
            const T low = std::min(x[i], x[j]);
            x[i] = std::max(x[i], x[j]);
            x[j] = low;
        }
        return std::accumulate(x, x + n_best, 0.0)/double(n_best);
    }
    best.assign(score, score + n);
    std::sort(best.begin(), best.end(), std::greater<T>());
    return std::accumulate(best.begin(), best.begin() + n_best, 0.0)/double(n_best);
}

// one past the last of the cells before n that lie in the window of cell i0
static int32_t window_end(const cell_positions & pos, int32_t i0, int32_t n, int32_t omega) {
    const int64_t end = (int64_t(pos[i0])/omega + 1)*omega; // position behind the window

    int32_t i1 = i0 + 1;
    while (i1 < std::min(n, pos.n_listed) && pos.listed[i1] < end) {
        ++i1;
    }
    return i1 < pos.n_listed || i1 >= n ? i1 : std::min<int64_t>(n, std::max<int64_t>(i1, end - pos.next + pos.n_listed));
}

// Windows before the observation window, in the order of positions. They stand on a fixed grid of positions, so that what one
// compaction kept whole stays together in the next.
template <typename T>
static void make_windows(const T * score, const cell_set & cells, const wkv_selection & p, window_set & res) {
    std::vector<T>     best;
    std::vector<float> best_row;
    for (int32_t i0 = 0; i0 < res.n_review;) {
        // where no position is missing, windows follow each other
        const bool    whole = i0 > cells.pos.n_listed && !res.windows.empty();
        const int32_t i1    = whole ? std::min<int64_t>(res.n_review, int64_t(i0) + p.omega) : window_end(cells.pos, i0, res.n_review, p.omega);

        if (whole && p.omega == 2 && cells.rows.empty()) {
            // as below, in a loop that is a third as long
            const size_t n = res.windows.size();
            res.windows.resize(n + (res.n_review - i0)/2);
            for (size_t iw = n; iw < res.windows.size(); ++iw, i0 += 2) {
                res.windows[iw] = { top_mean(score + i0, 2, p.top_p, best), i0, i0 + 2 };
            }
            if (i0 == res.n_review) {
                break;
            }
            res.windows.push_back({ double(score[i0]), i0, i0 + 1 });
            break;
        }

        double sum = 0.0;
        for (const float * row : cells.rows) {
            sum += top_mean(row + i0, i1 - i0, p.top_p, best_row);
        }
        if (cells.rows.empty()) {
            sum = top_mean(score + i0, i1 - i0, p.top_p, best);
        }
        res.windows.push_back({ sum/double(std::max<size_t>(1, cells.rows.size())), i0, i1 });
        i0 = i1;
    }
}

int32_t n_recent_of(int32_t n, const wkv_selection & p, int32_t budget) {
    return std::min({ n, p.n_recent, std::max(1, int32_t(budget*p.recent_share)) });
}

window_set windows_of(const cache_view & view, int32_t il0, int32_t il1, int32_t ih, int32_t budget) {
    const wkv_scoring   & scoring = view.policy.scoring;
    const wkv_selection & p       = view.policy.selection;

    cell_set cells = p.share == WKV_SHARE_MEAN ? mean_cells(view, il0, il1, ih) : cells_of(view, il0, ih, false);

    window_set res;
    res.n        = cells.n;
    res.n_review = std::max(0, cells.n - scoring.window_size);
    res.n_recent = n_recent_of(cells.n, p, budget);
    res.budget   = budget;
    res.windows.reserve(cells.pos.n_listed >= res.n_review ? 0 : res.n_review/p.omega + 2);

    // what follows an attended token is often what the answer needs next
    if (cells.single) {
        res.single = cells.single;
        if (scoring.kernel_size > 1) {
            res.pooled = pool(scoring, cells.single, cells.pos, res.n_review);
            res.single = res.pooled.data();
        }
        make_windows(res.single, cells, p, res);
    } else {
        res.mean = scoring.kernel_size > 1 ? pool(scoring, cells.mean.data(), cells.pos, res.n_review) : std::move(cells.mean);
        make_windows(res.mean.data(), cells, p, res);
    }
    res.pos    = cells.pos;
    res.listed = std::move(cells.listed);
    return res;
}

static bool is_better(const window & a, const window & b) {
    return a.score != b.score ? a.score > b.score : a.i0 < b.i0;
}

int32_t n_whole(window_set & set, const wkv_selection & p) {
    auto & windows = set.windows;
    std::sort(windows.begin() + (p.protect_first && !windows.empty()), windows.end(), is_better);

    int64_t n_drop = set.n_review - std::min<int64_t>(set.n_review, int64_t(set.budget) - set.n_recent);
    int32_t res    = set.n_review;
    for (size_t i = windows.size(); i-- > 0 && n_drop > 0;) {
        const int32_t n = windows[i].i1 - windows[i].i0;

        n_drop -= windows[i].i1 == set.n_review ? p.omega : n;
        res    -= n;
    }
    return set.n_recent + res;
}

// Puts the best windows first, as many as fit into n cells, and behind them the one that fits in part; returns how many fit. Only
// so far is anything sorted. count: cells of a window.
template <typename F>
static size_t put_best_first(std::vector<window> & windows, size_t first, int64_t n, F count) {
    if (n <= 0) {
        return first;
    }
    const auto at  = [&](size_t i) { return windows.begin() + i; };
    const auto sum = [&](size_t i0, size_t i1) {
        int64_t res = 0;
        for (size_t i = i0; i < i1; ++i) {
            res += count(windows[i]);
        }
        return res;
    };

    size_t  lo   = first; // all before it fit
    size_t  hi   = windows.size(); // this one, if there is one, does not fit as a whole
    int64_t n_in = sum(lo, hi);
    while (n_in > n && lo < hi) {
        // where they are alike the first guess is right
        const double guess = double(n)/double(n_in)*double(hi - lo);
        const size_t mid   = std::min(hi - 1, lo + size_t(std::max(0.0, guess)));

        std::nth_element(at(lo), at(mid), at(hi), is_better);
        const int64_t n_before = sum(lo, mid);
        const int64_t n_mid    = n_before + count(windows[mid]);
        if (n_mid <= n) {
            lo    = mid + 1;
            n    -= n_mid;
            n_in -= n_mid;
        } else {
            hi   = mid;
            n_in = n_before;
        }
    }
    return hi;
}

void mark_best(window_set & set, const wkv_selection & p, const held_cells & held, bool all_count, int32_t n, mark_row keep) {
    const auto take = [&](int32_t i) {
        const int32_t at = held.at.empty() ? i : held.at[i];
        if (at >= 0) {
            keep.set(at);
        }
        n -= all_count || at >= 0;
    };
    const auto count = [&](const window & w) -> int32_t {
        return all_count || held.before.empty() ? w.i1 - w.i0 : held.before[w.i1] - held.before[w.i0];
    };

    for (int32_t i = set.n - 1; i >= set.n - set.n_recent && n > 0; --i) {
        take(i);
    }

    auto & windows = set.windows;
    const size_t n_protected = p.protect_first && !windows.empty() ? 1 : 0;
    const bool   first_fits  = n_protected == 0 || count(windows[0]) <= n;
    const size_t n_fit       = !first_fits ? 0 : put_best_first(windows, n_protected, n - (n_protected ? count(windows[0]) : 0), count);
    for (size_t iw = 0; iw < n_fit; ++iw) {
        for (int32_t i = windows[iw].i0; i < windows[iw].i1; ++i) {
            take(i);
        }
    }
    if (n_fit < windows.size() && n > 0) {
        // of the next one its best tokens
        std::vector<int32_t> cells(windows[n_fit].i1 - windows[n_fit].i0);
        std::iota(cells.begin(), cells.end(), windows[n_fit].i0);
        std::sort(cells.begin(), cells.end(), [&](int32_t a, int32_t b) {
            return set.score(a) != set.score(b) ? set.score(a) > set.score(b) : a < b;
        });
        for (size_t i = 0; i < cells.size() && n > 0; ++i) {
            take(cells[i]);
        }
    }

    // the rest of the observation window, then what this head holds beside the set, newest first
    for (int32_t i = set.n - 1 - set.n_recent; i >= set.n_review && n > 0; --i) {
        take(i);
    }
    for (size_t i = held.others.size(); i-- > 0 && n > 0; --n) {
        keep.set(held.others[i]);
    }
}

} // namespace wkv
