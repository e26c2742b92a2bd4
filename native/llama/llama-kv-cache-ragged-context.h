#pragma once

// What a batch, and the graphs of its ubatches, see of a ragged KV cache.

#include "llama-kv-cache.h"
#include "llama-kv-ragged-layer.h"

#include <functional>
#include <utility>
#include <vector>

struct llama_context;
struct llm_graph_context;

class llama_kv_cache_ragged;
class llama_kv_ragged_replay;

// The scale of a layer's attention logits, which the worst-case graph of a context has. Throws llama_kv_ragged_unsupported if the layer's
// attention does not run through the cache.
float llama_kv_ragged_scale(const llama_context & lctx, int32_t il);

//
// llama_kv_cache_ragged_context
//

class llama_kv_cache_ragged_context : public llama_kv_cache_context {
public:
    // used for errors
    llama_kv_cache_ragged_context(llama_memory_status status);

    // used to create a full-cache context, for measuring graphs
    llama_kv_cache_ragged_context(llama_kv_cache_ragged * kv);

    // used to create a batch processing context from a batch
    llama_kv_cache_ragged_context(
            llama_kv_cache_ragged * kv,
            slot_info_vec_t sinfos,
            std::vector<llama_ubatch> ubatches);

    // used to create an update context, which runs fn
    llama_kv_cache_ragged_context(
            llama_kv_cache_ragged * kv,
            std::function<void()> fn);

    // the ragged context behind a KV cache context, nullptr if there is none
    static const llama_kv_cache_ragged_context * cast(const llama_kv_cache_context * mctx);

    // the one inside the context of any memory, nullptr if there is none
    static const llama_kv_cache_ragged_context * find(const llama_memory_context_i * mctx);

    bool apply() override;

    //
    // llama_kv_cache_ragged_context specific API
    //

    // what the graph of the current ubatch sees of a layer
    struct layer_view {
        ggml_tensor * k;  // [n_embd_head_k, n_rows]
        ggml_tensor * v;  // [n_embd_head_v, n_rows]
        int64_t cap;      // rows per head, if all have the same
    };

    layer_view get_view(ggml_context * ctx, int32_t il) const;

    // what attends in a layer in a graph of n_tokens
    llama_kv_ragged_kernel get_kernel(int32_t il, int64_t n_tokens) const;

    // what stock attention sees of a layer's heads, which hold equally many cells (ih = ALL_HEADS), or of one of them
    struct cells_view {
        int64_t first;   // row of the pool
        int64_t n_cells; // cells per head, those of the ubatch included
        int64_t n_read;  // cells per head that attention reads
    };

    static constexpr int32_t ALL_HEADS = -1;

    cells_view get_cells(int32_t il, int32_t ih) const;

    const llama_kv_ragged_layer & get_layer(int32_t il) const;

    ggml_tensor * get_queries(int32_t il) const; // observed ones of a layer, F16 [n_embd_head_k, n_rows, n_head]

    const std::vector<llama_kv_ragged_layer> & get_layers() const;

    // the device that holds the table of a layer's cells for graphs of n_tokens, and the table; nullptr if it is an input
    std::pair<ggml_backend_dev_t, ggml_tensor *> get_table(int32_t il, int64_t n_tokens) const;

    // write a table before its graph runs
    void set_table(ggml_backend_dev_t dev, ggml_tensor * table, const std::vector<int32_t> & data) const;

    // first row and cells of every head, those of the ubatch included, {first, cells} x n_head_kv
    void get_ranges(int32_t il, int32_t * ranges) const;

    int32_t get_index  (int32_t il) const; // of a layer of the model among those of the cache
    int32_t get_n_layer() const;

    // rows of the observed queries for the last tokens of the ubatch, [get_n_observed(n_tokens)]
    const std::vector<int64_t> & get_observed_rows() const { return observed_rows; }

    int64_t get_n_observed(int64_t n_tokens) const;

    uint64_t get_epoch() const;

    // nullptr: the tokens of the graph repeat nothing
    llama_kv_ragged_replay * get_replay() const;

    int64_t n_replay_keys() const;

    // see llama_kv_ragged_replay
    void set_replay_rows(int32_t il, int32_t * rows) const;
    void set_replay_mask(int64_t n_tokens, float * mask) const;

    // what a context shift has to know of the keys that the graph makes
    void note_keys(int32_t il, const ggml_tensor * k_cur) const;

    // store k_cur and v_cur, observe q_cur and attend
    //   q_cur [n_embd_head_k, n_head, n_tokens], k_cur, v_cur [n_embd_head_k/v, n_head_kv, n_tokens]
    //   returns [n_embd_head_v*n_head, n_tokens]
    ggml_tensor * build_attn(
            const llm_graph_context & g,
            ggml_tensor * q_cur,
            ggml_tensor * k_cur,
            ggml_tensor * v_cur,
            ggml_tensor * kq_b,
            ggml_tensor * sinks,
                  float   kq_scale,
                    int   il) const;

private:
    llama_kv_cache_ragged * kv = nullptr;

    bool full = false;

    std::function<void()> update;

    std::vector<int64_t> observed_rows;
};
