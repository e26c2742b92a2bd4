#pragma once

// Cells of a pool as vectors of F32: a type for every format of a row, prefetch, tiles converted to F32.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "flash-attn-ragged-simd.h"

#include "ggml-cpu.h"
#include "simd-mappings.h"

#include <algorithm>

//
// VL integers, converted. GCC 12 takes the elements of __builtin_convertvector() one by one, and warns of the intrinsics without
// a mask
//

static inline vu32 vf_widen_u16(const uint16_t * x) {
#if defined(__AVX512F__)
    return (vu32) _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256((const __m256i *) x));
#elif defined(__AVX2__)
    return (vu32) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) x));
#elif defined(__ARM_NEON)
    return (vu32) vmovl_u16(vld1_u16(x));
#else
    vu16 res;
    memcpy(&res, x, sizeof(res));
    return __builtin_convertvector(res, vu32);
#endif
}

static inline vf32 vf_convert_i8(vi8 x) {
#if defined(__AVX512F__)
    const vi32 res = (vi32) _mm512_maskz_cvtepi8_epi32(0xFFFF, (__m128i) x);
#elif defined(__AVX2__)
    const vi32 res = (vi32) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) &x));
#elif defined(__ARM_NEON)
    int32_t bytes;
    memcpy(&bytes, &x, sizeof(bytes));
    const vi32 res = (vi32) vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)))));
#else
    const vi32 res = __builtin_convertvector(x, vi32);
#endif
    return __builtin_convertvector(res, vf32);
}

//
// formats of a row: load(row, i) gives its elements i to i + VL - 1 as F32, i is a multiple of VL
//

struct fattn_row_f32 {
    static vf32 load(const char * row, int64_t i) {
        return vf_load((const float *) row + i);
    }
};

struct fattn_row_f16 {
    static vf32 load(const char * row, int64_t i) {
        const ggml_fp16_t * x = (const ggml_fp16_t *) row + i;
#if defined(__AVX512F__)
        return (vf32) _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256((const __m256i *) x));
#elif defined(__AVX__) && defined(__F16C__)
        return (vf32) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x));
#elif defined(__ARM_NEON) && defined(__aarch64__)
        return (vf32) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
#else
        vf32 res;
        for (int j = 0; j < VL; ++j) {
            res[j] = GGML_CPU_FP16_TO_FP32(x[j]);
        }
        return res;
#endif
    }
};

struct fattn_row_bf16 {
    static vf32 load(const char * row, int64_t i) {
        return (vf32) (vf_widen_u16((const uint16_t *) row + i) << 16);
    }
};

// the scale of a block. Where the processor converts by itself, the table of 256 KiB that GGML_CPU_FP16_TO_FP32() may read would
// displace cells from the caches
static inline float fattn_scale(ggml_fp16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    return GGML_CPU_FP16_TO_FP32(x);
#endif
}

struct fattn_row_q8_0 {
    static vf32 load(const char * row, int64_t i) {
        const block_q8_0 * x = (const block_q8_0 *) row + i/QK8_0;

        vi8 q;
        memcpy(&q, x->qs + i%QK8_0, sizeof(q));
        return fattn_scale(x->d)*vf_convert_i8(q);
    }
};

struct fattn_row_q4_0 {
    // the low halves of the bytes are the first 16 elements of a block
    static vf32 load(const char * row, int64_t i) {
        const block_q4_0 * x = (const block_q4_0 *) row + i/QK4_0;

        vu8 q;
        memcpy(&q, x->qs + i%(QK4_0/2), sizeof(q));
        q = i%QK4_0 < QK4_0/2 ? q & 0x0F : q >> 4;
        return fattn_scale(x->d)*vf_convert_i8((vi8) q - 8);
    }
};

//
// tiles of cells
//

// consecutive rows of a pool: cells of one kv head
struct fattn_cells {
    const char * data; // first row
    size_t       nb;   // bytes between rows
};

// how many cells ahead of the one in use
static constexpr int64_t N_CELLS_PREFETCH = 32;

// Asks for n cells that come N_CELLS_PREFETCH behind cell j. Cells stream from memory in regions too short for the hardware to
// predict well. They are asked for in the second-level cache: measured with 131,072 cells of 128 F16 and one thread, that is
// 1.4 times faster than the first, which the tile in use fills. Addresses behind the pool do no harm: a prefetch never faults
static inline void fattn_prefetch(const fattn_cells & cells, int64_t j, int64_t n) {
    const char * row = cells.data + (j + N_CELLS_PREFETCH)*cells.nb;
    for (size_t i = 0; i < n*cells.nb; i += 64) {
        __builtin_prefetch(row + i, 0, 2);
    }
}

// dst [ld, n_cells] F32: dst[j*ld + d] = element d of cell j. ld, a multiple of VL, is the size of a row
template <typename row_t>
static void fattn_convert(float * dst, int64_t ld, const fattn_cells & cells, int64_t n_cells) {
    for (int64_t j = 0; j < n_cells; ++j) {
        for (int64_t d = 0; d < ld; d += VL) {
            vf_store(dst + j*ld + d, row_t::load(cells.data + j*cells.nb, d));
        }
    }
}

// Likewise for rows of n_embd elements that are not whole vectors: zeros behind them, up to ld. Quantised rows are whole vectors
// always: their blocks have 32 elements
static void fattn_convert_padded(ggml_type type, float * dst, int64_t ld, const fattn_cells & cells, int64_t n_embd, int64_t n_cells) {
    for (int64_t j = 0; j < n_cells; ++j, dst += ld) {
        const char * row = cells.data + j*cells.nb;
        switch (type) {
            case GGML_TYPE_F32:  memcpy(dst, row, n_embd*sizeof(float));                        break;
            case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, dst, n_embd); break;
            case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) row, dst, n_embd); break;
            default: GGML_ABORT("fatal error");
        }
        std::fill(dst + n_embd, dst + ld, 0.0f);
    }
}

// calls fn with the format of a type's rows
template <typename fn_t>
static void fattn_with_row_type(ggml_type type, fn_t fn) {
    switch (type) {
        case GGML_TYPE_F32:  fn(fattn_row_f32{});  break;
        case GGML_TYPE_F16:  fn(fattn_row_f16{});  break;
        case GGML_TYPE_BF16: fn(fattn_row_bf16{}); break;
        case GGML_TYPE_Q8_0: fn(fattn_row_q8_0{}); break;
        case GGML_TYPE_Q4_0: fn(fattn_row_q4_0{}); break;
        default: GGML_ABORT("fatal error");
    }
}
