#pragma once

// What a policy asks of a compaction.

#include "llama-kv-ragged-compact.h"
#include "policy/wkv-pinned.h"
#include "policy/wkv-policy.h"

#include <cstdint>
#include <memory>
#include <vector>

struct llama_kv_ragged_rest;
struct llama_kv_ragged_seq;

// cells is what every (layer, kv head) holds, those of rest if there is one, and has to outlive the result
wkv_shapes llama_kv_ragged_shapes(
        const llama_kv_ragged_seq & seq, const std::vector<int32_t> & cells, const llama_kv_ragged_rest * rest = nullptr);

// positions of every (layer, kv head); seq has to outlive them
std::vector<wkv::cell_positions> llama_kv_ragged_positions(const llama_kv_ragged_seq & seq);

// what a selection sees of a cache with pinned positions
struct llama_kv_ragged_rest {
    llama_kv_ragged_claim claim;
    wkv::rest_cells       cells;

    llama_kv_ragged_rest(
            const llama_kv_ragged_seq & seq, const std::vector<wkv::position_range> & pinned, const std::vector<int32_t> & n_cells);
};

// Null if no cell is pinned. Else n_cells becomes what is left for the others: at least 1, or 0 if nothing has to go.
// Throws std::invalid_argument if the pinned cells leave nothing.
std::shared_ptr<const llama_kv_ragged_rest> llama_kv_ragged_without(
        const llama_kv_ragged_seq & seq, const std::vector<wkv::position_range> & pinned, int64_t & n_cells);

// Whether a policy evicts anything of the cells that seq holds now, and if so how: n_cells stay per (layer, kv head) on average, the
// pinned ones among them.
// seq, the policy and what it points to have to outlive the request.
// Throws std::invalid_argument if the policy, or its number of cells, does not fit.
bool llama_kv_ragged_policy_request(
        const llama_kv_ragged_seq & seq, const wkv_policy & policy, const std::vector<wkv::position_range> & pinned, int64_t n_cells,
        llama_kv_ragged_request & request);

// Throws std::invalid_argument if a selection that observes window_size tokens cannot keep n_cells cells per head.
void llama_kv_ragged_check_request(const llama_kv_ragged_seq & seq, int32_t window_size, int64_t n_cells);
