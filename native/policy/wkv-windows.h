#pragma once

// Windows of one set of cells, inside wkv-windows*.cpp.

#include "wkv-parts.h"

namespace wkv {

// the cells that one order is made from: ascending positions with their scores
struct cell_set {
    std::vector<int32_t> pos;
    std::vector<double>  score; // mean over the rows

    std::vector<const float *> rows; // query_heads = each: [cells] of every query head
};

// one head's order
struct ranking {
    std::vector<int32_t> order; // cells, most important first
    ranked_keys          keys;
    int32_t              n_whole = 0; // whole_windows: cells of the order that stay
};

// the cells of a head, or of a layer with scope = layer, whatever head is given then
cell_set cells_of(const cache_view & view, int32_t il, int32_t ih);

// union of the cells of the layers il0 to il1 - 1; a score is the mean over the layers that hold the cell, summed in their order
cell_set mean_cells(const cache_view & view, int32_t il0, int32_t il1, int32_t ih);

// newest cells that stay of a head with n cells and this budget
int32_t n_recent_of(int32_t n, const wkv_selection & p, int32_t budget);

// with_order = false: keys alone. budget is that of the head whose cells they are
ranking rank_windows(cell_set cells, const wkv_policy & policy, int32_t budget, bool with_order);

} // namespace wkv
