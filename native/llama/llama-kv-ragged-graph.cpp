// The attention of the ragged cache: graph inputs and the nodes that store, observe and attend.

#include "llama-kv-cache-ragged.h"

#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-ragged-create.h"

#include "ggml-flash-attn-ragged.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <vector>

// Inputs of one graph. Layers whose heads hold equally many cells share a class: one mask, one set of indices.
// Appending adds the same number of cells everywhere, so the classes of a graph stay valid within an epoch.
class llm_graph_input_ragged : public llm_graph_input_i {
public:
    struct cell_class {
        int32_t il; // a layer of this class
        int64_t n_cells;
        int64_t n_read;

        ggml_tensor * mask; // F16 [n_read, n_tokens]
        ggml_tensor * idxs; // I64 [n_tokens]
    };

    llm_graph_input_ragged(const llama_kv_cache_ragged_context * mctx, int64_t n_tokens) :
        mctx(mctx), epoch(mctx->get_epoch()), n_tokens(n_tokens) {}

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    const cell_class & get_class(ggml_context * ctx, const llama_kv_cache_ragged_context::layer_view & view, int32_t il);

    ggml_tensor * get_ring_idxs(ggml_context * ctx);

    // For the layers whose heads differ, I32: where their heads stand, [2, n_head_kv, n_layer], and behind that the rows of the new
    // cells, [n_head_kv*n_tokens, n_layer]. All layers share it and each looks at its own plane.
    struct cell_table {
        ggml_tensor * all;
        ggml_tensor * ranges; // a view
    };

    const cell_table & get_table(ggml_context * ctx, int64_t n_head_kv, int32_t il);

    ggml_tensor * get_rows(ggml_context * ctx, const cell_table & table, int32_t il) const;

    static llm_graph_input_ragged * find(llm_graph_result * res);

private:
    const llama_kv_cache_ragged_context * mctx;

    const uint64_t epoch;
    const int64_t  n_tokens;

    std::vector<cell_class> classes;

    ggml_tensor * ring_idxs = nullptr; // I64 [n_observed]

    // by device, nullptr: an input of the graph; a device's own is written once, inputs are copied for every layer's view
    std::map<ggml_backend_dev_t, cell_table> tables;

    std::vector<int32_t> ragged; // layers that look at them
    std::vector<int32_t> table_data;
};

llm_graph_input_ragged * llm_graph_input_ragged::find(llm_graph_result * res) {
    for (const auto & input : res->inputs) {
        if (auto * cur = dynamic_cast<llm_graph_input_ragged *>(input.get())) {
            return cur;
        }
    }
    return nullptr;
}

const llm_graph_input_ragged::cell_class & llm_graph_input_ragged::get_class(
        ggml_context * ctx, const llama_kv_cache_ragged_context::layer_view & view, int32_t il) {
    for (const auto & cls : classes) {
        if (cls.n_cells == view.n_cells && cls.n_read == view.n_read) {
            return cls;
        }
    }

    cell_class cls = { il, view.n_cells, view.n_read, nullptr, nullptr };

    cls.mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, view.n_read, n_tokens);
    ggml_set_input(cls.mask);
    ggml_format_name(cls.mask, "ragged_mask_%zu", classes.size());

    cls.idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
    ggml_set_input(cls.idxs);
    ggml_format_name(cls.idxs, "ragged_idxs_%zu", classes.size());

    classes.push_back(cls);
    return classes.back();
}

ggml_tensor * llm_graph_input_ragged::get_ring_idxs(ggml_context * ctx) {
    if (!ring_idxs) {
        ring_idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, std::min<int64_t>(n_tokens, mctx->get_window()));
        ggml_set_input(ring_idxs);
        ggml_set_name(ring_idxs, "ragged_ring_idxs");
    }
    return ring_idxs;
}

const llm_graph_input_ragged::cell_table & llm_graph_input_ragged::get_table(ggml_context * ctx, int64_t n_head_kv, int32_t il) {
    ragged.push_back(il);

    const auto [dev, held] = mctx->get_table(il, n_tokens);

    const auto [it, is_new] = tables.try_emplace(dev);
    auto & table = it->second;
    if (is_new) {
        const int64_t n_layer = mctx->get_n_layer();

        table.all = held;
        if (!held) {
            table.all = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (2 + n_tokens)*n_head_kv*n_layer);
            ggml_set_input(table.all);
            ggml_set_name(table.all, "ragged_table");
        }
        table.ranges = ggml_view_3d(ctx, table.all, 2, n_head_kv, n_layer, 2*sizeof(int32_t), 2*n_head_kv*sizeof(int32_t), 0);
    }
    return table;
}

ggml_tensor * llm_graph_input_ragged::get_rows(ggml_context * ctx, const cell_table & table, int32_t il) const {
    const int64_t n_rows = table.ranges->ne[1]*n_tokens;

    return ggml_view_1d(ctx, table.all, n_rows, (ggml_nelements(table.ranges) + mctx->get_index(il)*n_rows)*sizeof(int32_t));
}

void llm_graph_input_ragged::set_input(const llama_ubatch * ubatch) {
    GGML_ASSERT(ubatch->n_tokens == n_tokens);

    const ggml_fp16_t zero    = ggml_fp32_to_fp16(0.0f);
    const ggml_fp16_t neg_inf = ggml_fp32_to_fp16(-INFINITY);

    std::vector<ggml_fp16_t> mask;
    std::vector<int64_t>     idxs(n_tokens);

    for (const auto & cls : classes) {
        const int64_t n_cells = mctx->get_view(nullptr, cls.il).n_cells;
        const int64_t n_old   = n_cells - n_tokens;

        // new cells are the last ones: query t sees the cells [0, n_old + t]
        mask.assign(cls.n_read*n_tokens, neg_inf);
        for (int64_t t = 0; t < n_tokens; ++t) {
            std::fill_n(mask.begin() + t*cls.n_read, n_old + t + 1, zero);
            idxs[t] = n_old + t;
        }

        ggml_backend_tensor_set(cls.mask, mask.data(), 0, ggml_nbytes(cls.mask));
        ggml_backend_tensor_set(cls.idxs, idxs.data(), 0, ggml_nbytes(cls.idxs));
    }

    if (!tables.empty()) {
        const int64_t n_head_kv = tables.begin()->second.ranges->ne[1];
        const int64_t n_rows    = n_head_kv*n_tokens;

        table_data.assign((2*n_head_kv + n_rows)*mctx->get_n_layer(), 0);
        for (const int32_t il : ragged) {
            int32_t * ranges = table_data.data() + mctx->get_index(il)*2*n_head_kv;
            int32_t * rows   = table_data.data() + mctx->get_n_layer()*2*n_head_kv + mctx->get_index(il)*n_rows;

            mctx->get_ranges(il, ranges);
            for (int64_t t = 0; t < n_tokens; ++t) {
                for (int64_t ih = 0; ih < n_head_kv; ++ih) {
                    rows[t*n_head_kv + ih] = ranges[2*ih] + ranges[2*ih + 1] - n_tokens + t;
                }
            }
        }
        for (const auto & [dev, table] : tables) {
            mctx->set_table(dev, table.all, table_data);
        }
    }

    const int64_t n_observed = ring_idxs->ne[0];
    const int64_t n_pos      = mctx->get_n_pos();

    idxs.resize(n_observed);
    for (int64_t i = 0; i < n_observed; ++i) {
        idxs[i] = (n_pos - n_observed + i) % mctx->get_window();
    }
    ggml_backend_tensor_set(ring_idxs, idxs.data(), 0, ggml_nbytes(ring_idxs));
}

bool llm_graph_input_ragged::can_reuse(const llm_graph_params & params) {
    const auto * next = llama_kv_cache_ragged_context::find(params.mctx);
    if (!next || next->get_epoch() != epoch || params.ubatch.n_tokens != n_tokens) {
        return false;
    }

    for (const auto & cls : classes) {
        if (next->get_view(nullptr, cls.il).n_read != cls.n_read) {
            return false;
        }
    }

    mctx = next;
    return true;
}

// cells of all heads of a pool, [n_embd_head, n, n_head]
static ggml_tensor * view_cells(ggml_context * ctx, ggml_tensor * pool, int64_t cap, int64_t n, int64_t n_head) {
    return ggml_view_3d(ctx, pool, pool->ne[0], n, n_head, pool->nb[1], cap*pool->nb[1], 0);
}

// [n_embd_head, n_head, n_tokens] -> [n_embd_head, n_tokens, n_head]
static ggml_tensor * by_head(ggml_context * ctx, ggml_tensor * cur) {
    return ggml_permute(ctx, cur, 0, 2, 1, 3);
}

// [n_embd_head, n_head, n_tokens] -> [n_embd_head, n_head*n_tokens]
static ggml_tensor * all_heads(ggml_context * ctx, ggml_tensor * cur) {
    return ggml_reshape_2d(ctx, ggml_is_contiguous(cur) ? cur : ggml_cont(ctx, cur), cur->ne[0], cur->ne[1]*cur->ne[2]);
}

// flash attention takes no F32 cells on most backends, stock casts as well
static ggml_tensor * cast_f32(ggml_context * ctx, ggml_tensor * cur) {
    return cur->type == GGML_TYPE_F32 ? ggml_cast(ctx, cur, GGML_TYPE_F16) : cur;
}

ggml_tensor * llama_kv_cache_ragged_context::build_attn(
        const llm_graph_context & g,
        ggml_tensor * q_cur,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur,
        ggml_tensor * kq_b,
        ggml_tensor * sinks,
              float   kq_scale,
                int   il) const {
    // thrown while the worst-case graph is built, so that the context is not created
    const auto refuse = [&](const char * what) {
        const std::string msg = format("kv_policy: %s (layer %d) is not supported, use the model without a policy", what, il);
        llama_kv_ragged_set_error(msg);
        throw std::runtime_error(msg);
    };
    if (kq_b)                  { refuse("an attention bias"); }
    if (!k_cur || !v_cur)      { refuse("a layer that shares the KV cache of another"); }
    if (!g.cparams.flash_attn) { refuse("attention without flash attention"); }
    if (g.cparams.training)    { refuse("training"); }
    // the device was asked for the operation with the layer's own
    if (sinks != kv->layers.at(kv->map_layer.at(il)).sinks) { refuse("a learned attention sink of another layer"); }

    ggml_context * ctx = g.ctx0;

    auto & layer = kv->layers.at(kv->map_layer.at(il));
    layer.hooked   = true;
    layer.kq_scale = kq_scale;

    auto * inp = llm_graph_input_ragged::find(g.res);
    if (!inp) {
        inp = static_cast<llm_graph_input_ragged *>(
                g.res->add_input(std::make_unique<llm_graph_input_ragged>(this, q_cur->ne[2])));
    }

    const layer_view view = get_view(ctx, il);

    const int64_t n_head_kv = layer.n_head_kv;
    const float   softcap   = g.hparams.attn_soft_cap ? g.hparams.f_attn_logit_softcapping : 0.0f;

    // the last queries of the ubatch go to the observation ring
    {
        ggml_tensor * idxs = inp->get_ring_idxs(ctx);

        const int64_t n_observed = idxs->ne[0];

        ggml_tensor * q_obs = ggml_view_3d(ctx, q_cur, q_cur->ne[0], q_cur->ne[1], n_observed,
                q_cur->nb[1], q_cur->nb[2], (q_cur->ne[2] - n_observed)*q_cur->nb[2]);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, layer.ring, by_head(ctx, q_obs), idxs));
    }

    ggml_tensor * q = by_head(ctx, q_cur);

    ggml_tensor * cur;
    if (view.stock) {
        const auto cls = inp->get_class(ctx, view, il);

        ggml_tensor * k_all = view_cells(ctx, view.k, view.cap, view.cap, n_head_kv);
        ggml_tensor * v_all = view_cells(ctx, view.v, view.cap, view.cap, n_head_kv);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, k_all, by_head(ctx, k_cur), cls.idxs));
        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, v_all, by_head(ctx, v_cur), cls.idxs));

        ggml_tensor * k = cast_f32(ctx, view_cells(ctx, view.k, view.cap, view.n_read, n_head_kv));
        ggml_tensor * v = cast_f32(ctx, view_cells(ctx, view.v, view.cap, view.n_read, n_head_kv));

        cur = ggml_flash_attn_ext(ctx, q, k, v, cls.mask, kq_scale, 0.0f, softcap);
        ggml_flash_attn_ext_add_sinks(cur, sinks);
        g.res->add_fused_node({ LLM_FUSED_OP_FLASH_ATTN, cur, il });
        ggml_prec_set_acc(cur, GGML_PREC_F32);
    } else {
        const auto & table = inp->get_table(ctx, n_head_kv, il);

        ggml_tensor * rows = inp->get_rows(ctx, table, il);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, view.k, all_heads(ctx, k_cur), rows));
        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, view.v, all_heads(ctx, v_cur), rows));

        cur = ggml_flash_attn_ragged(ctx, q, view.k, view.v, table.ranges, sinks, get_index(il),
                kq_scale, softcap, /*causal =*/ true);
    }

    cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(g.gf, cur);

    return cur;
}
