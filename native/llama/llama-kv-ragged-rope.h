#pragma once

// How the keys of a layer got their positions: read from the graph that makes them, as not every model says it elsewhere.

#include "ggml.h"

#include <cstdint>

struct llama_kv_ragged_rope {
    enum kind_type {
        UNKNOWN, // no graph was built yet
        NONE,    // they have none
        WHOLE,   // one rotation, of a head's first n_rot values
        OTHER,   // anything else
    };
    kind_type kind = UNKNOWN;

    int32_t mode       = 0;
    int32_t n_rot      = 0;
    int32_t n_ctx_orig = 0;
    float   freq_base   = 0.0f;
    float   freq_scale  = 0.0f;
    float   ext_factor  = 0.0f;
    float   beta_fast   = 0.0f;
    float   beta_slow   = 0.0f;

    ggml_tensor * factors = nullptr; // of the model [n_rot/2], nullptr without
};

// k_cur [n_embd_head_k, n_head_kv, n_tokens]: the keys that a graph stores
llama_kv_ragged_rope llama_kv_ragged_find_rope(const ggml_tensor * k_cur);
