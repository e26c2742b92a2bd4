#pragma once

// What the files of the C interface share.

#include "windowkv.h"

#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"
#include "policy/wkv-policy.h"

#include <exception>
#include <stdexcept>
#include <string>

static inline int wkv_fail(int status, const std::string & msg) {
    llama_kv_ragged_set_error(msg);
    return status;
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
        return wkv_fail(WKV_ERR_COMPUTE, err.what());
    } catch (...) {
        return wkv_fail(WKV_ERR_COMPUTE, "an unknown failure");
    }
}
