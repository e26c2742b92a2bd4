#pragma once

// The primitives that the texts of native/simt/ are written in, for CUDA, and for HIP on devices with waves of 32 lanes. They are what those texts may use beside C++:
//
//   SIMT_FUNC, SIMT_UNROLL                what stands before functions and loops
//   SIMT_GLOBAL(T), SIMT_SHARED(T)        pointers into device memory and into memory of a block
//   SIMT_CAST(T, p), SIMT_SHARED_CAST(T, p)
//                                         pointer into device memory, and into memory of the block, of another type
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
//   simt_fresh(x)                         x, an int32_t, of which compilers know nothing: what follows from it is computed where it stands
//   simt_byte_f32(x, i)                   byte i of x, 0 to 255, added to SIMT_BYTE_F32_ZERO: without a conversion, of which devices
//                                         make few at a time
//   simt_mma_a, simt_mma_b, simt_mma_c    operands and sums of a product of matrices in registers of a warp: [16, 16] and [8, 16] F16,
//                                         [8, 16] F32 (columns, rows), whose elements lanes know: see there
//   simt_copy_async(dst, src), simt_copy_commit(), simt_copy_wait<n>()
//                                         16 bytes from device memory to memory of the block, on their way while the thread goes on; what
//                                         was copied between two commits is there for the thread when it has waited for all but the last
//                                         n commits, for others after a barrier behind that
//   simt_store_u32x4(dst, x)              16 bytes into memory of the block
//   simt_bytes_f16x2(x, i), simt_scale_f16x2(x, zero, scale)
//                                         bytes 2*i and 2*i + 1 of x, 0 to 255, as two F16, 1024 larger; (x - zero)*scale of two F16
//   simt_atomic_add(p, i, x), _or         p[i] += x of int32_t in device memory or memory of a block, p[i] |= x of uint32_t in device
//                                         memory, whoever else does the same; others wait for a barrier
//   simt_f64_to_bits, simt_bits_to_f64    doubles, which Metal has not
//   simt_get, simt_pack, simt_unpack_f16, simt_pack_f16, simt_bits_to_f32, simt_f32_to_bits, simt_min, simt_max, simt_exp2

#include "common.cuh"

#ifndef GGML_USE_HIP
#include <mma.h>

#include "cp-async.cuh"
#include "mma.cuh"
#endif

#define SIMT_FUNC __device__ __forceinline__
#define SIMT_UNROLL _Pragma("unroll")

#define SIMT_GLOBAL(T) T *
#define SIMT_SHARED(T) T *
#define SIMT_CAST(T, p) reinterpret_cast<T *>(p)
#define SIMT_SHARED_CAST(T, p) reinterpret_cast<T *>(p)
#define SIMT_THREAD(T) T &

// the entry of a kernel: memory of the block, and pointers as the texts have them
#define SIMT_SHARED_ARRAY(T, name, n) __shared__ __align__(128) T name[n] // as matrices want it
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

static __device__ __forceinline__ uint32_t simt_pack_f16(float lo, float hi) {
    const half2 res = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t *>(&res);
}

static __device__ __forceinline__ void simt_store_u32x4(half * dst, uint4 x) {
    *reinterpret_cast<uint4 *>(dst) = x;
}

static __device__ __forceinline__ uint32_t simt_bytes_f16x2(uint32_t x, int i) {
    return __byte_perm(x, 0x64646464, i == 0 ? 0x4140 : 0x4342);
}

// zero and scale: the same number in both halves
static __device__ __forceinline__ uint32_t simt_scale_f16x2(uint32_t x, uint32_t zero, uint32_t scale) {
    const half2 diff = __hsub2(*reinterpret_cast<const half2 *>(&x), *reinterpret_cast<const half2 *>(&zero));
    const half2 res  = __hmul2(diff, *reinterpret_cast<const half2 *>(&scale));
    return *reinterpret_cast<const uint32_t *>(&res);
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

static __device__ __forceinline__ int32_t simt_fresh(int32_t x) {
#ifndef GGML_USE_HIP
    asm volatile("" : "+r"(x));
#endif
    return x;
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

//
// matrices in registers, as the PTX documents lay them out in a warp: lane l has
//
//   simt_mma_a  rows l/4 and l/4 + 8, columns 2*(l%4) and the next, and the same 8 columns further on
//   simt_mma_b  rows 2*(l%4) and the next, and the same 8 rows further on, of column l/4
//   simt_mma_c  x[0] and x[1] of row l/4, x[2] and x[3] of row l/4 + 8, columns 2*(l%4) and the next
//
// simt_mma_load_a(a, p)    a: 16 x 16 in memory of the block. A lane names 16 bytes of it by p: of row l%16, columns 8*(l/16) on
// simt_mma_load_a_t(a, p)  the same, transposed
// simt_mma(c, a, b)        c += a*b
// simt_transpose_f16(x)    of the 8 x 8 F16 of which lane l has row l/4, columns 2*(l%4) and the next: the transposed ones
//

#if defined(GGML_USE_HIP) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < GGML_CUDA_CC_TURING)

// there are no such products, has_mma() of flash-attn-ragged.cu says so
struct simt_mma_a { uint32_t x[4]; };
struct simt_mma_b { uint32_t x[2]; };
struct simt_mma_c { float    x[4]; };

static __device__ void     simt_mma_load_a  (simt_mma_a &, const half *) { NO_DEVICE_CODE; }
static __device__ void     simt_mma_load_a_t(simt_mma_a &, const half *) { NO_DEVICE_CODE; }
static __device__ void     simt_mma(simt_mma_c &, const simt_mma_a &, const simt_mma_b &) { NO_DEVICE_CODE; }
static __device__ uint32_t simt_transpose_f16(uint32_t x) { NO_DEVICE_CODE; return x; }

#else

struct simt_mma_a { ggml_cuda_mma::tile<16, 8, half2> m; };

struct simt_mma_b {
    uint32_t x[2];
};

struct simt_mma_c {
    float x[4];
};

// ggml's load_ldmatrix() takes blocks of warps in two dimensions, and rows that are not permuted
static __device__ __forceinline__ void simt_mma_load_a(simt_mma_a & a, const half * p) {
    int * x = reinterpret_cast<int *>(a.m.x);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"((uint32_t) __cvta_generic_to_shared(p)));
}

static __device__ __forceinline__ void simt_mma_load_a_t(simt_mma_a & a, const half * p) {
    int * x = reinterpret_cast<int *>(a.m.x);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[2]), "=r"(x[1]), "=r"(x[3]) : "r"((uint32_t) __cvta_generic_to_shared(p)));
}

static __device__ __forceinline__ void simt_mma(simt_mma_c & c, const simt_mma_a & a, const simt_mma_b & b) {
    ggml_cuda_mma::tile<16, 8, float> tc;
    ggml_cuda_mma::tile<8,  8, half2> tb;
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
        tc.x[i] = c.x[i];
    }
    tb.x[0] = *reinterpret_cast<const half2 *>(&b.x[0]);
    tb.x[1] = *reinterpret_cast<const half2 *>(&b.x[1]);
    ggml_cuda_mma::mma(tc, a.m, tb);
    SIMT_UNROLL
    for (int i = 0; i < 4; ++i) {
        c.x[i] = tc.x[i];
    }
}

static __device__ __forceinline__ uint32_t simt_transpose_f16(uint32_t x) {
    return ggml_cuda_movmatrix((int) x);
}

#endif

//
// copies
//

#if !defined(GGML_USE_HIP) && defined(CP_ASYNC_AVAILABLE)

static __device__ __forceinline__ void simt_copy_async(half * dst, const char * src) {
    cp_async_cg_16<128>((uint32_t) __cvta_generic_to_shared(dst), src);
}

static __device__ __forceinline__ void simt_copy_commit() {
    asm volatile("cp.async.commit_group;");
}

template <int n>
static __device__ __forceinline__ void simt_copy_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(n) : "memory");
}

#else

// done when the thread goes on
static __device__ __forceinline__ void simt_copy_async(half * dst, const char * src) {
    simt_store_u32x4(dst, simt_load_u32x4(src));
}

static __device__ __forceinline__ void simt_copy_commit() {}

template <int n>
static __device__ __forceinline__ void simt_copy_wait() {}

#endif
