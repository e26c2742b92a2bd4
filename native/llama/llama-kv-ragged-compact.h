#pragma once

// Compaction of a sequence: a plan says which cells stay, gathering moves them to new pools.

#include "llama-kv-ragged-score.h"

#include <cstdint>
#include <functional>
#include <vector>

// Arrays of one selection, for every (layer, kv head) in turn its cells.
struct llama_kv_ragged_choice {
    const std::vector<int32_t> & cells; // [n_layer*n_head_kv]

    const int32_t * positions; // ascending
    const float   * scores;    // one such plane per window, by query head [n_gqa, cells] for every kv head; zeros without windows
    uint8_t       * keep;      // comes as 0, becomes 1 where a cell stays
};

// what a compaction asks for
struct llama_kv_ragged_request {
    llama_kv_ragged_scoring scoring; // no windows: positions alone decide

    // what it throws leaves the cache as it was
    std::function<void(const llama_kv_ragged_choice &)> select;

    int64_t n_bytes_cell = 0; // host memory that select takes for a moment, bytes per cell
};

struct llama_kv_ragged_plan {
    int64_t n_head_kv = 0; // of every layer

    std::vector<uint8_t> keep;   // [cells of all (layer, kv head)]
    std::vector<int32_t> before; // [n_layer*n_head_kv], cells held
    std::vector<int32_t> after;  // [n_layer*n_head_kv], cells that stay

    double t_score_ms  = 0.0;
    double t_select_ms = 0.0;

    int64_t n_released() const;
    int64_t n_released(size_t i) const; // in a layer
};

// Score on the layers' backends, select on the host; nothing is changed.
// Throws what select throws, and std::runtime_error if a graph fails, memory runs out or a device has no attention for the outcome.
llama_kv_ragged_plan llama_kv_ragged_make_plan(
        llama_context & lctx, const llama_kv_ragged_seq & seq, const llama_kv_ragged_request & request);

// What the plan leaves of one layer, in a new pool with room for what comes next; throws std::runtime_error if memory runs out.
llama_kv_ragged_cells llama_kv_ragged_gather(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_plan & plan);
