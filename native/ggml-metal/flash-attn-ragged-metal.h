#pragma once

// Metal kernels of GGML_OP_FLASH_ATTN_RAGGED, see ggml-flash-attn-ragged.h

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// encodes the op, returns 1: the number of nodes
int ggml_metal_op_flash_attn_ragged(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const struct ggml_tensor * op);

bool ggml_metal_op_flash_attn_ragged_supported(const struct ggml_tensor * op);

// bytes behind the result for parts
size_t ggml_metal_op_flash_attn_ragged_extra(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
