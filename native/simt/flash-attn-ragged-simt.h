// GGML_OP_FLASH_ATTN_RAGGED for machines with groups of 32 lanes in step.
//
// CUDA, Metal and the emulator of the tests compile this very text. Who includes it has defined the primitives simt_* and SIMT_*
// before; simt-cuda.cuh lists them.
//
//   flash-attn-ragged-rows.h      formats of a row of a pool
//   flash-attn-ragged-work.h      how the work is divided among blocks
//   flash-attn-ragged-combine.h   results, and those of rows that were attended in parts
//   flash-attn-ragged-vec.h       kernel for few rows: decoding; its steps are in flash-attn-ragged-vec-steps.h, with products from
//                                 flash-attn-ragged-products.h and sums over lanes from flash-attn-ragged-deal.h
//   flash-attn-ragged-mma.h       kernel for some rows: groups of query heads, a few tokens; its steps are in
//                                 flash-attn-ragged-mma-steps.h. For machines whose products of matrices have a known layout in
//                                 registers, which those of Metal have not: its host includes it
//   flash-attn-ragged-tile.h      kernel for many rows: prompts
//
// Shapes in these files are in ggml's order: the first size is that of a row in memory.

#include "flash-attn-ragged-args.h"

// Kernels are compiled with options that let compilers assume that no float is infinite (-use_fast_math, and Metal by default). So
// these take the place of -infinity; scores are far smaller
#define FATTN_LOWEST (-5e29f) // where maxima start
#define FATTN_MASKED (-1e30f) // the score of a cell that a row does not see: so far below FATTN_LOWEST that its weight is 0

// the op's tensors in device memory
struct fattn_tensors {
    SIMT_GLOBAL(const char)    q;      // [n_embd_k, n_tokens, n_head] F32, strides nb_q1 and nb_q2
    SIMT_GLOBAL(const char)    k;      // [n_embd_k, n_rows_pool] of type_k, stride nb_k
    SIMT_GLOBAL(const char)    v;      // [n_embd_v, n_rows_pool] of type_v, stride nb_v
    SIMT_GLOBAL(const int32_t) ranges; // [2, n_head_kv] of the op's layer: first row, cells
    SIMT_GLOBAL(const float)   sinks;  // [n_head], if has_sinks
    SIMT_GLOBAL(float)         part;   // [n_embd_v + 2, n_rows_block, 2, n_blocks], see fattn_part()
    SIMT_GLOBAL(float)         dst;    // [n_embd_v, n_head, n_tokens]
};

// tanh by the exponential function: the fast tanh of some compilers is off by more than scores are allowed to be. From 15 on it
// rounds to 1; below, e becomes 0. Of NaN it is NaN
static SIMT_FUNC float fattn_tanh(float x) {
    const float e = simt_exp2(2.0f*FATTN_LOG2E*simt_min(15.0f, x));
    return (e - 1.0f)/(e + 1.0f);
}

#include "flash-attn-ragged-rows.h"
#include "flash-attn-ragged-work.h"
#include "flash-attn-ragged-combine.h"
#include "flash-attn-ragged-products.h"
#include "flash-attn-ragged-deal.h"
#include "flash-attn-ragged-vec-steps.h"
#include "flash-attn-ragged-vec.h"
#include "flash-attn-ragged-tile.h"
