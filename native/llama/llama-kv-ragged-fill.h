#pragma once

#include <cstdint>

struct llama_context;

// n_tokens positions with random cells in an empty cache of any kind, see wkv_fill()
// throws std::invalid_argument before anything changed, std::runtime_error if memory runs out
void llama_kv_ragged_fill(llama_context & ctx, int32_t n_tokens);
