// The attention of the ragged cache: graph inputs and the nodes that store, observe and attend.

#include "llama-kv-cache-ragged-context.h"
#include "llama-kv-ragged-replay.h"
#include "llama-kv-ragged-table.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-ragged-create.h"

#include "ggml-flash-attn-ragged.h"

#include <algorithm>
#include <deque>
#include <map>
#include <numeric>
#include <set>
#include <vector>

// Inputs of one graph. Layers whose heads hold equally many cells share a class, and so do heads that are attended one by one: one mask,
// one set of indices. Appending adds the same number of cells everywhere, so the classes of a graph stay valid within an epoch.
//
// A mask has a triangle at its end, and so have those of all classes: in large batches, and for single heads, the classes are views of
// one mask, or a model whose layers all differ in length would hold a mask of its own for every layer, and copy each to its device.
class llm_graph_input_ragged : public llm_graph_input_i {
public:
    struct cell_class {
        int32_t il; // a layer of this class
        int32_t ih; // a head of it, ALL_HEADS for whole layers

        int64_t n_cells;
        int64_t n_read;

        // for whole layers
        ggml_tensor * mask = nullptr; // F16 [n_read, n_tokens]; nullptr: columns of the common one
        ggml_tensor * idxs = nullptr; // I64 [n_tokens]
    };

    llm_graph_input_ragged(const llama_kv_cache_ragged_context * mctx, int64_t n_tokens) :
        mctx(mctx), epoch(mctx->get_epoch()), n_tokens(n_tokens) {}

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    const cell_class & get_class(ggml_context * ctx, int32_t il, int32_t ih);

    // F16 [n_read, n_tokens]
    ggml_tensor * get_mask(ggml_context * ctx, const cell_class & cls, ggml_backend_dev_t dev);

    ggml_tensor * get_observed_idxs(ggml_context * ctx);

    // For the layers whose heads differ, I32: where their heads stand, [2, n_head_kv, n_layer], and behind that the rows of the new
    // cells, [n_head_kv*n_tokens, n_layer]. All layers share it and each looks at its own plane.
    struct cell_table {
        ggml_tensor * all;
        ggml_tensor * ranges; // a view
    };

    const cell_table & get_table(ggml_context * ctx, int64_t n_head_kv, int32_t il);

    ggml_tensor * get_rows(ggml_context * ctx, const cell_table & table, int32_t il) const;

    // of tokens that repeat a piece: the keys that they are asked about, I32 [n_keys*n_head_kv] of a layer, and F32 [n_keys, n_tokens]
    ggml_tensor * get_replay_rows(ggml_context * ctx, int64_t n_head_kv, int32_t il);
    ggml_tensor * get_replay_mask(ggml_context * ctx);

    std::map<int32_t, float> scales; // of the attention logits of the layers in this graph

    static llm_graph_input_ragged * find(llm_graph_result * res);

private:
    const llama_kv_cache_ragged_context * mctx;

    const uint64_t epoch;
    const int64_t  n_tokens;

    std::deque<cell_class> classes;

    // F16 [n_cols, n_tokens]: query t sees the first n_seen + t columns
    ggml_tensor * common   = nullptr;
    int64_t       n_common = 0; // cells of the longest class

    // a view of an input is copied to the device by itself, so every device gets a copy of the whole to look at
    std::map<ggml_backend_dev_t, ggml_tensor *> commons;

    void init_common(ggml_context * ctx);

    ggml_tensor * observed_idxs = nullptr; // I64 [n_observed]

    std::map<int32_t, ggml_tensor *> replay_rows; // of the layers
    ggml_tensor *                    replay_mask = nullptr;

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

float llama_kv_ragged_scale(const llama_context & lctx, int32_t il) {
    const auto * inp = llm_graph_input_ragged::find(lctx.get_gf_res_reserve());
    if (!inp || inp->scales.count(il) == 0) {
        llama_kv_ragged_refuse_unsupported(format("the attention of layer %d does not run through the KV cache, use the model without a policy", il));
    }
    return inp->scales.at(il);
}

const llm_graph_input_ragged::cell_class & llm_graph_input_ragged::get_class(ggml_context * ctx, int32_t il, int32_t ih) {
    const bool by_head = ih != llama_kv_cache_ragged_context::ALL_HEADS;
    const auto view    = mctx->get_cells(il, ih);

    for (const auto & cls : classes) {
        // heads of one class hold equally many cells for ever, so that the reads of the first one serve all
        const bool as_mine = by_head == (cls.ih != llama_kv_cache_ragged_context::ALL_HEADS);
        if (as_mine && cls.n_cells == view.n_cells && cls.n_read == view.n_read) {
            return cls;
        }
    }

    if (classes.empty()) {
        init_common(ctx);
    }

    classes.push_back({ il, ih, view.n_cells, view.n_read });
    auto & cls = classes.back();
    if (by_head) {
        return cls;
    }

    // masks of a few tokens are small, and copying columns of a common one costs a node for every layer
    if (!common || n_tokens <= llama_kv_ragged_tables::N_TOKENS_MAX) {
        cls.mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, view.n_read, n_tokens);
        ggml_set_input(cls.mask);
        ggml_format_name(cls.mask, "ragged_mask_%zu", classes.size() - 1);
    }

    cls.idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens);
    ggml_set_input(cls.idxs);
    ggml_format_name(cls.idxs, "ragged_idxs_%zu", classes.size() - 1);
    return cls;
}

void llm_graph_input_ragged::init_common(ggml_context * ctx) {
    std::set<std::pair<int64_t, int64_t>> distinct;

    const auto add = [&](int32_t il, int32_t ih) {
        const auto view = mctx->get_cells(il, ih);
        distinct.insert({ view.n_cells, view.n_read });
        n_common = std::max(n_common, view.n_cells);
    };

    bool by_head = false;
    for (const auto & layer : mctx->get_layers()) {
        switch (mctx->get_kernel(layer.il, n_tokens)) {
            case LLAMA_KV_RAGGED_KERNEL_STOCK:
                add(layer.il, llama_kv_cache_ragged_context::ALL_HEADS);
                break;
            case LLAMA_KV_RAGGED_KERNEL_BY_HEAD:
                for (int32_t ih = 0; ih < layer.n_head_kv; ++ih) {
                    add(layer.il, ih);
                }
                by_head = true;
                break;
            case LLAMA_KV_RAGGED_KERNEL_RAGGED:
                break;
        }
    }
    if (!by_head && (distinct.size() < 2 || n_tokens <= llama_kv_ragged_tables::N_TOKENS_MAX)) {
        return;
    }

    int64_t n_cols = 0;
    for (const auto & [n_cells, n_read] : distinct) {
        n_cols = std::max(n_cols, n_common - n_cells + n_read);
    }
    common = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_cols, n_tokens);
    ggml_set_input(common);
    ggml_set_name(common, "ragged_mask");
}

ggml_tensor * llm_graph_input_ragged::get_mask(ggml_context * ctx, const cell_class & cls, ggml_backend_dev_t dev) {
    if (cls.mask) {
        return cls.mask;
    }
    ggml_tensor *& held = commons[dev];
    if (!held) {
        held = ggml_cont(ctx, common);
    }
    // contiguous, as flash attention asks; the scheduler reuses the memory for the next layer
    return ggml_cont(ctx, ggml_view_2d(ctx, held, cls.n_read, n_tokens, common->nb[1], (n_common - cls.n_cells)*common->nb[0]));
}

// query t sees the first n_seen + t columns
static void set_mask(ggml_tensor * dst, int64_t n_seen) {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    const int64_t n_cols = dst->ne[0];

    ggml_fp16_t * data = (ggml_fp16_t *) dst->data;
    std::fill_n(data, ggml_nelements(dst), ggml_fp32_to_fp16(-INFINITY));
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        std::fill_n(data + t*n_cols, n_seen + t, ggml_fp32_to_fp16(0.0f));
    }
}

ggml_tensor * llm_graph_input_ragged::get_observed_idxs(ggml_context * ctx) {
    if (!observed_idxs) {
        observed_idxs = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, mctx->get_n_observed(n_tokens));
        ggml_set_input(observed_idxs);
        ggml_set_name(observed_idxs, "ragged_observed_idxs");
    }
    return observed_idxs;
}

ggml_tensor * llm_graph_input_ragged::get_replay_rows(ggml_context * ctx, int64_t n_head_kv, int32_t il) {
    ggml_tensor * res = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, mctx->n_replay_keys()*n_head_kv);
    ggml_set_input(res);
    ggml_format_name(res, "ragged_replay_rows-%d", il);
    replay_rows[il] = res;
    return res;
}

ggml_tensor * llm_graph_input_ragged::get_replay_mask(ggml_context * ctx) {
    if (!replay_mask) {
        replay_mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, mctx->n_replay_keys(), n_tokens);
        ggml_set_input(replay_mask);
        ggml_set_name(replay_mask, "ragged_replay_mask");
    }
    return replay_mask;
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

    std::vector<int64_t> idxs(n_tokens);

    for (const auto & cls : classes) {
        if (!cls.idxs) {
            continue;
        }
        // new cells are the last ones: query t sees the cells [0, n_old + t]
        const int64_t n_old = mctx->get_cells(cls.il, cls.ih).n_cells - n_tokens;

        std::iota(idxs.begin(), idxs.end(), n_old);
        ggml_backend_tensor_set(cls.idxs, idxs.data(), 0, ggml_nbytes(cls.idxs));
        if (cls.mask) {
            set_mask(cls.mask, n_old + 1);
        }
    }
    if (common) {
        const int64_t n_appended = mctx->get_cells(classes[0].il, classes[0].ih).n_cells - classes[0].n_cells;
        set_mask(common, n_common + n_appended - n_tokens + 1);
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

    if (replay_mask) {
        std::vector<float> mask(ggml_nelements(replay_mask));
        mctx->set_replay_mask(n_tokens, mask.data());
        ggml_backend_tensor_set(replay_mask, mask.data(), 0, ggml_nbytes(replay_mask));
    }
    for (const auto & [il, dst] : replay_rows) {
        std::vector<int32_t> own(ggml_nelements(dst));
        mctx->set_replay_rows(il, own.data());
        ggml_backend_tensor_set(dst, own.data(), 0, ggml_nbytes(dst));
    }

    const auto & rows = mctx->get_observed_rows();
    GGML_ASSERT((int64_t) rows.size() == observed_idxs->ne[0]);
    ggml_backend_tensor_set(observed_idxs, rows.data(), 0, ggml_nbytes(observed_idxs));
}

bool llm_graph_input_ragged::can_reuse(const llm_graph_params & params) {
    const auto * next = llama_kv_cache_ragged_context::find(params.mctx);
    if (!next || next->get_epoch() != epoch || params.ubatch.n_tokens != n_tokens || !replay_rows.empty()) {
        return false;
    }

    for (const auto & cls : classes) {
        if (next->get_cells(cls.il, cls.ih).n_read != cls.n_read) {
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

// cells of one head, [n_embd_head, n, 1]
static ggml_tensor * view_head(ggml_context * ctx, ggml_tensor * pool, int64_t first, int64_t n) {
    return ggml_view_3d(ctx, pool, pool->ne[0], n, 1, pool->nb[1], n*pool->nb[1], first*pool->nb[1]);
}

// kernels may expect that what they read begins where a tensor of its own would
static ggml_tensor * aligned(ggml_context * ctx, ggml_tensor * view, ggml_backend_buffer_type_t buft) {
    return view->view_offs % ggml_backend_buft_get_alignment(buft) == 0 ? view : ggml_cont(ctx, view);
}

// [n_embd_head, n, n_tokens] x parts -> [n_embd_head, n*parts, n_tokens]; neighbours first, so that a value is copied log2(parts) times
static ggml_tensor * concat_heads(ggml_context * ctx, std::vector<ggml_tensor *> parts) {
    while (parts.size() > 1) {
        std::vector<ggml_tensor *> next;
        for (size_t i = 0; i + 1 < parts.size(); i += 2) {
            next.push_back(ggml_concat(ctx, parts[i], parts[i + 1], 1));
        }
        if (parts.size() % 2 == 1) {
            next.push_back(parts.back());
        }
        parts = std::move(next);
    }
    return parts[0];
}

// [n_embd_head, n_head, n_tokens] -> [n_embd_head, n_tokens, n_head]
static ggml_tensor * heads_last(ggml_context * ctx, ggml_tensor * cur) {
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
        llama_kv_ragged_refuse(format("%s (layer %d) is not supported, use the model without a policy", what, il));
    };
    if (kq_b)                  { refuse("an attention bias"); }
    if (!k_cur || !v_cur)      { refuse("a layer that shares the KV cache of another"); }
    if (!g.cparams.flash_attn) { refuse("attention without flash attention"); }
    if (g.cparams.training)    { refuse("training"); }
    const auto & layer = get_layer(il); // the device was asked for the operation with its own sink
    if (sinks != layer.sinks)  { refuse("a learned attention sink of another layer"); }

    ggml_context * ctx = g.ctx0;

    auto * inp = llm_graph_input_ragged::find(g.res);
    if (!inp) {
        inp = static_cast<llm_graph_input_ragged *>(
                g.res->add_input(std::make_unique<llm_graph_input_ragged>(this, q_cur->ne[2])));
    }

    inp->scales[il] = kq_scale;
    note_keys(il, k_cur);

    const layer_view view = get_view(ctx, il);

    const int64_t n_head_kv = layer.n_head_kv;
    const float   softcap   = g.hparams.attn_soft_cap ? g.hparams.f_attn_logit_softcapping : 0.0f;

    // the last queries of the ubatch are observed
    {
        ggml_tensor * idxs = inp->get_observed_idxs(ctx);

        const int64_t n_observed = idxs->ne[0];

        ggml_tensor * q_obs = ggml_view_3d(ctx, q_cur, q_cur->ne[0], q_cur->ne[1], n_observed,
                q_cur->nb[1], q_cur->nb[2], (q_cur->ne[2] - n_observed)*q_cur->nb[2]);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, get_queries(il), heads_last(ctx, q_obs), idxs));
    }

    ggml_tensor * q = heads_last(ctx, q_cur);

    // stock's attention over cells of some heads and their queries
    const auto attend = [&](ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * sinks, const llm_graph_input_ragged::cell_class & cls) {
        ggml_tensor * res = ggml_flash_attn_ext(ctx, q, cast_f32(ctx, k), cast_f32(ctx, v), inp->get_mask(ctx, cls, layer.dev), kq_scale, 0.0f, softcap);
        ggml_flash_attn_ext_add_sinks(res, sinks);
        ggml_prec_set_acc(res, GGML_PREC_F32);
        return res;
    };

    const auto kernel = get_kernel(il, q_cur->ne[2]);

    ggml_tensor * cur;
    if (kernel == LLAMA_KV_RAGGED_KERNEL_STOCK) {
        const auto & cls = inp->get_class(ctx, il, ALL_HEADS);

        ggml_tensor * k_all = view_cells(ctx, view.k, view.cap, view.cap, n_head_kv);
        ggml_tensor * v_all = view_cells(ctx, view.v, view.cap, view.cap, n_head_kv);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, k_all, heads_last(ctx, k_cur), cls.idxs));
        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, v_all, heads_last(ctx, v_cur), cls.idxs));

        cur = attend(q, view_cells(ctx, view.k, view.cap, cls.n_read, n_head_kv), view_cells(ctx, view.v, view.cap, cls.n_read, n_head_kv), sinks, cls);
        g.res->add_fused_node({ LLM_FUSED_OP_FLASH_ATTN, cur, il });
    } else {
        const auto & table = inp->get_table(ctx, n_head_kv, il);

        ggml_tensor * rows = inp->get_rows(ctx, table, il);

        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, view.k, all_heads(ctx, k_cur), rows));
        ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, view.v, all_heads(ctx, v_cur), rows));

        if (kernel == LLAMA_KV_RAGGED_KERNEL_RAGGED) {
            cur = ggml_flash_attn_ragged(ctx, q, view.k, view.v, table.ranges, sinks, get_index(il), kq_scale, softcap, /*causal =*/ true);
        } else {
            const int64_t n_gqa = layer.n_gqa();

            std::vector<ggml_tensor *> heads;
            for (int64_t ih = 0; ih < n_head_kv; ++ih) {
                const auto & cls   = inp->get_class(ctx, il, ih);
                const auto   first = get_cells(il, ih).first;

                ggml_tensor * q_own = ggml_view_3d(ctx, q, q->ne[0], q->ne[1], n_gqa, q->nb[1], q->nb[2], ih*n_gqa*q->nb[2]);

                ggml_tensor * sinks_own = !sinks ? nullptr : aligned(ctx, ggml_view_1d(ctx, sinks, n_gqa, ih*n_gqa*sinks->nb[0]), layer.buft);

                heads.push_back(attend(aligned(ctx, q_own, layer.buft), view_head(ctx, view.k, first, cls.n_read), view_head(ctx, view.v, first, cls.n_read),
                            sinks_own, cls));

                // one head after the other: their masks take turns in the same memory
                ggml_build_forward_expand(g.gf, heads.back());
            }
            cur = concat_heads(ctx, heads);
        }
    }

    if (auto * replay = get_replay()) {
        replay->build(g, q, view.k, inp->get_replay_rows(ctx, n_head_kv, il), layer.on_cpu() ? nullptr : inp->get_replay_mask(ctx), sinks, kq_scale, softcap,
                get_index(il));
    }

    cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(g.gf, cur);

    return cur;
}
