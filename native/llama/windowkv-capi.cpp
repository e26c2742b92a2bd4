// The C interface of windowkv.h over the ragged cache and the policies.

#include "windowkv-capi.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-fill.h"
#include "llama-kv-ragged-policy.h"
#include "llama-model.h"

#include "ggml.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <functional>
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

// the same for calls that change it, refused while a selection runs
template <typename F>
static int64_t with_idle_cache(llama_context * ctx, F fn) {
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        kv.check_idle();
        return fn(kv);
    });
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
    return llama_kv_ragged_get_error();
}

void wkv_clear_error(void) {
    llama_kv_ragged_set_error("");
}

int wkv_pending_set(int32_t n_observed, int32_t type) {
    return wkv_guard([&] {
        if (n_observed < 1) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("n_observed is %d, expected at least 1", n_observed));
        }
        if (type >= 0 && type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_BF16 && type != GGML_TYPE_Q8_0 &&
            type != GGML_TYPE_Q4_0) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("type is %d, expected f32, f16, bf16, q8_0, q4_0, or -1 for those of the context", type));
        }
        llama_kv_ragged_set_error("");
        llama_kv_ragged_pending_set(n_observed, type);
        return int(WKV_OK);
    });
}

void wkv_pending_clear(void) {
    llama_kv_ragged_pending_set(0);
}

int wkv_ready(struct llama_context * ctx, bool ragged) {
    return with_cache(ctx, [&](const llama_kv_cache_ragged & kv) {
        const std::string error = kv.ready(ragged);
        return error.empty() ? WKV_OK : wkv_fail(WKV_ERR_UNSUPPORTED, "kv_policy: " + error);
    });
}

int wkv_reserve(struct llama_context * ctx, int32_t n_tokens) {
    return with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        if (n_tokens < 0) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("n_tokens is %d, expected at least 0", n_tokens));
        }
        return kv.reserve(n_tokens) ? WKV_OK : wkv_fail(WKV_ERR_COMPUTE, format("no memory for %d more tokens", n_tokens));
    });
}

int wkv_set_observed(struct llama_context * ctx, int32_t n_observed) {
    return with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        if (n_observed < 1) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("n_observed is %d, expected at least 1", n_observed));
        }
        kv.set_observed(n_observed);
        return int(WKV_OK);
    });
}

int wkv_set_attention(struct llama_context * ctx, int32_t attention) {
    return with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        switch (attention) {
            case WKV_ATTENTION_AUTO:   kv.set_attention(llama_kv_cache_ragged::ATTENTION_AUTO);   return int(WKV_OK);
            case WKV_ATTENTION_STOCK:  kv.set_attention(llama_kv_cache_ragged::ATTENTION_STOCK);  return int(WKV_OK);
            case WKV_ATTENTION_RAGGED: kv.set_attention(llama_kv_cache_ragged::ATTENTION_RAGGED); return int(WKV_OK);
        }
        return wkv_fail(WKV_ERR_ARGUMENT, format("attention is %d, expected a value of enum wkv_attention", attention));
    });
}

int wkv_prompt_done(struct llama_context * ctx) {
    return with_idle_cache(ctx, [](llama_kv_cache_ragged & kv) {
        kv.end_prompt();
        return int(WKV_OK);
    });
}

int wkv_on_prompt(struct llama_context * ctx, wkv_prompt_fn fn, void * user) {
    return with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        kv.set_on_prompt(fn ? std::function<void()>([fn, user] { fn(user); }) : nullptr);
        return int(WKV_OK);
    });
}

static int64_t run(llama_context & ctx, llama_kv_cache_ragged & kv, const llama_kv_ragged_request & request) {
    const auto plan = llama_kv_ragged_make_plan(kv, ctx, request);
    kv.commit(ctx, plan);
    return plan.n_released();
}

int64_t wkv_compact(struct llama_context * ctx, const struct wkv_policy * policy, int64_t n_cells) {
    return with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) -> int64_t {
        if (!policy) {
            return wkv_fail(WKV_ERR_ARGUMENT, "policy is null");
        }
        const wkv::policy converted = wkv_convert(*policy);

        llama_kv_ragged_request request;
        if (!llama_kv_ragged_policy_request(kv, converted, n_cells, request)) {
            kv.end_prompt();
            return 0;
        }
        return run(*ctx, kv, request);
    });
}

int64_t wkv_compact_custom(struct llama_context * ctx, int32_t window_size, int64_t n_cells, wkv_select_fn fn, void * user) {
    return with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) -> int64_t {
        if (!fn) {
            return wkv_fail(WKV_ERR_ARGUMENT, "fn is null");
        }
        llama_kv_ragged_check_request(kv, window_size, n_cells);

        llama_kv_ragged_request request;
        request.scoring.window_sizes.assign(window_size > 0 ? 1 : 0, window_size);
        request.select = [&](const llama_kv_ragged_choice & choice) {
            const wkv::shapes shapes = llama_kv_ragged_shapes(kv, choice.cells);
            const wkv_shapes  given  = { shapes.n_layer, shapes.n_head_kv, shapes.n_gqa, shapes.n_past, shapes.cells };

            if (fn(user, &given, n_cells, choice.positions, choice.scores, choice.keep) != 0) {
                throw std::invalid_argument("the selection was given up, nothing was evicted");
            }
            const std::string error = wkv::selection_error(shapes, n_cells, choice.keep);
            if (!error.empty()) {
                throw std::invalid_argument(error);
            }
        };
        return run(*ctx, kv, request);
    });
}

int wkv_snapshot_save(struct llama_context * ctx) {
    return with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        return kv.snapshot_save(*ctx->get_memory()) ? WKV_OK : wkv_fail(WKV_ERR_COMPUTE, "no memory for a copy of the cache");
    });
}

int wkv_snapshot_restore(struct llama_context * ctx) {
    return with_idle_cache(ctx, [](llama_kv_cache_ragged & kv) {
        return kv.snapshot_restore() ? WKV_OK : wkv_fail(WKV_ERR_COMPUTE,
            "no snapshot to go back to (none was saved, the cache was cleared or its observed queries resized since), or no memory");
    });
}

int wkv_snapshot_drop(struct llama_context * ctx) {
    return with_idle_cache(ctx, [](llama_kv_cache_ragged & kv) {
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

static void ragged_stats(const llama_memory_i & mem, llama_kv_cache_ragged & kv, struct wkv_stats & stats) {
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
    stats.n_observed     = seq.observed.n_observed;
    stats.type_k         = layers[0].type_k;
    stats.type_v         = layers[0].type_v;
    stats.bytes_live     = kv.get_meter().live;
    stats.bytes_peak     = kv.get_meter().peak;
    stats.bytes_released = own.bytes_released;
    stats.bytes_other    = n_bytes(mem) - n_bytes(kv);
    stats.t_score_ms     = own.t_score_ms;
    stats.t_select_ms    = own.t_select_ms;
    stats.t_gather_ms    = own.t_gather_ms;
    for (size_t i = 0; i < layers.size(); ++i) {
        stats.bytes_pool += kv.get_pools()[i].bytes();
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
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        ragged_stats(*ctx->get_memory(), kv, *stats);
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
        const auto res = kv.get_seq().n_cells();
        check_room(n, res.size());
        std::copy(res.begin(), res.end(), cells);
        return WKV_OK;
    });
}

int wkv_get_positions(struct llama_context * ctx, int32_t layer, int32_t head, int32_t * pos, size_t n) {
    return with_cache(ctx, [&](const llama_kv_cache_ragged & kv) -> int64_t {
        check_head(head, get_layer(kv, layer).n_head_kv);

        const auto res = kv.get_seq().positions(layer, head);
        std::copy_n(res.begin(), std::min(n, res.size()), pos);
        return res.size();
    });
}

static int64_t get_scores(llama_context * ctx, int32_t layer, const llama_kv_ragged_scoring & scoring, size_t n_planes, float * scores, size_t n) {
    return with_cache(ctx, [&](llama_kv_cache_ragged & kv) -> int64_t {
        get_layer(kv, layer);
        for (const int32_t size : scoring.window_sizes) {
            if (size < 1) {
                throw std::invalid_argument(format("window_size is %d, expected at least 1", size));
            }
        }
        ctx->synchronize();
        const auto   res  = llama_kv_ragged_score(*ctx, kv.get_source(layer), scoring, kv.get_meter());
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

int64_t wkv_get_attention(struct llama_context * ctx, int32_t layer, float * weights, size_t n) {
    llama_kv_ragged_scoring scoring;
    scoring.window_sizes.push_back(1);
    scoring.by_query_head = true;
    return get_scores(ctx, layer, scoring, 1, weights, n);
}

int64_t wkv_get_rows(struct llama_context * ctx, int32_t layer, int32_t head, int32_t which, float * rows, size_t n) {
    return with_cache(ctx, [&](const llama_kv_cache_ragged & kv) -> int64_t {
        check_head(head, get_layer(kv, layer).n_head_kv);
        if (which != 0 && which != 1) {
            throw std::invalid_argument(format("which is %d, expected 0 (K) or 1 (V)", which));
        }
        ctx->synchronize();

        const auto        & pool    = kv.get_pools()[layer];
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
    return with_cache(ctx, [&](const llama_kv_cache_ragged & kv) -> int64_t {
        check_head(head, get_layer(kv, layer).n_head);
        ctx->synchronize();

        const ggml_tensor * src  = kv.get_queries(layer);
        const auto        & seq  = kv.get_seq();
        const auto          held = seq.observed.find(int32_t(seq.n_pos) - int32_t(seq.observed.n_observed));

        check_room(n_rows, held.size()*src->ne[0]);
        check_room(n_pos,  held.size());
        for (size_t i = 0; i < held.size(); ++i) {
            pos[i] = seq.observed.pos[held[i]];
            read_rows(src, head*src->nb[2] + held[i]*src->nb[1], 1, rows + i*src->ne[0]);
        }
        return held.size()*src->ne[0];
    });
}
