// What hosts tell the kernels of GGML_OP_FLASH_ATTN_RAGGED. Both sides include this text, and nothing else in it.

#ifndef FLASH_ATTN_RAGGED_ARGS_H
#define FLASH_ATTN_RAGGED_ARGS_H

enum { FA_N_WARPS = 4, FA_N_THREADS = 32*FA_N_WARPS };

enum { FA_DIMS = 8 }; // consecutive dimensions of a row that one lane holds

enum { FA_F32, FA_F16, FA_BF16, FA_Q8_0, FA_Q4_0 };

#define FA_LOG2E 1.44269504f

// function constants of Metal's kernels
#define FC_TYPE_K 0
#define FC_TYPE_V 1

struct fa_args {
    int32_t type_k, type_v; // FA_*
    int32_t n_embd_k, n_embd_v;
    int32_t n_tokens, n_head, n_head_kv, n_gqa;

    int32_t n_rows;       // n_tokens*n_gqa
    int32_t n_row_blocks; // of a kv head
    int32_t n_blocks;     // shares of the work
    int32_t n_splits;     // 0, or parts of equal length that every item is cut into instead

    int64_t  nb_q1, nb_q2; // bytes between tokens and heads of q
    uint32_t nb_k, nb_v;   // bytes between rows of the pools

    // logits are those of powers of two, which devices compute faster: one of these has the factor log2(e)
    float scale; // with softcap: divided by it
    float softcap;

    int32_t causal;
    int32_t has_sinks;
};

#endif
