#include "flash-attn-ragged.cuh"

#include "test-simt-ragged.h"

simt_device simt_cuda() {
    return {
        "CUDA",
        ggml_cuda_flash_attn_ragged_supported,
        [](const ggml_tensor *) { return size_t(0); },
        [](simt::machine & machine, ggml_tensor * op) {
            ggml_backend_cuda_context ctx(machine);
            ggml_cuda_flash_attn_ragged(ctx, op);
        },
    };
}
