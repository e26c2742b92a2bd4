#include "flash-attn-ragged.cuh"
#include "ragged-select.cuh"

#include "test-simt-ragged.h"

int simt_cuda_n_sm = 6; // so that small cases fill the device
int simt_cuda_cc   = GGML_CUDA_CC_AMPERE;

simt_device simt_cuda() {
    return {
        "CUDA",
        [](const ggml_tensor * op) {
            return op->op == GGML_OP_RAGGED_SELECT ? ggml_cuda_ragged_select_supported(0, op) : ggml_cuda_flash_attn_ragged_supported(0, op);
        },
        [](const ggml_tensor *) { return size_t(0); },
        [](simt::machine & machine, ggml_tensor * op) {
            machine.shared_limit = 48*1024; // without asking for more
            ggml_backend_cuda_context ctx(machine);
            if (op->op == GGML_OP_RAGGED_SELECT) {
                ggml_cuda_ragged_select(ctx, op);
            } else {
                ggml_cuda_flash_attn_ragged(ctx, op);
            }
        },
    };
}
