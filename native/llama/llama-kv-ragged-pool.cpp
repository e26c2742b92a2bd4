#include "llama-kv-ragged-pool.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <algorithm>
#include <utility>

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

//
// llama_kv_ragged_buffer
//

llama_kv_ragged_buffer::llama_kv_ragged_buffer(llama_kv_ragged_buffer && other) noexcept {
    *this = std::move(other);
}

llama_kv_ragged_buffer & llama_kv_ragged_buffer::operator=(llama_kv_ragged_buffer && other) noexcept {
    std::swap(ctx,    other.ctx);
    std::swap(buf,    other.buf);
    std::swap(tensor, other.tensor);
    std::swap(meter,  other.meter);
    return *this;
}

llama_kv_ragged_buffer::~llama_kv_ragged_buffer() {
    if (meter) {
        meter->add(-bytes());
    }
}

llama_kv_ragged_buffer llama_kv_ragged_buffer::make(
        ggml_backend_buffer_type_t buft, ggml_type type, const std::array<int64_t, 3> & ne, const char * name, llama_kv_ragged_meter * meter) {
    const ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    llama_kv_ragged_buffer res;
    res.ctx.reset(ggml_init(params));
    res.tensor = ggml_new_tensor_3d(res.ctx.get(), type, ne[0], ne[1], ne[2]);
    ggml_set_name(res.tensor, name);

    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), buft));
    if (!res.buf) {
        return {};
    }
    ggml_backend_buffer_clear(res.buf.get(), 0);

    res.meter = meter;
    if (meter) {
        meter->add(res.bytes());
    }
    return res;
}

//
// llama_kv_ragged_pool
//

llama_kv_ragged_pool::llama_kv_ragged_pool(llama_kv_ragged_pool && other) noexcept {
    *this = std::move(other);
}

llama_kv_ragged_pool & llama_kv_ragged_pool::operator=(llama_kv_ragged_pool && other) noexcept {
    std::swap(ctx,   other.ctx);
    std::swap(buf,   other.buf);
    std::swap(k,     other.k);
    std::swap(v,     other.v);
    std::swap(first, other.first);
    std::swap(meter, other.meter);
    return *this;
}

llama_kv_ragged_pool::~llama_kv_ragged_pool() {
    if (meter) {
        meter->add(-bytes());
    }
}
