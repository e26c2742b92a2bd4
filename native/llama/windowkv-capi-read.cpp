// The C interface of what the cache holds: statistics, cells, scores, rows.

#include "windowkv-capi.h"

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include "ggml.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <numeric>

static const llama_kv_ragged_layer & get_layer(const llama_kv_cache_ragged & kv, int32_t layer) {
    const auto & layers = kv.get_layers();
    if (layer < 0 || layer >= (int32_t) layers.size()) {
        throw std::invalid_argument(format("layer is %d, expected 0 to %zu", layer, layers.size() - 1));
    }
    return layers[layer];
}

static void check_head(int32_t head, int64_t n) {
    if (head < 0 || head >= n) {
        throw std::invalid_argument(format("head is %d, expected 0 to %" PRId64, head, n - 1));
    }
}

static void check_room(size_t have, size_t need) {
    if (have < need) {
        throw std::invalid_argument(format("the buffer holds %zu elements, expected at least %zu", have, need));
    }
}

// rows of a tensor as F32, row major
static void read_rows(const ggml_tensor * src, size_t offset, int64_t n, float * dst) {
    std::vector<uint8_t> data(n*src->nb[1]);
    ggml_backend_tensor_get(src, data.data(), offset, data.size());

    if (src->type == GGML_TYPE_F32) {
        memcpy(dst, data.data(), data.size());
    } else {
        ggml_get_type_traits(src->type)->to_float(data.data(), dst, n*src->ne[0]);
    }
}

static int64_t n_bytes(const llama_memory_i & mem) {
    int64_t res = 0;
    for (const auto & [_, size] : mem.memory_breakdown()) {
        res += size;
    }
    return res;
}

// indices in the model of the layers that attend to all positions; where nothing is known, of all layers
static std::vector<uint32_t> attn_layers(const llama_context & ctx) {
    const llama_kv_cache * kv = llama_kv_ragged_attn_cache(ctx.get_memory());

    std::vector<uint32_t> res;
    if (const auto * ragged = dynamic_cast<const llama_kv_cache_ragged *>(kv)) {
        for (const auto & layer : ragged->get_layers()) {
            res.push_back(layer.il);
        }
    } else if (kv) {
        res = kv->get_layer_ids();
    } else {
        for (uint32_t il = 0; il < ctx.get_model().hparams.n_layer(); ++il) {
            res.push_back(il);
        }
    }
    return res;
}

// the stock cache holds every position in every layer and allocates all of them at once
static int stock_stats(const llama_context & ctx, struct wkv_stats & stats) {
    const llama_memory_t   mem     = ctx.get_memory();
    const llama_kv_cache * kv      = llama_kv_ragged_attn_cache(mem);
    const auto           & hparams = ctx.get_model().hparams;

    const auto    layers = attn_layers(ctx);
    const int64_t total  = n_bytes(*mem);

    stats = {};
    stats.n_layer     = layers.size();
    stats.n_head_kv   = layers.empty() ? 0 : hparams.n_head_kv(layers[0]);
    stats.n_gqa       = layers.empty() ? 0 : hparams.n_gqa(layers[0]);
    stats.n_past      = mem->seq_pos_max(0) + 1;
    stats.bytes_live  = kv ? n_bytes(*kv) : total;
    stats.bytes_other = total - stats.bytes_live;
    stats.type_k      = kv && !kv->get_layer_ids().empty() ? kv->type_k() : GGML_TYPE_COUNT;
    stats.type_v      = kv && !kv->get_layer_ids().empty() ? kv->type_v() : GGML_TYPE_COUNT;
    stats.bytes_pool  = stats.bytes_live;
    stats.bytes_peak  = stats.bytes_live;
    stats.bytes_full  = stats.bytes_live*stats.n_past/ctx.n_ctx();
    return WKV_OK;
}

static void ragged_stats(const llama_memory_i & mem, const llama_kv_cache_ragged & kv, struct wkv_stats & stats) {
    const auto & layers = kv.get_layers();
    const auto & seq    = kv.get_seq();
    const auto & own    = kv.get_stats();

    stats = {};
    stats.n_layer        = layers.size();
    stats.n_head_kv      = layers[0].n_head_kv;
    stats.n_gqa          = layers[0].n_gqa();
    stats.n_past         = seq.n_pos;
    stats.n_boundary     = seq.boundary;
    stats.n_compactions  = own.n_compactions;
    stats.n_summed       = seq.n_summed();
    stats.n_replayed     = seq.n_replayed();
    stats.n_observed     = seq.observed.n_observed;
    stats.n_queries      = std::count_if(seq.observed.pos.begin(), seq.observed.pos.end(), [](int32_t p) { return p >= 0; });
    stats.type_k         = layers[0].type_k;
    stats.type_v         = layers[0].type_v;
    stats.bytes_live     = own.meter.live;
    stats.bytes_peak     = own.meter.peak;
    stats.bytes_released = own.bytes_released;
    stats.bytes_other    = n_bytes(mem) - n_bytes(kv);
    stats.t_score_ms     = own.t_score_ms;
    stats.t_select_ms    = own.t_select_ms;
    stats.t_gather_ms    = own.t_gather_ms;
    for (size_t i = 0; i < layers.size(); ++i) {
        stats.bytes_pool += seq.cells[i].pool.bytes();
        stats.bytes_cell += layers[i].n_head_kv*
            (ggml_row_size(layers[i].type_k, layers[i].n_embd_head_k) + ggml_row_size(layers[i].type_v, layers[i].n_embd_head_v));
        stats.bytes_full += layers[i].n_head_kv*seq.n_pos*
            (ggml_row_size(own.stock_type_k, layers[i].n_embd_head_k) + ggml_row_size(own.stock_type_v, layers[i].n_embd_head_v));
    }
}

int wkv_get_stats(struct llama_context * ctx, struct wkv_stats * stats) {
    if (!stats) {
        return wkv_fail(WKV_ERR_ARGUMENT, "stats is null");
    }
    if (ctx && ctx->get_memory() && !llama_kv_ragged_find(ctx->get_memory())) {
        return wkv_guard([&] { return stock_stats(*ctx, *stats); });
    }
    return wkv_with_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        ragged_stats(*ctx->get_memory(), kv, *stats);
        return WKV_OK;
    });
}

int32_t wkv_get_removable(struct llama_context * ctx) {
    return wkv_with_cache(ctx, [&](const llama_kv_cache_ragged & kv) {
        const auto & seq = kv.get_seq();
        if (dynamic_cast<const llama_memory_hybrid *>(ctx->get_memory())) {
            return int32_t(seq.n_pos); // recurrent states do not go back
        }
        const auto * iswa = dynamic_cast<const llama_kv_cache_iswa *>(ctx->get_memory());

        int32_t res = std::max<int32_t>(1, seq.boundary);
        while (res < int32_t(seq.n_pos) && !kv.can_rm(0, res, -1, iswa ? iswa->get_swa() : nullptr)) {
            res++;
        }
        return std::min<int32_t>(res, seq.n_pos);
    });
}

int wkv_get_layers(struct llama_context * ctx, int32_t * layers, size_t n) {
    if (!ctx || !ctx->get_memory()) {
        return wkv_fail(WKV_ERR_ARGUMENT, "the context is null or has no memory");
    }
    return wkv_guard([&] {
        const auto res = attn_layers(*ctx);
        check_room(n, res.size());
        std::copy(res.begin(), res.end(), layers);
        return int(res.size());
    });
}

int wkv_get_cells(struct llama_context * ctx, int32_t * cells, size_t n) {
    return wkv_with_cache(ctx, [&](const llama_kv_cache_ragged & kv) {
        const auto res = kv.get_seq().n_cells();
        check_room(n, res.size());
        std::copy(res.begin(), res.end(), cells);
        return WKV_OK;
    });
}

int wkv_get_positions(struct llama_context * ctx, int32_t layer, int32_t head, int32_t * pos, size_t n) {
    return wkv_with_cache(ctx, [&](const llama_kv_cache_ragged & kv) -> int64_t {
        check_head(head, get_layer(kv, layer).n_head_kv);

        const auto res = kv.get_seq().positions(layer, head);
        std::copy_n(res.begin(), std::min(n, res.size()), pos);
        return res.size();
    });
}

static int64_t get_scores(llama_context * ctx, int32_t layer, const llama_kv_ragged_scoring & scoring, size_t n_planes, float * scores, size_t n) {
    return wkv_with_cache(ctx, [&](llama_kv_cache_ragged & kv) -> int64_t {
        get_layer(kv, layer);
        for (const int32_t size : scoring.window_sizes) {
            if (size < 1) {
                throw std::invalid_argument(format("window_size is %d, expected at least 1", size));
            }
        }
        ctx->synchronize();
        const auto   res  = llama_kv_ragged_score(*ctx, kv.get_seq(), layer, scoring);
        const size_t size = res.size()/n_planes;
        check_room(n, size);
        std::copy_n(res.begin(), size, scores);
        return size;
    });
}

int64_t wkv_get_scores(struct llama_context * ctx, int32_t layer, int32_t window_size, int32_t among, float * scores, size_t n) {
    llama_kv_ragged_scoring scoring;
    scoring.window_sizes.push_back(window_size);
    if (among > 0) {
        scoring.window_sizes.push_back(among);
    }
    return get_scores(ctx, layer, scoring, scoring.window_sizes.size(), scores, n);
}

int64_t wkv_get_replayed(struct llama_context * ctx, int32_t layer, float * scores, size_t n) {
    return wkv_with_cache(ctx, [&](const llama_kv_cache_ragged & kv) -> int64_t {
        get_layer(kv, layer);
        const auto    n_cells = kv.get_seq().n_cells(layer);
        const int64_t n_all   = std::accumulate(n_cells.begin(), n_cells.end(), int64_t(0));
        check_room(n, n_all);
        kv.get_seq().copy_replayed(layer, scores);
        return n_all;
    });
}

int64_t wkv_get_attention(struct llama_context * ctx, int32_t layer, float * weights, size_t n) {
    llama_kv_ragged_scoring scoring;
    scoring.window_sizes.push_back(1);
    scoring.by_query_head = true;
    return get_scores(ctx, layer, scoring, 1, weights, n);
}

int64_t wkv_get_rows(struct llama_context * ctx, int32_t layer, int32_t head, int32_t which, float * rows, size_t n) {
    return wkv_with_cache(ctx, [&](const llama_kv_cache_ragged & kv) -> int64_t {
        check_head(head, get_layer(kv, layer).n_head_kv);
        if (which != 0 && which != 1) {
            throw std::invalid_argument(format("which is %d, expected 0 (K) or 1 (V)", which));
        }
        ctx->synchronize();

        const auto        & pool    = kv.get_seq().cells[layer].pool;
        const ggml_tensor * src     = which == 0 ? pool.k : pool.v;
        const int64_t       n_cells = kv.get_seq().n_cells(layer, head);
        if (n_cells == 0) {
            return 0;
        }
        check_room(n, n_cells*src->ne[0]);
        read_rows(src, pool.first[head]*src->nb[1], n_cells, rows);
        return n_cells*src->ne[0];
    });
}

int64_t wkv_get_queries(
        struct llama_context * ctx, int32_t layer, int32_t head, float * rows, size_t n_rows, int32_t * pos, size_t n_pos) {
    return wkv_with_cache(ctx, [&](const llama_kv_cache_ragged & kv) -> int64_t {
        check_head(head, get_layer(kv, layer).n_head);
        ctx->synchronize();

        const auto        & seq  = kv.get_seq();
        const ggml_tensor * src  = seq.observed.queries[layer].tensor;
        const auto          held = seq.observed.find(seq.observed_end() - int32_t(seq.observed.n_observed));

        check_room(n_rows, held.size()*src->ne[0]);
        check_room(n_pos,  held.size());
        for (size_t i = 0; i < held.size(); ++i) {
            pos[i] = seq.observed.pos[held[i]];
            read_rows(src, head*src->nb[2] + held[i]*src->nb[1], 1, rows + i*src->ne[0]);
        }
        return held.size()*src->ne[0];
    });
}
