#pragma once

// Memory of the ragged KV cache: pools of cells, other tensors, and what all of them take.

#include "ggml-cpp.h"

#include <array>
#include <cstdint>
#include <memory>
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

    void set(int64_t n) { add(n - size); }

private:
    llama_kv_ragged_meter & meter;

    int64_t size = 0;
};

// give the pages of freed host buffers back to the system
void llama_kv_ragged_trim();

// tensors of their own in a buffer of their own, which counts as live as long as it exists
struct llama_kv_ragged_buffer {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;

    std::unique_ptr<llama_kv_ragged_claim> claim;

    bool    empty() const { return buf == nullptr; }
    int64_t bytes() const { return buf ? ggml_backend_buffer_get_size(buf.get()) : 0; }

    void init(size_t n_tensors);

    // memory for the tensors of ctx, zeroed unless somebody writes all of it; false if it runs out
    bool alloc(ggml_backend_buffer_type_t buft, llama_kv_ragged_meter & meter, bool zeroed = true);
};

// one tensor
struct llama_kv_ragged_tensor : llama_kv_ragged_buffer {
    ggml_tensor * tensor = nullptr;

    // empty if memory runs out
    static llama_kv_ragged_tensor make(
            ggml_backend_buffer_type_t buft, ggml_type type, const std::array<int64_t, 3> & ne, const char * name,
            llama_kv_ragged_meter & meter);
};

// K and V of all kv heads of a layer
//   k [n_embd_head_k, n_rows], v [n_embd_head_v, n_rows]: one row = one head's cell
//   head ih owns the rows [first[ih], first[ih + 1])
struct llama_kv_ragged_pool : llama_kv_ragged_buffer {
    ggml_tensor * k = nullptr;
    ggml_tensor * v = nullptr;

    std::vector<int64_t> first; // [n_head_kv + 1], empty without a buffer

    int64_t cap(int64_t ih) const { return empty() ? 0 : first[ih + 1] - first[ih]; }
    int64_t n_rows()        const { return empty() ? 0 : k->ne[1]; }
};
