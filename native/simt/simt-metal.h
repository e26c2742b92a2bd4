// The primitives of the texts in native/simt/ for Metal; simt-cuda.cuh says what they are. SIMD groups are warps.

#include <metal_stdlib>

using namespace metal;

#define SIMT_FUNC inline
#define SIMT_UNROLL _Pragma("clang loop unroll(full)")

#define SIMT_GLOBAL(T) device T *
#define SIMT_SHARED(T) threadgroup T *
#define SIMT_CAST(T, p) ((device T *) (p))
#define SIMT_THREAD(T) thread T &

#define SIMT_SHARED_ARRAY(T, name, n) threadgroup T name[n]
#define SIMT_ENTER(p) p

// what is known when a pipeline is made
#define SIMT_FUNCTION_CONSTANT(T, name, index) constant T name [[function_constant(index)]];

// a template as a function of the library; the emulator registers it
#define SIMT_KERNEL_NAME(name, ...) template [[host_name(#name)]] kernel decltype(__VA_ARGS__) __VA_ARGS__;

struct simt_ids {
    int32_t block, tid, warp, lane; // thread: tid of the block, lane of the warp
};

typedef uint4  simt_u32x4;
typedef float2 simt_f32x2;
typedef half   simt_f16;

inline void simt_barrier() {
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

template <typename T>
inline T simt_shuffle(T x, int i, int, int lane0) {
    return simd_shuffle(x, (ushort) (lane0 + i));
}

inline bool simt_any(bool x) {
    return simd_any(x);
}

template <typename T>
inline T simt_shuffle_xor(T x, int m) {
    return simd_shuffle_xor(x, (ushort) m);
}

inline ushort simt_load_u16(device const char * p) {
    return *(device const ushort *) p;
}

inline uint simt_load_u32(device const char * p) {
    return *(device const uint *) p;
}

inline uint4 simt_load_u32x4(device const char * p) {
    return *(device const uint4 *) p;
}

inline uint simt_get(uint4 x, int i) {
    return x[i];
}

inline uint4 simt_pack(uint a, uint b, uint c, uint d) {
    return uint4(a, b, c, d);
}

inline float2 simt_unpack_f16(uint x) {
    return float2(as_type<half2>(x));
}

inline float simt_bits_to_f32(uint x) {
    return as_type<float>(x);
}

inline uint simt_f32_to_bits(float x) {
    return as_type<uint>(x);
}

#define SIMT_BYTE_F32_ZERO 8388608.0f

inline float simt_byte_f32(uint x, int i) {
    return as_type<float>(0x4B000000u | (x >> 8*i & 0xFFu));
}

// no instruction; formats that are known when a pipeline is made do without
inline int simt_dp2a_lo(uint a, uint b, int c) {
    return c + (int) (short) a*(int) (char) b + (int) (short) (a >> 16)*(int) (char) (b >> 8);
}

inline int simt_dp2a_hi(uint a, uint b, int c) {
    return simt_dp2a_lo(a, b >> 16, c);
}

template <typename T>
inline device T * simt_known(device T * p) {
    return p;
}

inline half simt_to_f16(float x) {
    return half(x);
}

template <typename T>
inline T simt_min(T a, T b) {
    return a < b ? a : b;
}

template <typename T>
inline T simt_max(T a, T b) {
    return a > b ? a : b;
}

inline float simt_max(float a, float b) {
    return fmax(a, b);
}

inline float simt_exp2(float x) {
    return exp2(x);
}

//
// matrices: 2 x 2 blocks of 8 x 8
//

struct simt_frag {
    simdgroup_float8x8 x[2][2];
};

inline void simt_frag_zero(thread simt_frag & c) {
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
        c.x[i/2][i%2] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    }
}

inline void simt_frag_load(thread simt_frag & c, threadgroup const float * p, int ld) {
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
        simdgroup_load(c.x[i/2][i%2], p + i/2*8*ld + i%2*8, ld);
    }
}

inline void simt_frag_store(threadgroup float * p, thread simt_frag & c, int ld) {
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
        simdgroup_store(c.x[i/2][i%2], p + i/2*8*ld + i%2*8, ld);
    }
}

// c += a*b
inline void simt_frag_mma(thread simt_frag & c, threadgroup const half * a, int ld_a, threadgroup const half * b, int ld_b) {
    for (int k = 0; k < 2; ++k) {
        SIMT_UNROLL
        for (int i = 0; i < 4; ++i) {
            simdgroup_half8x8 x;
            simdgroup_half8x8 y;
            simdgroup_load(x, a + i/2*8*ld_a + k*8, ld_a);
            simdgroup_load(y, b + k*8*ld_b + i%2*8, ld_b);
            simdgroup_multiply_accumulate(c.x[i/2][i%2], x, y, c.x[i/2][i%2]);
        }
    }
}

// c += a*b^T
inline void simt_frag_mma_t(thread simt_frag & c, threadgroup const half * a, int ld_a, threadgroup const half * b, int ld_b) {
    for (int k = 0; k < 2; ++k) {
        SIMT_UNROLL
        for (int i = 0; i < 4; ++i) {
            simdgroup_half8x8 x;
            simdgroup_half8x8 y;
            simdgroup_load(x, a + i/2*8*ld_a + k*8, ld_a);
            simdgroup_load(y, b + i%2*8*ld_b + k*8, ld_b, ulong2(0, 0), true);
            simdgroup_multiply_accumulate(c.x[i/2][i%2], x, y, c.x[i/2][i%2]);
        }
    }
}
