// What ggml-cuda's common.cuh uses of hipBLAS, for compilers without it: declarations alone.

#pragma once

#include <hip/hip_runtime.h>

typedef void * hipblasHandle_t;
typedef int    hipblasOperation_t;

enum hipblasStatus_t {
    HIPBLAS_STATUS_SUCCESS,
    HIPBLAS_STATUS_NOT_INITIALIZED,
    HIPBLAS_STATUS_ALLOC_FAILED,
    HIPBLAS_STATUS_INVALID_VALUE,
    HIPBLAS_STATUS_MAPPING_ERROR,
    HIPBLAS_STATUS_EXECUTION_FAILED,
    HIPBLAS_STATUS_INTERNAL_ERROR,
    HIPBLAS_STATUS_NOT_SUPPORTED,
    HIPBLAS_STATUS_ARCH_MISMATCH,
};

hipblasStatus_t hipblasCreate   (hipblasHandle_t * handle);
hipblasStatus_t hipblasDestroy  (hipblasHandle_t handle);
hipblasStatus_t hipblasSetStream(hipblasHandle_t handle, hipStream_t stream);
