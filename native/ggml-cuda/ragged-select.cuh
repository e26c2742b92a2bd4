#pragma once

// CUDA kernels of GGML_OP_RAGGED_SELECT, see ggml-ragged-select.h

#include "common.cuh"

void ggml_cuda_ragged_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

bool ggml_cuda_ragged_select_supported(int device, const ggml_tensor * dst);
