#pragma once

// A state of a memory to go back to any number of times.

#include "llama-kv-ragged-seq.h"

#include <functional>
#include <vector>

class llama_kv_cache;
struct llama_memory_i;

// What a memory holds beside the sequence: copies of upstream's caches, windows and recurrent states among them.
struct llama_kv_ragged_others {
    llama_memory_i * mem; // of the context

    // kv: the cell metadata of the cache that holds the sequence, without layers of its own; mem: the memory of its context
    // throws std::runtime_error if memory runs out
    llama_kv_ragged_others(llama_kv_cache & kv, llama_memory_i & mem);

    // puts them back, to the bit; clears the memory and refuses if memory runs out
    void restore() const;

    // host memory of the copies
    int64_t bytes() const { return n_bytes; }

private:
    int64_t n_bytes = 0;

    std::vector<std::function<void()>> fns;
};

struct llama_kv_ragged_snapshot {
    llama_kv_ragged_seq    seq;
    llama_kv_ragged_others others;

    // as above
    llama_kv_ragged_snapshot(const llama_kv_ragged_seq & seq, llama_kv_cache & kv, llama_memory_i & mem) :
        seq(seq.copy(/*exact =*/ true)), others(kv, mem) {}
};
