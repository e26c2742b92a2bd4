#pragma once

// Vectors of the compiler (GCC and Clang), wide as one register of the target: the same code for AVX512, AVX, SSE, NEON
// and plain C. Intrinsics only where the compilers do not find the instruction.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <cfloat>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define FA_LANES(f) f(0), f(4), f(8), f(12)
static constexpr int VL = 16;
#elif defined(__AVX__)
#define FA_LANES(f) f(0), f(4)
static constexpr int VL = 8;
#else
#define FA_LANES(f) f(0)
static constexpr int VL = 4;
#endif

// tile of the register-blocked kernels, bounded by 32 or 16 registers
#if defined(__AVX512F__) || defined(__aarch64__)
static constexpr int N_REG_ROWS = 8;
static constexpr int N_REG_DOTS = 4;
#else
static constexpr int N_REG_ROWS = 4;
static constexpr int N_REG_DOTS = 2;
#endif

typedef float    vf32   __attribute__((vector_size(4*VL)));
typedef uint32_t vu32   __attribute__((vector_size(4*VL)));
typedef int32_t  vi32   __attribute__((vector_size(4*VL)));
typedef uint16_t vu16   __attribute__((vector_size(2*VL)));
typedef int8_t   vi8    __attribute__((vector_size(VL)));
typedef uint8_t  vu8    __attribute__((vector_size(VL)));
typedef float    vf32x4 __attribute__((vector_size(16)));

static inline vf32 vf_load(const float * x) {
    vf32 res;
    memcpy(&res, x, sizeof(res));
    return res;
}

static inline void vf_store(float * x, vf32 v) {
    memcpy(x, &v, sizeof(v));
}

// x - 0 is x for every x, x + 0 is not
static inline vf32 vf_set1(float x) {
    return x - vf32{};
}

// shuffles within 128-bit lanes
#define FA_LO32(i) i + 0, i + 0 + VL, i + 1, i + 1 + VL
#define FA_HI32(i) i + 2, i + 2 + VL, i + 3, i + 3 + VL
#define FA_LO64(i) i + 0, i + 1, i + 0 + VL, i + 1 + VL
#define FA_HI64(i) i + 2, i + 3, i + 2 + VL, i + 3 + VL

#if defined(__clang__) || __GNUC__ >= 12
#define FA_SHUFFLE(a, b, f) __builtin_shufflevector(a, b, FA_LANES(f))

template <int i>
static inline vf32x4 vf_lane(vf32 x) {
    return __builtin_shufflevector(x, x, 4*i, 4*i + 1, 4*i + 2, 4*i + 3);
}
#else
#define FA_SHUFFLE(a, b, f) __builtin_shuffle(a, b, vu32{ FA_LANES(f) })

template <int i>
static inline vf32x4 vf_lane(vf32 x) {
    vf32x4 res;
    memcpy(&res, (const char *) &x + 16*i, sizeof(res));
    return res;
}
#endif

// the sums of four vectors
static inline vf32x4 vf_sum4(vf32 a, vf32 b, vf32 c, vf32 d) {
    const vf32 ab  = FA_SHUFFLE(a, b, FA_LO32) + FA_SHUFFLE(a, b, FA_HI32);
    const vf32 cd  = FA_SHUFFLE(c, d, FA_LO32) + FA_SHUFFLE(c, d, FA_HI32);
    const vf32 sum = FA_SHUFFLE(ab, cd, FA_LO64) + FA_SHUFFLE(ab, cd, FA_HI64);

    vf32x4 res = vf_lane<0>(sum);
    if constexpr (VL >= 8) {
        res += vf_lane<1>(sum);
    }
    if constexpr (VL >= 16) {
        res += vf_lane<2>(sum) + vf_lane<3>(sum);
    }
    return res;
}

template <int i = 0>
static inline void vf_store_lanes(float * dst, int64_t ld, vf32 x) {
    const vf32x4 lane = vf_lane<i>(x);
    memcpy(dst + 4*i*ld, &lane, sizeof(lane));
    if constexpr (4*(i + 1) < VL) {
        vf_store_lanes<i + 1>(dst, ld, x);
    }
}

// dst[i*ld + j] = x_j[i] for the four vectors x_j
static inline void vf_store_transposed(float * dst, int64_t ld, vf32 a, vf32 b, vf32 c, vf32 d) {
    const vf32 ab_lo = FA_SHUFFLE(a, b, FA_LO32);
    const vf32 ab_hi = FA_SHUFFLE(a, b, FA_HI32);
    const vf32 cd_lo = FA_SHUFFLE(c, d, FA_LO32);
    const vf32 cd_hi = FA_SHUFFLE(c, d, FA_HI32);

    vf_store_lanes(dst + 0*ld, ld, FA_SHUFFLE(ab_lo, cd_lo, FA_LO64));
    vf_store_lanes(dst + 1*ld, ld, FA_SHUFFLE(ab_lo, cd_lo, FA_HI64));
    vf_store_lanes(dst + 2*ld, ld, FA_SHUFFLE(ab_hi, cd_hi, FA_LO64));
    vf_store_lanes(dst + 3*ld, ld, FA_SHUFFLE(ab_hi, cd_hi, FA_HI64));
}

static inline float vf_sum(vf32 x) {
    float res = 0.0f;
    for (int i = 0; i < VL; ++i) {
        res += x[i];
    }
    return res;
}

static inline float vf_max(vf32 x) {
    float res = x[0];
    for (int i = 1; i < VL; ++i) {
        res = x[i] > res ? x[i] : res;
    }
    return res;
}

// exp for x <= 88, exactly 0 below -87; relative error 2e-7
static inline vf32 vf_exp(vf32 x) {
    // x = n*ln(2) + r: adding 1.5*2^23 rounds and leaves n in the low bits
    const vf32 z = x*1.44269504f + 12582912.0f;
    const vf32 n = z - 12582912.0f;
    const vf32 r = x - n*0.693359375f + n*2.12194440e-4f;

    // minimax polynomial over |r| <= ln(2)/2, fitted for relative error 2e-9
    vf32 p = vf_set1(1.38368353e-3f);
    p = p*r + 8.37482419e-3f;
    p = p*r + 4.16682251e-2f;
    p = p*r + 1.66664198e-1f;
    p = p*r + 4.99999911e-1f;
    p = p*r + 1.0f;
    p = p*r + 1.0f;

    const vf32 res = (vf32) ((vu32) p + ((vu32) z << 23));

    return x < -87.0f ? vf32{} : res;
}

static inline vf32 vf_tanh(vf32 x) {
    // 1 - 2/(exp(2x) + 1); from 15 on it rounds to 1
    x = x >  15.0f ? vf_set1( 15.0f) : x;
    x = x < -15.0f ? vf_set1(-15.0f) : x;
    return 1.0f - 2.0f/(vf_exp(2.0f*x) + 1.0f);
}

//
// VL elements of a row, converted to F32. GCC 12 takes the elements of
// __builtin_convertvector() one by one, and warns of the intrinsics without a mask
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

struct fa_row_f32 {
    static vf32 load(const char * row, int64_t i) {
        return vf_load((const float *) row + i);
    }
};

struct fa_row_f16 {
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

struct fa_row_bf16 {
    static vf32 load(const char * row, int64_t i) {
        return (vf32) (vf_widen_u16((const uint16_t *) row + i) << 16);
    }
};

// the scale of a block; GGML_CPU_FP16_TO_FP32() reads a table of 256 kB here
static inline float fa_scale(ggml_fp16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    return GGML_CPU_FP16_TO_FP32(x);
#endif
}

struct fa_row_q8_0 {
    static vf32 load(const char * row, int64_t i) {
        const block_q8_0 * x = (const block_q8_0 *) row + i/QK8_0;

        vi8 q;
        memcpy(&q, x->qs + i%QK8_0, sizeof(q));
        return fa_scale(x->d)*vf_convert_i8(q);
    }
};

struct fa_row_q4_0 {
    // the low halves of the bytes are the first 16 elements of a block
    static vf32 load(const char * row, int64_t i) {
        const block_q4_0 * x = (const block_q4_0 *) row + i/QK4_0;

        vu8 q;
        memcpy(&q, x->qs + i%(QK4_0/2), sizeof(q));
        q = i%QK4_0 < QK4_0/2 ? q & 0x0F : q >> 4;
        return fa_scale(x->d)*vf_convert_i8((vi8) q - 8);
    }
};
