#pragma once

// Budgets and selection: pure functions over scores and positions, no llama.cpp headers.
// windowkv_edge/reference.py holds the same definitions in NumPy; tests compare them cell by cell.

#include "windowkv.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace wkv {

// "" or what is wrong with the policy
std::string policy_error(const wkv_policy & policy);

// "" or what is wrong with the shapes, or with the policy for these shapes
std::string shapes_error(const wkv_policy & policy, const wkv_shapes & shapes);

// Integers with lo[i] <= b[i] <= hi[i] that sum to total (itself clamped to the sums of the bounds), as near to
// want as the bounds allow: what clamping takes from some is given to the others in equal parts, the indivisible
// rest to the first of them.
std::vector<int64_t> apportion(
        const std::vector<int64_t> & want,
        const std::vector<int64_t> & lo,
        const std::vector<int64_t> & hi,
                         int64_t     total);

// The same with base + level*weight[i] in place of want, for the level that spends total: what clamping takes from
// some is given to the others by weight. Rounding favours the largest fractions.
std::vector<int64_t> pour(
                          double     base,
        const std::vector<double>  & weight,
        const std::vector<int64_t> & lo,
        const std::vector<int64_t> & hi,
                         int64_t     total);

// the cells that one selection chooses from
struct cache_view {
    const wkv_policy & policy;
    const wkv_shapes & shapes;
    const int32_t    * positions; // for every (layer, head) in turn its ascending positions
    const float      * scores;    // same layout, two planes of it if policy.tokens > 0

    std::vector<size_t> offsets;  // [n_layer*n_head_kv + 1]

    cache_view(const wkv_policy & policy, const wkv_shapes & shapes, const int32_t * positions, const float * scores);

    size_t index(int32_t il, int32_t ih) const { return size_t(il)*shapes.n_head_kv + ih; }

    size_t          n_cells(int32_t il, int32_t ih) const { return shapes.cells[index(il, ih)]; }
    const int32_t * pos    (int32_t il, int32_t ih) const { return positions + offsets[index(il, ih)]; }
    const float   * score  (int32_t il, int32_t ih) const { return scores    + offsets[index(il, ih)]; }

    // by the last policy.token_alpha tokens
    const float * token_score(int32_t il, int32_t ih) const { return score(il, ih) + offsets.back(); }
};

// the cells of one (layer, head), most important first, as indices
struct ranking {
    std::vector<int32_t> order;
    std::vector<double>  key; // never rises along the order; infinite where a cell stays before, or goes before, all others
};

// AdaKV (arXiv 2407.11550, algorithm 1): every head is sure of the share floor of its own budget, the rest goes to the best
// cells, whoever holds them; keys of the heads' rankings and their budgets, [heads] -> cells that stay
std::vector<int32_t> compete(const std::vector<std::vector<double>> & keys, const std::vector<int32_t> & own, double floor);

// the budgets that heads are ranked with: those given, or where heads compete, what each would hold otherwise
std::vector<int32_t> rank_budgets(const cache_view & view, const int32_t * budgets);

using rank_fn = std::function<void(int32_t il, int32_t ih, const ranking & res)>;

// the policies: each calls fn for every (layer, head); budgets as for select(), "" or why these inputs cannot be served
std::string rank(const cache_view & view, const int32_t * budgets, const rank_fn & fn);

std::string rank_streamingllm(const cache_view & view, const rank_fn & fn);
std::string rank_snapkv      (const cache_view & view, const rank_fn & fn); // and pyramidkv, which differs in its budgets
std::string rank_windowkv    (const cache_view & view, const int32_t * budgets, const rank_fn & fn);

// cells that stay, [n_layer, n_head_kv]; their mean is n_cells unless the cache holds fewer
// "" or why these inputs cannot be served
std::string budgets(const cache_view & view, int64_t n_cells, std::vector<int32_t> & res);

// set keep, in the layout of positions, for the first budget entries of every ranking
// "" or why these inputs cannot be served; keep is written only on success
std::string select(const cache_view & view, const int32_t * budgets, uint8_t * keep);

} // namespace wkv
