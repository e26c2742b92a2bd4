#include "llama-kv-ragged-replay.h"

#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-score.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

llama_kv_ragged_replay::llama_kv_ragged_replay(const llama_kv_ragged_seq & seq, int32_t p0, int32_t p1, int32_t n_tokens) :
    p0(p0), p1(p1), n_tokens(n_tokens), n_held(seq.n_pos), n_sink(llama_kv_ragged_seq::N_SINK), layers(&seq.get_layers()) {
    if (p0 < 0 || p1 <= p0 || p1 > int64_t(seq.n_pos)) {
        throw std::invalid_argument(format("the positions %d to %d cannot be replayed, expected some of the %u that there are", p0, p1 - 1, seq.n_pos));
    }
    for (size_t i = 0; i < layers->size(); ++i) {
        for (int64_t ih = 0; ih < (*layers)[i].n_head_kv; ++ih) {
            const int64_t before = seq.cells[i].find(ih, p0);
            if (int64_t(seq.cells[i].find(ih, p1)) - before != p1 - p0) {
                throw std::invalid_argument(format("layer %u, kv head %d has lost cells of the positions %d to %d, which cannot be replayed any more",
                            (*layers)[i].il, int(ih), p0, p1 - 1));
            }
            n_sink = std::min(n_sink, before);
        }
    }
    for (const auto & layer : *layers) {
        scores.push_back(llama_kv_ragged_tensor::make(layer.buft, GGML_TYPE_F32, { p1 - p0, layer.n_head_kv, 1 },
                    format("ragged_replay_l%u", layer.il).c_str(), seq.get_meter()));
        if (scores.back().empty()) {
            llama_kv_ragged_refuse(format("no memory for the scores of %d replayed positions in layer %u", p1 - p0, layer.il));
        }
    }
}

void llama_kv_ragged_replay::set_rows(const llama_kv_ragged_seq & seq, size_t i, int32_t * rows) const {
    const auto & cells = seq.cells[i];
    for (size_t ih = 0; ih < cells.kept.size(); ++ih) {
        const auto run = [&](int64_t ic, int64_t n) {
            for (int64_t j = 0; j < n; ++j) {
                *rows++ = cells.pool.first[ih] + ic + j;
            }
        };
        run(cells.find(ih, p0), p1 - p0);
        run(0, n_sink);
        run(cells.find(ih, n_held), seq.n_pos - n_held);
    }
}

void llama_kv_ragged_replay::set_mask(uint32_t n_pos, int64_t n_tokens, float * mask) const {
    const int64_t n = n_keys(n_pos);
    for (int64_t t = 0; t < n_tokens; ++t) {
        const int64_t n_seen = n - n_tokens + t + 1;
        std::fill(mask + t*n, mask + t*n + n_seen, 0.0f);
        std::fill(mask + t*n + n_seen, mask + (t + 1)*n, -INFINITY);
    }
}

void llama_kv_ragged_replay::build(
        const llm_graph_context & g,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * rows,
        ggml_tensor  * mask,
        ggml_tensor  * sinks,
        float          kq_scale,
        float          softcap,
        size_t         i) {
    ggml_context * ctx = g.ctx0;

    ggml_tensor * res = scores[i].tensor;

    const int64_t n         = p1 - p0;
    const int64_t n_tokens  = q->ne[1];
    const int64_t n_head_kv = res->ne[1];
    const int64_t n_gqa     = q->ne[2]/n_head_kv;

    ggml_tensor * keys = ggml_reshape_3d(ctx, ggml_get_rows(ctx, k, rows), k->ne[0], rows->ne[0]/n_head_kv, n_head_kv); // F32

    if (ggml_tensor * done = build_on_cpu(g, q, keys, sinks, kq_scale, softcap, i)) {
        ggml_build_forward_expand(g.gf, done);
        return;
    }

    ggml_tensor * kq = ggml_mul_mat(ctx, keys, q); // [n_keys, n_tokens, n_head]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    if (softcap > 0.0f) {
        kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, kq_scale/softcap)), softcap);
    }
    kq = ggml_soft_max_ext(ctx, kq, mask, softcap > 0.0f ? 1.0f : kq_scale, 0.0f);
    ggml_soft_max_add_sinks(kq, sinks);

    // [n_tokens*n_gqa, n, n_head_kv]
    ggml_tensor * cur = ggml_view_4d(ctx, kq, n, n_tokens, n_gqa, n_head_kv, kq->nb[1], kq->nb[2], n_gqa*kq->nb[2], 0);
    cur = ggml_cont(ctx, ggml_permute(ctx, cur, 2, 0, 1, 3));
    cur = ggml_reshape_3d(ctx, cur, n_tokens*n_gqa, n, n_head_kv);
    cur = llama_kv_ragged_build_largest(ctx, cur);

    ggml_tensor * held = ggml_reshape_3d(ctx, res, n, 1, n_head_kv);
    cur = llama_kv_ragged_build_larger(ctx, cur, held);
    ggml_build_forward_expand(g.gf, ggml_cpy(ctx, cur, held));
}

// in the steps of the CPU backend, without a tensor of weights; nullptr for a layer on a device
ggml_tensor * llama_kv_ragged_replay::build_on_cpu(
        const llm_graph_context & g, ggml_tensor * q, ggml_tensor * keys, ggml_tensor * sinks, float kq_scale, float softcap, size_t i) {
    ggml_context * ctx = g.ctx0;

    const auto & layer = (*layers)[i];
    const auto * steps = llama_kv_ragged_cpu_steps(layer);
    if (!steps) {
        return nullptr;
    }
    ggml_tensor * res = scores[i].tensor;

    const int64_t n_keys   = keys->ne[1];
    const int64_t n_tokens = q->ne[1];

    on_cpu.emplace_back();
    auto & cur = on_cpu.back();
    for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
        cur.first.push_back(ih*n_keys);
        cur.n_cells.push_back(n_keys);
        cur.dst.push_back((float *) res->data + ih*res->ne[0]);
        for (int64_t t = 0; t < n_tokens; ++t) {
            cur.n_hidden.push_back(n_tokens - t - 1);
        }
    }
    cur.rows.resize(n_tokens);
    std::iota(cur.rows.begin(), cur.rows.end(), 0);

    auto & p = cur.p;
    ggml_tensor * q_f16 = ggml_cast(ctx, q, GGML_TYPE_F16);

    p.k             = ggml_reshape_2d(ctx, keys, keys->ne[0], n_keys*layer.n_head_kv);
    p.n_head_kv     = layer.n_head_kv;
    p.n_gqa         = layer.n_gqa();
    p.first         = cur.first.data();
    p.n_cells       = cur.n_cells.data();
    p.q             = q_f16;
    p.n_queries     = n_tokens;
    p.rows          = cur.rows.data();
    p.n_hidden      = cur.n_hidden.data();
    p.kq_scale      = kq_scale;
    p.softcap       = softcap;
    p.sinks         = sinks && ggml_backend_buffer_is_host(sinks->buffer) ? (const float *) sinks->data : nullptr;
    p.by_query_head = false;
    p.largest       = true;
    p.weight        = 1.0f;
    p.keep          = 1.0f;
    p.dst           = cur.dst.data();
    p.n_scored      = res->ne[0];
    p.n_piece       = 128;
    p.n_threads     = std::max(g.cparams.n_threads, g.cparams.n_threads_batch);

    // the steps read these two where they lie, so that they may not be computed on a device beside, which the scheduler would copy from
    ggml_backend_sched_set_tensor_backend(g.sched, keys->view_src, g.backend_cpu);
    ggml_backend_sched_set_tensor_backend(g.sched, q_f16, g.backend_cpu);
    return llama_kv_ragged_build_steps(ctx, *steps, p, { const_cast<ggml_tensor *>(p.k), q_f16 });
}

void llama_kv_ragged_replay::give(llama_kv_ragged_seq & seq) const {
    GGML_ASSERT(seq.n_pos == n_held);

    std::vector<float> data;
    for (size_t i = 0; i < scores.size(); ++i) {
        data.resize(ggml_nelements(scores[i].tensor));
        ggml_backend_tensor_get(scores[i].tensor, data.data(), 0, ggml_nbytes(scores[i].tensor));
        seq.set_replayed(i, p0, p1, data.data());
    }
}
