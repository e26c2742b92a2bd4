#pragma once

// Windows of one set of cells, inside wkv-windows*.cpp.

#include "wkv-parts.h"

namespace wkv {

struct window {
    double  score;
    int32_t i0; // first and one past the last cell
    int32_t i1;
};

// Windows of a set of cells, which one head holds, or several. The order of importance is: the newest n_recent cells, windows by
// score, each with its best cells first, and the rest of the observation window, newest first.
struct window_set {
    int32_t n        = 0; // cells
    int32_t n_review = 0; // of these before the observation window
    int32_t n_recent = 0; // newest cells that stay
    int32_t budget   = 0; // of the head, or of the first layer's

    cell_positions       pos;
    std::vector<int32_t> listed; // what pos lists, if that is no head's

    std::vector<window> windows; // in the order of positions; with protect_first the first one stays the first

    const float *       single = nullptr; // [n_review], pooled scores if a cell has one, else
    std::vector<double> mean;             // the mean of several
    std::vector<float>  pooled;

    double score(int32_t i) const { return single ? single[i] : mean[i]; }

    // it points into itself
    window_set() = default;
    window_set(window_set &&) = default;
};

// which cells of a set a head holds
struct held_cells {
    std::vector<int32_t> at;     // [cells of the set], the head's cell or -1; empty: it holds the same cells
    std::vector<int32_t> before; // [cells of the set + 1], how many it holds before each; empty likewise
    std::vector<int32_t> others; // cells of the head that the set lacks
};

bool same_cells(const cell_positions & a, int32_t n_a, const cell_positions & b, int32_t n_b);

// newest cells that stay of a head with n cells and this budget
int32_t n_recent_of(int32_t n, const wkv_selection & p, int32_t budget);

// token_share: of a budget of head i, cells that come before single tokens
int32_t n_before_tokens(const cache_view & view, const std::vector<int32_t> & own, size_t i);

// the same of the heads i0 to i1 - 1; empty if there are no budgets
std::vector<int32_t> n_before_tokens(const cache_view & view, const std::vector<int32_t> & own, size_t i0, size_t i1);

// windows that the layers il0 to il1 - 1 share, of a head or, with scope = layer, of all heads; budget is that of the first layer
window_set windows_of(const cache_view & view, int32_t il0, int32_t il1, int32_t ih, int32_t budget);

// whole_windows: cells that stay. A short window at the end counts as a whole one
int32_t n_whole(window_set & set, const wkv_selection & p);

// Marks the first n cells of the order that a head holds, or what it holds of the first n if all_count. Sorts windows.
void mark_best(window_set & set, const wkv_selection & p, const held_cells & held, bool all_count, int32_t n, mark_row keep);

} // namespace wkv
