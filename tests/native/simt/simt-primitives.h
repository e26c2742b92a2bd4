// The primitives of native/simt/ for the emulator; native/simt/simt-cuda.cuh says what they are.

#pragma once

#include "simt-pointers.h"

#include "ggml.h"

#include <cmath>

#define SIMT_FUNC inline
#define SIMT_UNROLL

#define SIMT_GLOBAL(T) simt::global_ptr<T>
#define SIMT_SHARED(T) simt::shared_ptr<T>
#define SIMT_CAST(T, p) simt::cast<T>(p)
#define SIMT_SHARED_CAST(T, p) simt::shared_cast<T>(p)
#define SIMT_THREAD(T) T &

#define SIMT_SHARED_ARRAY(T, name, n) const auto name = simt::shared_array<T>(__LINE__, n)
#define SIMT_ENTER(p) simt::enter_pointer(p)

#define SIMT_KERNEL(n_threads, n_blocks_sm) static void

struct simt_ids {
    int32_t block, tid, warp, lane; // thread: tid of the block, lane of the warp
};

inline simt_ids simt_get_ids() {
    const int32_t thread = simt::current_machine()->thread_id();
    return { simt::current_machine()->block_id(), thread, thread/simt::WARP, thread%simt::WARP };
}

struct simt_u32x4 {
    uint32_t x[4];
};

struct simt_f32x2 {
    float x, y;
};

#define simt_barrier() simt::current_machine()->barrier(__LINE__)
#define simt_shuffle(x, i, n, lane0) simt::current_machine()->shuffle(x, i, n, lane0, __LINE__)
#define simt_any(x) simt::current_machine()->any(x, __LINE__)
#define simt_shuffle_xor(x, m) simt::current_machine()->shuffle_xor(x, m, __LINE__)

inline uint16_t   simt_load_u16  (SIMT_GLOBAL(const char) p) { return simt::load<uint16_t>(p); }
inline uint32_t   simt_load_u32  (SIMT_GLOBAL(const char) p) { return simt::load<uint32_t>(p); }
inline simt_u32x4 simt_load_u32x4(SIMT_GLOBAL(const char) p) { return simt::load<simt_u32x4>(p); }

inline simt_u32x4 simt_pack(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return { { a, b, c, d } }; }

inline uint32_t simt_get(const simt_u32x4 & x, int i) { return x.x[i]; }

// what computes with loaded values says so, see launch_cost

inline simt_f32x2 simt_unpack_f16(uint32_t x) {
    simt::current_machine()->use();
    return { ggml_fp16_to_fp32(x & 0xFFFF), ggml_fp16_to_fp32(x >> 16) };
}

inline uint32_t simt_pack_f16(float lo, float hi) {
    return (uint32_t) ggml_fp32_to_fp16(lo) | (uint32_t) ggml_fp32_to_fp16(hi) << 16;
}

inline uint32_t simt_bytes_f16x2(uint32_t x, int i) {
    simt::current_machine()->use();
    x >>= 16*i;
    return 0x64006400u | (x & 0xFF) | (x & 0xFF00) << 8;
}

// differences of whole numbers are exact
inline uint32_t simt_scale_f16x2(uint32_t x, uint32_t zero, uint32_t scale) {
    const simt_f32x2 a = simt_unpack_f16(x);
    const simt_f32x2 b = simt_unpack_f16(zero);
    const simt_f32x2 c = simt_unpack_f16(scale);
    return simt_pack_f16((a.x - b.x)*c.x, (a.y - b.y)*c.y);
}

inline float simt_bits_to_f32(uint32_t x) {
    simt::current_machine()->use();
    float res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

inline uint32_t simt_f32_to_bits(float x) {
    simt::current_machine()->use();
    uint32_t res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

inline uint64_t simt_f64_to_bits(double x) {
    uint64_t res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

inline double simt_bits_to_f64(uint64_t x) {
    double res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

inline void simt_atomic_add(const SIMT_GLOBAL(int32_t) & p, int32_t i, int32_t x)   { (p + i).update([=](int32_t  old) { return old + x; }); }
inline void simt_atomic_add(const SIMT_SHARED(int32_t) & p, int32_t i, int32_t x)   { (p + i).update([=](int32_t  old) { return old + x; }); }
inline void simt_atomic_or (const SIMT_GLOBAL(uint32_t) & p, int32_t i, uint32_t x) { (p + i).update([=](uint32_t old) { return old | x; }); }

#define SIMT_BYTE_F32_ZERO 8388608.0f

inline float simt_byte_f32(uint32_t x, int i) { return simt_bits_to_f32(0x4B000000u | (x >> 8*i & 0xFF)); }

inline int32_t simt_dp2a_lo(uint32_t a, uint32_t b, int32_t c) {
    simt::current_machine()->use();
    return c + (int16_t) a*(int8_t) b + (int16_t) (a >> 16)*(int8_t) (b >> 8);
}

inline int32_t simt_dp2a_hi(uint32_t a, uint32_t b, int32_t c) { return simt_dp2a_lo(a, b >> 16, c); }

inline int32_t simt_fresh(int32_t x) { return x; }

template <typename T> SIMT_GLOBAL(T) simt_known(const SIMT_GLOBAL(T) & p) { return p; }

template <typename T> T simt_min(T a, T b) { return a < b ? a : b; }
template <typename T> T simt_max(T a, T b) { return a > b ? a : b; }

inline float simt_max(float a, float b) {
    simt::current_machine()->use();
    return fmaxf(a, b);
}

inline float simt_exp2(float x) {
    simt::current_machine()->use();
    return exp2f(x);
}

//
// matrices: a lane holds eight consecutive elements of the 256
//

typedef _Float16 simt_f16;

inline simt_f16 simt_to_f16(float x) { return (simt_f16) x; }

struct simt_frag {
    float x[8];
};

inline void simt_frag_zero(simt_frag & c) {
    simt::current_machine()->converge(__LINE__);
    std::fill(c.x, c.x + 8, 0.0f);
}

inline void simt_frag_load(simt_frag & c, SIMT_SHARED(float) p, int ld) {
    simt::current_machine()->converge(__LINE__);
    p.check_matrix(ld);
    const int lane = simt_get_ids().lane;
    for (int i = 0; i < 8; ++i) {
        c.x[i] = p[lane/2*ld + lane%2*8 + i];
    }
}

inline void simt_frag_store(SIMT_SHARED(float) p, const simt_frag & c, int ld) {
    simt::current_machine()->converge(__LINE__);
    p.check_matrix(ld);
    const int lane = simt_get_ids().lane;
    for (int i = 0; i < 8; ++i) {
        p[lane/2*ld + lane%2*8 + i] = c.x[i];
    }
}

// a lane answers for 16 bytes of a matrix, the product reads all of it
inline const simt_f16 * simt_frag_rows(SIMT_SHARED(simt_f16) p, int ld) {
    p.check_matrix(ld);
    const int lane = simt_get_ids().lane;
    return (p + lane/2*ld + lane%2*8).read(8) - lane/2*ld - lane%2*8;
}

inline void simt_frag_mma(simt_frag & c, SIMT_SHARED(simt_f16) a, int ld_a, SIMT_SHARED(simt_f16) b, int ld_b) {
    const int        lane = simt_get_ids().lane;
    const simt_f16 * x    = simt_frag_rows(a, ld_a) + lane/2*ld_a;
    const simt_f16 * y    = simt_frag_rows(b, ld_b) + lane%2*8;
    for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 8; ++i) {
            c.x[i] += (float) x[k]*(float) y[k*ld_b + i];
        }
    }
}

inline void simt_frag_mma_t(simt_frag & c, SIMT_SHARED(simt_f16) a, int ld_a, SIMT_SHARED(simt_f16) b, int ld_b) {
    const int        lane = simt_get_ids().lane;
    const simt_f16 * x    = simt_frag_rows(a, ld_a) + lane/2*ld_a;
    const simt_f16 * y    = simt_frag_rows(b, ld_b) + lane%2*8*ld_b;
    for (int i = 0; i < 8; ++i) {
        for (int k = 0; k < 16; ++k) {
            c.x[i] += (float) x[k]*(float) y[i*ld_b + k];
        }
    }
}

inline void simt_store_u32x4(SIMT_SHARED(simt_f16) p, const simt_u32x4 & x) {
    simt::check_aligned(p, sizeof(x));
    simt::current_machine()->use();
    memcpy(simt::current_machine()->shared_access(p.at, sizeof(x), p.begin, p.end, true), &x, sizeof(x));
}

//
// matrices in registers and asynchronous copies, by the documents of PTX (m16n8k16, ldmatrix, movmatrix, cp.async)
//

struct simt_mma_a { uint32_t x[4]; };
struct simt_mma_b { uint32_t x[2]; };
struct simt_mma_c { float    x[4]; };

inline float simt_f16_of(uint32_t x, int i) { return ggml_fp16_to_fp32(x >> 16*i & 0xFFFF); }

// ldmatrix.x4: lane 8*j + i names row i of the matrix j, 8 x 8; matrices 0 and 1 are the upper and lower half of the left columns. A lane
// answers for the row that it names
inline const simt::words * simt_mma_rows(SIMT_SHARED(simt_f16) p) {
    simt::check_aligned(p, 16);
    uint32_t x[4];
    memcpy(x, simt::current_machine()->shared_access(p.at, sizeof(x), p.begin, p.end, false), sizeof(x));
    return simt::current_machine()->collect({ x[0], x[1], x[2], x[3] }, __LINE__);
}

inline void simt_mma_load_a(simt_mma_a & a, SIMT_SHARED(simt_f16) p) {
    const auto * rows = simt_mma_rows(p);
    const int    lane = simt_get_ids().lane;
    for (int j = 0; j < 4; ++j) {
        a.x[j] = rows[8*j + lane/4][lane%4];
    }
}

inline void simt_mma_load_a_t(simt_mma_a & a, SIMT_SHARED(simt_f16) p) {
    const auto * rows = simt_mma_rows(p);
    const int    lane = simt_get_ids().lane;
    const auto   get  = [&](int j, int i) { return rows[8*j + i][lane/4/2] >> lane/4%2*16 & 0xFFFF; };
    for (int j = 0; j < 4; ++j) {
        // the transposed matrix has right above what was left below
        a.x[j/2 + j%2*2] = get(j, lane%4*2) | get(j, lane%4*2 + 1) << 16;
    }
}

inline void simt_mma(simt_mma_c & c, const simt_mma_a & a, const simt_mma_b & b) {
    const auto * all  = simt::current_machine()->collect({ a.x[0], a.x[1], a.x[2], a.x[3], b.x[0], b.x[1] }, __LINE__);
    const int    lane = simt_get_ids().lane;

    float x[2][16], y[2][16]; // rows of a, columns of b
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
            for (int k = 0; k < 2; ++k) {
                const auto & row = all[lane/4*4 + j];
                const auto & col = all[(lane%4*2 + i)*4 + j];
                for (int h = 0; h < 2; ++h) {
                    x[i][8*k + 2*j + h] = simt_f16_of(row[2*k + i], h);
                    y[i][8*k + 2*j + h] = simt_f16_of(col[4 + k],   h);
                }
            }
        }
    }
    for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 16; ++k) {
            c.x[i] += x[i/2][k]*y[i%2][k];
        }
    }
}

inline uint32_t simt_transpose_f16(uint32_t x) {
    const auto * rows = simt::current_machine()->collect({ x }, __LINE__);
    const int    lane = simt_get_ids().lane;
    const auto   get  = [&](int i) { return rows[i*4 + lane/4/2][0] >> lane/4%2*16 & 0xFFFF; };
    return get(lane%4*2) | get(lane%4*2 + 1) << 16;
}

inline void simt_copy_async(SIMT_SHARED(simt_f16) dst, SIMT_GLOBAL(const char) src) {
    simt::current_machine()->copy_async(dst.at, dst.begin, dst.end, src.r, src.p, 16);
}

inline void simt_copy_commit() { simt::current_machine()->copy_commit(); }

template <int n>
void simt_copy_wait() { simt::current_machine()->copy_wait(n); }
