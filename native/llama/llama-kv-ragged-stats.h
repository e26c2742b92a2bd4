#pragma once

// What the ragged KV cache tells about itself.

#include "llama-kv-ragged-pool.h"

#include <cstdint>

struct llama_kv_ragged_stats {
    // types of the cells that stock would hold
    ggml_type stock_type_k = GGML_TYPE_F16;
    ggml_type stock_type_v = GGML_TYPE_F16;

    llama_kv_ragged_meter meter;

    // those that evicted something, in all layers or in some
    int32_t n_compactions = 0;

    // the last one of them
    int64_t bytes_released = 0;
    double  t_score_ms     = 0.0;
    double  t_select_ms    = 0.0;
    double  t_gather_ms    = 0.0;
};
