#include "llama-kv-ragged-compact.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-compute.h"
#include "policy/wkv-threads.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>

int64_t llama_kv_ragged_plan::n_released() const {
    return std::accumulate(before.begin(), before.end(), int64_t(0)) - std::accumulate(after.begin(), after.end(), int64_t(0));
}

int64_t llama_kv_ragged_plan::n_released(size_t i) const {
    int64_t res = 0;
    for (size_t ih = i*n_head_kv; ih < (i + 1)*n_head_kv; ++ih) {
        res += before[ih] - after[ih];
    }
    return res;
}

//
// llama_kv_ragged_choice
//

llama_kv_ragged_choice::llama_kv_ragged_choice(
        llama_context & lctx, const llama_kv_ragged_seq & seq, const llama_kv_ragged_scoring & scoring) :
    cells(seq.n_cells()), keep(cells.data(), cells.size()), lctx(lctx), seq(seq), scoring(scoring), claim(seq.get_meter()) {
}

float * llama_kv_ragged_choice::score(size_t il0, size_t il1, size_t i_window) {
    const auto & layers = seq.get_layers();

    const auto   first   = cells.begin() + il0*layers[0].n_head_kv;
    const auto   last    = cells.begin() + il1*layers[0].n_head_kv;
    const size_t n_cells = std::accumulate(first, last, size_t(0))*(scoring.by_query_head ? layers[0].n_gqa() : 1);

    // host memory of a compaction is part of the peak
    const size_t n_before = scores.size();
    claim.add(int64_t(n_cells*sizeof(float)) - int64_t(n_before*sizeof(float)));
    if (n_cells != n_before) {
        GGML_ASSERT(i_window == 0);
        scores = {}; // before there is another one
        scores.resize(n_cells, 0.0f);
    }
    if (scoring.window_sizes.empty()) {
        return scores.data();
    }

    const int64_t t_start_us = ggml_time_us();

    if (!workspace) {
        workspace = std::make_unique<llama_kv_ragged_workspace>(seq.get_meter());
    }
    float * dst = scores.data();
    for (size_t i = il0; i < il1; ++i) {
        dst += llama_kv_ragged_score(lctx, seq, i, scoring, i_window, *workspace, dst);
    }

    if (il1 == layers.size()) {
        workspace.reset();
    }
    t_score_us += ggml_time_us() - t_start_us;
    return scores.data();
}

void llama_kv_ragged_choice::drop_scores() {
    claim.set(0);
    scores = {};
}

void llama_kv_ragged_choice::score(size_t il, const llama_kv_ragged_score_fn & stay) {
    const int64_t t_start_us = ggml_time_us();

    if (!workspace) {
        workspace = std::make_unique<llama_kv_ragged_workspace>(seq.get_meter());
    }
    llama_kv_ragged_score(lctx, seq, il, scoring, *workspace, stay);

    if (il + 1 == seq.get_layers().size()) {
        workspace.reset();
    }
    t_score_us += ggml_time_us() - t_start_us;
}

int32_t llama_kv_ragged_choice::n_threads() const {
    // a thread needs memory for the head it is at: 1/64 of the heads take a quarter of a byte for every cell at most
    return std::clamp<int64_t>(lctx.n_threads_batch(), 1, std::max<int64_t>(1, cells.size()/64));
}

llama_kv_ragged_plan llama_kv_ragged_make_plan(
        llama_context & lctx, const llama_kv_ragged_seq & seq, const llama_kv_ragged_request & request) {
    const auto & layers  = seq.get_layers();
    const auto & scoring = request.scoring;

    for (const auto & layer : layers) {
        if (scoring.by_query_head && (scoring.window_sizes.size() > 1 || layer.n_gqa() != layers[0].n_gqa())) {
            llama_kv_ragged_refuse_unsupported(format("scores by query head need one observation window, and as many query heads in all layers: "
                    "layer %u has %" PRId64 ", layer %u %" PRId64, layers[0].il, layers[0].n_head, layer.il, layer.n_head));
        }
    }

    llama_kv_ragged_plan res;
    res.n_head_kv = layers[0].n_head_kv;
    res.before    = seq.n_cells();
    res.claim     = std::make_unique<llama_kv_ragged_claim>(seq.get_meter(), wkv::marks::n_bytes(res.before.data(), res.before.size()));

    lctx.synchronize();

    const int64_t t_start_us = ggml_time_us();

    llama_kv_ragged_choice choice(lctx, seq, scoring);
    request.select(choice);

    res.keep = std::move(choice.keep);
    for (size_t i = 0; i < res.before.size(); ++i) {
        res.after.push_back(res.keep.count(i));
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto * n = res.after.data() + i*res.n_head_kv;
        if (std::any_of(n, n + res.n_head_kv, [&](int32_t cur) { return cur != *n; })) {
            layers[i].check_ragged();
        }
    }

    res.t_score_ms  = choice.get_t_score_us()/1000.0;
    res.t_select_ms = (ggml_time_us() - t_start_us - choice.get_t_score_us())/1000.0;
    return res;
}

// the I32 alias of a pool: get_rows then copies the bytes of any cell type
static ggml_tensor * alias_i32(ggml_context * ctx, ggml_tensor * pool) {
    ggml_tensor * res = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, pool->nb[1]/sizeof(int32_t), pool->ne[1]);
    ggml_backend_tensor_alloc(pool->buffer, res, pool->data);
    return res;
}

// dst row i = src row rows[i], on the backend
static void move_rows(
        llama_context & lctx, const llama_kv_ragged_layer & layer, const llama_kv_ragged_pool & src, const llama_kv_ragged_pool & dst,
        const std::vector<int32_t> & rows, llama_kv_ragged_meter & meter) {
    llama_kv_ragged_workspace workspace(meter);
    llama_kv_ragged_compute   graph(lctx, layer, workspace, 8);

    ggml_tensor * idxs = graph.input(GGML_TYPE_I32, rows.size());
    for (const auto & [from, to] : { std::make_pair(src.k, dst.k), std::make_pair(src.v, dst.v) }) {
        ggml_tensor * cur = ggml_get_rows(graph.get_ctx(), alias_i32(graph.get_ctx(), from), idxs);
        ggml_backend_tensor_alloc(to->buffer, cur, to->data);
        graph.expand(cur);
    }

    graph.alloc();
    ggml_backend_tensor_set(idxs, rows.data(), 0, ggml_nbytes(idxs));
    graph.compute();
}

// the same through the host: quantised rows of some head sizes do not end on four bytes
static void move_rows_by_host(
        const llama_kv_ragged_pool & src, const llama_kv_ragged_pool & dst, const std::vector<int32_t> & rows, llama_kv_ragged_meter & meter) {
    for (const auto & [from, to] : { std::make_pair(src.k, dst.k), std::make_pair(src.v, dst.v) }) {
        const size_t n_row = from->nb[1];

        llama_kv_ragged_claim claim(meter, ggml_nbytes(from) + ggml_nbytes(to));

        std::vector<uint8_t> data_from(ggml_nbytes(from));
        std::vector<uint8_t> data_to  (ggml_nbytes(to));
        ggml_backend_tensor_get(from, data_from.data(), 0, data_from.size());
        for (size_t i = 0; i < rows.size(); ++i) {
            std::copy_n(data_from.begin() + rows[i]*n_row, n_row, data_to.begin() + i*n_row);
        }
        ggml_backend_tensor_set(to, data_to.data(), 0, data_to.size());
    }
}

// The same in memory of the host: what stays in a row is copied in a row, by threads. Rows that are not used become zero.
static void move_rows_on_cpu(
        llama_context & lctx, const llama_kv_ragged_pool & src, const llama_kv_ragged_pool & dst, const wkv::marks & keep, size_t i_head,
        size_t n_heads) {
    const auto move = [&](size_t i) {
        const ggml_tensor * from = i%2 == 0 ? src.k : src.v;
        const ggml_tensor * to   = i%2 == 0 ? dst.k : dst.v;

        const size_t n_row = from->nb[1];
        const char * own   = (const char *) from->data + src.first[i/2]*n_row;
        char       * next  = (char       *) to->data   + dst.first[i/2]*n_row;
        keep.for_runs(i_head + i/2, [&](int32_t i0, int32_t i1) {
            next = std::copy(own + i0*n_row, own + i1*n_row, next);
        });
        std::fill(next, (char *) to->data + dst.first[i/2 + 1]*n_row, 0);
    };
    // a thread takes longer to start than a MiB to copy
    const int64_t n_worth = int64_t(ggml_nbytes(dst.k) + ggml_nbytes(dst.v)) >> 20;
    wkv::for_each(std::clamp<int64_t>(n_worth, 1, lctx.n_threads_batch()), 2*n_heads, move);
}

// The same where every head keeps its rows: cells move towards its first one, what is behind them stays as it is. By one thread, as
// nothing may fail halfway.
static void move_rows_in_place(const llama_kv_ragged_pool & pool, const wkv::marks & keep, size_t i_head, size_t n_heads) {
    for (const ggml_tensor * cur : { pool.k, pool.v }) {
        for (size_t ih = 0; ih < n_heads; ++ih) {
            const size_t n_row = cur->nb[1];
            char       * own   = (char *) cur->data + pool.first[ih]*n_row;
            char       * next  = own;
            keep.for_runs(i_head + ih, [&](int32_t i0, int32_t i1) {
                memmove(next, own + i0*n_row, (i1 - i0)*n_row);
                next += (i1 - i0)*n_row;
            });
        }
    }
}

// numbers go with their cells; those of cells that have none are not kept
static llama_kv_ragged_carried gather_carried(const llama_kv_ragged_carried & src, const llama_kv_ragged_plan & plan, size_t i_head) {
    llama_kv_ragged_carried res;
    res.n_pos = src.n_pos;
    res.heads.resize(src.heads.size());
    for (size_t ih = 0; ih < res.heads.size(); ++ih) {
        const auto & own = src.heads[ih];
        plan.keep.for_runs(i_head + ih, [&](int32_t i0, int32_t i1) {
            const int32_t n = own.size();
            res.heads[ih].insert(res.heads[ih].end(), own.begin() + std::min(i0, n), own.begin() + std::min(i1, n));
        });
    }
    return res;
}

// what stays of a layer, without its rows
static llama_kv_ragged_cells gather_positions(const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_plan & plan) {
    llama_kv_ragged_cells res;
    res.kept.resize(seq.cells[i].kept.size());
    res.boundary = seq.n_pos;
    for (size_t ih = 0; ih < res.kept.size(); ++ih) {
        const size_t i_head = i*plan.n_head_kv + ih;

        auto & kept = res.kept[ih];
        kept.reserve(plan.after[i_head]);
        plan.keep.for_runs(i_head, [&](int32_t i0, int32_t i1) {
            for (int32_t ic = i0; ic < i1; ++ic) {
                kept.push_back(seq.cells[i].position(ih, ic));
            }
        });
        GGML_ASSERT(int64_t(kept.size()) == plan.after[i_head]);
    }
    res.sums     = gather_carried(seq.cells[i].sums,     plan, i*plan.n_head_kv);
    res.replayed = gather_carried(seq.cells[i].replayed, plan, i*plan.n_head_kv);
    return res;
}

// rows that the heads of a layer are given, with room for what comes next
static std::vector<int64_t> capacity_after(const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_plan & plan) {
    const auto & layer = seq.get_layers()[i];

    const auto n_after = plan.after.begin() + i*plan.n_head_kv;

    const std::vector<int64_t> len_next(n_after, n_after + layer.n_head_kv);

    const int64_t n_mean  = std::accumulate(plan.after.begin(), plan.after.end(), int64_t(0))/int64_t(plan.after.size());
    const bool    uniform = std::all_of(len_next.begin(), len_next.end(), [&](int64_t n) { return n == len_next[0]; });
    const int64_t slack   = std::max<int64_t>({ 1, llama_kv_ragged_seq::n_slack_compacted(uniform, n_mean), seq.n_room });

    return layer.capacity(len_next, slack, true);
}

llama_kv_ragged_cells llama_kv_ragged_gather(
        llama_context & lctx, llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_plan & plan) {
    const auto & layer = seq.get_layers()[i];
    const auto & pool  = seq.cells[i].pool;
    const auto   cap   = capacity_after(seq, i, plan);

    llama_kv_ragged_cells res = gather_positions(seq, i, plan);

    llama_kv_ragged_claim claim_carried(seq.get_meter(), res.n_bytes_carried()); // the old ones are there too until the rows have moved

    bool same_rows = layer.on_cpu();
    for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
        same_rows = same_rows && pool.cap(ih) == cap[ih];
    }
    if (same_rows) {
        move_rows_in_place(pool, plan.keep, i*plan.n_head_kv, plan.n_head_kv);
        res.pool = std::move(seq.cells[i].pool); // nothing fails from here on
        return res;
    }

    res.pool = layer.make_pool(cap, seq.get_meter(), !layer.on_cpu());
    if (layer.on_cpu()) {
        move_rows_on_cpu(lctx, pool, res.pool, plan.keep, i*plan.n_head_kv, plan.n_head_kv);
        return res;
    }

    // unused rows have to be finite: between heads they repeat a valid one, behind the last cell they are zero
    const int64_t n_rows = res.pool.first[layer.n_head_kv - 1] + plan.after[(i + 1)*plan.n_head_kv - 1];

    llama_kv_ragged_claim claim(seq.get_meter(), n_rows*sizeof(int32_t));
    std::vector<int32_t>  rows(n_rows, 0);
    for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
        auto next = rows.begin() + res.pool.first[ih];
        plan.keep.for_runs(i*plan.n_head_kv + ih, [&](int32_t i0, int32_t i1) {
            for (int32_t ic = i0; ic < i1; ++ic) {
                *next++ = pool.first[ih] + ic;
            }
        });
    }

    if (pool.k->nb[1] % sizeof(int32_t) == 0 && pool.v->nb[1] % sizeof(int32_t) == 0) {
        move_rows(lctx, layer, pool, res.pool, rows, seq.get_meter());
    } else {
        move_rows_by_host(pool, res.pool, rows, seq.get_meter());
    }
    return res;
}

//
// llama_kv_cache_ragged
//

void llama_kv_cache_ragged::accumulate(llama_context & lctx) {
    llama_kv_ragged_scoring scoring;
    scoring.window_sizes.push_back(seq.observed.n_observed);
    scoring.reduce = LLAMA_KV_RAGGED_REDUCE_SUM;

    lctx.synchronize();

    for (size_t i = 0; i < layers.size(); ++i) {
        if (seq.cells[i].sums.n_pos < seq.n_pos) {
            const auto n_cells = seq.n_cells(i);

            // what is scored, and the sums that it becomes, beside those so far
            llama_kv_ragged_claim claim(stats.meter, 2*sizeof(float)*std::accumulate(n_cells.begin(), n_cells.end(), int64_t(0)));
            seq.set_sums(i, llama_kv_ragged_score(lctx, seq, i, scoring)); // if it fails, the layers before are done
        }
    }
}

int64_t llama_kv_cache_ragged::compact(llama_context & lctx, const llama_kv_ragged_request & request) {
    check_closed();

    const llama_kv_ragged_while guard(selecting);

    const auto plan = llama_kv_ragged_make_plan(lctx, seq, request);
    if (plan.n_released() == 0) {
        seq.end_prompt();
        return 0;
    }
    commit(lctx, plan);
    return plan.n_released();
}

void llama_kv_cache_ragged::commit(llama_context & lctx, const llama_kv_ragged_plan & plan) {
    const int64_t t_start_us   = ggml_time_us();
    const int64_t bytes_before = stats.meter.live;

    size_t      i     = 0;
    bool        moved = false;
    char        error[256] = ""; // memory may have run out
    try {
        for (; i < layers.size(); ++i) {
            if (plan.n_released(i) == 0 && seq.cells[i].boundary == seq.n_pos) {
                continue; // done by a call that found no memory for the rest
            }
            seq.compact(i, llama_kv_ragged_gather(lctx, seq, i, plan));
            epoch++;
            moved = true;
        }
    } catch (const std::exception & err) {
        if (i == 0) {
            throw;
        }
        snprintf(error, sizeof(error), "%s", llama_kv_ragged_reason(err));
    }

    if (moved) {
        seq.end_prompt();
        llama_kv_ragged_trim();

        stats.n_compactions++;
        stats.bytes_released = bytes_before - stats.meter.live;
        stats.t_score_ms     = plan.t_score_ms;
        stats.t_select_ms    = plan.t_select_ms;
        stats.t_gather_ms    = (ggml_time_us() - t_start_us)/1000.0;
    }

    LLAMA_LOG_DEBUG("%s: %zu of %zu layers compacted at position %u (%.2f MiB), scored in %.1f ms, selected in %.1f ms, moved in %.1f ms\n",
            __func__, i, layers.size(), seq.n_pos, stats.bytes_released/1024.0/1024.0,
            stats.t_score_ms, stats.t_select_ms, stats.t_gather_ms);

    if (i < layers.size()) {
        throw std::runtime_error(format("%s. The compaction is half done: the layers before layer %u are compacted, %zu of %zu, and the "
                    "others hold all their cells. The cache can be used as it is; compact again, with more free memory or for fewer cells, "
                    "to complete it", error, layers[i].il, i, layers.size()));
    }
}
