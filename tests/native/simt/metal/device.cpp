#include "flash-attn-ragged-metal.h"

#include "test-simt-ragged.h"

simt_device simt_metal() {
    return {
        "Metal",
        [](const ggml_tensor * op) { return op->op == GGML_OP_FLASH_ATTN_RAGGED && ggml_metal_op_flash_attn_ragged_supported(op); },
        ggml_metal_op_flash_attn_ragged_extra,
        [](simt::machine & machine, ggml_tensor * op) {
            machine.shared_limit = 32*1024;
            machine.device_barrier();
            ggml_metal_encoder enc = { machine };
            ggml_metal_op_flash_attn_ragged(nullptr, &enc, op);
        },
    };
}
