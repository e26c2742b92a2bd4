#include "llama-kv-ragged-decode.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"

#include <cstdio>
#include <exception>
#include <new>

// An exception may come from the middle of what the caches of a memory note about positions, and upstream's note some for a trial while
// they look for slots. What they hold then cannot be told, so that nothing of it stays
static int thrown(llama_memory_i & mem, int status, const char * what) {
    const char * rest = "the cache was cleared, evaluate its tokens again";
    try {
        mem.clear(true);
    } catch (const std::exception &) {
        rest = "the cache could not be cleared, free the context";
    }

    char msg[512];
    snprintf(msg, sizeof(msg), "kv_policy: %s while a batch was evaluated, %s", what, rest);
    llama_kv_ragged_set_error(msg);
    LLAMA_LOG_ERROR("%s: %s\n", __func__, msg);
    return status;
}

template <typename B>
static int decode(llama_context & lctx, const B & batch) {
    llama_memory_i * mem = lctx.get_memory();
    if (!llama_kv_ragged_find(mem)) {
        return lctx.decode(batch);
    }

    try {
        return lctx.decode(batch);
    } catch (const std::bad_alloc &) {
        return thrown(*mem, -2, "memory ran out");
    } catch (const std::exception & err) {
        return thrown(*mem, -3, err.what());
    }
}

int llama_kv_ragged_decode(llama_context & lctx, const llama_batch & batch) {
    return decode(lctx, batch);
}

int llama_kv_ragged_decode(llama_context & lctx, const llama_batch_ext & batch) {
    return decode(lctx, batch);
}
