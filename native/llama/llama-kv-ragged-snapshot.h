#pragma once

// A state of a memory to go back to any number of times.

#include "llama-kv-ragged-seq.h"

#include <functional>
#include <vector>

class llama_kv_cache;
struct llama_memory_i;

struct llama_kv_ragged_snapshot {
    llama_kv_ragged_seq seq;

    // put back, to the bit, what the memory holds of upstream's caches
    std::vector<std::function<void()>> others;

    llama_memory_i * mem; // of the context

    // kv: the cell metadata of the cache that holds seq, without layers of its own; mem: the memory of its context, whose windows and
    // recurrent states are part of the state
    // throws std::runtime_error if memory runs out
    llama_kv_ragged_snapshot(const llama_kv_ragged_seq & seq, llama_kv_cache & kv, llama_memory_i & mem);
};
