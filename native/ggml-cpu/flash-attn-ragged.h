#pragma once

// CPU kernel of GGML_OP_FLASH_ATTN_RAGGED, see ggml-flash-attn-ragged.h

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void ggml_compute_forward_flash_attn_ragged(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of the work buffer
size_t ggml_flash_attn_ragged_work_size(const struct ggml_tensor * dst, int n_threads);

bool ggml_flash_attn_ragged_supported(const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
