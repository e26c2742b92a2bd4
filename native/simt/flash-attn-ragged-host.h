#pragma once

// What the hosts of all devices have in common: arguments of the kernels, and what they support.

#include "flash-attn-ragged-args.h"

#include "ggml-impl.h"
#include "ggml.h"

#include <algorithm>

// -1 for types of which the kernels know nothing
static inline int fattn_type(const ggml_tensor * pool) {
    // an even number of blocks, whose sizes are 2 more than a multiple of 4
    const bool words = pool->ne[0] % 64 == 0 && pool->nb[1] % 4 == 0 && pool->view_offs % 4 == 0;
    switch (pool->type) {
        case GGML_TYPE_F32:  return FATTN_F32;
        case GGML_TYPE_F16:  return FATTN_F16;
        case GGML_TYPE_BF16: return FATTN_BF16;
        case GGML_TYPE_Q8_0: return words ? FATTN_Q8_0 : FATTN_Q8_0_ALIGN2;
        case GGML_TYPE_Q4_0: return words ? FATTN_Q4_0 : FATTN_Q4_0_ALIGN2;
        default:             return -1;
    }
}

// all but the division of the work
static inline fattn_args fattn_args_of(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    fattn_args a = {};
    a.type_k    = fattn_type(k);
    a.type_v    = fattn_type(v);
    a.n_embd_k  = k->ne[0];
    a.n_embd_v  = v->ne[0];
    a.n_tokens  = q->ne[1];
    a.n_head    = q->ne[2];
    a.n_head_kv = dst->src[3]->ne[1];
    a.n_gqa     = a.n_head/a.n_head_kv;
    a.n_rows    = a.n_tokens*a.n_gqa;
    a.nb_q1     = q->nb[1];
    a.nb_q2     = q->nb[2];
    a.nb_k      = k->nb[1];
    a.nb_v      = v->nb[1];
    a.scale     = ggml_get_op_params_f32(dst, 0);
    a.softcap   = ggml_get_op_params_f32(dst, 1);
    a.causal    = ggml_get_op_params_i32(dst, 3);
    a.has_sinks = dst->src[4] != nullptr;
    if (a.softcap != 0.0f) {
        a.scale   /= a.softcap;
        a.softcap *= FATTN_LOG2E;
    } else {
        a.scale *= FATTN_LOG2E;
    }
    return a;
}

// bytes from the start of the ranges to those of the op's layer
static inline size_t fattn_ranges_offset(const ggml_tensor * dst) {
    return ggml_get_op_params_i32(dst, 2)*dst->src[3]->nb[2];
}

// lanes that hold a row of the larger pool
static inline int fattn_n_lanes(const fattn_args & a) {
    const int n_embd = std::max(a.n_embd_k, a.n_embd_v);
    return n_embd <= 8*FATTN_DIMS ? 8 : n_embd <= 16*FATTN_DIMS ? 16 : 32;
}

// rows of a block of the kernel for few rows
static inline int fattn_vec_rows(const fattn_args & a) {
    return a.n_rows == 1 ? 1 : a.n_rows == 2 ? 2 : a.n_rows <= 4 ? 4 : 8;
}

// rows of a block of the kernel of products in registers: those of more than 128 elements have room for 32
static inline int fattn_mma_rows(const fattn_args & a) {
    return a.n_rows <= 8 ? 8 : a.n_rows <= 16 ? 16 : a.n_rows <= 32 || fattn_n_lanes(a) == 32 ? 32 : 64;
}

// Work in equal shares of n_tiles_min tiles at least, one for every block of the grid: n_busy at most, which keep the device busy, and
// not more than there can be shares. How many cells the heads have is known on the device alone; together they have no more than the
// pool has rows
static inline void fattn_plan_shares(
        fattn_args & a, const ggml_tensor * dst, int n_rows_block, int n_cells_tile, int n_busy, int n_tiles_min = 1) {
    a.n_row_blocks = (a.n_rows + n_rows_block - 1)/n_rows_block;

    const int64_t n_tiles = (dst->src[1]->ne[1]/n_cells_tile + a.n_head_kv)*a.n_row_blocks;
    a.n_blocks    = std::min<int64_t>((n_tiles + n_tiles_min - 1)/n_tiles_min, n_busy);
    a.n_splits    = 0;
    a.n_tiles_min = n_tiles_min;
}

// of a share of the kernel for many rows, whose tiles are small, since every part is written and read once more
enum { FATTN_TILE_N_TILES_MIN = 4 };

// Items in parts of equal length: as many as keep the device busy, with four tiles at least if heads are equally long, since every
// part is written and read once more
static inline void fattn_plan_splits(fattn_args & a, const ggml_tensor * dst, int n_rows_block, int n_cells_tile, int n_busy) {
    a.n_row_blocks = (a.n_rows + n_rows_block - 1)/n_rows_block;

    const int64_t n_items = (int64_t) a.n_row_blocks*a.n_head_kv;
    const int64_t n_tiles = dst->src[1]->ne[1]/n_cells_tile/a.n_head_kv + 1;
    a.n_splits = std::max<int64_t>(1, std::min((n_busy + n_items - 1)/n_items, n_tiles/4));
    a.n_blocks    = n_items*a.n_splits;
    a.n_tiles_min = 1;
}

// floats for the parts of all blocks, fattn_part() says where each lies
static inline size_t fattn_part_size(const fattn_args & a, int n_rows_block) {
    return a.n_splits == 1 ? 0 : (size_t) a.n_blocks*2*n_rows_block*(a.n_embd_v + 2);
}

// lanes hold whole groups of FATTN_DIMS elements, and what is not quantised is read 16 bytes at a time
static inline bool fattn_supported(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    for (const ggml_tensor * pool : { dst->src[1], dst->src[2] }) {
        if (fattn_type(pool) < 0 || pool->ne[0] > 32*FATTN_DIMS || pool->ne[0] % FATTN_DIMS != 0) {
            return false;
        }
        const size_t align = ggml_is_quantized(pool->type) ? 2 : 16;
        if (pool->nb[1] % align != 0 || pool->view_offs % align != 0) {
            return false;
        }
    }
    return q->nb[1] % sizeof(float) == 0 && q->nb[2] % sizeof(float) == 0 && ggml_is_contiguous(dst);
}
