#pragma once

// Budgets and selection: pure functions over scores and positions, no llama.cpp headers.
// windowkv_edge/reference.py holds the same definitions in NumPy; tests compare them cell by cell.

#include "windowkv.h"

#include <cstdint>
#include <string>
#include <vector>

namespace wkv {

// "" or what is wrong with the policy
std::string policy_error(const wkv_policy & policy);

// "" or what is wrong with the shapes
std::string shapes_error(const wkv_shapes & shapes);

// Integers with lo[i] <= b[i] <= hi[i] that sum to total (itself clamped to the sums of the bounds), as near to
// want as the bounds allow: what clamping takes from some is given to the others in equal parts, the indivisible
// rest to the first of them.
std::vector<int64_t> apportion(
        const std::vector<int64_t> & want,
        const std::vector<int64_t> & lo,
        const std::vector<int64_t> & hi,
                         int64_t     total);

// cells per kv head for every layer, [n_layer]; their mean is n_cells unless the layers hold fewer
std::vector<int32_t> budgets(const wkv_policy & policy, const wkv_shapes & shapes, int64_t n_cells);

// views on the inputs of one selection: layer il, head h -> its cells[il] ascending positions and scores
struct selection {
    const wkv_policy & policy;
    const wkv_shapes & shapes;
    const int32_t    * budgets;   // [n_layer]
    const int32_t    * positions; // layers one after the other, each [n_head_kv, cells[il]]
    const float      * scores;    // same layout
    uint8_t          * keep;      // same layout

    std::vector<size_t> offsets;  // [n_layer + 1], first element of each layer

    selection(const wkv_policy & policy, const wkv_shapes & shapes, const int32_t * budgets,
              const int32_t * positions, const float * scores, uint8_t * keep);

    size_t n_cells(int32_t il) const { return shapes.cells[il]; }
    size_t at(int32_t il, int32_t ih) const { return offsets[il] + size_t(ih)*shapes.cells[il]; }
};

// "" or why these inputs cannot be served; keep is written only on success
std::string select(selection & sel);

// the policies: each fills keep for all layers
std::string select_streamingllm(selection & sel);
std::string select_snapkv      (selection & sel); // and pyramidkv, which differs in its budgets
std::string select_windowkv    (selection & sel);

// set keep for the first budget entries of order, an order of cell indices of this (layer, head)
void keep_first(selection & sel, int32_t il, int32_t ih, const std::vector<int32_t> & order);

} // namespace wkv
