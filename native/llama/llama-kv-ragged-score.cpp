#include "llama-kv-ragged-score.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged-context.h"
#include "llama-kv-ragged-create.h"
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
    bool    on_cpu;
};

// Heads whose scores are computed together: they hold equally many cells, and their rows have the same distance in the pool.
struct head_group {
    int64_t ih;
    int64_t n;

    ggml_tensor * mask    = nullptr; // F32 [n_tail, n_rows*n_gqa*n] of the last cells, nullptr: every query sees all
    ggml_tensor * weights = nullptr; // F32 [n_rows*n_gqa, n_res, n]
    ggml_tensor * sum     = nullptr; // F32 [n_cells, n_res, n]

    std::vector<float> mask_data;
};

} // namespace

// Heads whose weights fit into this together are computed at once: that saves launches where a head is little work. A CPU launches
// nothing.
static constexpr int64_t N_BYTES_GROUP = 8 << 20;

static observers find_observers(const llama_kv_ragged_seq & seq, const std::vector<int32_t> & window_sizes) {
    const auto start = [&, end = seq.observed_end()](int32_t n) { return end - n; };

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

static std::vector<head_group> make_groups(
        const llama_kv_ragged_pool & pool, const std::vector<int64_t> & len, int64_t n_bytes_head, int64_t n_bytes_group) {
    const int64_t n_head_kv = len.size();

    bool alike = true;
    for (int64_t ih = 1; ih < n_head_kv; ++ih) {
        alike = alike && len[ih] == len[0] && pool.first[ih] - pool.first[ih - 1] == pool.first[1] - pool.first[0];
    }
    const int64_t n_max = alike ? std::clamp<int64_t>(n_bytes_group/n_bytes_head, 1, n_head_kv) : 1;

    std::vector<head_group> res;
    for (int64_t ih = 0; ih < n_head_kv; ih += n_max) {
        res.emplace_back();
        res.back().ih = ih;
        res.back().n  = std::min(n_max, n_head_kv - ih);
    }
    return res;
}

// Cells at the end of a head with n cells that a query does not see: those behind its own position. A query that is older than every
// cell that is left sees all of them, which prefers none.
static int64_t n_unseen(const llama_kv_ragged_cells & cells, int64_t ih, int64_t n, int32_t pos) {
    const auto  & kept    = cells.kept[ih];
    const int64_t n_older = std::upper_bound(kept.begin(), kept.end(), pos) - kept.begin() +
        std::clamp<int64_t>(int64_t(pos) + 1 - cells.boundary, 0, n - kept.size());
    return n_older > 0 ? n - n_older : 0;
}

// 0 or minus infinity for the last n_tail cells, [n_tail, n_rows*n_gqa*n]
static std::vector<float> make_mask(
        const llama_kv_ragged_cells & cells, const head_group & group, int64_t n_cells, const observers & obs, int64_t n_gqa) {
    std::vector<int64_t> n_hidden;
    for (int64_t ih = group.ih; ih < group.ih + group.n; ++ih) {
        for (const int32_t pos : obs.pos) {
            n_hidden.push_back(n_unseen(cells, ih, n_cells, pos));
        }
    }
    const int64_t n_tail = *std::max_element(n_hidden.begin(), n_hidden.end());
    const int64_t n_cols = obs.n()*n_gqa;

    std::vector<float> res(n_tail*n_cols*group.n, 0.0f);
    for (int64_t i = 0; i < n_cols*group.n; ++i) {
        const auto end = res.begin() + (i + 1)*n_tail;
        std::fill(end - n_hidden[i/n_cols*obs.n() + i%obs.n()], end, -INFINITY);
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

// columns of a matrix or the same of a mask, [ne0, n_rows*n_gqa, n]; some of them only if n = 1
static ggml_tensor * columns(ggml_context * ctx, ggml_tensor * cur, int64_t i0, int64_t n) {
    return n == cur->ne[1] ? cur : ggml_view_2d(ctx, cur, cur->ne[0], n, cur->nb[1], i0*cur->nb[1]);
}

// F32 [ne1, ne0, ne2] of [ne0, ne1, ne2] in tiles of 16 x 16, which are whole cache lines on both sides; the CPU's copy goes value by
// value
static void transpose(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const ggml_tensor * src = dst->src[0];

    const int64_t n_rows  = src->ne[1];
    const int64_t n_cells = src->ne[0];
    const int64_t n_tiles = (n_cells + 15)/16;
    for (int64_t it = ith; it < n_tiles*src->ne[2]; it += nth) {
        const float * from = (const float *) src->data + it/n_tiles*n_cells*n_rows;
        float       * to   = (float       *) dst->data + it/n_tiles*n_cells*n_rows;

        const int64_t ic0 = it%n_tiles*16;
        const int64_t ic1 = std::min(n_cells, ic0 + 16);
        for (int64_t ir0 = 0; ir0 < n_rows; ir0 += 16) {
            const int64_t ir1 = std::min(n_rows, ir0 + 16);
            for (int64_t ic = ic0; ic < ic1; ++ic) {
                for (int64_t ir = ir0; ir < ir1; ++ir) {
                    to[ic*n_rows + ir] = from[ir*n_cells + ic];
                }
            }
        }
    }
}

static ggml_tensor * transposed(ggml_context * ctx, ggml_tensor * cur, bool on_cpu) {
    return on_cpu ? ggml_custom_4d(ctx, GGML_TYPE_F32, cur->ne[1], cur->ne[0], cur->ne[2], 1, &cur, 1, transpose, GGML_N_TASKS_MAX, nullptr)
                  : ggml_cont(ctx, ggml_transpose(ctx, cur));
}

// the means over some of the columns: softmax(q k^T), then times the weights, [n_cells, n_res, n]
static ggml_tensor * build_part(
        ggml_context * ctx, const attention & attn, ggml_tensor * k, ggml_tensor * q, ggml_tensor * sinks, int64_t n_obs,
        const head_group & group, const part & cur) {
    const float   softcap = attn.softcap;
    const int64_t n_cols  = cur.n_rows*cur.n_gqa;
    const int64_t i_col   = cur.ig0*n_obs + cur.ir0;

    ggml_tensor * weights = group.weights;

    ggml_tensor * kq = ggml_mul_mat(ctx, k, columns(ctx, q, i_col, n_cols)); // [n_cells, n_cols, n]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    if (softcap > 0.0f) {
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, attn.kq_scale/softcap)), softcap);
    }
    kq = ggml_reshape_2d(ctx, kq, kq->ne[0], n_cols*group.n);
    if (group.mask) {
        kq = ggml_acc_inplace(ctx, kq, columns(ctx, group.mask, i_col, n_cols*group.n), kq->nb[1], kq->nb[2], kq->nb[3],
                (kq->ne[0] - group.mask->ne[0])*kq->nb[0]);
    }

    kq = ggml_reshape_3d(ctx, kq, kq->ne[0], cur.n_rows, cur.n_gqa*group.n);
    kq = ggml_soft_max_ext_inplace(ctx, kq, nullptr, softcap > 0.0f ? 1.0f : attn.kq_scale, 0.0f);
    if (sinks) {
        ggml_soft_max_add_sinks(kq, ggml_view_1d(ctx, sinks, cur.n_gqa*group.n, (group.ih*attn.n_gqa + cur.ig0)*sinks->nb[0]));
    }
    kq = ggml_reshape_3d(ctx, kq, kq->ne[0], n_cols, group.n);

    ggml_tensor * w = n_cols == weights->ne[0] ? weights :
        ggml_cont(ctx, ggml_view_2d(ctx, weights, n_cols, weights->ne[1], weights->nb[1], i_col*weights->nb[0]));

    return ggml_mul_mat(ctx, transposed(ctx, kq, attn.on_cpu), w);
}

size_t llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring,
        llama_kv_ragged_workspace & workspace, float * dst, size_t n_stride, const llama_kv_ragged_score_fn & stay) {
    const auto & layer   = seq.get_layers()[i];
    const auto & hparams = lctx.get_model().hparams;
    const auto & pool    = seq.cells[i].pool;
    const auto   obs     = find_observers(seq, scoring.window_sizes);
    const auto   len     = seq.n_cells(i);

    ggml_tensor * queries = seq.observed.queries[i].tensor;

    const attention attn = { llama_kv_ragged_scale(lctx, layer.il), hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f, layer.n_gqa(),
        layer.on_cpu() };

    const int64_t n_gqa     = layer.n_gqa();
    const int64_t n_head_kv = layer.n_head_kv;
    const int64_t n_res     = scoring.by_query_head ? n_gqa : scoring.window_sizes.size();

    const int64_t n_cols = obs.n()*n_gqa;
    const int64_t n_most = *std::max_element(len.begin(), len.end());

    const auto parts  = make_parts(n_most, obs.n(), n_gqa, scoring.n_bytes_max);
    auto       groups = make_groups(pool, len, n_most*n_cols*(int64_t) sizeof(float), std::min(scoring.n_bytes_max,
            scoring.n_bytes_group >= 0 ? scoring.n_bytes_group : attn.on_cpu ? 0 : N_BYTES_GROUP));

    llama_kv_ragged_compute graph(lctx, layer, workspace, (24 + 20*parts.size())*(groups.size() + 1));
    ggml_context * ctx = graph.get_ctx();

    // A learned sink takes a share of every query's attention. Where this backend cannot read the model's tensor, the scores
    // do without: that scales all cells of a query alike.
    ggml_tensor * sinks = layer.sinks && layer.sinks->buffer &&
        ggml_backend_dev_supports_buft(layer.dev, ggml_backend_buffer_get_type(layer.sinks->buffer)) ? layer.sinks : nullptr;

    ggml_tensor * weights = graph.input(GGML_TYPE_F32, n_cols, n_res*groups[0].n);
    ggml_tensor * idxs    = graph.input(GGML_TYPE_I32, obs.n(), n_gqa*groups[0].n);

    for (auto & group : groups) {
        const int64_t n_cells = len[group.ih];

        group.mask_data = make_mask(seq.cells[i], group, n_cells, obs, n_gqa);
        group.mask      = group.mask_data.empty() ? nullptr :
            graph.input(GGML_TYPE_F32, group.mask_data.size()/(n_cols*group.n), n_cols*group.n);
        group.weights   = ggml_view_3d(ctx, weights, n_cols, n_res, group.n, weights->nb[1], n_res*weights->nb[1], 0);

        ggml_tensor * k = ggml_view_3d(ctx, pool.k, layer.n_embd_head_k, n_cells, group.n,
                pool.k->nb[1], (pool.first[1] - pool.first[0])*pool.k->nb[1], pool.first[group.ih]*pool.k->nb[1]);
        ggml_tensor * q = ggml_view_3d(ctx, queries, layer.n_embd_head_k, queries->ne[1], n_gqa*group.n,
                queries->nb[1], queries->nb[2], group.ih*n_gqa*queries->nb[2]);

        q = ggml_get_rows(ctx, q, ggml_view_2d(ctx, idxs, obs.n(), n_gqa*group.n, idxs->nb[1], 0)); // F32
        q = ggml_reshape_3d(ctx, q, layer.n_embd_head_k, n_cols, group.n);

        for (const part & cur : parts) {
            ggml_tensor * sum = build_part(ctx, attn, k, q, sinks, obs.n(), group, cur);
            group.sum = group.sum ? ggml_add(ctx, group.sum, sum) : sum;
        }
        if (stay) {
            stay(graph, group.sum, group.ih);
            continue;
        }
        ggml_set_output(group.sum);
        graph.expand(group.sum);
    }

    graph.alloc();

    const auto data = make_weights(obs, n_gqa, scoring.by_query_head);
    for (int64_t ih = 0; ih < groups[0].n; ++ih) {
        ggml_backend_tensor_set(weights, data.data(), ih*n_res*weights->nb[1], n_res*weights->nb[1]);
    }
    for (int64_t ig = 0; ig < n_gqa*groups[0].n; ++ig) {
        ggml_backend_tensor_set(idxs, obs.rows.data(), ig*idxs->nb[1], idxs->nb[1]);
    }
    for (const auto & group : groups) {
        if (group.mask) {
            ggml_backend_tensor_set(group.mask, group.mask_data.data(), 0, ggml_nbytes(group.mask));
        }
    }

    graph.compute();
    if (stay) {
        return 0;
    }

    // the results of one window follow each other, those of query heads kv head by kv head
    size_t i0 = 0;
    for (int64_t ih = 0; ih < n_head_kv; ++ih) {
        for (int64_t ir = 0; ir < n_res; ++ir) {
            float * own = dst + (scoring.by_query_head ? i0*n_res + ir*len[ih] : ir*n_stride + i0);
            const auto & group = groups[ih/groups[0].n];
            ggml_backend_tensor_get(group.sum, own, ir*group.sum->nb[1] + (ih - group.ih)*group.sum->nb[2], len[ih]*sizeof(float));
        }
        i0 += len[ih];
    }
    return i0*(scoring.by_query_head ? n_res : 1);
}

std::vector<float> llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring) {
    const auto   len      = seq.n_cells(i);
    const size_t n_stride = std::accumulate(len.begin(), len.end(), size_t(0));
    const size_t n_res    = scoring.by_query_head ? seq.get_layers()[i].n_gqa() : scoring.window_sizes.size();

    std::vector<float> res(n_stride*n_res);
    llama_kv_ragged_workspace workspace(seq.get_meter());
    llama_kv_ragged_score(lctx, seq, i, scoring, workspace, res.data(), n_stride);
    return res;
}
