#pragma once

// What the ragged KV cache holds, as a value.

#include "llama-kv-ragged-seq.h"

#include <cstdint>
#include <functional>
#include <vector>

class llama_kv_cache;
struct llama_memory_i;

struct llama_kv_ragged_state {
    llama_kv_ragged_seq                 seq;
    std::vector<llama_kv_ragged_pool>   pools;   // [layers], the cells of seq without room for more
    std::vector<llama_kv_ragged_buffer> queries; // [layers], the observed ones
};

// a state to go back to any number of times, with what the memory around the cache held
struct llama_kv_ragged_snapshot {
    llama_kv_ragged_state state;

    // put back the cell metadata and the caches of window and recurrent layers
    std::vector<std::function<void()>> others;
};

// Puts back what a memory holds of upstream's caches, to the bit: the cell metadata of kv, which has no layers of its own, and the
// windows and recurrent states that mem keeps beside it.
std::vector<std::function<void()>> llama_kv_ragged_copy_others(llama_memory_i & mem, llama_kv_cache & kv);
