#include "llama-kv-ragged-compact.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-compute.h"

#include <algorithm>
#include <cinttypes>
#include <new>
#include <numeric>
#include <stdexcept>

int64_t llama_kv_ragged_plan::n_released() const {
    return std::accumulate(before.begin(), before.end(), int64_t(0)) - std::accumulate(after.begin(), after.end(), int64_t(0));
}

namespace {

// nothing else changes the cache while a selection looks at it
struct busy_guard {
    llama_kv_cache_ragged & kv;

    explicit busy_guard(llama_kv_cache_ragged & kv) : kv(kv) { kv.check_idle(); kv.set_busy(true); }
    ~busy_guard() { kv.set_busy(false); }
};

} // namespace

llama_kv_ragged_plan llama_kv_ragged_make_plan(llama_kv_cache_ragged & kv, llama_context & lctx, const llama_kv_ragged_request & request) {
    const auto & layers = kv.get_layers();
    const auto & seq    = kv.get_seq();

    llama_kv_ragged_plan res;
    res.before = seq.n_cells();

    const size_t  n_cells   = std::accumulate(res.before.begin(), res.before.end(), size_t(0));
    const int64_t n_head_kv = layers[0].n_head_kv;
    const size_t  n_rep     = request.scoring.by_query_head ? layers[0].n_gqa() : 1;
    const size_t  n_planes  = std::max<size_t>(1, request.scoring.window_sizes.size());

    for (const auto & layer : layers) {
        if (request.scoring.by_query_head && (n_planes > 1 || layer.n_gqa() != layers[0].n_gqa())) {
            llama_kv_ragged_refuse_unsupported(format("scores by query head need one observation window, and as many query heads in all layers: "
                    "layer %u has %" PRId64 ", layer %u %" PRId64, layers[0].il, layers[0].n_head, layer.il, layer.n_head));
        }
    }

    // host memory of the selection is part of the peak
    llama_kv_ragged_claim claim(kv.get_meter(), n_cells*(sizeof(int32_t) + n_rep*n_planes*sizeof(float) + sizeof(uint8_t) + request.n_bytes_cell));

    lctx.synchronize();

    const int64_t t_start_us = ggml_time_us();

    std::vector<int32_t> pos;
    pos.reserve(n_cells);
    std::vector<float> scores(n_cells*n_rep*n_planes, 0.0f);
    for (size_t i = 0; i < layers.size(); ++i) {
        const size_t i0 = pos.size();
        for (int64_t ih = 0; ih < n_head_kv; ++ih) {
            const auto cur = seq.positions(i, ih);
            pos.insert(pos.end(), cur.begin(), cur.end());
        }
        if (request.scoring.window_sizes.empty()) {
            continue;
        }
        const auto   cur = llama_kv_ragged_score(lctx, kv.get_source(i), request.scoring, kv.get_meter());
        const size_t n   = (pos.size() - i0)*n_rep;
        for (size_t ip = 0; ip < n_planes; ++ip) {
            std::copy_n(cur.begin() + ip*n, n, scores.begin() + (ip*n_cells + i0)*n_rep);
        }
    }

    const int64_t t_select_us = ggml_time_us();

    res.keep.assign(n_cells, 0);
    {
        busy_guard guard(kv);
        request.select({ res.before, pos.data(), scores.data(), res.keep.data() });
    }

    auto first = res.keep.begin();
    for (const int32_t n : res.before) {
        res.after.push_back(n - std::count(first, first + n, 0));
        first += n;
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto * n = res.after.data() + i*n_head_kv;
        if (!layers[i].has_ragged && std::any_of(n, n + n_head_kv, [&](int32_t cur) { return cur != *n; })) {
            llama_kv_ragged_refuse_unsupported(llama_kv_cache_ragged::no_ragged_attention(layers[i]));
        }
    }

    res.t_score_ms  = (t_select_us - t_start_us)/1000.0;
    res.t_select_ms = (ggml_time_us() - t_select_us)/1000.0;
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
    llama_kv_ragged_compute graph(lctx, layer, meter, 8);

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

llama_kv_ragged_pool llama_kv_ragged_gather(
        llama_context & lctx, const llama_kv_ragged_source & src, const uint8_t * keep, const int32_t * n_keep,
        std::vector<std::vector<int32_t>> & kept, llama_kv_ragged_meter & meter) {
    const auto & layer = src.layer;
    const auto   len   = src.seq.n_cells(src.i);

    const std::vector<int64_t> len_next(n_keep, n_keep + layer.n_head_kv);

    // heads that fill at different rows are given the same room
    const int64_t n_mean  = std::accumulate(len_next.begin(), len_next.end(), int64_t(0))/layer.n_head_kv;
    const bool    uniform = std::all_of(len_next.begin(), len_next.end(), [&](int64_t n) { return n == n_mean; });
    const int64_t slack   = std::max<int64_t>(uniform ? 1 : 16, n_mean/64);

    llama_kv_ragged_pool next = layer.make_pool(layer.capacity(len_next, slack, true), &meter);
    if (next.empty()) {
        llama_kv_ragged_refuse(format("no memory for %" PRId64 " cells per head in layer %u", n_mean, layer.il));
    }

    kept.assign(layer.n_head_kv, {});

    // unused rows repeat a valid one, they have to be finite
    std::vector<int32_t> rows(next.n_rows(), 0);
    for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
        const auto pos = src.seq.positions(src.i, ih);
        for (int64_t i = 0; i < len[ih]; ++i) {
            if (keep[i]) {
                rows[next.first[ih] + kept[ih].size()] = src.pool.first[ih] + i;
                kept[ih].push_back(pos[i]);
            }
        }
        keep += len[ih];
        GGML_ASSERT((int64_t) kept[ih].size() == len_next[ih]);
    }

    if (src.pool.k->nb[1] % sizeof(int32_t) == 0 && src.pool.v->nb[1] % sizeof(int32_t) == 0) {
        move_rows(lctx, layer, src.pool, next, rows, meter);
    } else {
        move_rows_by_host(src.pool, next, rows, meter);
    }
    return next;
}

//
// llama_kv_cache_ragged
//

void llama_kv_cache_ragged::commit(llama_context & lctx, const llama_kv_ragged_plan & plan) {
    if (plan.n_released() == 0) {
        seq.end_prompt();
        return;
    }

    const int64_t t_start_us   = ggml_time_us();
    const int64_t bytes_before = meter.live;

    size_t i_keep = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
        const int32_t * n_before = plan.before.data() + i*layers[i].n_head_kv;
        const int32_t * n_after  = plan.after.data()  + i*layers[i].n_head_kv;

        std::vector<std::vector<int32_t>> kept;
        try {
            pools[i] = llama_kv_ragged_gather(lctx, get_source(i), plan.keep.data() + i_keep, n_after, kept, meter);
        } catch (const std::exception & err) {
            if (i == 0) {
                throw;
            }
            const bool no_memory = dynamic_cast<const std::bad_alloc *>(&err);
            throw std::runtime_error(format("%s. The compaction is half done: the layers before layer %u are compacted, %zu of %zu, and the others "
                        "hold all their cells; compact again", no_memory ? "kv_policy: memory ran out" : err.what(), layers[i].il, i, layers.size()));
        }

        // whatever happens to the next layers
        seq.cells[i] = { std::move(kept), seq.n_pos };
        seq.boundary = seq.n_pos;
        epoch++;

        i_keep = std::accumulate(n_before, n_before + layers[i].n_head_kv, i_keep);
    }

    seq.end_prompt();
    llama_kv_ragged_trim();

    stats.n_compactions++;
    stats.bytes_released = bytes_before - meter.live;
    stats.t_score_ms     = plan.t_score_ms;
    stats.t_select_ms    = plan.t_select_ms;
    stats.t_gather_ms    = (ggml_time_us() - t_start_us)/1000.0;

    LLAMA_LOG_DEBUG("%s: %" PRId64 " of %zu cells released at position %u (%.2f MiB), scored in %.1f ms, selected in %.1f ms, moved in %.1f ms\n", __func__,
            plan.n_released(), plan.keep.size(), seq.n_pos, stats.bytes_released/1024.0/1024.0, stats.t_score_ms, stats.t_select_ms, stats.t_gather_ms);
}
