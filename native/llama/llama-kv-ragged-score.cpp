#include "llama-kv-ragged-score.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged-context.h"
#include "llama-kv-ragged-create.h"
#include "llama-model.h"

#include "ggml-cpu/ragged-scores.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace {

// Queries that are asked: rows of the buffer in the order of their positions, so that sums do not depend on its size.
struct observers {
    std::vector<int32_t> rows;
    std::vector<int32_t> pos;

    float weight = 0.0f; // of the attention of each query and query head
    float keep   = 0.0f; // of the scores that are there

    // what a graph computes: means over the last n queries, and their weight
    std::vector<std::pair<int64_t, float>> planes;

    int64_t n() const { return rows.size(); }
};

// Some of the columns of a kv head's attention weights [n_cells, n_rows, n_gqa]: several query heads, or some queries of one.
struct part {
    int64_t ig0, n_gqa;  // query heads
    int64_t ir0, n_rows; // queries
};

// what a layer makes of queries and keys
struct attention {
    float         kq_scale;
    float         softcap;
    int64_t       n_gqa;
    ggml_tensor * sinks; // [n_head], nullptr: none
};

// Heads whose scores are computed together: they hold equally many cells, and their rows have the same distance in the pool.
struct head_group {
    int64_t ih;
    int64_t n;

    ggml_tensor * mask    = nullptr; // F32 [n_tail, n_rows*n_gqa*n] of the last cells, nullptr: every query sees all
    ggml_tensor * weights = nullptr; // F32 [n_rows*n_gqa, n_res, n]; of the largest [1, n_rows*n_gqa, n]
    ggml_tensor * sum     = nullptr; // F32 [n_cells, n_res, n]

    std::vector<float> mask_data;
};

} // namespace

// Heads whose weights fit into this together are computed at once: that saves launches where a head is little work.
static constexpr int64_t N_BYTES_GROUP = 8 << 20;

// where a window of n tokens begins that the newest query ends
static int32_t window_start(const llama_kv_ragged_seq & seq, int32_t n) {
    return seq.observed_end() - n;
}

// Of the largest window. Where drafts that were taken back have displaced all of its queries, the newest one that is left.
static std::vector<int32_t> find_rows(const llama_kv_ragged_seq & seq, const std::vector<int32_t> & sizes) {
    auto res = seq.observed.find(window_start(seq, *std::max_element(sizes.begin(), sizes.end())));
    if (res.empty()) {
        const auto all = seq.observed.find(0);
        res.assign(all.empty() ? all.end() : all.end() - 1, all.end());
    }
    return res;
}

// how many of these each window holds, the last ones, and at least one
static std::vector<int64_t> count_rows(const llama_kv_ragged_seq & seq, const std::vector<int32_t> & sizes, const std::vector<int32_t> & rows) {
    std::vector<int64_t> res;
    for (const int32_t n : sizes) {
        const int32_t start = window_start(seq, n);
        const int64_t held  = std::count_if(rows.begin(), rows.end(), [&](int32_t row) { return seq.observed.pos[row] >= start; });
        res.push_back(std::max<int64_t>(held, !rows.empty()));
    }
    if (seq.n_pos == 0) {
        llama_kv_ragged_refuse("nothing to score, evaluate a prompt first");
    }
    if (*std::min_element(res.begin(), res.end()) == 0) {
        llama_kv_ragged_refuse(format("no query of the %u positions is observed any more, evaluate a prompt first", seq.n_pos));
    }
    return res;
}

static observers make_observers(const llama_kv_ragged_seq & seq, std::vector<int32_t> rows) {
    observers res;
    res.rows = std::move(rows);
    for (const int32_t row : res.rows) {
        res.pos.push_back(seq.observed.pos[row]);
    }
    return res;
}

// those that are in no sum yet; of what is only observed none are
static observers find_unsummed(const llama_kv_ragged_seq & seq, size_t i, int64_t n_gqa) {
    auto rows = seq.observed.find(seq.cells[i].sums.n_pos);
    rows.erase(std::find_if(rows.begin(), rows.end(), [&](int32_t row) { return seq.observed.pos[row] >= int32_t(seq.n_pos); }), rows.end());

    auto res = make_observers(seq, std::move(rows));
    res.weight = 1.0f/float(n_gqa);
    res.keep   = 1.0f;
    res.planes = { { res.n(), res.weight } };
    return res;
}

static observers find_observers(
        const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring, size_t i_window, int64_t n_gqa) {
    if (scoring.reduce == LLAMA_KV_RAGGED_REDUCE_SUM) {
        return find_unsummed(seq, i, n_gqa);
    }
    if (scoring.reduce == LLAMA_KV_RAGGED_REDUCE_REPLAY) {
        return {};
    }
    const auto rows = find_rows(seq, scoring.window_sizes);
    const auto n_of = count_rows(seq, scoring.window_sizes, rows);

    const int64_t n       = n_of[i_window];
    const int64_t n_known = i_window > 0 && n_of[0] <= n ? n_of[0] : 0; // the mean over these is there

    auto res = make_observers(seq, { rows.end() - n, rows.end() - n_known });
    res.weight = 1.0f/float(n*(scoring.by_query_head ? 1 : n_gqa));
    res.keep   = float(n_known)/float(n);
    res.planes = { { res.n(), res.weight } };
    return res;
}

static observers find_all_observers(const llama_kv_ragged_seq & seq, const llama_kv_ragged_scoring & scoring, int64_t n_gqa) {
    const auto rows = find_rows(seq, scoring.window_sizes);

    auto res = make_observers(seq, rows);
    for (const int64_t n : count_rows(seq, scoring.window_sizes, rows)) {
        res.planes.emplace_back(n, 1.0f/float(n*n_gqa));
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

// Columns of weights [n_rows*n_gqa, n_res] whose products with the attention are the means: one per plane, or one per query head.
static std::vector<float> make_weights(const observers & obs, int64_t n_gqa, bool by_query_head) {
    const int64_t n_cols = obs.n()*n_gqa;
    const int64_t n_res  = by_query_head ? n_gqa : obs.planes.size();

    std::vector<float> res(n_cols*n_res, 0.0f);
    for (int64_t ir = 0; ir < n_res; ++ir) {
        const auto & [n, weight] = obs.planes[by_query_head ? 0 : ir];
        for (int64_t ig = 0; ig < n_gqa; ++ig) {
            if (!by_query_head || ig == ir) {
                std::fill_n(res.begin() + ir*n_cols + (ig + 1)*obs.n() - n, n, weight);
            }
        }
    }
    return res;
}

// cells that the query of every column sees, [1, n_rows*n_gqa*n]
static std::vector<float> make_n_seen(const llama_kv_ragged_cells & cells, const head_group & group, int64_t n_cells, const observers & obs,
        int64_t n_gqa) {
    std::vector<float> res;
    for (int64_t i = 0; i < n_gqa*group.n; ++i) {
        for (const int32_t pos : obs.pos) {
            res.push_back(n_cells - n_unseen(cells, group.ih + i/n_gqa, n_cells, pos));
        }
    }
    return res;
}

// columns of a matrix or the same of a mask, [ne0, n_rows*n_gqa, n]; some of them only if n = 1
static ggml_tensor * columns(ggml_context * ctx, ggml_tensor * cur, int64_t i0, int64_t n) {
    return n == cur->ne[1] ? cur : ggml_view_2d(ctx, cur, cur->ne[0], n, cur->nb[1], i0*cur->nb[1]);
}

ggml_tensor * llama_kv_ragged_build_largest(ggml_context * ctx, ggml_tensor * rows) {
    const int64_t n = rows->ne[0];

    ggml_tensor * rest = ggml_scale(ctx, ggml_sum_rows(ctx, rows), 0.0f);
    ggml_tensor * res  = ggml_add(ctx, ggml_pool_2d(ctx, rows, GGML_OP_POOL_MAX, n, 1, n, 1, 0, 0), rest);
    return ggml_reshape_3d(ctx, res, rows->ne[1], 1, rows->ne[2]);
}

ggml_tensor * llama_kv_ragged_build_larger(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    const auto as_row = [&](ggml_tensor * cur) { return ggml_reshape_3d(ctx, cur, 1, cur->ne[0], cur->ne[2]); };
    return llama_kv_ragged_build_largest(ctx, ggml_concat(ctx, as_row(a), as_row(b), 0));
}

// the means over some of the columns: softmax(q k^T), then times the weights, [n_cells, n_res, n]; or the largest after that
static ggml_tensor * build_part(
        ggml_context * ctx, const attention & attn, ggml_tensor * k, ggml_tensor * q, int64_t n_obs, const head_group & group, const part & cur,
        bool largest) {
    const float   softcap = attn.softcap;
    const int64_t n_cols  = cur.n_rows*cur.n_gqa;
    const int64_t i_col   = cur.ig0*n_obs + cur.ir0;

    ggml_tensor * weights = group.weights;
    ggml_tensor * sinks   = attn.sinks;

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
    if (largest) {
        kq = ggml_mul(ctx, kq, columns(ctx, weights, i_col, n_cols));
        return llama_kv_ragged_build_largest(ctx, ggml_cont(ctx, ggml_transpose(ctx, kq)));
    }

    ggml_tensor * w = n_cols == weights->ne[0] ? weights :
        ggml_cont(ctx, ggml_view_2d(ctx, weights, n_cols, weights->ne[1], weights->nb[1], i_col*weights->nb[0]));

    return ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, kq)), w);
}

static attention attention_of(llama_context & lctx, const llama_kv_ragged_layer & layer) {
    const auto & hparams = lctx.get_model().hparams;

    // A learned sink takes a share of every query's attention. Where this backend cannot read the model's tensor, the scores
    // do without: that scales all cells of a query alike.
    ggml_tensor * sinks = layer.sinks && layer.sinks->buffer &&
        ggml_backend_dev_supports_buft(layer.dev, ggml_backend_buffer_get_type(layer.sinks->buffer)) ? layer.sinks : nullptr;

    return { llama_kv_ragged_scale(lctx, layer.il), hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f, layer.n_gqa(), sinks };
}

// in graphs of ggml's ops; with stay, scores stay there
static void score_by_graph(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring, const observers & obs,
        const attention & attn, llama_kv_ragged_workspace & workspace, float * dst, const llama_kv_ragged_score_fn & stay = nullptr) {
    const auto & layer = seq.get_layers()[i];
    const auto & pool  = seq.cells[i].pool;
    const auto   len   = seq.n_cells(i);

    ggml_tensor * queries = seq.observed.queries[i].tensor;

    const int64_t n_gqa     = layer.n_gqa();
    const int64_t n_head_kv = layer.n_head_kv;
    const int64_t n_res     = scoring.by_query_head ? n_gqa : obs.planes.size();

    const int64_t n_cols = obs.n()*n_gqa;
    const int64_t n_most = *std::max_element(len.begin(), len.end());
    if (n_most == 0) {
        return; // a shift may give up all cells of a layer
    }

    const auto parts  = make_parts(n_most, obs.n(), n_gqa, scoring.n_bytes_max);
    auto       groups = make_groups(pool, len, n_most*n_cols*(int64_t) sizeof(float),
            std::min(scoring.n_bytes_max, scoring.n_bytes_group >= 0 ? scoring.n_bytes_group : layer.on_cpu() ? 0 : N_BYTES_GROUP));

    llama_kv_ragged_compute graph(lctx, layer, workspace, (24 + 32*parts.size())*(groups.size() + 1));
    ggml_context * ctx = graph.get_ctx();

    const bool    largest = scoring.reduce == LLAMA_KV_RAGGED_REDUCE_MAX;
    ggml_tensor * weights = largest ? nullptr : graph.input(GGML_TYPE_F32, n_cols, n_res*groups[0].n);
    ggml_tensor * idxs    = graph.input(GGML_TYPE_I32, obs.n(), n_gqa*groups[0].n);

    for (auto & group : groups) {
        const int64_t n_cells = len[group.ih];

        group.mask_data = make_mask(seq.cells[i], group, n_cells, obs, n_gqa);
        group.mask      = group.mask_data.empty() ? nullptr :
            graph.input(GGML_TYPE_F32, group.mask_data.size()/(n_cols*group.n), n_cols*group.n);
        group.weights   = largest ? graph.input(GGML_TYPE_F32, 1, n_cols*group.n) :
            ggml_view_3d(ctx, weights, n_cols, n_res, group.n, weights->nb[1], n_res*weights->nb[1], 0);
        if (largest) {
            group.weights = ggml_reshape_3d(ctx, group.weights, 1, n_cols, group.n);
        }

        ggml_tensor * k = ggml_view_3d(ctx, pool.k, layer.n_embd_head_k, n_cells, group.n,
                pool.k->nb[1], (pool.first[1] - pool.first[0])*pool.k->nb[1], pool.first[group.ih]*pool.k->nb[1]);
        ggml_tensor * q = ggml_view_3d(ctx, queries, layer.n_embd_head_k, queries->ne[1], n_gqa*group.n,
                queries->nb[1], queries->nb[2], group.ih*n_gqa*queries->nb[2]);

        q = ggml_get_rows(ctx, q, ggml_view_2d(ctx, idxs, obs.n(), n_gqa*group.n, idxs->nb[1], 0)); // F32
        q = ggml_reshape_3d(ctx, q, layer.n_embd_head_k, n_cols, group.n);

        for (const part & cur : parts) {
            ggml_tensor * sum = build_part(ctx, attn, k, q, obs.n(), group, cur, largest);
            group.sum = !group.sum ? sum : largest ? llama_kv_ragged_build_larger(ctx, group.sum, sum) : ggml_add(ctx, group.sum, sum);
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
    for (int64_t ih = 0; !largest && ih < groups[0].n; ++ih) {
        ggml_backend_tensor_set(weights, data.data(), ih*n_res*weights->nb[1], n_res*weights->nb[1]);
    }
    for (int64_t ig = 0; ig < n_gqa*groups[0].n; ++ig) {
        ggml_backend_tensor_set(idxs, obs.rows.data(), ig*idxs->nb[1], idxs->nb[1]);
    }
    for (const auto & group : groups) {
        if (largest) {
            const auto n_seen = make_n_seen(seq.cells[i], group, len[group.ih], obs, n_gqa);
            ggml_backend_tensor_set(group.weights, n_seen.data(), 0, ggml_nbytes(group.weights));
        }
        if (group.mask) {
            ggml_backend_tensor_set(group.mask, group.mask_data.data(), 0, ggml_nbytes(group.mask));
        }
    }

    graph.compute();
    if (stay) {
        return;
    }

    llama_kv_ragged_claim claim(seq.get_meter(), obs.keep > 0.0f ? n_most*sizeof(float) : 0);
    std::vector<float>    more(obs.keep > 0.0f ? n_most : 0);
    for (int64_t ih = 0; ih < n_head_kv; ++ih) {
        const auto & group = groups[ih/groups[0].n];
        for (int64_t ir = 0; ir < n_res; ++ir, dst += len[ih]) {
            ggml_backend_tensor_get(group.sum, more.empty() ? dst : more.data(), ir*group.sum->nb[1] + (ih - group.ih)*group.sum->nb[2],
                    len[ih]*sizeof(float));
            for (int64_t ic = 0; !more.empty() && ic < len[ih]; ++ic) {
                dst[ic] = obs.keep*dst[ic] + more[ic];
            }
        }
    }
}

const ggml_ragged_scores_steps * llama_kv_ragged_cpu_steps(const llama_kv_ragged_layer & layer) {
    if (!layer.on_cpu()) {
        return nullptr;
    }
    void * fct = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(layer.dev), GGML_RAGGED_SCORES_PROC);
    if (!fct) {
        llama_kv_ragged_refuse("the CPU backend that was loaded has no scores, it is not the one of this build");
    }
    return ((const ggml_ragged_scores_steps * (*)()) fct)();
}

ggml_tensor * llama_kv_ragged_build_steps(
        ggml_context * ctx, const ggml_ragged_scores_steps & steps, ggml_ragged_scores & p, const std::vector<ggml_tensor *> & reads) {
    const auto node = [&](int64_t n, std::vector<ggml_tensor *> args, ggml_custom_op_t step) {
        args.insert(args.end(), reads.begin(), reads.end());
        return ggml_custom_4d(ctx, GGML_TYPE_F32, n, 1, 1, 1, args.data(), args.size(), step, GGML_N_TASKS_MAX, &p);
    };
    ggml_tensor * work  = node(steps.n_work(&p), {}, steps.scan);
    ggml_tensor * heads = node(1, { work }, steps.combine);
    return node(1, { work, heads }, steps.weigh);
}

static void score_by_steps(
        llama_context & lctx, const llama_kv_ragged_layer & layer, const ggml_ragged_scores_steps & steps, ggml_ragged_scores & p,
        llama_kv_ragged_workspace & workspace) {
    llama_kv_ragged_compute graph(lctx, layer, workspace, 3);

    p.n_threads = std::max(lctx.n_threads(), lctx.n_threads_batch());
    graph.expand(llama_kv_ragged_build_steps(graph.get_ctx(), steps, p, {}));

    graph.alloc();
    graph.compute();
}

size_t llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring, size_t i_window,
        llama_kv_ragged_workspace & workspace, float * dst) {
    const auto & layer = seq.get_layers()[i];
    const auto   len   = seq.n_cells(i);
    const auto   obs   = find_observers(seq, i, scoring, i_window, layer.n_gqa());

    const int64_t n_res = scoring.by_query_head ? layer.n_gqa() : 1;
    const size_t  n_all = std::accumulate(len.begin(), len.end(), int64_t(0))*n_res;
    if (scoring.reduce == LLAMA_KV_RAGGED_REDUCE_SUM) {
        seq.copy_sums(i, dst);
    }
    if (scoring.reduce == LLAMA_KV_RAGGED_REDUCE_REPLAY) {
        seq.copy_replayed(i, dst);
    }
    if (obs.n() == 0 || n_all == 0) {
        return n_all; // both windows hold the same queries, all of them are in the sums, or a replay has asked
    }

    const attention attn = attention_of(lctx, layer);

    std::vector<int64_t> n_hidden;
    std::vector<float *> rows;
    float * end = dst;
    for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
        for (const int32_t pos : obs.pos) {
            n_hidden.push_back(n_unseen(seq.cells[i], ih, len[ih], pos));
        }
        for (int64_t ir = 0; ir < n_res; ++ir, end += len[ih]) {
            rows.push_back(end);
        }
    }

    ggml_ragged_scores p;
    p.k             = seq.cells[i].pool.k;
    p.n_head_kv     = layer.n_head_kv;
    p.n_gqa         = layer.n_gqa();
    p.first         = seq.cells[i].pool.first.data();
    p.n_cells       = len.data();
    p.q             = seq.observed.queries[i].tensor;
    p.n_queries     = obs.n();
    p.rows          = obs.rows.data();
    p.n_hidden      = n_hidden.data();
    p.kq_scale      = attn.kq_scale;
    p.softcap       = attn.softcap;
    p.sinks         = attn.sinks ? (const float *) attn.sinks->data : nullptr;
    p.by_query_head = scoring.by_query_head;
    p.largest       = scoring.reduce == LLAMA_KV_RAGGED_REDUCE_MAX;
    p.weight        = p.largest ? 0.0f : obs.weight;
    p.keep          = obs.keep;
    p.dst           = rows.data();

    const auto * steps = scoring.graph ? nullptr : llama_kv_ragged_cpu_steps(layer);
    if (steps && steps->supports(&p)) {
        score_by_steps(lctx, layer, *steps, p, workspace);
    } else {
        score_by_graph(lctx, seq, i, scoring, obs, attn, workspace, dst);
    }
    return n_all;
}

void llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring,
        llama_kv_ragged_workspace & workspace, const llama_kv_ragged_score_fn & stay) {
    const auto & layer = seq.get_layers()[i];
    score_by_graph(lctx, seq, i, scoring, find_all_observers(seq, scoring, layer.n_gqa()), attention_of(lctx, layer), workspace, nullptr, stay);
}

std::vector<float> llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring) {
    const auto   len      = seq.n_cells(i);
    const size_t n_planes = scoring.window_sizes.size();
    const size_t n_plane  = std::accumulate(len.begin(), len.end(), size_t(0))*(scoring.by_query_head ? seq.get_layers()[i].n_gqa() : 1);

    std::vector<float> res(n_plane*n_planes);
    llama_kv_ragged_workspace workspace(seq.get_meter());
    for (size_t iw = 0; iw < n_planes; ++iw) {
        if (iw > 0) {
            std::copy_n(res.begin(), n_plane, res.begin() + iw*n_plane);
        }
        llama_kv_ragged_score(lctx, seq, i, scoring, iw, workspace, res.data() + iw*n_plane);
    }
    return res;
}
