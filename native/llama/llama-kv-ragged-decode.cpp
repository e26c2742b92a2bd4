#include "llama-kv-ragged-decode.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <new>

// An exception may come from the middle of what the caches of a memory note about positions, and upstream's note some for a trial while
// they look for slots. What they hold then cannot be told, so that nothing of it stays
struct llama_kv_ragged_decoding {
    // An allocator of graphs that found no memory takes the places of the graph for found. And the graph of the worst case, which knows
    // the scales of the layers, may be half built.
    static void reserve_anew(llama_context & lctx) { lctx.sched_need_reserve = true; }

    static int failed(llama_context & lctx, int status, const char * what) {
        reserve_anew(lctx);

        llama_memory_i & mem = *lctx.get_memory();
        try {
            mem.clear(true);
        } catch (...) {
        }
        const bool cleared = mem.seq_pos_max(0) < 0; // it is not while a selection runs

        char msg[512]; // no memory is asked for here
        snprintf(msg, sizeof(msg), "%s%s while a batch was evaluated, %s", strncmp(what, "kv_policy: ", 11) == 0 ? "" : "kv_policy: ", what,
                cleared ? "the cache was cleared, evaluate its tokens again" : "the cache could not be cleared, free the context");
        llama_kv_ragged_set_error(msg);
        LLAMA_LOG_ERROR("%s\n", msg);
        return status;
    }
};

template <typename B>
static int decode(llama_context & lctx, const B & batch) {
    auto * kv = llama_kv_ragged_find(lctx.get_memory());
    if (!kv) {
        return lctx.decode(batch);
    }

    try {
        const int status = lctx.decode(batch);
        if (status == -2) {
            llama_kv_ragged_decoding::reserve_anew(lctx);
        }
        if (status != 0) {
            kv->drop_replay();
        }
        return status;
    } catch (const std::bad_alloc &) {
        return llama_kv_ragged_decoding::failed(lctx, -2, "memory ran out");
    } catch (const std::exception & err) {
        return llama_kv_ragged_decoding::failed(lctx, -3, err.what());
    } catch (...) {
        return llama_kv_ragged_decoding::failed(lctx, -3, "an unknown failure");
    }
}

int llama_kv_ragged_decode(llama_context & lctx, const llama_batch & batch) {
    return decode(lctx, batch);
}

int llama_kv_ragged_decode(llama_context & lctx, const llama_batch_ext & batch) {
    return decode(lctx, batch);
}
