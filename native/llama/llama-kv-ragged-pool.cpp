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

//
// llama_kv_ragged_layer
//

bool llama_kv_ragged_layer::on_cpu() const {
    return ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

int64_t llama_kv_ragged_layer::cell_bytes() const {
    return ggml_row_size(type_k, n_embd_head_k) + ggml_row_size(type_v, n_embd_head_v);
}

std::vector<int64_t> llama_kv_ragged_layer::capacity(const std::vector<int64_t> & len, int64_t slack, bool compacted) const {
    const bool uniform = std::all_of(len.begin(), len.end(), [&](int64_t n) { return n == len[0]; });

    std::vector<int64_t> res;
    for (const int64_t n : len) {
        res.push_back(uniform ? GGML_PAD(n + slack, compacted ? n_pad : 256) : n + slack);
    }
    return res;
}

llama_kv_ragged_pool llama_kv_ragged_layer::make_pool(const std::vector<int64_t> & cap, llama_kv_ragged_meter * meter) const {
    std::vector<int64_t> first(1, 0);
    for (const int64_t n : cap) {
        first.push_back(first.back() + n);
    }
    const int64_t n_rows = first.back();

    const ggml_init_params params = {
        /*.mem_size   =*/ 2*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    llama_kv_ragged_pool res;
    res.ctx.reset(ggml_init(params));
    res.k = ggml_new_tensor_2d(res.ctx.get(), type_k, n_embd_head_k, n_rows);
    res.v = ggml_new_tensor_2d(res.ctx.get(), type_v, n_embd_head_v, n_rows);
    ggml_format_name(res.k, "cache_ragged_k_l%u", il);
    ggml_format_name(res.v, "cache_ragged_v_l%u", il);

    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), buft));
    if (!res.buf) {
        return {};
    }

    // masked cells are multiplied by zero weights, so even unused rows have to be finite
    ggml_backend_buffer_clear(res.buf.get(), 0);

    res.first = std::move(first);
    res.meter = meter;
    if (meter) {
        meter->add(res.bytes());
    }
    return res;
}

static void copy_rows(ggml_tensor * src, ggml_tensor * dst, int64_t i_src, int64_t i_dst, int64_t n) {
    const ggml_init_params params = {
        /*.mem_size   =*/ 2*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };

    ggml_tensor * a = ggml_view_2d(ctx.get(), src, src->ne[0], n, src->nb[1], i_src*src->nb[1]);
    ggml_tensor * b = ggml_view_2d(ctx.get(), dst, dst->ne[0], n, dst->nb[1], i_dst*dst->nb[1]);
    ggml_backend_view_init(a);
    ggml_backend_view_init(b);
    ggml_backend_tensor_copy(a, b);
}

llama_kv_ragged_pool llama_kv_ragged_layer::copy_pool(
        const llama_kv_ragged_pool & src,
        const std::vector<int64_t> & cap,
        const std::vector<int64_t> & len,
        llama_kv_ragged_meter      * meter) const {
    llama_kv_ragged_pool res = make_pool(cap, meter);
    if (res.empty()) {
        return res;
    }

    for (int64_t ih = 0; ih < n_head_kv; ++ih) {
        if (len[ih] > 0) {
            copy_rows(src.k, res.k, src.first[ih], res.first[ih], len[ih]);
            copy_rows(src.v, res.v, src.first[ih], res.first[ih], len[ih]);
        }
    }
    return res;
}
