#pragma once

// What a policy asks of a compaction.

#include "llama-kv-ragged-compact.h"
#include "policy/wkv-policy.h"

#include <cstdint>

struct llama_kv_ragged_seq;

// cells is what every (layer, kv head) holds, and has to outlive the result
wkv_shapes llama_kv_ragged_shapes(const llama_kv_ragged_seq & seq, const std::vector<int32_t> & cells);

// Whether a policy evicts anything of the cells that seq holds now, and if so how: n_cells stay per (layer, kv head) on average.
// seq, the policy and what it points to have to outlive the request.
// Throws std::invalid_argument if the policy, or its number of cells, does not fit.
bool llama_kv_ragged_policy_request(
        const llama_kv_ragged_seq & seq, const wkv_policy & policy, int64_t n_cells, llama_kv_ragged_request & request);

// Throws std::invalid_argument if a selection that observes window_size tokens cannot keep n_cells cells per head.
void llama_kv_ragged_check_request(const llama_kv_ragged_seq & seq, int32_t window_size, int64_t n_cells);
