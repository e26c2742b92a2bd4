// windowkv: what a policy is, as plain C. The only definition: native/policy uses these structs, callers of windowkv.h fill them,
// and the Python package parses them with cffi (policies/parts.py has a dataclass for each).
//
// Choices are ints here, so that any value can be passed; policy_error() in native/policy refuses those that no enum has.

#ifndef WINDOWKV_POLICY_H
#define WINDOWKV_POLICY_H

#include <stdint.h>

// cdef: begin

// A policy: scoring, allocation, selection. What a choice does not use has to be 0.

// max-pooling of the scores of the tokens before the observation window
enum wkv_pooling {
    WKV_POOLING_MAX   = 0, // centred: a token takes the best score of kernel_size tokens around it (SnapKV, arXiv 2404.14469)
    WKV_POOLING_CARRY = 1, // causal: of the kernel_size positions that end with its own; what follows an attended token is kept
    WKV_POOLING_COUNT
};

// what is scored where several query heads share a kv head
enum wkv_query_heads {
    WKV_QUERY_HEADS_MEAN = 0, // one score per cell, the mean over these query heads
    WKV_QUERY_HEADS_EACH = 1, // one per cell and query head; a window is scored in each and averaged (WindowKV's code)
    WKV_QUERY_HEADS_COUNT
};

// what the attention weights that a cell gets become, over the observing tokens and the query heads of its kv head
enum wkv_reduce {
    WKV_REDUCE_MEAN   = 0, // their mean
    WKV_REDUCE_MAX    = 1, // the largest of weight times cells that the query sees; over 1 it is more than an even share of that query's
                         // attention (CORM, arXiv 2404.15949, section 4.1)
    WKV_REDUCE_SUM    = 2, // their sum over the tokens of the whole sequence, mean over the query heads (H2O, arXiv 2306.14048, section 4);
                         // sums stay with their cells in compactions
    WKV_REDUCE_REPLAY = 3, // the largest that tokens which repeat it pay to it, see wkv_replay_begin() (KVzip, arXiv 2505.23416, section 3);
                           // a cell that was not repeated has a larger one than any that was. window_size asks for no queries then
    WKV_REDUCE_COUNT
};

// Scoring: who observes, and how scores are pooled. A score is the mean attention that a cell gets from the observing tokens, unless
// reduce says otherwise.
struct wkv_scoring {
    int32_t window_size;       // observation window: the last window_size tokens observe the others; 0: positions alone decide
    int32_t token_window_size; // with token_share: a second plane of scores by the last token_window_size tokens, for single tokens
    int32_t pooling;           // enum wkv_pooling
    int32_t kernel_size;       // tokens that pooling spans, or positions if they carry over, 1 = none; odd if centred
    int32_t query_heads;       // enum wkv_query_heads; each: windows with kernel_size = 1, share = first and token_share = 0
    int32_t reduce;            // enum wkv_reduce; max, sum: kind = best; replay: query_heads = mean, token_window_size = 0
};

// the mean budget C of the layers
enum wkv_layers {
    WKV_LAYERS_FLAT       = 0, // C for every layer
    WKV_LAYERS_PYRAMID    = 1, // falls linearly to C/beta at the last layer (PyramidKV, arXiv 2406.02069, eq. 5)
    WKV_LAYERS_ARITHMETIC = 2, // falls linearly over groups of gamma layers to C*gamma/lam (WindowKV, arXiv 2503.17922, section 3.4)
    WKV_LAYERS_COUNT
};

// how the kv heads divide what there is
enum wkv_heads {
    WKV_HEADS_EQUAL      = 0, // every head of a layer holds the same number of cells
    WKV_HEADS_IMPORTANCE = 1, // by scores that the model's heads were given beforehand (HeadKV, arXiv 2410.19258)
    WKV_HEADS_SCORE      = 2, // heads compete with the scores of their cells (AdaKV, arXiv 2407.11550)
    WKV_HEADS_COUNT
};

// whom a head competes with
enum wkv_across {
    WKV_ACROSS_LAYER = 0, // the heads of its layer, as published
    WKV_ACROSS_MODEL = 1, // all heads
    WKV_ACROSS_COUNT
};

enum wkv_accounting {
    WKV_ACCOUNTING_NATIVE = 0, // every cell counts, and the mean is n_cells exactly unless there are fewer
    WKV_ACCOUNTING_PAPER  = 1, // rounded and cut as by the authors' code, so that totals miss n_cells by some; with windows the
                               // observation window comes on top of n_cells
    WKV_ACCOUNTING_COUNT
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
    double  alpha_safeguard;  // heads = score: of what it would hold if no heads competed and it had lost no cells, the share that every
                              // head is sure of as long as it has so many, 0..1
    int32_t importance_floor; // cells of each head that are not divided by importance, >= 0 (HeadKV: 0)
    const double * importance; // [n_layer, n_head_kv], not negative, any scale; where beta divides by it
    int64_t n_importance;     // elements of importance
};

enum wkv_kind {
    WKV_KIND_FULL    = 0, // every cell
    WKV_KIND_RECENT  = 1, // the first n_sink tokens and the newest ones (StreamingLLM, arXiv 2309.17453)
    WKV_KIND_TOKENS  = 2, // the newest n_recent tokens and those with the best scores (SnapKV, arXiv 2404.14469)
    WKV_KIND_WINDOWS = 3, // windows of omega consecutive tokens, each as a whole (WindowKV, arXiv 2503.17922)
    WKV_KIND_BEST    = 4, // the newest n_recent tokens and of all others, observing ones too, those with the best scores (H2O, CORM)
    WKV_KIND_COUNT
};

// the heads that hold the same windows
enum wkv_scope { WKV_SCOPE_LAYER = 0, WKV_SCOPE_HEAD = 1, WKV_SCOPE_COUNT };

// whose scores choose for a group of gamma layers: its first layer's, as published, or the mean over its layers
enum wkv_share { WKV_SHARE_FIRST = 0, WKV_SHARE_MEAN = 1, WKV_SHARE_COUNT };

// Selection: what stays of a head, given its budget.
struct wkv_selection {
    int32_t kind;          // enum wkv_kind
    int32_t n_sink;        // recent: first tokens that always stay
    int32_t n_recent;      // tokens, windows: of the observation window the newest tokens that always stay, 0..window_size; best: any
                           // number of newest tokens, and at least the newest one stays
    int32_t omega;         // windows: tokens per window, on a fixed grid of positions; this and all below but recent_share
    int32_t top_p;         // a window scores the mean of its top_p best tokens, 1..omega
    int32_t gamma;         // consecutive layers that share one set of indices, 1 = none do
    int32_t share;         // enum wkv_share
    int32_t scope;         // enum wkv_scope
    int32_t protect_first; // 1: the first window always stays (it holds the attention sink)
    int32_t whole_windows; // 1: the worst windows are dropped whole until the budget is met or passed by less than one, as by the
                           // authors' code; 0: the last one that fits in part keeps its best tokens. Needs heads = equal
    double  recent_share;  // windows: n_recent takes at most this share of a budget, over 0 and up to 1; best: as many newest tokens as
                           // this share of the budget stay in place of n_recent, 0 = n_recent do
    double  token_share;   // of the rest single tokens take this share, 0..1; needs scope = head and gamma = 1
    int32_t window_floor;  // with token_share: cells that windows get before single tokens get any, >= 0
};

struct wkv_policy {
    struct wkv_scoring    scoring;
    struct wkv_allocation allocation;
    struct wkv_selection  selection;

    double replay_share; // of the cells that stay, the share that scores by replay (reduce = replay) choose among those that all above
                         // leaves, whichever heads hold them, 0 to under 1; not with reduce = replay, kind = full or accounting = paper
};

// Shapes of one selection.
struct wkv_shapes {
    int32_t n_layer;
    int32_t n_head_kv;
    int32_t n_gqa;              // query heads per kv head; query_heads = each has as many rows of scores
    int32_t n_past;             // cells that a head which has lost none holds: positions seen, without those that are pinned
    const int32_t * cells;      // cells that each (layer, kv head) holds now, row major [n_layer, n_head_kv]
};

// cdef: end

#endif // WINDOWKV_POLICY_H
