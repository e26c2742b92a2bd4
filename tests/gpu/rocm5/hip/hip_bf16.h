// What ggml-cuda's common.cuh uses of ROCm 6, for ROCm 5 as Debian has it: enough to compile our kernels, which use none of it.

#pragma once

#include <hip/hip_bfloat16.h>
#include <hip/hip_fp16.h>

typedef hip_bfloat16 __hip_bfloat16;

struct __hip_bfloat162 {
    hip_bfloat16 x, y;
};

static __device__ inline half2 __shfl_xor(half2 x, int mask, int width) {
    int bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    bits = __shfl_xor(bits, mask, width);
    __builtin_memcpy(&x, &bits, sizeof(bits));
    return x;
}

static __device__ inline half2 __shfl_up(half2 x, unsigned int delta, int width) {
    int bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    bits = __shfl_up(bits, delta, width);
    __builtin_memcpy(&x, &bits, sizeof(bits));
    return x;
}

static __device__ inline __half __hmax(__half a, __half b) {
    return __hgt(a, b) ? a : b;
}
