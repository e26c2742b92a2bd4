// windowkv: per-head KV cells for llama.cpp, the C interface.
//
// This header and windowkv-policy.h are the single source of the declarations: the Python package parses both with cffi.
// Everything between the two "cdef" marks must therefore be plain C without preprocessor lines.

#ifndef WINDOWKV_H
#define WINDOWKV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "windowkv-policy.h"

#if defined(_WIN32)
#    define WKV_API __declspec(dllexport)
#else
#    define WKV_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;

// cdef: begin

// Every function that returns int returns WKV_OK or one of the negative codes below; wkv_last_error() then
// says in words what was got, what was expected and what to do. No function throws.
enum wkv_status {
    WKV_OK              =  0,
    WKV_ERR_ARGUMENT    = -1, // a parameter is out of range
    WKV_ERR_NO_POLICY   = -2, // the context was created without a policy
    WKV_ERR_UNSUPPORTED = -3, // the model, backend or call cannot be served
    WKV_ERR_COMPUTE     = -4, // a graph failed or memory ran out
};

// which attention layers run
enum wkv_attention {
    WKV_ATTENTION_AUTO   = 0, // heads that hold equally many cells: stock until something is evicted, then the faster one: ragged on the
                              // CPU, stock elsewhere; quantised cells on the CPU: ragged
                              // heads that differ: ragged on the CPU, and elsewhere for up to 8 tokens where the device has it; stock
                              // for the rest
    WKV_ATTENTION_STOCK  = 1, // ggml_flash_attn_ext, head by head where they differ; the CPU runs ragged for these
    WKV_ATTENTION_RAGGED = 2, // ggml_flash_attn_ragged, where the device has it
};

// Of the layers that attend to all positions, which are those that policies compress: all of them in most models. Window and
// recurrent layers stay as they are in stock and count in bytes_other alone.
struct wkv_stats {
    int32_t n_layer;
    int32_t n_head_kv;
    int32_t n_gqa;              // query heads per kv head
    int32_t n_past;             // positions
    int32_t n_boundary;         // positions below this one were subject to the last compaction
    int32_t n_compactions;      // that evicted something, in all layers or in some
    int32_t n_observed;         // queries that a compaction can ask for; as many of the last prompt's end are held beside them
    int32_t n_queries;          // observed queries that are held: none where the tokens that had them were removed
    int32_t n_summed;           // tokens before this position are in the sums of the cells, see wkv_accumulate()
    int32_t n_replayed;         // positions before this one were repeated, see wkv_replay_begin()
    int32_t type_k;             // ggml types of the cells
    int32_t type_v;
    int64_t bytes_live;         // bytes of the live buffers: pools, observed queries, tables on GPUs
    int64_t bytes_pool;         // of these, the K and V pools
    int64_t bytes_cell;         // of these, a cell of every head of every layer takes
    int64_t bytes_full;         // what the stock cache holds for n_past positions in these layers
    int64_t bytes_peak;         // largest bytes_live so far; what growth and compaction hold for a moment, on the host too, included
    int64_t bytes_released;     // given back by the last compaction
    int64_t bytes_other;        // of the caches of window and recurrent layers, 0 where there are none
    double  t_score_ms;         // last compaction: scoring
    double  t_select_ms;        // last compaction: selection on the host
    double  t_gather_ms;        // last compaction: moving the kept cells and freeing the rest
};

// --- library

// hash of the pin, the patches and the native sources this library was built from
WKV_API const char * wkv_build_stamp(void);

// message of the last failure on this thread, "" if there was none; llama_decode() and llama_state_*() on a context with a policy forget
// it first and leave one if they fail
WKV_API const char * wkv_last_error(void);

// forget it, to tell whether a call of llama.h that follows is refused by this cache
WKV_API void wkv_clear_error(void);

// --- creation

// The next llama_context created on this thread gets a ragged KV cache whose compactions observe up to n_observed tokens (> 0,
// or as many as there are positions).
// type: a ggml type for its cells, where the blocks of that divide the rows of all heads; below 0, and for other heads, the types
// that the context asks for, which caches with a sliding window have in any case. Models whose other layers keep a sliding window
// or a recurrent state get it for the layers that attend to all positions; their window caches are as large as the window then,
// whatever swa_full says. Errors of parameters can stop the creation before the request is consumed, so call wkv_pending_clear()
// afterwards in any case.
WKV_API int  wkv_pending_set(int32_t n_observed, int32_t type);
WKV_API void wkv_pending_clear(void);

// WKV_OK if the context has a ragged cache that serves all of its attention layers, with ragged = true also for
// policies that give the heads of a layer different numbers of cells
WKV_API int wkv_ready(struct llama_context * ctx, bool ragged);

// Whether the devices of all layers have ggml_flash_attn_ragged: 1, or 0 if some attend head by head where heads differ, with an
// attention of its own for every kv head (wkv_ready() says if they can), or a negative status
WKV_API int wkv_has_ragged(struct llama_context * ctx);

// --- runtime

// make room for positions up to n_past + n_tokens without slack; an optimisation, never required
WKV_API int wkv_reserve(struct llama_context * ctx, int32_t n_tokens);

// Give an empty cache, also one without a policy, n_tokens positions with random K, V and observed queries, without evaluating
// anything; recurrent states stay as they are. For measuring speed and memory at depths whose prompt would take hours.
WKV_API int wkv_fill(struct llama_context * ctx, int32_t n_tokens);

// Positions whose cells stay in every compaction from now on: n ranges, row major [n, 2], from the first position to one behind the last,
// of positions that are there or will be; n = 0: none. They count in its n_cells, which has to leave at least one for the others, and
// the policy chooses among these as if they were the whole cache; a position that some head has lost is as any other. They belong to
// the context, and clearing the cache leaves them.
WKV_API int wkv_set_pinned(struct llama_context * ctx, const int32_t * ranges, size_t n);

// Rows that every compaction from now on leaves free in every head, 0 = few: so many tokens follow before cells move to larger pools, and
// graphs are reused meanwhile.
WKV_API int wkv_set_room(struct llama_context * ctx, int32_t n_tokens);

// Adds the attention of the tokens that were evaluated since the last call, as far as they are observed, to the sums of the cells, of which
// reduce = sum makes scores. A compaction that scores so does it by itself; before a batch after which more than n_observed tokens would
// wait for it, the caller does. Tokens that are removed afterwards stay in the sums of the cells that they attended to.
WKV_API int wkv_accumulate(struct llama_context * ctx);

// Context shift: give up the positions [p0, p0 + n), in every head those that it still holds, and move all later ones down by n, their keys
// and observed queries rotated to where they are then. Windows and recurrent states beside do what they do in stock llama.cpp. Ranges of
// wkv_set_pinned() and snapshots stay as they are. 0 <= p0, n >= 1, and positions are left behind. Nothing changes if it fails, unless a
// backend fails while cells move: the cache is cleared then, and the message says so.
// llama_memory_seq_rm(mem, 0, p0, p0 + n) and llama_memory_seq_add(mem, 0, p0 + n, -1, -n) do the same; between the two only removals are
// served.
WKV_API int wkv_shift(struct llama_context * ctx, int32_t p0, int32_t n);

// whether the positions of the model can be shifted: 1 or 0
WKV_API int wkv_can_shift(struct llama_context * ctx);

// choose between attention kernels, for measuring and tests (enum wkv_attention)
WKV_API int wkv_set_attention(struct llama_context * ctx, int32_t attention);

// observe up to n_observed tokens from now on; what was observed so far is forgotten
WKV_API int wkv_set_observed(struct llama_context * ctx, int32_t n_observed);

// The positions so far end a prompt: the queries of its last tokens stay available, whatever is generated and taken back after it,
// until the next call or compaction, which says the same.
WKV_API int wkv_prompt_done(struct llama_context * ctx);

// Tokens evaluated between these two calls are only observed: wkv_observe_end() gives up their positions, with what they did to
// sliding windows and recurrent states, and a compaction that follows at once takes their queries for the newest ones. Thus a
// question chooses the cells of a document of which only a part was read. Between them nothing can be compacted, and no position
// from before removed; clearing the cache ends it. wkv_observe_end() returns 1, or 0 if there was nothing to end; it forgets their queries then. Until the next batch
// the functions that read scores, attention and queries are about these tokens, whose positions are n_past and up. No more of them
// than n_observed: they would take the place of all others.
WKV_API int wkv_observe_begin(struct llama_context * ctx);
WKV_API int wkv_observe_end  (struct llama_context * ctx);

// wkv_observe_begin() for tokens that repeat the positions [p0, p1), as a prompt that asks for it makes a model do, of which no head has
// lost a cell. wkv_observe_end() gives each of their cells the largest attention that these tokens and the query heads of its kv head
// pay it, for reduce = replay, in a softmax over the repeated cells, the first four of the head, and the repeating tokens up to the one
// that pays. The larger one stays where a cell has one already; cells of positions between n_replayed of the statistics and p0 get 0.
// Scores stay with their cells, in compactions and saved states. The queries that are held stay held.
// n_tokens: how many will be evaluated, what asks for the repetition included; if others are, or a batch fails, no cell gets a score.
WKV_API int wkv_replay_begin(struct llama_context * ctx, int32_t p0, int32_t p1, int32_t n_tokens);

// scores of one layer by replays: for every kv head in turn its cells; 2, which is more than any, for cells that were not repeated and for
// those of the first four positions. Returns the number of floats
WKV_API int64_t wkv_get_replayed(struct llama_context * ctx, int32_t layer, float * scores, size_t n);

// Called inside llama_decode() before it evaluates a single token behind a prompt: behind several tokens that came at once while
// the function was set, since when nobody compacted or called wkv_prompt_done(). It may call these two and wkv_set_pinned(), and read
// the context, nothing else.
typedef void (*wkv_prompt_fn)(void * user);

// fn = NULL: no more
WKV_API int wkv_on_prompt(struct llama_context * ctx, wkv_prompt_fn fn, void * user);

// score, select and gather: afterwards the (layer, kv head) pairs hold n_cells cells on average
// returns the number of cells released over all layers and heads, or a negative status: nothing was evicted then, or if memory ran
// out while cells moved, in some layers alone. The message says which; the cache can be used, and a second call completes it
WKV_API int64_t wkv_compact(struct llama_context * ctx, const struct wkv_policy * policy, int64_t n_cells);

// Chooses the cells that stay: sets keep to 1 there (it comes as 0), in the layout of positions and scores, for at most
// n_cells cells per (layer, kv head) on average and at least one each. The arrays are the runtime's own and valid until it
// returns. It may read the context, not change it:
// calls that would are refused. Returns 0, or anything else to leave the cache as it is.
typedef int (*wkv_select_fn)(void * user, const struct wkv_shapes * shapes, int64_t n_cells,
                             const int32_t * positions, const float * scores, uint8_t * keep);

// wkv_compact() with a selection of the caller's; scores are the mean attention of the last window_size tokens, zeros if
// that is 0
WKV_API int64_t wkv_compact_custom(struct llama_context * ctx, int32_t window_size, int64_t n_cells, wkv_select_fn fn, void * user);

// keep a copy of the cache, go back to it any number of times, give it up; clearing the cache gives it up too
// for comparing policies after one prefill. Logits are not part of it.
WKV_API int wkv_snapshot_save   (struct llama_context * ctx);
WKV_API int wkv_snapshot_restore(struct llama_context * ctx);
WKV_API int wkv_snapshot_drop   (struct llama_context * ctx);

// works without a policy too: the stock cache then, whose bytes_live is what it allocated for n_ctx positions and
// whose bytes_full is the share of the positions seen
WKV_API int wkv_get_stats(struct llama_context * ctx, struct wkv_stats * stats);

// the smallest p0 > 0 for which llama_memory_seq_rm(mem, 0, p0, -1) removes the positions from p0 on, n_past if there is none below
WKV_API int32_t wkv_get_removable(struct llama_context * ctx);

// indices in the model of the layers that are meant by n_layer of the statistics and by every "layer" below; returns their
// number or a negative status
WKV_API int wkv_get_layers(struct llama_context * ctx, int32_t * layers, size_t n);

// cells of every (layer, kv head), row major [n_layer, n_head_kv]
WKV_API int wkv_get_cells(struct llama_context * ctx, int32_t * cells, size_t n);

// positions kept by one head, ascending; returns their number or a negative status, writes at most n of them
WKV_API int wkv_get_positions(struct llama_context * ctx, int32_t layer, int32_t head, int32_t * pos, size_t n);

// mean attention of the last window_size tokens, as far as observed, over the cells of one layer: for every kv head in turn its cells
// (mean over its query heads); returns the number of floats or a negative status
// among: 0, or for a policy that scores with two windows the larger one: sums are made of as many queries as in its compaction then, and
// differ from its by rounding alone
WKV_API int64_t wkv_get_scores(struct llama_context * ctx, int32_t layer, int32_t window_size, int32_t among, float * scores, size_t n);

// attention of the last position over the cells of one layer: for every kv head in turn row major [n_gqa, cells];
// returns the number of floats or a negative status
WKV_API int64_t wkv_get_attention(struct llama_context * ctx, int32_t layer, float * weights, size_t n);

// K (0) or V (1) of one head as F32, row major [cells, head_dim]; returns the number of floats
WKV_API int64_t wkv_get_rows(struct llama_context * ctx, int32_t layer, int32_t head, int32_t which, float * rows, size_t n);

// observed queries of one query head as F32 in position order, rows row major [observed, head_dim] of n_rows floats, and their
// positions [observed] of n_pos; returns the number of floats
WKV_API int64_t wkv_get_queries(struct llama_context * ctx, int32_t layer, int32_t head, float * rows, size_t n_rows, int32_t * pos, size_t n_pos);

// --- pure functions: the same code the runtime calls, no context needed

// positions: for every (layer, kv head) in turn its ascending positions
// scores:    F32, in the same layout; query_heads = each: for every (layer, kv head) in turn row major [n_gqa, cells]
//            with token_share a second plane follows, the scores by the last token_window_size tokens
//            wkv_budgets() looks at positions and scores for heads = score alone, they may be NULL otherwise; wkv_select() at
//            scores where window_size > 0. Scores that are not finite are refused
// budgets:   cells that stay, row major [n_layer, n_head_kv]; n_cells = average cells per (layer, kv head)
WKV_API int wkv_budgets(const struct wkv_policy * policy, const struct wkv_shapes * shapes, int64_t n_cells,
                        const int32_t * positions, const float * scores, int32_t * budgets);

// keep: layout of positions, set to 1 where the cell stays, else 0
WKV_API int wkv_select(const struct wkv_policy * policy, const struct wkv_shapes * shapes, const int32_t * budgets,
                       const int32_t * positions, const float * scores, uint8_t * keep);

// cdef: end

#ifdef __cplusplus
}
#endif

#endif // WINDOWKV_H
