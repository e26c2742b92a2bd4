#include "llama-kv-ragged-decode.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"

#include <exception>
#include <new>

static thread_local bool applied = false;

void llama_kv_ragged_decode_applies() {
    applied = true;
}

// An exception may come from the middle of what the caches of a memory note about the positions of an ubatch. What they hold then cannot
// be told, so that nothing of it stays; before that nothing has changed
static int thrown(llama_memory_i & mem, int status, const char * what) {
    const char * rest = "nothing has changed";
    if (applied) {
        rest = "the cache was cleared, evaluate its tokens again";
        try {
            mem.clear(true);
        } catch (const std::exception &) {
            rest = "the cache could not be cleared, free the context";
        }
    }
    try {
        llama_kv_ragged_set_error(format("kv_policy: %s while a batch was evaluated, %s", what, rest).c_str());
    } catch (const std::bad_alloc &) {
        llama_kv_ragged_set_error(rest);
    }
    LLAMA_LOG_ERROR("%s: %s while a batch was evaluated, %s\n", __func__, what, rest);
    return status;
}

template <typename B>
static int decode(llama_context & lctx, const B & batch) {
    llama_memory_i * mem = lctx.get_memory();
    if (!llama_kv_ragged_find(mem)) {
        return lctx.decode(batch);
    }

    applied = false;
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
