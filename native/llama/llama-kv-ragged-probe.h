#pragma once

// Whether a device computes the attention of a layer, asked when the cache is created: later the pools of the layer would have to move to
// another device at every token, or a decode would fail.

#include "ggml-backend.h"

#include <cstdint>

// a layer's attention on a device
struct llama_kv_ragged_probe {
    ggml_backend_dev_t dev;

    int64_t n_head;
    int64_t n_head_kv;
    int64_t n_embd_head_k;
    int64_t n_embd_head_v;

    ggml_type type_k;
    ggml_type type_v;

    float softcap; // of the logits, 0 without
    bool  sinks;   // learned attention sinks
};

// The first operation of a graph that the device lacks, nullptr if there is none. Only shapes and types have to be known, no tensor needs
// memory.
const ggml_tensor * llama_kv_ragged_missing_op(ggml_backend_dev_t dev, ggml_cgraph * gf);

// the same for storing and gathering cells and for attention while all heads hold equally many: nullptr or the operation's name
const char * llama_kv_ragged_missing_stock(const llama_kv_ragged_probe & probe);

// whether the device attends over heads that hold different numbers of cells, with GGML_OP_FLASH_ATTN_RAGGED
bool llama_kv_ragged_has_ragged(const llama_kv_ragged_probe & probe);

// the first operation of attending head by head that the device lacks: nullptr or its name
const char * llama_kv_ragged_missing_by_head(const llama_kv_ragged_probe & probe);
