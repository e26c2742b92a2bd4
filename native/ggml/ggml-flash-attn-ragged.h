#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

    // attention of kv heads that each own a region of rows of a pool, without padding and without a mask
    //
    // q:      [n_embd_k, n_tokens, n_head]    F32, elements of a row contiguous
    // k:      [n_embd_k, n_rows]              F32, F16, BF16, Q8_0 or Q4_0; one row is one cell of one kv head
    // v:      [n_embd_v, n_rows]              likewise, the type may differ from that of k
    // ranges: [2, n_head_kv, n_layer]         I32 {first row, n_cells} of every kv head of every layer
    // sinks:  [n_head]                        F32, optional
    // res:    [n_embd_v, n_head, n_tokens]    F32 !! permuted !!
    //
    // broadcast:
    //   n_head % n_head_kv == 0, each kv head serves n_head/n_head_kv consecutive query heads
    //
    // layer:         plane of ranges
    // scale:         of q*k
    // logit_softcap: 0, or scores become logit_softcap*tanh(scale*q*k/logit_softcap)
    // causal:        query t sees the first n_cells - n_tokens + t + 1 cells of its kv head (the last n_tokens cells are
    //                the queries' own), otherwise all of them
    //
    // A query that sees no cell yields zeros. Rows outside of the ranges are never read.
    GGML_API struct ggml_tensor * ggml_flash_attn_ragged(
            struct ggml_context * ctx,
            struct ggml_tensor  * q,
            struct ggml_tensor  * k,
            struct ggml_tensor  * v,
            struct ggml_tensor  * ranges,
            struct ggml_tensor  * sinks,
            int                   layer,
            float                 scale,
            float                 logit_softcap,
            bool                  causal);

#ifdef __cplusplus
}
#endif
