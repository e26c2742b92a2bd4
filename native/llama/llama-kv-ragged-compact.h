#pragma once

// Compaction of the ragged KV cache: a plan says which cells stay, committing it moves them and frees the rest.

#include "llama-kv-ragged-score.h"

#include <cstdint>
#include <functional>
#include <vector>

class llama_kv_cache_ragged;

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
    std::vector<uint8_t> keep;   // [cells of all (layer, kv head)]
    std::vector<int32_t> before; // [n_layer*n_head_kv], cells held
    std::vector<int32_t> after;  // [n_layer*n_head_kv], cells that stay

    double t_score_ms  = 0.0;
    double t_select_ms = 0.0;

    int64_t n_released() const;
};

// Score on the layers' backends, select on the host; the cache is not changed.
// Throws what select throws, and std::runtime_error if a graph fails, memory runs out or a device has no attention for the outcome.
llama_kv_ragged_plan llama_kv_ragged_make_plan(llama_kv_cache_ragged & kv, llama_context & lctx, const llama_kv_ragged_request & request);

// The rows that stay of one layer in a new pool, with room for what comes next; throws std::runtime_error if memory runs out.
// keep and n_keep are those of this layer; kept becomes the positions that stay, [n_head_kv].
llama_kv_ragged_pool llama_kv_ragged_gather(
        llama_context & lctx, const llama_kv_ragged_source & src, const uint8_t * keep, const int32_t * n_keep,
        std::vector<std::vector<int32_t>> & kept, llama_kv_ragged_meter & meter);
