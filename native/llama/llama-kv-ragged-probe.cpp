#include "llama-kv-ragged-probe.h"

#include "ggml-cpp.h"
#include "ggml-flash-attn-ragged.h"
#include "ggml.h"

#include <cstring>

static constexpr int     N_TENSORS = 32;
static constexpr int64_t N_ROWS    = 256; // GPU kernels of stock want lengths in multiples of it
static constexpr int64_t N_NEW     = 16;  // rows that are stored or gathered

static ggml_context_ptr probe_context() {
    const ggml_init_params params = {
        /*.mem_size   =*/ N_TENSORS*ggml_tensor_overhead() + ggml_graph_overhead_custom(N_TENSORS, false),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    return ggml_context_ptr(ggml_init(params));
}

static ggml_tensor * new_sinks(ggml_context * ctx, const llama_kv_ragged_probe & probe) {
    return probe.sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, probe.n_head) : nullptr;
}

// F32 cells are cast for attention
static ggml_type attended(ggml_type type) {
    return type == GGML_TYPE_F32 ? GGML_TYPE_F16 : type;
}

const ggml_tensor * llama_kv_ragged_missing_op(ggml_backend_dev_t dev, ggml_cgraph * gf) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        if (!ggml_backend_dev_supports_op(dev, node)) {
            return node;
        }
    }
    return nullptr;
}

const char * llama_kv_ragged_missing_stock(const llama_kv_ragged_probe & probe) {
    const ggml_context_ptr ctx_ptr = probe_context();
    ggml_context * ctx = ctx_ptr.get();

    ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, probe.n_embd_head_k, 1, probe.n_head);
    ggml_tensor * k    = ggml_new_tensor_3d(ctx, attended(probe.type_k), probe.n_embd_head_k, N_ROWS, probe.n_head_kv);
    ggml_tensor * v    = ggml_new_tensor_3d(ctx, attended(probe.type_v), probe.n_embd_head_v, N_ROWS, probe.n_head_kv);
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, N_ROWS, 1);
    ggml_tensor * attn = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, 0.0f, probe.softcap);
    ggml_flash_attn_ext_add_sinks(attn, new_sinks(ctx, probe));

    // gathered as numbers of 32 bits, whatever the type
    ggml_tensor * rows = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, probe.n_embd_head_k/2, N_ROWS);
    ggml_tensor * idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, N_NEW);

    ggml_tensor * at = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, N_NEW);

    const auto stored = [&](ggml_type type, int64_t n_embd) {
        ggml_tensor * pool = ggml_new_tensor_3d(ctx, type, n_embd, N_ROWS, probe.n_head_kv);
        ggml_tensor * cur  = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_embd, N_NEW, probe.n_head_kv);
        return ggml_set_rows(ctx, pool, cur, at);
    };

    ggml_cgraph * gf = ggml_new_graph_custom(ctx, N_TENSORS, false);
    ggml_build_forward_expand(gf, attn);
    ggml_build_forward_expand(gf, ggml_get_rows(ctx, rows, idxs));
    ggml_build_forward_expand(gf, stored(probe.type_k, probe.n_embd_head_k));
    ggml_build_forward_expand(gf, stored(probe.type_v, probe.n_embd_head_v));

    const ggml_tensor * res = llama_kv_ragged_missing_op(probe.dev, gf);
    return res ? ggml_op_name(res->op) : nullptr;
}

bool llama_kv_ragged_has_ragged(const llama_kv_ragged_probe & probe) {
    // RPC devices say yes to every op, their servers need not know ours
    if (strncmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(probe.dev)), "RPC", 3) == 0) {
        return false;
    }

    const ggml_context_ptr ctx_ptr = probe_context();
    ggml_context * ctx = ctx_ptr.get();

    ggml_tensor * q      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, probe.n_embd_head_k, 1, probe.n_head);
    ggml_tensor * k      = ggml_new_tensor_2d(ctx, probe.type_k, probe.n_embd_head_k, N_ROWS);
    ggml_tensor * v      = ggml_new_tensor_2d(ctx, probe.type_v, probe.n_embd_head_v, N_ROWS);
    ggml_tensor * ranges = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, probe.n_head_kv, 1);

    return ggml_backend_dev_supports_op(probe.dev, ggml_flash_attn_ragged(ctx, q, k, v, ranges, new_sinks(ctx, probe), /*i_layer =*/ 0,
                1.0f, probe.softcap, /*causal =*/ true));
}

const char * llama_kv_ragged_missing_by_head(const llama_kv_ragged_probe & probe) {
    const ggml_context_ptr ctx_ptr = probe_context();
    ggml_context * ctx = ctx_ptr.get();

    const int64_t n_gqa = probe.n_head/probe.n_head_kv;

    // columns of a mask
    ggml_tensor * common = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, 2*N_ROWS, N_NEW);
    ggml_tensor * mask   = ggml_cont(ctx, ggml_view_2d(ctx, common, N_ROWS, N_NEW, common->nb[1], common->nb[0]));

    // the query heads of one kv head, and its rows in the pool
    ggml_tensor * q = ggml_permute(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, probe.n_embd_head_k, probe.n_head, N_NEW), 0, 2, 1, 3);
    ggml_tensor * k = ggml_new_tensor_3d(ctx, attended(probe.type_k), probe.n_embd_head_k, N_ROWS, 1);
    ggml_tensor * v = ggml_new_tensor_3d(ctx, attended(probe.type_v), probe.n_embd_head_v, N_ROWS, 1);

    ggml_tensor * attn = ggml_flash_attn_ext(ctx, ggml_view_3d(ctx, q, q->ne[0], q->ne[1], n_gqa, q->nb[1], q->nb[2], 0), k, v, mask,
            1.0f, 0.0f, probe.softcap);
    if (probe.sinks) {
        ggml_flash_attn_ext_add_sinks(attn, ggml_cont(ctx, ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_gqa)));
    }

    // new cells of all heads are stored at once
    ggml_tensor * at = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, N_NEW);

    const auto stored = [&](ggml_type type, int64_t n_embd) {
        ggml_tensor * pool = ggml_new_tensor_2d(ctx, type, n_embd, N_ROWS);
        return ggml_set_rows(ctx, pool, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_embd, N_NEW), at);
    };

    ggml_cgraph * gf = ggml_new_graph_custom(ctx, N_TENSORS, false);
    ggml_build_forward_expand(gf, ggml_concat(ctx, attn, attn, 1));
    ggml_build_forward_expand(gf, stored(probe.type_k, probe.n_embd_head_k));
    ggml_build_forward_expand(gf, stored(probe.type_v, probe.n_embd_head_v));

    const ggml_tensor * res = llama_kv_ragged_missing_op(probe.dev, gf);
    return res ? ggml_op_name(res->op) : nullptr;
}
