#pragma once

// Storage of one attention layer of the ragged KV cache: what its cells look like, and the pools that hold them.

#include "ggml-cpp.h"

#include <array>
#include <cstdint>
#include <vector>

// bytes of live buffers of one cache, with their maximum
struct llama_kv_ragged_meter {
    int64_t live = 0;
    int64_t peak = 0;

    void add(int64_t n);
};

// bytes that count as live as long as it exists
class llama_kv_ragged_claim {
public:
    llama_kv_ragged_claim(llama_kv_ragged_meter & meter, int64_t n = 0) : meter(meter) { add(n); }
    ~llama_kv_ragged_claim() { meter.add(-size); }

    llama_kv_ragged_claim(const llama_kv_ragged_claim &) = delete;
    llama_kv_ragged_claim & operator=(const llama_kv_ragged_claim &) = delete;

    void add(int64_t n) {
        size += n;
        meter.add(n);
    }

private:
    llama_kv_ragged_meter & meter;

    int64_t size = 0;
};

// a tensor of its own in a buffer of its own, zeroed; counts as live as long as it exists
struct llama_kv_ragged_buffer {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor           * tensor = nullptr;

    llama_kv_ragged_meter * meter = nullptr;

    llama_kv_ragged_buffer() = default;
    llama_kv_ragged_buffer(llama_kv_ragged_buffer && other) noexcept;
    llama_kv_ragged_buffer & operator=(llama_kv_ragged_buffer && other) noexcept;
    ~llama_kv_ragged_buffer();

    // empty if memory runs out
    static llama_kv_ragged_buffer make(
            ggml_backend_buffer_type_t buft, ggml_type type, const std::array<int64_t, 3> & ne, const char * name, llama_kv_ragged_meter * meter);

    bool    empty() const { return buf == nullptr; }
    int64_t bytes() const { return buf ? ggml_backend_buffer_get_size(buf.get()) : 0; }
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

// what the cells of one layer look like, and where they lie
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

    int64_t n_gqa() const { return n_head/n_head_kv; }
    bool    on_cpu() const;

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
