#pragma once

// One layer of the ragged KV cache: its shapes, its device, and the pools that are made for it.

#include "llama-kv-ragged-pool.h"
#include "llama-memory.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct llama_cparams;
struct llama_model;

// what attends in a layer: stock's attention over all heads, which hold equally many cells; the same over one head after the other; ours
enum llama_kv_ragged_kernel {
    LLAMA_KV_RAGGED_KERNEL_STOCK,
    LLAMA_KV_RAGGED_KERNEL_BY_HEAD,
    LLAMA_KV_RAGGED_KERNEL_RAGGED,
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

    // whether the device attends over heads of different lengths with GGML_OP_FLASH_ATTN_RAGGED
    bool has_ragged;

    // the operation that the device lacks to attend head by head; nullptr if it lacks none
    const char * missing_by_head;

    // heads that are attended one by one begin at multiples of this many rows: where a kernel may expect a tensor to begin
    int64_t n_align;

    // learned attention sinks of the model [n_head], F32, nullptr without
    ggml_tensor * sinks = nullptr;

    // empty; stands for the pool in worst-case graphs, which are measured and never computed
    std::shared_ptr<ggml_backend_buffer> buf_full;

    int64_t n_gqa() const { return n_head/n_head_kv; }
    bool    on_cpu() const;

    // whether heads of different lengths are attended one by one: on a device, which has the operations for it. The CPU has the op,
    // which is exact and fast there
    bool has_by_head() const { return !on_cpu() && !missing_by_head; }

    // throws llama_kv_ragged_unsupported if the device does not attend over heads of different lengths
    void check_ragged() const;

    // tensors that attending head by head puts into a graph
    size_t n_nodes_by_head() const;

    // Rows that heads with len cells are given, slack of them free at least. Heads of equal length stay equal, padded for attention over
    // views. Where others are attended one by one, reads of a length that is padded end inside the pool: in rows of the heads behind, and
    // for the last one in rows of its own.
    std::vector<int64_t> capacity(const std::vector<int64_t> & len, int64_t slack, bool compacted) const;

    // a pool with room for cap[ih] cells of every head, zeroed unless somebody writes all of it; throws std::runtime_error if memory
    // runs out
    llama_kv_ragged_pool make_pool(const std::vector<int64_t> & cap, llama_kv_ragged_meter & meter, bool zeroed = true) const;

    // the same with the first len[ih] cells of every head of src
    llama_kv_ragged_pool copy_pool(
            const llama_kv_ragged_pool & src,
            const std::vector<int64_t> & cap,
            const std::vector<int64_t> & len,
            llama_kv_ragged_meter      & meter) const;
};

// n rows of one tensor to another of the same row type; those of one must not overlap
void llama_kv_ragged_copy_rows(ggml_tensor * src, ggml_tensor * dst, int64_t i_src, int64_t i_dst, int64_t n);

// The layers that the filter accepts, all without one. Throws std::runtime_error with the reason if one cannot be served, or the
// backend that holds it.
std::vector<llama_kv_ragged_layer> llama_kv_ragged_make_layers(
        const llama_model                     & model,
        const llama_cparams                   & cparams,
              ggml_type                         type_k,
              ggml_type                         type_v,
        const llama_memory_i::layer_filter_cb & filter);
