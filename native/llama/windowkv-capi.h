#pragma once

// What the files of the C interface share.

#include "windowkv.h"

#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"
#include "policy/wkv-policy.h"

#include <exception>
#include <new>
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
    } catch (const std::bad_alloc &) {
        return wkv_fail(WKV_ERR_COMPUTE, "kv_policy: memory ran out");
    } catch (const std::exception & err) {
        return wkv_fail(WKV_ERR_COMPUTE, err.what());
    } catch (...) {
        return wkv_fail(WKV_ERR_COMPUTE, "an unknown failure");
    }
}

// the policy of the inner code; throws std::invalid_argument for values that no enum of windowkv.h has, the rest is checked by
// wkv::policy_error()
wkv::policy wkv_convert(const struct wkv_policy & policy);
