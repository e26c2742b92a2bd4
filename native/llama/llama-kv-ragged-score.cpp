#include "llama-kv-ragged-score.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged-context.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-compute.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace {

// the queries of one compaction: rows of the buffer in the order of their positions, so that sums do not depend on its size
struct observers {
    std::vector<int32_t> rows;
    std::vector<int32_t> pos;

    std::vector<int64_t> n_of; // [window_sizes], how many of the last of them form each window

    int64_t n() const { return rows.size(); }
};

// Some of the columns of a kv head's attention weights [n_cells, n_rows, n_gqa]: several query heads, or some queries of one.
struct part {
    int64_t ig0, n_gqa;  // query heads
    int64_t ir0, n_rows; // queries
};

// what a layer makes of queries and keys
struct attention {
    float   kq_scale;
    float   softcap;
    int64_t n_gqa;
};

struct head_graph {
    ggml_tensor * mask = nullptr; // F32 [n_tail, n_rows*n_gqa] of the last cells, nullptr: every query sees all
    ggml_tensor * sum  = nullptr; // F32 [n_cells, n_res]
};

} // namespace

static observers find_observers(const llama_kv_ragged_seq & seq, const std::vector<int32_t> & window_sizes) {
    const auto start = [&](int32_t n) { return int32_t(seq.n_pos) - n; };

    observers res;
    res.rows = seq.observed.find(start(*std::max_element(window_sizes.begin(), window_sizes.end())));
    for (const int32_t row : res.rows) {
        res.pos.push_back(seq.observed.pos[row]);
    }
    for (const int32_t n : window_sizes) {
        res.n_of.push_back(res.pos.end() - std::lower_bound(res.pos.begin(), res.pos.end(), start(n)));
    }
    if (seq.n_pos == 0 || *std::min_element(res.n_of.begin(), res.n_of.end()) == 0) {
        llama_kv_ragged_refuse("nothing to score, evaluate a prompt first");
    }
    return res;
}

static std::vector<part> make_parts(int64_t n_cells, int64_t n_rows, int64_t n_gqa, int64_t n_bytes_max) {
    const int64_t n_max = std::max<int64_t>(1, n_bytes_max/(n_cells*(int64_t) sizeof(float))); // columns

    std::vector<part> res;
    if (n_max >= n_rows) {
        for (int64_t ig = 0; ig < n_gqa; ig += n_max/n_rows) {
            res.push_back({ ig, std::min(n_max/n_rows, n_gqa - ig), 0, n_rows });
        }
        return res;
    }
    for (int64_t ig = 0; ig < n_gqa; ++ig) {
        for (int64_t ir = 0; ir < n_rows; ir += n_max) {
            res.push_back({ ig, 1, ir, std::min(n_max, n_rows - ir) });
        }
    }
    return res;
}

// Cells at the end of a head that a query does not see: those behind its own position. A query that is older than every cell that
// is left sees all of them, which prefers none.
static int64_t n_unseen(const std::vector<int32_t> & cells, int32_t pos) {
    const int64_t n_older = std::upper_bound(cells.begin(), cells.end(), pos) - cells.begin();
    return n_older > 0 ? cells.size() - n_older : 0;
}

// 0 or minus infinity for the last n_tail cells, [n_tail, n_rows*n_gqa]
static std::vector<float> make_mask(const std::vector<int32_t> & cells, const observers & obs, int64_t n_gqa) {
    std::vector<int64_t> n_hidden;
    for (const int32_t pos : obs.pos) {
        n_hidden.push_back(n_unseen(cells, pos));
    }
    const int64_t n_tail = *std::max_element(n_hidden.begin(), n_hidden.end());

    std::vector<float> res(n_tail*obs.n()*n_gqa, 0.0f);
    for (int64_t i = 0; i < obs.n()*n_gqa; ++i) {
        const auto end = res.begin() + (i + 1)*n_tail;
        std::fill(end - n_hidden[i % obs.n()], end, -INFINITY);
    }
    return res;
}

// Columns of weights [n_rows*n_gqa, n_res] whose products with the attention are the means: one per window, or one per query head.
static std::vector<float> make_weights(const observers & obs, int64_t n_gqa, bool by_query_head) {
    const int64_t n_cols = obs.n()*n_gqa;
    const int64_t n_res  = by_query_head ? n_gqa : obs.n_of.size();

    std::vector<float> res(n_cols*n_res, 0.0f);
    for (int64_t ir = 0; ir < n_res; ++ir) {
        const int64_t n_of = obs.n_of[by_query_head ? 0 : ir];
        for (int64_t ig = 0; ig < n_gqa; ++ig) {
            if (!by_query_head || ig == ir) {
                std::fill_n(res.begin() + ir*n_cols + (ig + 1)*obs.n() - n_of, n_of, 1.0f/float(n_of*(by_query_head ? 1 : n_gqa)));
            }
        }
    }
    return res;
}

// columns of a matrix or the same of a mask, [ne0, n_rows*n_gqa]
static ggml_tensor * columns(ggml_context * ctx, ggml_tensor * cur, int64_t i0, int64_t n) {
    return n == cur->ne[1] ? cur : ggml_view_2d(ctx, cur, cur->ne[0], n, cur->nb[1], i0*cur->nb[1]);
}

// the means over some of the columns: softmax(q k^T), then times the weights, [n_cells, n_res]
static ggml_tensor * build_part(
        ggml_context * ctx, const attention & attn, ggml_tensor * k, ggml_tensor * q, ggml_tensor * mask, ggml_tensor * weights,
        ggml_tensor * sinks, int64_t n_obs, int64_t ih, const part & cur) {
    const float   softcap = attn.softcap;
    const int64_t n_cols  = cur.n_rows*cur.n_gqa;
    const int64_t i_col   = cur.ig0*n_obs + cur.ir0;

    ggml_tensor * kq = ggml_mul_mat(ctx, k, columns(ctx, q, i_col, n_cols)); // [n_cells, n_cols]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    if (softcap > 0.0f) {
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, attn.kq_scale/softcap)), softcap);
    }
    if (mask) {
        kq = ggml_acc_inplace(ctx, kq, columns(ctx, mask, i_col, n_cols), kq->nb[1], kq->nb[2], kq->nb[3], (kq->ne[0] - mask->ne[0])*kq->nb[0]);
    }

    kq = ggml_reshape_3d(ctx, kq, kq->ne[0], cur.n_rows, cur.n_gqa);
    kq = ggml_soft_max_ext(ctx, kq, nullptr, softcap > 0.0f ? 1.0f : attn.kq_scale, 0.0f);
    if (sinks) {
        ggml_soft_max_add_sinks(kq, ggml_view_1d(ctx, sinks, cur.n_gqa, (ih*attn.n_gqa + cur.ig0)*sinks->nb[0]));
    }
    kq = ggml_reshape_2d(ctx, kq, kq->ne[0], n_cols);

    ggml_tensor * w = n_cols == weights->ne[0] ? weights :
        ggml_cont(ctx, ggml_view_2d(ctx, weights, n_cols, weights->ne[1], weights->nb[1], i_col*weights->nb[0]));

    return ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, kq)), w);
}

std::vector<float> llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring) {
    const auto & layer   = seq.get_layers()[i];
    const auto & hparams = lctx.get_model().hparams;
    const auto & pool    = seq.cells[i].pool;
    const auto   obs     = find_observers(seq, scoring.window_sizes);
    const auto   len     = seq.n_cells(i);

    ggml_tensor * queries = seq.observed.queries[i].tensor;

    const attention attn = { llama_kv_ragged_scale(lctx, layer.il), hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f, layer.n_gqa() };

    const int64_t n_gqa     = layer.n_gqa();
    const int64_t n_head_kv = layer.n_head_kv;
    const int64_t n_res     = scoring.by_query_head ? n_gqa : scoring.window_sizes.size();

    const auto parts = make_parts(*std::max_element(len.begin(), len.end()), obs.n(), n_gqa, scoring.n_bytes_max);

    llama_kv_ragged_compute graph(lctx, layer, seq.get_meter(), (16 + 16*parts.size())*(n_head_kv + 1));
    ggml_context * ctx = graph.get_ctx();

    // A learned sink takes a share of every query's attention. Where this backend cannot read the model's tensor, the scores
    // do without: that scales all cells of a query alike.
    ggml_tensor * sinks = layer.sinks && layer.sinks->buffer &&
        ggml_backend_dev_supports_buft(layer.dev, ggml_backend_buffer_get_type(layer.sinks->buffer)) ? layer.sinks : nullptr;

    ggml_tensor * weights = graph.input(GGML_TYPE_F32, obs.n()*n_gqa, n_res);
    ggml_tensor * idxs    = graph.input(GGML_TYPE_I32, obs.n(), n_gqa);

    // before the first compaction all heads hold the same positions
    const int64_t n_masks = seq.cells[i].boundary == 0 ? 1 : n_head_kv;

    std::vector<std::vector<float>> masks;
    std::vector<head_graph> heads(n_head_kv);
    for (int64_t ih = 0; ih < n_head_kv; ++ih) {
        if (ih < n_masks) {
            masks.push_back(make_mask(seq.positions(i, ih), obs, n_gqa));
            heads[ih].mask = masks.back().empty() ? nullptr : graph.input(GGML_TYPE_F32, masks.back().size()/(obs.n()*n_gqa), obs.n()*n_gqa);
        } else {
            heads[ih].mask = heads[0].mask;
        }

        ggml_tensor * k = ggml_view_2d(ctx, pool.k, layer.n_embd_head_k, len[ih], pool.k->nb[1], pool.first[ih]*pool.k->nb[1]);
        ggml_tensor * q = ggml_view_3d(ctx, queries, layer.n_embd_head_k, queries->ne[1], n_gqa,
                queries->nb[1], queries->nb[2], ih*n_gqa*queries->nb[2]);

        q = ggml_reshape_2d(ctx, ggml_get_rows(ctx, q, idxs), layer.n_embd_head_k, obs.n()*n_gqa); // F32

        for (const part & cur : parts) {
            ggml_tensor * sum = build_part(ctx, attn, k, q, heads[ih].mask, weights, sinks, obs.n(), ih, cur);
            heads[ih].sum = heads[ih].sum ? ggml_add(ctx, heads[ih].sum, sum) : sum;
        }
        ggml_set_output(heads[ih].sum);
        graph.expand(heads[ih].sum);
    }

    graph.alloc();

    const auto data = make_weights(obs, n_gqa, scoring.by_query_head);
    ggml_backend_tensor_set(weights, data.data(), 0, ggml_nbytes(weights));
    for (int64_t ig = 0; ig < n_gqa; ++ig) {
        ggml_backend_tensor_set(idxs, obs.rows.data(), ig*idxs->nb[1], idxs->nb[1]);
    }
    for (int64_t ih = 0; ih < n_masks; ++ih) {
        if (heads[ih].mask) {
            ggml_backend_tensor_set(heads[ih].mask, masks[ih].data(), 0, ggml_nbytes(heads[ih].mask));
        }
    }

    graph.compute();

    // the results of one window follow each other, those of query heads kv head by kv head
    const size_t n_plane = std::accumulate(len.begin(), len.end(), size_t(0));

    std::vector<float> res(n_plane*n_res);
    size_t i0 = 0;
    for (int64_t ih = 0; ih < n_head_kv; ++ih) {
        for (int64_t ir = 0; ir < n_res; ++ir) {
            float * dst = res.data() + (scoring.by_query_head ? i0*n_res + ir*len[ih] : ir*n_plane + i0);
            ggml_backend_tensor_get(heads[ih].sum, dst, ir*heads[ih].sum->nb[1], len[ih]*sizeof(float));
        }
        i0 += len[ih];
    }
    return res;
}
