// The C interface of windowkv.h over the ragged cache and the policies.

#include "windowkv-capi.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include "ggml.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <stdexcept>

#ifndef WKV_BUILD_STAMP
#    error "WKV_BUILD_STAMP has to be defined by the build"
#endif

// runs fn on the ragged cache of ctx
template <typename F>
static int64_t with_cache(llama_context * ctx, F fn) {
    if (!ctx) {
        return wkv_fail(WKV_ERR_ARGUMENT, "ctx is null");
    }
    auto * kv = llama_kv_ragged_find(ctx->get_memory());
    if (!kv) {
        return wkv_fail(WKV_ERR_NO_POLICY, "this context was created without a KV policy: call wkv_pending_set before creating it");
    }
    return wkv_guard([&] { return fn(*kv); });
}

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

const char * wkv_build_stamp(void) {
    return WKV_BUILD_STAMP;
}

const char * wkv_last_error(void) {
    return llama_kv_ragged_get_error().c_str();
}

int wkv_pending_set(int32_t n_window, int32_t type) {
    if (n_window < 1) {
        return wkv_fail(WKV_ERR_ARGUMENT, format("n_window is %d, expected at least 1", n_window));
    }
    if (type >= 0 && type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_BF16 && type != GGML_TYPE_Q8_0 &&
        type != GGML_TYPE_Q4_0) {
        return wkv_fail(WKV_ERR_ARGUMENT, format("type is %d, expected f32, f16, bf16, q8_0, q4_0, or -1 for those of the context", type));
    }
    llama_kv_ragged_set_error("");
    llama_kv_ragged_pending_set(n_window, type);
    return WKV_OK;
}

void wkv_pending_clear(void) {
    llama_kv_ragged_pending_set(0);
}

int wkv_ready(struct llama_context * ctx, bool ragged) {
    return with_cache(ctx, [&](const llama_kv_cache_ragged & kv) {
        const std::string error = kv.ready(ragged);
        return error.empty() ? WKV_OK : wkv_fail(WKV_ERR_UNSUPPORTED, error);
    });
}

int wkv_reserve(struct llama_context * ctx, int32_t n_tokens) {
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        if (n_tokens < 0) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("n_tokens is %d, expected at least 0", n_tokens));
        }
        return kv.reserve(n_tokens) ? WKV_OK : wkv_fail(WKV_ERR_COMPUTE, format("no memory for %d more tokens", n_tokens));
    });
}

int wkv_set_window(struct llama_context * ctx, int32_t n_window) {
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        if (n_window < 1) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("n_window is %d, expected at least 1", n_window));
        }
        kv.set_window(n_window);
        return int(WKV_OK);
    });
}

int wkv_set_attention(struct llama_context * ctx, int32_t attention) {
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        if (attention < WKV_ATTENTION_AUTO || attention > WKV_ATTENTION_RAGGED) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("attention is %d, expected a value of enum wkv_attention", attention));
        }
        kv.set_attention(wkv_attention(attention));
        return int(WKV_OK);
    });
}

int64_t wkv_compact(struct llama_context * ctx, const struct wkv_policy * policy, int64_t n_cells) {
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) -> int64_t {
        if (!policy) {
            return wkv_fail(WKV_ERR_ARGUMENT, "policy is null");
        }
        return kv.compact(ctx, wkv_convert(*policy), n_cells);
    });
}

int64_t wkv_compact_custom(struct llama_context * ctx, int32_t alpha, int64_t n_cells, wkv_select_fn fn, void * user) {
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) -> int64_t {
        if (!fn) {
            return wkv_fail(WKV_ERR_ARGUMENT, "fn is null");
        }
        return kv.compact(ctx, alpha, n_cells, fn, user);
    });
}

int wkv_snapshot_save(struct llama_context * ctx) {
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        return kv.snapshot_save(ctx->get_memory()) ? WKV_OK : wkv_fail(WKV_ERR_COMPUTE, "no memory for a copy of the cache");
    });
}

int wkv_snapshot_restore(struct llama_context * ctx) {
    return with_cache(ctx, [](llama_kv_cache_ragged & kv) {
        return kv.snapshot_restore() ? WKV_OK : wkv_fail(WKV_ERR_COMPUTE,
            "no snapshot to go back to (none was saved, the cache was cleared or its window resized since), or no memory");
    });
}

int wkv_snapshot_drop(struct llama_context * ctx) {
    return with_cache(ctx, [](llama_kv_cache_ragged & kv) {
        kv.snapshot_drop();
        return WKV_OK;
    });
}

static int64_t n_bytes(const llama_memory_i & mem) {
    int64_t res = 0;
    for (const auto & [_, size] : mem.memory_breakdown()) {
        res += size;
    }
    return res;
}

int wkv_fill(struct llama_context * ctx, int32_t n_tokens) {
    if (!ctx || !ctx->get_memory()) {
        return wkv_fail(WKV_ERR_ARGUMENT, "the context is null or has no memory");
    }
    return wkv_guard([&] {
        llama_kv_ragged_fill(*ctx, n_tokens);
        return int(WKV_OK);
    });
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

int wkv_get_stats(struct llama_context * ctx, struct wkv_stats * stats) {
    if (!stats) {
        return wkv_fail(WKV_ERR_ARGUMENT, "stats is null");
    }
    if (ctx && ctx->get_memory() && !llama_kv_ragged_find(ctx->get_memory())) {
        return stock_stats(*ctx, *stats);
    }
    return with_cache(ctx, [&](const llama_kv_cache_ragged & kv) {
        kv.get_stats(*stats);
        stats->bytes_other = n_bytes(*ctx->get_memory()) - n_bytes(kv);
        return WKV_OK;
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
    return with_cache(ctx, [&](const llama_kv_cache_ragged & kv) {
        const auto & layers = kv.get_layers();
        check_room(n, layers.size()*layers[0].n_head_kv);
        for (const auto & layer : layers) {
            const auto own = kv.n_cells(layer);
            cells = std::copy(own.begin(), own.end(), cells);
        }
        return WKV_OK;
    });
}

int wkv_get_positions(struct llama_context * ctx, int32_t layer, int32_t head, int32_t * pos, size_t n) {
    return with_cache(ctx, [&](const llama_kv_cache_ragged & kv) -> int64_t {
        const auto & cur = get_layer(kv, layer);
        check_head(head, cur.n_head_kv);

        const auto res = kv.positions(cur, head);
        std::copy_n(res.begin(), std::min(n, res.size()), pos);
        return res.size();
    });
}

int64_t wkv_get_scores(struct llama_context * ctx, int32_t layer, int32_t alpha, int32_t among, float * scores, size_t n) {
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) -> int64_t {
        ctx->synchronize();
        auto res = kv.score(ctx, get_layer(kv, layer), among > 0 ? std::vector<int32_t>{ alpha, among } : std::vector<int32_t>{ alpha });
        if (among > 0) {
            res.resize(res.size()/2);
        }
        check_room(n, res.size());
        std::copy(res.begin(), res.end(), scores);
        return res.size();
    });
}

int64_t wkv_get_attention(struct llama_context * ctx, int32_t layer, float * weights, size_t n) {
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) -> int64_t {
        ctx->synchronize();
        const auto res = kv.score_heads(ctx, get_layer(kv, layer));
        check_room(n, res.size());
        std::copy(res.begin(), res.end(), weights);
        return res.size();
    });
}

int64_t wkv_get_rows(struct llama_context * ctx, int32_t layer, int32_t head, int32_t which, float * rows, size_t n) {
    return with_cache(ctx, [&](const llama_kv_cache_ragged & kv) -> int64_t {
        const auto & cur = get_layer(kv, layer);
        check_head(head, cur.n_head_kv);
        ctx->synchronize();

        const ggml_tensor * pool  = which == 0 ? cur.pool.k : cur.pool.v;
        const int64_t     n_cells = kv.n_cells(cur, head);
        if (n_cells == 0) {
            return 0;
        }
        check_room(n, n_cells*pool->ne[0]);
        read_rows(pool, cur.pool.first[head]*pool->nb[1], n_cells, rows);
        return n_cells*pool->ne[0];
    });
}

int64_t wkv_get_queries(struct llama_context * ctx, int32_t layer, int32_t head, float * rows, int32_t * pos, size_t n) {
    return with_cache(ctx, [&](const llama_kv_cache_ragged & kv) -> int64_t {
        const auto & cur = get_layer(kv, layer);
        check_head(head, cur.n_head);
        ctx->synchronize();

        std::vector<std::pair<int32_t, int64_t>> order; // position, ring row
        for (size_t i = 0; i < kv.get_ring_pos().size(); ++i) {
            if (kv.get_ring_pos()[i] >= 0) {
                order.emplace_back(kv.get_ring_pos()[i], i);
            }
        }
        std::sort(order.begin(), order.end());

        const int64_t n_embd = cur.ring->ne[0];
        check_room(n, order.size()*n_embd);
        for (size_t i = 0; i < order.size(); ++i) {
            pos[i] = order[i].first;
            read_rows(cur.ring, head*cur.ring->nb[2] + order[i].second*cur.ring->nb[1], 1, rows + i*n_embd);
        }
        return order.size()*n_embd;
    });
}
