#pragma once

// What the files of the C interface share.

#include "windowkv.h"

#include "llama-context.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"
#include "policy/wkv-policy.h"

#include <exception>
#include <stdexcept>
#include <string>

// allocates nothing, for where memory may have run out
static inline int wkv_fail(int status, const char * msg) {
    llama_kv_ragged_set_error(msg);
    return status;
}

static inline int wkv_fail(int status, const std::string & msg) {
    return wkv_fail(status, msg.c_str());
}

// no exception leaves the C interface
template <typename F>
static int64_t wkv_guard(F fn) {
    try {
        return fn();
    } catch (const std::invalid_argument & err) {
        return wkv_fail(WKV_ERR_ARGUMENT, err.what());
    } catch (const llama_kv_ragged_unsupported & err) {
        return wkv_fail(WKV_ERR_UNSUPPORTED, err.what());
    } catch (const std::exception & err) {
        return wkv_fail(WKV_ERR_COMPUTE, llama_kv_ragged_reason(err));
    } catch (...) {
        return wkv_fail(WKV_ERR_COMPUTE, "an unknown failure");
    }
}

// runs fn on the ragged cache of ctx
template <typename F>
static int64_t wkv_with_cache(llama_context * ctx, F fn) {
    if (!ctx) {
        return wkv_fail(WKV_ERR_ARGUMENT, "ctx is null");
    }
    auto * kv = llama_kv_ragged_find(ctx->get_memory());
    if (!kv) {
        return wkv_fail(WKV_ERR_NO_POLICY, "this context was created without a KV policy: call wkv_pending_set before creating it");
    }
    return wkv_guard([&] { return fn(*kv); });
}

// the same for calls that change it, refused while a selection or a wkv_prompt_fn runs
template <typename F>
static int64_t wkv_with_idle_cache(llama_context * ctx, F fn) {
    return wkv_with_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        llama_kv_ragged_check_idle(&kv);
        return fn(kv);
    });
}

// the same for what a wkv_prompt_fn may call
template <typename F>
static int64_t wkv_with_prompt(llama_context * ctx, F fn) {
    return wkv_with_cache(ctx, [&](llama_kv_cache_ragged & kv) {
        if (kv.is_selecting()) {
            llama_kv_ragged_check_idle(&kv);
        }
        return fn(kv);
    });
}
