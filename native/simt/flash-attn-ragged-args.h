// What hosts tell the kernels of GGML_OP_FLASH_ATTN_RAGGED. Both sides include this text, and nothing else in it.

#ifndef FLASH_ATTN_RAGGED_ARGS_H
#define FLASH_ATTN_RAGGED_ARGS_H

enum { FATTN_N_WARPS = 4, FATTN_N_THREADS = 32*FATTN_N_WARPS }; // of a block

enum { FATTN_DIMS = 8 }; // elements of a row that one lane holds: 16 bytes of F16, the widest load

// formats of a row of a pool; ALIGN2: rows that are not made of whole words
enum { FATTN_F32, FATTN_F16, FATTN_BF16, FATTN_Q8_0, FATTN_Q4_0, FATTN_Q8_0_ALIGN2, FATTN_Q4_0_ALIGN2 };

#define FATTN_LOG2E 1.44269504f // log2(e)

// function constants of Metal's kernels
#define FC_TYPE_K 0
#define FC_TYPE_V 1

struct fattn_args {
    int32_t type_k, type_v;     // FATTN_*
    int32_t n_embd_k, n_embd_v; // elements of a row
    int32_t n_tokens, n_head, n_head_kv, n_gqa;

    int32_t n_rows;       // of a kv head, n_tokens*n_gqa: row = token*n_gqa + query head of the kv head
    int32_t n_row_blocks; // of a kv head: items
    int32_t n_blocks;     // of the grid: shares of the work
    int32_t n_splits;     // 0, or parts of equal length that every item is cut into instead
    int32_t n_tiles_min;  // that a share has at least

    int64_t  nb_q1, nb_q2; // bytes between tokens and heads of q
    uint32_t nb_k, nb_v;   // bytes between rows of the pools

    // Scores are those of powers of two, which devices compute faster than powers of e: softmax(x) is the same of
    // 2^(x*log2(e)). Without a softcap the scale has that factor, with one the softcap has it
    float scale; // of queries; with a softcap divided by it
    float softcap;

    int32_t causal;
    int32_t has_sinks;
};

#endif
