// The C interface of creation and of what changes the cache.

#include "windowkv-capi.h"

#include "llama-impl.h"
#include "llama-kv-cache-ragged-context.h"
#include "llama-kv-ragged-fill.h"
#include "llama-kv-ragged-policy.h"

#include "ggml.h"

#include <algorithm>
#include <functional>
#include <numeric>

#ifndef WKV_BUILD_STAMP
#    error "WKV_BUILD_STAMP has to be defined by the build"
#endif

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
    return wkv_with_cache(ctx, [&](const llama_kv_cache_ragged & kv) {
        for (const auto & layer : kv.get_layers()) {
            if (ragged) {
                layer.check_ragged();
            }
            llama_kv_ragged_scale(*ctx, layer.il);
        }
        return WKV_OK;
    });
}

int wkv_has_ragged(struct llama_context * ctx) {
    return wkv_with_cache(ctx, [](const llama_kv_cache_ragged & kv) {
        const auto & layers = kv.get_layers();
        return int(std::all_of(layers.begin(), layers.end(), [](const auto & layer) { return layer.has_ragged; }));
    });
}

int wkv_reserve(struct llama_context * ctx, int32_t n_tokens) {
    return wkv_with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        if (n_tokens < 0) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("n_tokens is %d, expected at least 0", n_tokens));
        }
        kv.reserve(n_tokens);
        return int(WKV_OK);
    });
}

int wkv_set_observed(struct llama_context * ctx, int32_t n_observed) {
    return wkv_with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        if (n_observed < 1) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("n_observed is %d, expected at least 1", n_observed));
        }
        kv.set_observed(n_observed);
        return int(WKV_OK);
    });
}

int wkv_set_pinned(struct llama_context * ctx, const int32_t * ranges, size_t n) {
    return wkv_with_prompt(ctx, [&](llama_kv_cache_ragged & kv) {
        std::vector<wkv::position_range> pinned;
        for (size_t i = 0; i < n; ++i) {
            const wkv::position_range cur = { ranges[2*i], ranges[2*i + 1] };
            if (cur.first < 0 || cur.last <= cur.first) {
                return wkv_fail(WKV_ERR_ARGUMENT, format("range %zu is positions %d to %d, expected 0 or more, and the end behind the start",
                            i, cur.first, cur.last));
            }
            pinned.push_back(cur);
        }
        kv.set_pinned(std::move(pinned));
        return int(WKV_OK);
    });
}

int wkv_set_room(struct llama_context * ctx, int32_t n_tokens) {
    return wkv_with_prompt(ctx, [&](llama_kv_cache_ragged & kv) {
        if (n_tokens < 0) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("n_tokens is %d, expected at least 0", n_tokens));
        }
        kv.set_room(n_tokens);
        return int(WKV_OK);
    });
}

int wkv_accumulate(struct llama_context * ctx) {
    return wkv_with_prompt(ctx, [&](llama_kv_cache_ragged & kv) {
        kv.check_not_observing();
        kv.check_closed();
        kv.accumulate(*ctx);
        return int(WKV_OK);
    });
}

int wkv_shift(struct llama_context * ctx, int32_t p0, int32_t n) {
    return wkv_with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        kv.shift(*ctx, p0, n);
        try {
            ctx->memory_update(false); // the keys of windows
        } catch (const std::exception & err) {
            LLAMA_LOG_DEBUG("%s: the keys of windows follow with the next batch (%s)\n", __func__, err.what());
        }
        return int(WKV_OK);
    });
}

int wkv_can_shift(struct llama_context * ctx) {
    return wkv_with_cache(ctx, [&](const llama_kv_cache_ragged &) { return int(ctx->get_memory()->get_can_shift()); });
}

int wkv_set_attention(struct llama_context * ctx, int32_t attention) {
    return wkv_with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        switch (attention) {
            case WKV_ATTENTION_AUTO:   kv.set_attention(llama_kv_cache_ragged::ATTENTION_AUTO);   return int(WKV_OK);
            case WKV_ATTENTION_STOCK:  kv.set_attention(llama_kv_cache_ragged::ATTENTION_STOCK);  return int(WKV_OK);
            case WKV_ATTENTION_RAGGED: kv.set_attention(llama_kv_cache_ragged::ATTENTION_RAGGED); return int(WKV_OK);
        }
        return wkv_fail(WKV_ERR_ARGUMENT, format("attention is %d, expected a value of enum wkv_attention", attention));
    });
}

int wkv_prompt_done(struct llama_context * ctx) {
    return wkv_with_prompt(ctx, [](llama_kv_cache_ragged & kv) {
        kv.check_not_observing();
        kv.end_prompt();
        return int(WKV_OK);
    });
}

int wkv_on_prompt(struct llama_context * ctx, wkv_prompt_fn fn, void * user) {
    return wkv_with_prompt(ctx, [&](llama_kv_cache_ragged & kv) {
        kv.set_on_prompt(fn ? std::function<void()>([fn, user] { fn(user); }) : nullptr);
        return int(WKV_OK);
    });
}

int64_t wkv_compact(struct llama_context * ctx, const struct wkv_policy * policy, int64_t n_cells) {
    return wkv_with_prompt(ctx, [&](llama_kv_cache_ragged & kv) -> int64_t {
        kv.check_not_observing();
        kv.check_closed();
        if (!policy) {
            return wkv_fail(WKV_ERR_ARGUMENT, "policy is null");
        }
        llama_kv_ragged_request request;
        if (!llama_kv_ragged_policy_request(kv.get_seq(), *policy, kv.get_pinned(), n_cells, request)) {
            kv.end_prompt();
            return 0;
        }
        if (policy->scoring.reduce == WKV_REDUCE_SUM) {
            kv.accumulate(*ctx); // what stays takes its sums along
        }
        return kv.compact(*ctx, request);
    });
}

// the caller's selection, which sees all cells at once
static void select_custom(
        const llama_kv_ragged_seq & seq, const llama_kv_ragged_rest * rest, llama_kv_ragged_choice & choice, int64_t n_cells, wkv_select_fn fn,
        void * user) {
    const auto & cells     = rest ? rest->cells.cells() : choice.cells;
    const auto   positions = rest ? rest->cells.positions() : llama_kv_ragged_positions(seq);
    const size_t n         = std::accumulate(cells.begin(), cells.end(), size_t(0));
    const auto   shapes    = llama_kv_ragged_shapes(seq, cells, rest);

    const llama_kv_ragged_claim claim(seq.get_meter(), n*(sizeof(int32_t) + sizeof(uint8_t)));

    std::vector<int32_t> pos;
    std::vector<uint8_t> keep(n, 0);
    pos.reserve(n);
    for (size_t i = 0; i < cells.size(); ++i) {
        for (int32_t ic = 0; ic < cells[i]; ++ic) {
            pos.push_back(positions[i][ic]);
        }
    }

    float * scores = choice.score(0, seq.get_layers().size());
    if (rest) {
        rest->cells.take(scores, 0, cells.size(), 1);
    }
    if (fn(user, &shapes, n_cells, pos.data(), scores, keep.data()) != 0) {
        throw std::invalid_argument("the selection was given up, nothing was evicted");
    }
    const std::string error = wkv::keep_error(shapes, n_cells, keep.data());
    if (!error.empty()) {
        throw std::invalid_argument(error);
    }

    wkv::marks      chosen = rest ? wkv::marks(cells.data(), cells.size()) : wkv::marks();
    const uint8_t * own    = keep.data();
    for (size_t i = 0; i < cells.size(); ++i) {
        (rest ? chosen : choice.keep).set(i, own);
        own += cells[i];
    }
    if (rest) {
        rest->cells.give(chosen, choice.keep);
    }
}

int64_t wkv_compact_custom(struct llama_context * ctx, int32_t window_size, int64_t n_cells, wkv_select_fn fn, void * user) {
    return wkv_with_prompt(ctx, [&](llama_kv_cache_ragged & kv) -> int64_t {
        kv.check_not_observing();
        kv.check_closed();
        if (!fn) {
            return wkv_fail(WKV_ERR_ARGUMENT, "fn is null");
        }
        llama_kv_ragged_check_request(kv.get_seq(), window_size, n_cells);

        const auto rest = llama_kv_ragged_without(kv.get_seq(), kv.get_pinned(), n_cells);
        if (n_cells == 0) {
            kv.end_prompt();
            return 0;
        }

        llama_kv_ragged_request request;
        request.scoring.window_sizes.assign(window_size > 0 ? 1 : 0, window_size);
        request.select = [&](llama_kv_ragged_choice & choice) {
            select_custom(kv.get_seq(), rest.get(), choice, n_cells, fn, user);
        };
        return kv.compact(*ctx, request);
    });
}

int wkv_snapshot_save(struct llama_context * ctx) {
    return wkv_with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        kv.snapshot_save(*ctx->get_memory());
        return WKV_OK;
    });
}

int wkv_snapshot_restore(struct llama_context * ctx) {
    return wkv_with_idle_cache(ctx, [](llama_kv_cache_ragged & kv) {
        kv.snapshot_restore();
        return WKV_OK;
    });
}

int wkv_snapshot_drop(struct llama_context * ctx) {
    return wkv_with_idle_cache(ctx, [](llama_kv_cache_ragged & kv) {
        kv.snapshot_drop();
        return WKV_OK;
    });
}

int wkv_observe_begin(struct llama_context * ctx) {
    return wkv_with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        kv.observe_begin(*ctx->get_memory());
        return WKV_OK;
    });
}

int wkv_replay_begin(struct llama_context * ctx, int32_t p0, int32_t p1, int32_t n_tokens) {
    return wkv_with_idle_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        kv.observe_begin(*ctx->get_memory(), std::make_unique<llama_kv_ragged_replay>(kv.get_seq(), p0, p1, n_tokens));
        return WKV_OK;
    });
}

int wkv_observe_end(struct llama_context * ctx) {
    return wkv_with_idle_cache(ctx, [](llama_kv_cache_ragged & kv) {
        return int(kv.observe_end());
    });
}

int wkv_fill(struct llama_context * ctx, int32_t n_tokens) {
    if (!ctx || !ctx->get_memory()) {
        return wkv_fail(WKV_ERR_ARGUMENT, "the context is null or has no memory");
    }
    return wkv_guard([&] {
        llama_kv_ragged_check_idle(llama_kv_ragged_attn_cache(ctx->get_memory()));
        llama_kv_ragged_fill(*ctx, n_tokens);
        return int(WKV_OK);
    });
}
