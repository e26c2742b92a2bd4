#pragma once

// Vectors of VL floats, as wide as one register of the target. They are vector types of GCC and Clang: the same code for AVX512,
// AVX, SSE, NEON and plain C. Intrinsics only where the compilers do not find the instruction.

#include "ggml-cpu-impl.h"

#include <cfloat>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define FATTN_LANES(f) f(0), f(4), f(8), f(12)
static constexpr int VL = 16;
#elif defined(__AVX__)
#define FATTN_LANES(f) f(0), f(4)
static constexpr int VL = 8;
#else
#define FATTN_LANES(f) f(0)
static constexpr int VL = 4;
#endif

// Sums that a kernel keeps in registers: N_REG_DOTS rows x 4 cells, or N_REG_ROWS rows x 2 vectors, 16 of the 32 registers of these
// targets and 8 of the 16 of others. The rest holds operands
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
#define FATTN_LO32(i) i + 0, i + 0 + VL, i + 1, i + 1 + VL
#define FATTN_HI32(i) i + 2, i + 2 + VL, i + 3, i + 3 + VL
#define FATTN_LO64(i) i + 0, i + 1, i + 0 + VL, i + 1 + VL
#define FATTN_HI64(i) i + 2, i + 3, i + 2 + VL, i + 3 + VL

#if defined(__clang__) || __GNUC__ >= 12
#define FATTN_SHUFFLE(a, b, f) __builtin_shufflevector(a, b, FATTN_LANES(f))

template <int i>
static inline vf32x4 vf_lane(vf32 x) {
    return __builtin_shufflevector(x, x, 4*i, 4*i + 1, 4*i + 2, 4*i + 3);
}
#else
#define FATTN_SHUFFLE(a, b, f) __builtin_shuffle(a, b, vu32{ FATTN_LANES(f) })

template <int i>
static inline vf32x4 vf_lane(vf32 x) {
    vf32x4 res;
    memcpy(&res, (const char *) &x + 16*i, sizeof(res));
    return res;
}
#endif

// {sum(a), sum(b), sum(c), sum(d)}
static inline vf32x4 vf_sum4(vf32 a, vf32 b, vf32 c, vf32 d) {
    const vf32 ab  = FATTN_SHUFFLE(a, b, FATTN_LO32) + FATTN_SHUFFLE(a, b, FATTN_HI32);
    const vf32 cd  = FATTN_SHUFFLE(c, d, FATTN_LO32) + FATTN_SHUFFLE(c, d, FATTN_HI32);
    const vf32 sum = FATTN_SHUFFLE(ab, cd, FATTN_LO64) + FATTN_SHUFFLE(ab, cd, FATTN_HI64);

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

// dst [ld, VL]: dst[i*ld + j] = x_j[i] for the four vectors x_0 to x_3 = a, b, c, d
static inline void vf_store_transposed(float * dst, int64_t ld, vf32 a, vf32 b, vf32 c, vf32 d) {
    const vf32 ab_lo = FATTN_SHUFFLE(a, b, FATTN_LO32);
    const vf32 ab_hi = FATTN_SHUFFLE(a, b, FATTN_HI32);
    const vf32 cd_lo = FATTN_SHUFFLE(c, d, FATTN_LO32);
    const vf32 cd_hi = FATTN_SHUFFLE(c, d, FATTN_HI32);

    vf_store_lanes(dst + 0*ld, ld, FATTN_SHUFFLE(ab_lo, cd_lo, FATTN_LO64));
    vf_store_lanes(dst + 1*ld, ld, FATTN_SHUFFLE(ab_lo, cd_lo, FATTN_HI64));
    vf_store_lanes(dst + 2*ld, ld, FATTN_SHUFFLE(ab_hi, cd_hi, FATTN_LO64));
    vf_store_lanes(dst + 3*ld, ld, FATTN_SHUFFLE(ab_hi, cd_hi, FATTN_HI64));
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

// whether an element of a is larger than that of b
static inline bool vf_any_greater(vf32 a, vf32 b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512) a, (__m512) b, _CMP_GT_OQ) != 0;
#elif defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256) a, (__m256) b, _CMP_GT_OQ)) != 0;
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return vmaxvq_u32(vcgtq_f32((float32x4_t) a, (float32x4_t) b)) != 0;
#else
    bool res = false;
    for (int i = 0; i < VL; ++i) {
        res |= a[i] > b[i];
    }
    return res;
#endif
}

// exp for x <= 88, exactly 0 below -87, where exp(x) is no normal float any more; relative error 2e-7
static inline vf32 vf_exp(vf32 x) {
    // x = n*ln(2) + r: adding 1.5*2^23 rounds x/ln(2) to n and leaves it in the low bits. ln(2) in two parts after Cody and Waite:
    // 0.693359375 has 9 bits, so that its product with n is exact, and -2.1219444e-4 is the rest
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

// tanh(x) = 1 - 2/(exp(2x) + 1), which rounds to 1 long before x = 15
static inline vf32 vf_tanh(vf32 x) {
    x = x >  15.0f ? vf_set1( 15.0f) : x;
    x = x < -15.0f ? vf_set1(-15.0f) : x;
    return 1.0f - 2.0f/(vf_exp(2.0f*x) + 1.0f);
}
