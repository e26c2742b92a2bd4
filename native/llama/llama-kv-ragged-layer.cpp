#include "llama-kv-ragged-layer.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-probe.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <numeric>

// rows of both types that together are a multiple of what a buffer aligns tensors to
static int64_t aligned_rows(const llama_kv_ragged_layer & layer) {
    const size_t n_bytes = ggml_backend_buft_get_alignment(layer.buft);

    const auto n_rows = [&](ggml_type type, int64_t n_embd) { return n_bytes/std::gcd(n_bytes, ggml_row_size(type, n_embd)); };

    return std::lcm(n_rows(layer.type_k, layer.n_embd_head_k), n_rows(layer.type_v, layer.n_embd_head_v));
}

std::vector<llama_kv_ragged_layer> llama_kv_ragged_make_layers(
        const llama_model                     & model,
        const llama_cparams                   & cparams,
              ggml_type                         type_k,
              ggml_type                         type_v,
        const llama_memory_i::layer_filter_cb & filter) {
    const auto & hparams = model.hparams;

    std::vector<uint32_t> ils;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!filter || filter(il)) {
            ils.push_back(il);
        }
    }
    llama_kv_ragged_check_layers(model, ils);

    std::vector<llama_kv_ragged_layer> res;
    for (const uint32_t il : ils) {
        llama_kv_ragged_layer layer;
        layer.il            = il;
        layer.n_head        = hparams.n_head(il);
        layer.n_head_kv     = hparams.n_head_kv(il);
        layer.n_embd_head_k = hparams.n_embd_head_k(il);
        layer.n_embd_head_v = hparams.n_embd_head_v(il);
        layer.type_k        = type_k;
        layer.type_v        = type_v;
        layer.dev           = cparams.offload_kqv ? model.dev_layer(il) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        layer.buft          = ggml_backend_dev_buffer_type(layer.dev);

        // GPU kernels want lengths in multiples of 256 (see llama_kv_cache::get_n_kv), the CPU reads what it needs
        layer.n_pad = layer.on_cpu() ? 32 : 256;

        layer.sinks = model.layers[il].attn_sinks;

        layer.buf_full.reset(ggml_backend_buft_alloc_buffer(layer.buft, 0), ggml_backend_buffer_free);

        const llama_kv_ragged_probe probe = { layer.dev, layer.n_head, layer.n_head_kv, layer.n_embd_head_k, layer.n_embd_head_v,
            layer.type_k, layer.type_v, hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f, layer.sinks != nullptr };

        if (const char * missing = llama_kv_ragged_missing_stock(probe)) {
            llama_kv_ragged_refuse(format("%s lacks %s for layer %u (head size %" PRId64 ", %s and %s cells%s), load the model with "
                        "n_gpu_layers=0, with f16 cells or without a policy", ggml_backend_dev_name(layer.dev), missing, il,
                        layer.n_embd_head_k, ggml_type_name(layer.type_k), ggml_type_name(layer.type_v),
                        layer.sinks ? ", learned attention sinks" : ""));
        }

        layer.has_ragged      = llama_kv_ragged_has_ragged(probe);
        layer.missing_by_head = llama_kv_ragged_missing_by_head(probe);
        layer.n_align         = aligned_rows(layer);

        res.push_back(std::move(layer));
    }

    const bool on_device = std::any_of(ils.begin(), ils.end(), [&](uint32_t il) {
        return ggml_backend_dev_type(model.dev_layer(il)) != GGML_BACKEND_DEVICE_TYPE_CPU;
    });
    if (on_device && !cparams.offload_kqv) {
        LLAMA_LOG_WARN("%s: offload_kqv is off: the cells lie in host memory and the CPU attends to them, every layer on a device waits for "
            "it at every token\n", __func__);
    }
    return res;
}

bool llama_kv_ragged_layer::on_cpu() const {
    return ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

std::vector<int64_t> llama_kv_ragged_layer::capacity(const std::vector<int64_t> & len, int64_t slack, bool compacted) const {
    const bool uniform = std::all_of(len.begin(), len.end(), [&](int64_t n) { return n == len[0]; });

    std::vector<int64_t> res;
    for (const int64_t n : len) {
        res.push_back(uniform ? GGML_PAD(n + slack, compacted ? n_pad : 256) : n + slack);
    }
    if (uniform || !has_by_head()) {
        return res;
    }

    // a head is read to the next multiple of n_pad: for the others that ends before the last one's does
    for (int64_t & n : res) {
        n = GGML_PAD(n, n_align);
    }
    res.back() = GGML_PAD(res.back(), n_pad);
    return res;
}

void llama_kv_ragged_layer::check_ragged() const {
    if (!has_ragged && !has_by_head()) {
        llama_kv_ragged_refuse_unsupported(format("%s has no attention over heads of different lengths (layer %u, head size %" PRId64 "%s), "
                    "and to attend head by head it lacks %s: choose a policy that gives all heads of a layer the same number of cells, or "
                    "keep the cells in host memory, where the CPU attends to them, with offload_kqv=False (slower), or load the model with "
                    "n_gpu_layers=0", ggml_backend_dev_name(dev), il, n_embd_head_k, sinks ? ", learned attention sinks" : "",
                    missing_by_head ? missing_by_head : "nothing, but it is a CPU"));
    }
}

size_t llama_kv_ragged_layer::n_nodes_by_head() const {
    // per head: views of Q, K, V and the mask, its copy, the attention and its place in the result; each cast, and what is copied so that
    // it begins where a tensor would
    const size_t n_cast = (type_k == GGML_TYPE_F32) + (type_v == GGML_TYPE_F32);
    return has_by_head() ? n_head_kv*(8 + n_cast + (sinks ? 2 : 0)) + 16 : 0;
}

llama_kv_ragged_pool llama_kv_ragged_layer::make_pool(const std::vector<int64_t> & cap, llama_kv_ragged_meter & meter, bool zeroed) const {
    llama_kv_ragged_pool res;
    res.first.assign(1, 0);
    for (const int64_t n : cap) {
        res.first.push_back(res.first.back() + n);
    }

    res.init(2);
    res.k = ggml_new_tensor_2d(res.ctx.get(), type_k, n_embd_head_k, res.first.back());
    res.v = ggml_new_tensor_2d(res.ctx.get(), type_v, n_embd_head_v, res.first.back());
    ggml_format_name(res.k, "cache_ragged_k_l%u", il);
    ggml_format_name(res.v, "cache_ragged_v_l%u", il);

    if (!res.alloc(buft, meter, zeroed)) {
        llama_kv_ragged_refuse(format("no memory for %" PRId64 " cells per head in layer %u", res.first.back()/n_head_kv, il));
    }
    return res;
}

void llama_kv_ragged_copy_rows(ggml_tensor * src, ggml_tensor * dst, int64_t i_src, int64_t i_dst, int64_t n) {
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
        llama_kv_ragged_meter      & meter) const {
    llama_kv_ragged_pool res = make_pool(cap, meter);
    for (int64_t ih = 0; ih < n_head_kv; ++ih) {
        if (len[ih] > 0) {
            llama_kv_ragged_copy_rows(src.k, res.k, src.first[ih], res.first[ih], len[ih]);
            llama_kv_ragged_copy_rows(src.v, res.v, src.first[ih], res.first[ih], len[ih]);
        }
    }
    return res;
}
