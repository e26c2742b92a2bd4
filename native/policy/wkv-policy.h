#pragma once

// Policies: which cells of a cache stay. Pure functions over scores and positions, without llama.cpp's headers; what a policy is
// says windowkv-policy.h.
//
// scoring:    what a score is                             wkv-scoring.cpp
// allocation: cells per layer and head                    wkv-layers.cpp, wkv-heads.cpp         -> budgets()
// selection:  the cells of a head for its budget          wkv-selection.cpp, wkv-windows*.cpp   -> select()

#include "windowkv-policy.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace wkv {

// "" or what is wrong with the policy; nothing else may be asked about one that this refuses
std::string policy_error(const wkv_policy & policy);

// "" or what is wrong with the shapes, or with the policy for these shapes
std::string shapes_error(const wkv_policy & policy, const wkv_shapes & shapes);

// The observation windows that score planes are needed for, in the order of the planes; none if positions alone decide. With
// query_heads = each a plane has one row per query head, see cache_view.
std::vector<int32_t> window_sizes(const wkv_policy & policy);

// whether budgets() looks at positions and scores
bool needs_scores_for_budgets(const wkv_policy & policy);

// host memory that budgets() takes for a moment, bytes per cell
int64_t budgets_bytes_per_cell(const wkv_policy & policy);

// whether no layer holds more than n_cells cells per head on average: there is nothing to evict then
bool fits(const wkv_shapes & shapes, int64_t n_cells);

// The cells that one selection chooses from. Everything it points to is the caller's and has to outlive it.
struct cache_view {
    const wkv_policy  & policy;
    const wkv_shapes  & shapes;
    const int32_t     * positions; // for every (layer, kv head) in turn its ascending positions
    const float       * scores;    // planes, one after the other, each in the layout of positions; with query_heads = each for
                                   // every (layer, kv head) in turn row major [n_gqa, cells]
    std::vector<size_t> offsets;   // [n_layer*n_head_kv + 1], of cells

    cache_view(const wkv_policy & policy, const wkv_shapes & shapes, const int32_t * positions, const float * scores);

    size_t index(int32_t il, int32_t ih) const { return size_t(il)*shapes.n_head_kv + ih; }

    int32_t         n_cells(int32_t il, int32_t ih) const { return shapes.cells[index(il, ih)]; }
    const int32_t * pos    (int32_t il, int32_t ih) const { return positions + offsets[index(il, ih)]; }

    // rows of scores that every kv head has in the first plane
    int32_t n_rows() const { return policy.scoring.query_heads == WKV_QUERY_HEADS_EACH ? shapes.n_gqa : 1; }

    const float * score(int32_t il, int32_t ih, int32_t row = 0) const {
        return scores + offsets[index(il, ih)]*n_rows() + size_t(row)*n_cells(il, ih);
    }

    // by the last token_window_size tokens
    const float * token_score(int32_t il, int32_t ih) const { return scores + offsets.back()*n_rows() + offsets[index(il, ih)]; }
};

// "" or the first layer and head whose scores are not finite: every choice among them would be arbitrary
std::string scores_error(const cache_view & view);

// What an allocation leaves to every (layer, kv head), each [n_layer*n_head_kv]
struct head_budgets {
    std::vector<int32_t> n_cells; // cells that stay
    std::vector<int32_t> own;     // those that would stay if no heads competed, which rankings depend on
    std::vector<int32_t> n_stays; // heads that competed: places of their rankings that no other head could win; empty: not known
};

// The cells that stay; their mean is n_cells unless the cache holds fewer, or accounting = paper. Every head that holds a cell
// keeps one.
// "" or why these inputs cannot be served
std::string budgets(const cache_view & view, int64_t n_cells, head_budgets & res);

// the same from budgets that somebody else has kept, [n_layer, n_head_kv]; what exceeds a head's cells is cut
// "" or what is wrong with them
std::string given_budgets(const cache_view & view, const int32_t * n_cells, head_budgets & res);

// Sets keep, in the layout of positions, to 1 for as many cells of every head as its budget says and to 0 for the others.
// whole_windows counts by itself: more by less than omega, or fewer.
// "" or why these inputs cannot be served; keep is written only on success
std::string select(const cache_view & view, const head_budgets & budgets, uint8_t * keep);

// "" or what is wrong with a selection of the caller's: over n_cells cells per (layer, kv head) on average, or a head without any
std::string keep_error(const wkv_shapes & shapes, int64_t n_cells, const uint8_t * keep);

} // namespace wkv
