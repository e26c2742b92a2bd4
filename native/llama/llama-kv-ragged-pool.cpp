#include "llama-kv-ragged-pool.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <algorithm>

#if defined(__GLIBC__)
#    include <malloc.h>
#endif

void llama_kv_ragged_trim() {
#if defined(__GLIBC__)
    // blocks below the mmap threshold went back to the heap, not to the system
    malloc_trim(0);
#endif
}

void llama_kv_ragged_meter::add(int64_t n) {
    live += n;
    peak  = std::max(peak, live);
}

void llama_kv_ragged_buffer::init(size_t n_tensors) {
    const ggml_init_params params = {
        /*.mem_size   =*/ n_tensors*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ctx.reset(ggml_init(params));
}

bool llama_kv_ragged_buffer::alloc(ggml_backend_buffer_type_t buft, llama_kv_ragged_meter & meter, bool zeroed) {
    buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
    if (!buf) {
        return false;
    }
    // masked cells are multiplied by zero weights, so even unused rows have to be finite
    if (zeroed) {
        ggml_backend_buffer_clear(buf.get(), 0);
    }

    claim = std::make_unique<llama_kv_ragged_claim>(meter, bytes());
    return true;
}

llama_kv_ragged_tensor llama_kv_ragged_tensor::make(
        ggml_backend_buffer_type_t buft, ggml_type type, const std::array<int64_t, 3> & ne, const char * name,
        llama_kv_ragged_meter & meter) {
    llama_kv_ragged_tensor res;
    res.init(1);
    res.tensor = ggml_new_tensor_3d(res.ctx.get(), type, ne[0], ne[1], ne[2]);
    ggml_set_name(res.tensor, name);

    if (!res.alloc(buft, meter)) {
        return {};
    }
    return res;
}
