// windowkv: per-head KV cells for llama.cpp, the C interface.
//
// This header is the single source of the declarations: the Python package parses it with cffi.
// Everything between the two "cdef" marks must therefore be plain C without preprocessor lines.

#ifndef WINDOWKV_H
#define WINDOWKV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

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

// which attention a layer runs whose heads hold equally many cells; layers whose heads differ always run the ragged op
enum wkv_attention {
    WKV_ATTENTION_AUTO   = 0, // stock until something is evicted, then the faster one: ragged on the CPU, stock elsewhere;
                              // quantised cells on the CPU: ragged
    WKV_ATTENTION_STOCK  = 1, // ggml_flash_attn_ext
    WKV_ATTENTION_RAGGED = 2, // ggml_flash_attn_ragged, where the device has it
};

//
// a policy: scoring, allocation, selection. What a choice does not use has to be 0.
//

// max-pooling of the scores of the tokens before the observation window
enum wkv_pooling {
    WKV_POOLING_MAX   = 0, // centred: a token takes the best score of kernel_size tokens around it (SnapKV, arXiv 2404.14469)
    WKV_POOLING_CARRY = 1, // causal: of itself and the kernel_size - 1 tokens before it; what follows an attended token is kept
};

// what is scored where several query heads share a kv head
enum wkv_query_heads {
    WKV_QUERY_HEADS_MEAN = 0, // one score per cell, the mean over these query heads
    WKV_QUERY_HEADS_EACH = 1, // one per cell and query head; a window is scored in each and averaged (WindowKV's code)
};

// Scoring: who observes, and how scores are pooled. A score is the mean attention that a cell gets from the observing tokens.
struct wkv_scoring {
    int32_t window_size;       // observation window: the last window_size tokens observe the others; 0: positions alone decide
    int32_t token_window_size; // with token_share: a second plane of scores by the last token_window_size tokens, for single tokens
    int32_t pooling;           // enum wkv_pooling
    int32_t kernel_size;       // tokens that pooling spans, 1 = none; odd if centred
    int32_t query_heads;       // enum wkv_query_heads; each: windows with kernel_size = 1, share = first and token_share = 0
};

// the mean budget C of the layers
enum wkv_layers {
    WKV_LAYERS_FLAT       = 0, // C for every layer
    WKV_LAYERS_PYRAMID    = 1, // falls linearly to C/beta at the last layer (PyramidKV, arXiv 2406.02069, eq. 5)
    WKV_LAYERS_ARITHMETIC = 2, // falls linearly over groups of gamma layers to C*gamma/lam (WindowKV, arXiv 2503.17922, section 3.4)
};

// how the kv heads divide what there is
enum wkv_heads {
    WKV_HEADS_EQUAL      = 0, // every head of a layer holds the same number of cells
    WKV_HEADS_IMPORTANCE = 1, // by scores that the model's heads were given beforehand (HeadKV, arXiv 2410.19258)
    WKV_HEADS_SCORE      = 2, // heads compete with the scores of their cells (AdaKV, arXiv 2407.11550)
};

// whom a head competes with
enum wkv_across {
    WKV_ACROSS_LAYER = 0, // the heads of its layer, as published
    WKV_ACROSS_MODEL = 1, // all heads
};

enum wkv_accounting {
    WKV_ACCOUNTING_NATIVE = 0, // every cell counts, and the mean is n_cells exactly unless there are fewer
    WKV_ACCOUNTING_PAPER  = 1, // rounded and cut as by the authors' code, so that totals miss n_cells by some; with windows the
                               // observation window comes on top of n_cells
};

// Allocation: how layers and heads divide the cells.
struct wkv_allocation {
    int32_t layers;           // enum wkv_layers
    int32_t heads;            // enum wkv_heads
    int32_t across;           // heads = score: enum wkv_across; across = model needs layers = flat
    int32_t accounting;       // enum wkv_accounting
    double  lam;              // layers = arithmetic: WindowKV's lambda, > 0
    double  beta;             // layers = pyramid: PyramidKV's beta, >= 1
                              // heads = importance: HeadKV's beta, >= 1: 1/beta of all cells is divided by importance
                              // heads = score, across = model: the same before heads compete, 0 = nothing is
    double  alpha_safeguard;  // heads = score: of what it would hold otherwise, the share that every head is sure of, 0..1
    int32_t importance_floor; // cells of each head that are not divided by importance, >= 0 (HeadKV: 0)
    const double * importance; // [n_layer, n_head_kv], not negative, any scale; where beta divides by it
    int64_t n_importance;     // elements of importance
};

enum wkv_kind {
    WKV_KIND_FULL    = 0, // every cell
    WKV_KIND_RECENT  = 1, // the first n_sink tokens and the newest ones (StreamingLLM, arXiv 2309.17453)
    WKV_KIND_TOKENS  = 2, // the newest n_recent tokens and those with the best scores (SnapKV, arXiv 2404.14469)
    WKV_KIND_WINDOWS = 3, // windows of omega consecutive tokens, each as a whole (WindowKV, arXiv 2503.17922)
};

// the heads that hold the same windows
enum wkv_scope { WKV_SCOPE_LAYER = 0, WKV_SCOPE_HEAD = 1 };

// whose scores choose for a group of gamma layers: its first layer's, as published, or the mean over its layers
enum wkv_share { WKV_SHARE_FIRST = 0, WKV_SHARE_MEAN = 1 };

// Selection: what stays of a head, given its budget.
struct wkv_selection {
    int32_t kind;          // enum wkv_kind
    int32_t n_sink;        // recent: first tokens that always stay
    int32_t n_recent;      // tokens, windows: of the observation window the newest tokens that always stay, 0..window_size
    int32_t omega;         // windows: tokens per window, on a fixed grid of positions; this and all below
    int32_t top_p;         // a window scores the mean of its top_p best tokens, 1..omega
    int32_t gamma;         // consecutive layers that share one set of indices, 1 = none do
    int32_t share;         // enum wkv_share
    int32_t scope;         // enum wkv_scope
    int32_t protect_first; // 1: the first window always stays (it holds the attention sink)
    int32_t whole_windows; // 1: the worst windows are dropped whole until the budget is met or passed by less than one, as by the
                           // authors' code; 0: the last one that fits in part keeps its best tokens. Needs heads = equal
    double  recent_share;  // n_recent takes at most this share of a budget, over 0 and up to 1
    double  token_share;   // of the rest single tokens take this share, 0..1; needs scope = head and gamma = 1
    int32_t window_floor;  // with token_share: cells that windows get before single tokens get any, >= 0
};

struct wkv_policy {
    struct wkv_scoring    scoring;
    struct wkv_allocation allocation;
    struct wkv_selection  selection;
};

// Shapes of one selection.
struct wkv_shapes {
    int32_t n_layer;
    int32_t n_head_kv;
    int32_t n_gqa;              // query heads per kv head; query_heads = each has as many rows of scores
    int32_t n_past;             // positions the sequence has seen, evicted ones included
    const int32_t * cells;      // cells that each (layer, kv head) holds now, row major [n_layer, n_head_kv]
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
    int32_t type_k;             // ggml types of the cells
    int32_t type_v;
    int64_t bytes_live;         // bytes of the live buffers: pools, observed queries, tables on GPUs
    int64_t bytes_pool;         // of these, the K and V pools
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

// message of the last failure on this thread, "" if there was none; llama_decode() on a context with a policy forgets it first and
// leaves one if it fails
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

// --- runtime

// make room for positions up to n_past + n_tokens without slack; an optimisation, never required
WKV_API int wkv_reserve(struct llama_context * ctx, int32_t n_tokens);

// Give an empty cache, also one without a policy, n_tokens positions with random K, V and observed queries, without evaluating
// anything; recurrent states stay as they are. For measuring speed and memory at depths whose prompt would take hours.
WKV_API int wkv_fill(struct llama_context * ctx, int32_t n_tokens);

// choose between attention kernels, for measuring and tests (enum wkv_attention)
WKV_API int wkv_set_attention(struct llama_context * ctx, int32_t attention);

// observe up to n_observed tokens from now on; what was observed so far is forgotten
WKV_API int wkv_set_observed(struct llama_context * ctx, int32_t n_observed);

// The positions so far end a prompt: the queries of its last tokens stay available, whatever is generated and taken back after it,
// until the next call or compaction, which says the same.
WKV_API int wkv_prompt_done(struct llama_context * ctx);

// Called inside llama_decode() before it evaluates a single token behind a prompt: behind several tokens that came at once while
// the function was set, since when nobody compacted or called wkv_prompt_done(). It may call these two and read the context,
// nothing else.
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

// indices in the model of the layers that are meant by n_layer of the statistics and by every "layer" below; returns their
// number or a negative status
WKV_API int wkv_get_layers(struct llama_context * ctx, int32_t * layers, size_t n);

// cells of every (layer, kv head), row major [n_layer, n_head_kv]
WKV_API int wkv_get_cells(struct llama_context * ctx, int32_t * cells, size_t n);

// positions kept by one head, ascending; returns their number or a negative status, writes at most n of them
WKV_API int wkv_get_positions(struct llama_context * ctx, int32_t layer, int32_t head, int32_t * pos, size_t n);

// mean attention of the last window_size tokens, as far as observed, over the cells of one layer: for every kv head in turn its cells
// (mean over its query heads); returns the number of floats or a negative status
// among: 0, or for a policy that scores with two windows the larger one: sums round as in its compaction then
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
