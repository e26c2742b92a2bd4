#pragma once

// CUDA kernels of GGML_OP_FLASH_ATTN_RAGGED, see ggml-flash-attn-ragged.h

#include "common.cuh"

void ggml_cuda_flash_attn_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

bool ggml_cuda_flash_attn_ragged_supported(int device, const ggml_tensor * dst);
