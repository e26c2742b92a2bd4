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

enum wkv_kind {
    WKV_KIND_FULL         = 0, // keeps every cell
    WKV_KIND_STREAMINGLLM = 1, // arXiv 2309.17453
    WKV_KIND_SNAPKV       = 2, // arXiv 2404.14469
    WKV_KIND_PYRAMIDKV    = 3, // arXiv 2406.02069
    WKV_KIND_WINDOWKV     = 4, // arXiv 2503.17922
};

enum wkv_scope      { WKV_SCOPE_LAYER = 0, WKV_SCOPE_HEAD = 1 };
enum wkv_shape      { WKV_SHAPE_FLAT = 0, WKV_SHAPE_ARITHMETIC = 1 };
enum wkv_share      { WKV_SHARE_FIRST = 0, WKV_SHARE_MEAN = 1 };
enum wkv_accounting { WKV_ACCOUNTING_NATIVE = 0, WKV_ACCOUNTING_PAPER = 1 };

// how the kv heads divide what there is
enum wkv_heads {
    WKV_HEADS_EQUAL      = 0, // every head of a layer holds the same number of cells
    WKV_HEADS_IMPORTANCE = 1, // HeadKV, arXiv 2410.19258: by a score that the model's heads were given beforehand
    WKV_HEADS_SCORE      = 2, // AdaKV, arXiv 2407.11550: heads compete with the scores of their cells
};

// whom a head competes with
enum wkv_span {
    WKV_SPAN_LAYER = 0, // the heads of its layer, as published
    WKV_SPAN_MODEL = 1, // all heads
};

// which attention a layer runs whose heads hold equally many cells; layers whose heads differ always run the ragged op
enum wkv_attention {
    WKV_ATTENTION_AUTO   = 0, // stock until something is evicted, then the faster one: ragged on the CPU, stock elsewhere;
                              // quantised cells on the CPU: ragged
    WKV_ATTENTION_STOCK  = 1, // ggml_flash_attn_ext
    WKV_ATTENTION_RAGGED = 2, // ggml_flash_attn_ragged, where the device has it
};

// One policy. Fields that a kind does not use are ignored.
struct wkv_policy {
    int32_t kind;          // enum wkv_kind
    int32_t alpha;         // observation window: the last alpha tokens score the others, > 0
    int32_t suffix;        // of the observation window, the tokens that always stay, 0..alpha
    int32_t n_sink;        // streamingllm: first tokens that always stay
    int32_t kernel;        // snapkv, pyramidkv: width of the max-pool over token scores, odd
    int32_t omega;         // windowkv: tokens per window
    int32_t top_p;         // windowkv: a window scores the mean of its top_p best tokens, 1..omega
    int32_t gamma;         // windowkv: consecutive layers that share one set of indices
    int32_t share;         // windowkv: enum wkv_share, whose scores choose for the group
    int32_t scope;         // windowkv: enum wkv_scope
    int32_t shape;         // windowkv: enum wkv_shape of the budgets over the groups
    int32_t accounting;    // windowkv: enum wkv_accounting
    int32_t protect_first; // windowkv: 1 = the first window always stays (it holds the attention sink)
    int32_t carry;         // windowkv: a token's score carries over to this many tokens behind it, >= 0
    double  suffix_share;  // windowkv: of a budget the suffix takes at most this share, over 0 and up to 1
    double  tokens;        // windowkv: of the rest single tokens take this share, 0 to 1 (needs scope = head and gamma = 1)
    int32_t window_floor;  // windowkv: cells that windows get before single tokens get any, >= 0
    int32_t token_alpha;   // windowkv: the last token_alpha tokens score single tokens, > 0 if tokens > 0
    double  slope;         // lambda of windowkv, beta of pyramidkv: the last budget is C*gamma/lambda or C/beta
    int32_t heads;         // enum wkv_heads
    int32_t span;          // heads = score: enum wkv_span; budgets of span = model are flat
    double  pool;          // heads = importance, or score over the model: the share of all cells that is divided by importance
                           // before heads compete, 0..1 (HeadKV's 1/beta)
    int32_t pool_floor;    // of each head's equal budget, the cells that are not divided, >= 0 (HeadKV: 0)
    double  floor_share;   // heads = score: the share of what it would hold otherwise that every head is sure of, 0..1
    const double * importance; // [n_layer, n_head_kv], not negative, any scale; needed where pool > 0, and by heads = importance
    int64_t n_importance;      // elements of importance
};

// Shapes of one selection.
struct wkv_shapes {
    int32_t n_layer;
    int32_t n_head_kv;
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
    int32_t n_compactions;
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

// message of the last failure on this thread, "" if there was none
WKV_API const char * wkv_last_error(void);

// forget it, to tell whether a call of llama.h that follows is refused by this cache
WKV_API void wkv_clear_error(void);

// --- creation

// The next llama_context created on this thread gets a ragged KV cache whose compactions observe up to n_observed tokens (> 0).
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

// Called inside llama_decode() before it evaluates a single token behind a prompt: behind several tokens at once, since which
// nobody compacted or called wkv_prompt_done(). It may call these two and read the context, nothing else.
typedef void (*wkv_prompt_fn)(void * user);

// fn = NULL: no more
WKV_API int wkv_on_prompt(struct llama_context * ctx, wkv_prompt_fn fn, void * user);

// score, select and gather: afterwards the (layer, kv head) pairs hold n_cells cells on average
// returns the number of cells released over all layers and heads, or a negative status
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
// scores:    same layout, F32; with tokens > 0 a second plane follows, the scores by the last token_alpha tokens
//            only heads = score looks at positions and scores, they may be NULL otherwise
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
