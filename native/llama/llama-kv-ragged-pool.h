#pragma once

// Storage of one attention layer of the ragged KV cache: its K and V pools, and which positions they hold.

#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

// bytes of live buffers of one cache, with their maximum
struct llama_kv_ragged_meter {
    int64_t live = 0;
    int64_t peak = 0;

    void add(int64_t n);
};

// give the pages of freed host buffers back to the system
void llama_kv_ragged_trim();

// K and V of all kv heads of a layer
//   k [n_embd_head_k, n_rows], v [n_embd_head_v, n_rows]: one row = one head's cell
//   head ih owns the rows [first[ih], first[ih + 1])
struct llama_kv_ragged_pool {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;

    ggml_tensor * k = nullptr;
    ggml_tensor * v = nullptr;

    std::vector<int64_t> first; // [n_head_kv + 1], empty without a buffer

    llama_kv_ragged_meter * meter = nullptr;

    llama_kv_ragged_pool() = default;
    llama_kv_ragged_pool(llama_kv_ragged_pool && other) noexcept;
    llama_kv_ragged_pool & operator=(llama_kv_ragged_pool && other) noexcept;
    ~llama_kv_ragged_pool();

    bool    empty()  const { return buf == nullptr; }
    int64_t cap(int64_t ih) const { return buf ? first[ih + 1] - first[ih] : 0; }
    int64_t n_rows() const { return k ? k->ne[1] : 0; }
    int64_t bytes()  const { return buf ? ggml_backend_buffer_get_size(buf.get()) : 0; }
};

struct llama_kv_ragged_layer {
    uint32_t il; // layer index in the model

    int64_t n_head;
    int64_t n_head_kv;
    int64_t n_embd_head_k;
    int64_t n_embd_head_v;

    ggml_type type_k;
    ggml_type type_v;

    ggml_backend_dev_t         dev;
    ggml_backend_buffer_type_t buft;

    // read length of attention and capacity are padded to this many cells once the cache was compacted
    int64_t n_pad;

    // whether the device attends over heads of different lengths
    bool has_ragged;

    // set when the attention of this layer was built for the first time
    bool  hooked   = false;
    float kq_scale = 0.0f;

    // learned attention sinks of the model [n_head], F32, nullptr without
    ggml_tensor * sinks = nullptr;

    llama_kv_ragged_pool pool;

    // observed queries [n_embd_head_k, n_window, n_head], F16, row = position % n_window
    ggml_tensor * ring = nullptr;

    // positions below the boundary that each head kept, ascending; [n_head_kv]
    // all positions from the boundary on are held by every head and are not listed
    std::vector<std::vector<int32_t>> kept;
    uint32_t boundary = 0;

    int64_t cell_bytes() const; // K and V of one head's cell

    // rows that heads with len cells are given, slack of them free at least; heads of equal length stay equal, padded for
    // attention over views
    std::vector<int64_t> capacity(const std::vector<int64_t> & len, int64_t slack, bool compacted) const;

    // a zeroed pool with room for cap[ih] cells of every head; empty if memory runs out
    llama_kv_ragged_pool make_pool(const std::vector<int64_t> & cap, llama_kv_ragged_meter * meter) const;

    // the same with the first len[ih] cells of every head of src
    llama_kv_ragged_pool copy_pool(
            const llama_kv_ragged_pool & src,
            const std::vector<int64_t> & cap,
            const std::vector<int64_t> & len,
            llama_kv_ragged_meter      * meter) const;
};
