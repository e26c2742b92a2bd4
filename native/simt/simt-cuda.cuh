#pragma once

// The primitives that the texts of native/simt/ are written in, for CUDA, and for HIP on devices with waves of 32 lanes. They are what those texts may use beside C++:
//
//   SIMT_FUNC, SIMT_UNROLL                what stands before functions and loops
//   SIMT_GLOBAL(T), SIMT_SHARED(T)        pointers into device memory and into memory of a block
//   SIMT_CAST(T, p)                       pointer into device memory of another type
//   SIMT_THREAD(T)                        reference to a variable of the thread, that is to registers: what takes one is inlined
//   simt_ids                              block of the grid, thread of the block, warp and lane
//   simt_barrier()                        all threads of a block
//   simt_shuffle(x, i, n, lane0)          x, a float or an int32_t, of lane i of the own n lanes, the first of which is lane0; all
//                                         lanes of a warp, as for the next two
//   simt_shuffle_xor(x, m)                x of the lane whose number differs in the bits m
//   simt_any(x)                           whether x holds for any lane
//   simt_load_u16, _u32, _u32x4           aligned loads from device memory
//   simt_frag                             16 x 16 floats that a warp holds together; made of products of matrices of simt_f16 in
//                                         memory of the block, whose rows are ld apart: a multiple of 8 (of 4 for floats)
//   simt_f16, simt_to_f16                 half precision
//   simt_dp2a_lo, _hi(a, b, c)            c + the products of the two int16 in a and the lower, or upper, two int8 in b
//   simt_known(p)                         p, a pointer, as a value: not to be computed again where it is used
//   simt_byte_f32(x, i)                   byte i of x, 0 to 255, added to SIMT_BYTE_F32_ZERO: without a conversion, of which devices
//                                         make few at a time
//   simt_atomic_add(p, i, x), _or         p[i] += x of int32_t in device memory or memory of a block, p[i] |= x of uint32_t in device
//                                         memory, whoever else does the same; others wait for a barrier
//   simt_f64_to_bits, simt_bits_to_f64    doubles, which Metal has not
//   simt_get, simt_pack, simt_unpack_f16, simt_bits_to_f32, simt_f32_to_bits, simt_min, simt_max, simt_exp2

#include "common.cuh"

#ifndef GGML_USE_HIP
#include <mma.h>
#endif

#define SIMT_FUNC __device__ __forceinline__
#define SIMT_UNROLL _Pragma("unroll")

#define SIMT_GLOBAL(T) T *
#define SIMT_SHARED(T) T *
#define SIMT_CAST(T, p) reinterpret_cast<T *>(p)
#define SIMT_THREAD(T) T &

// the entry of a kernel: memory of the block, and pointers as the texts have them
#define SIMT_SHARED_ARRAY(T, name, n) __shared__ __align__(32) T name[n] // as matrices want it
#define SIMT_ENTER(p) p

#define SIMT_KERNEL(n_threads, n_blocks_sm) static __global__ void __launch_bounds__(n_threads, n_blocks_sm)

struct simt_ids {
    int32_t block, tid, warp, lane; // thread: tid of the block, lane of the warp
};

static __device__ __forceinline__ simt_ids simt_get_ids() {
    return { (int32_t) blockIdx.x, (int32_t) threadIdx.x, (int32_t) threadIdx.x/32, (int32_t) threadIdx.x%32 };
}

template <typename... params_t, typename... args_t>
static void simt_launch(void (*kernel)(params_t...), int n_blocks, int n_threads, cudaStream_t stream, args_t... args) {
    kernel<<<n_blocks, n_threads, 0, stream>>>(args...);
    CUDA_CHECK(cudaGetLastError());
}

typedef uint4  simt_u32x4;
typedef float2 simt_f32x2;

static __device__ __forceinline__ void simt_barrier() {
    __syncthreads();
}

template <typename T>
static __device__ __forceinline__ T simt_shuffle(T x, int i, int n, int) {
    return __shfl_sync(0xFFFFFFFF, x, i, n);
}

static __device__ __forceinline__ bool simt_any(bool x) {
    return __any_sync(0xFFFFFFFF, x);
}

template <typename T>
static __device__ __forceinline__ T simt_shuffle_xor(T x, int m) {
    return __shfl_xor_sync(0xFFFFFFFF, x, m, 32);
}

static __device__ __forceinline__ void simt_atomic_add(int32_t * p, int32_t i, int32_t x) {
    atomicAdd(p + i, x);
}

static __device__ __forceinline__ void simt_atomic_or(uint32_t * p, int32_t i, uint32_t x) {
    atomicOr(p + i, x);
}

static __device__ __forceinline__ uint64_t simt_f64_to_bits(double x) {
    return (uint64_t) __double_as_longlong(x);
}

static __device__ __forceinline__ double simt_bits_to_f64(uint64_t x) {
    return __longlong_as_double((long long) x);
}

static __device__ __forceinline__ uint16_t simt_load_u16(const char * p) {
    return __ldg(reinterpret_cast<const unsigned short *>(p));
}

static __device__ __forceinline__ uint32_t simt_load_u32(const char * p) {
    return __ldg(reinterpret_cast<const uint32_t *>(p));
}

static __device__ __forceinline__ uint4 simt_load_u32x4(const char * p) {
    return __ldg(reinterpret_cast<const uint4 *>(p));
}

static __device__ __forceinline__ uint32_t simt_get(uint4 x, int i) {
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

static __device__ __forceinline__ uint4 simt_pack(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return make_uint4(a, b, c, d);
}

static __device__ __forceinline__ float2 simt_unpack_f16(uint32_t x) {
    return __half22float2(*reinterpret_cast<const half2 *>(&x));
}

static __device__ __forceinline__ float simt_bits_to_f32(uint32_t x) {
    return __uint_as_float(x);
}

static __device__ __forceinline__ uint32_t simt_f32_to_bits(float x) {
    return __float_as_uint(x);
}

#define SIMT_BYTE_F32_ZERO 8388608.0f // 2^23, whose last bit is 1

static __device__ __forceinline__ float simt_byte_f32(uint32_t x, int i) {
    return __uint_as_float(__byte_perm(x, 0x4B000000, 0x7440 + i));
}

#if defined(GGML_USE_HIP)

// there is no such instruction
static __device__ __forceinline__ int32_t simt_dp2a_lo(uint32_t a, uint32_t b, int32_t c) {
    return c + (int16_t) a*(int8_t) b + (int16_t) (a >> 16)*(int8_t) (b >> 8);
}

static __device__ __forceinline__ int32_t simt_dp2a_hi(uint32_t a, uint32_t b, int32_t c) {
    return simt_dp2a_lo(a, b >> 16, c);
}

#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < GGML_CUDA_CC_DP4A

static __device__ int32_t simt_dp2a_lo(uint32_t, uint32_t, int32_t) { NO_DEVICE_CODE; return 0; }
static __device__ int32_t simt_dp2a_hi(uint32_t, uint32_t, int32_t) { NO_DEVICE_CODE; return 0; }

#else

static __device__ __forceinline__ int32_t simt_dp2a_lo(uint32_t a, uint32_t b, int32_t c) {
    return __dp2a_lo((int) a, (int) b, c);
}

static __device__ __forceinline__ int32_t simt_dp2a_hi(uint32_t a, uint32_t b, int32_t c) {
    return __dp2a_hi((int) a, (int) b, c);
}

#endif

template <typename T>
static __device__ __forceinline__ T * simt_known(T * p) {
#ifndef GGML_USE_HIP
    asm("" : "+l"(p));
#endif
    return p;
}

template <typename T>
static __device__ __forceinline__ T simt_min(T a, T b) {
    return a < b ? a : b;
}

template <typename T>
static __device__ __forceinline__ T simt_max(T a, T b) {
    return a > b ? a : b;
}

static __device__ __forceinline__ float simt_max(float a, float b) {
    return fmaxf(a, b);
}

static __device__ __forceinline__ float simt_exp2(float x) {
    return exp2f(x);
}

//
// matrices
//

typedef half simt_f16;

static __device__ __forceinline__ half simt_to_f16(float x) {
    return __float2half(x);
}

#if defined(GGML_USE_HIP)

// Without the matrix instructions, which differ from one family of devices to the next: a lane holds eight consecutive elements of the
// 256
struct simt_frag {
    float x[8];
};

static __device__ __forceinline__ int simt_frag_row() { return threadIdx.x%32/2; }
static __device__ __forceinline__ int simt_frag_col() { return threadIdx.x%2*8; }

static __device__ __forceinline__ void simt_frag_zero(simt_frag & c) {
    SIMT_UNROLL
    for (int i = 0; i < 8; ++i) {
        c.x[i] = 0.0f;
    }
}

static __device__ __forceinline__ void simt_frag_load(simt_frag & c, const float * p, int ld) {
    SIMT_UNROLL
    for (int i = 0; i < 8; ++i) {
        c.x[i] = p[simt_frag_row()*ld + simt_frag_col() + i];
    }
}

static __device__ __forceinline__ void simt_frag_store(float * p, const simt_frag & c, int ld) {
    SIMT_UNROLL
    for (int i = 0; i < 8; ++i) {
        p[simt_frag_row()*ld + simt_frag_col() + i] = c.x[i];
    }
}

// c += a*b
static __device__ __forceinline__ void simt_frag_mma(simt_frag & c, const half * a, int ld_a, const half * b, int ld_b) {
    for (int k = 0; k < 16; ++k) {
        const float x = __half2float(a[simt_frag_row()*ld_a + k]);
        SIMT_UNROLL
        for (int i = 0; i < 8; ++i) {
            c.x[i] += x*__half2float(b[k*ld_b + simt_frag_col() + i]);
        }
    }
}

// c += a*b^T
static __device__ __forceinline__ void simt_frag_mma_t(simt_frag & c, const half * a, int ld_a, const half * b, int ld_b) {
    for (int k = 0; k < 16; ++k) {
        const float x = __half2float(a[simt_frag_row()*ld_a + k]);
        SIMT_UNROLL
        for (int i = 0; i < 8; ++i) {
            c.x[i] += x*__half2float(b[(simt_frag_col() + i)*ld_b + k]);
        }
    }
}

#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < GGML_CUDA_CC_VOLTA

// there are no such products, ggml_cuda_flash_attn_ragged_supported() says so
struct simt_frag {};

static __device__ void simt_frag_zero (simt_frag &) { NO_DEVICE_CODE; }
static __device__ void simt_frag_load (simt_frag &, const float *, int) { NO_DEVICE_CODE; }
static __device__ void simt_frag_store(float *, const simt_frag &, int) { NO_DEVICE_CODE; }
static __device__ void simt_frag_mma  (simt_frag &, const half *, int, const half *, int) { NO_DEVICE_CODE; }
static __device__ void simt_frag_mma_t(simt_frag &, const half *, int, const half *, int) { NO_DEVICE_CODE; }

#else

typedef nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> simt_frag;

static __device__ __forceinline__ void simt_frag_zero(simt_frag & c) {
    nvcuda::wmma::fill_fragment(c, 0.0f);
}

static __device__ __forceinline__ void simt_frag_load(simt_frag & c, const float * p, int ld) {
    nvcuda::wmma::load_matrix_sync(c, p, ld, nvcuda::wmma::mem_row_major);
}

static __device__ __forceinline__ void simt_frag_store(float * p, const simt_frag & c, int ld) {
    nvcuda::wmma::store_matrix_sync(p, c, ld, nvcuda::wmma::mem_row_major);
}

// c += a*b
static __device__ __forceinline__ void simt_frag_mma(simt_frag & c, const half * a, int ld_a, const half * b, int ld_b) {
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, half, nvcuda::wmma::row_major> fa;
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, half, nvcuda::wmma::row_major> fb;
    nvcuda::wmma::load_matrix_sync(fa, a, ld_a);
    nvcuda::wmma::load_matrix_sync(fb, b, ld_b);
    nvcuda::wmma::mma_sync(c, fa, fb, c);
}

// c += a*b^T
static __device__ __forceinline__ void simt_frag_mma_t(simt_frag & c, const half * a, int ld_a, const half * b, int ld_b) {
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, half, nvcuda::wmma::row_major> fa;
    nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, half, nvcuda::wmma::col_major> fb;
    nvcuda::wmma::load_matrix_sync(fa, a, ld_a);
    nvcuda::wmma::load_matrix_sync(fb, b, ld_b);
    nvcuda::wmma::mma_sync(c, fa, fb, c);
}

#endif
