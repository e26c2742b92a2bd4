#include "flash-attn-ragged-metal.h"

#include "test-simt-ragged.h"

simt_device simt_metal() {
    return {
        "Metal",
        ggml_metal_op_flash_attn_ragged_supported,
        ggml_metal_op_flash_attn_ragged_extra,
        [](simt::machine & machine, ggml_tensor * op) {
            machine.shared_limit = 32*1024;
            machine.device_barrier();
            ggml_metal_encoder enc = { machine };
            ggml_metal_op_flash_attn_ragged(nullptr, &enc, op);
        },
    };
}
