#pragma once

// Scores of the cells of one layer: the attention that observed queries pay to them. Nothing is kept.

#include "llama-kv-ragged-compute.h"
#include "llama-kv-ragged-seq.h"

#include <cstdint>
#include <functional>
#include <vector>

// what a score is, see wkv_reduce
enum llama_kv_ragged_reduce {
    LLAMA_KV_RAGGED_REDUCE_MEAN,
    LLAMA_KV_RAGGED_REDUCE_MAX,
    LLAMA_KV_RAGGED_REDUCE_SUM,
    LLAMA_KV_RAGGED_REDUCE_REPLAY,
};

struct llama_kv_ragged_scoring {
    // Observation windows in tokens: the last queries of the sequence, or those of them that were observed. Each makes a plane of scores.
    std::vector<int32_t> window_sizes;

    // other than the mean: of one window, and by_query_head is false; sum: of the queries that are in no sum yet, added to the cells' sums;
    // replay: what a replay gave the cells
    llama_kv_ragged_reduce reduce = LLAMA_KV_RAGGED_REDUCE_MEAN;

    // false: the mean over the queries of a window and the query heads of a kv head
    // true:  the mean over the queries of the window for every query head by itself; there is one window then
    bool by_query_head = false;

    // Only a graph of ggml's ops has what follows: devices compute it, and the CPU for cells that its own steps do not read.

    // a CPU computes it, too
    bool graph = false;

    // largest tensor of attention weights in bytes, more are computed in parts; ggml_acc() keeps distances in 32 bits
    int64_t n_bytes_max = INT32_MAX;

    // bytes of attention weights that may be computed for several heads at once; -1: what suits the device
    int64_t n_bytes_group = -1;
};

// the largest of every row of [n, ne1, ne2], [ne1, 1, ne2]; no number where one was not finite, which comparing does not tell
ggml_tensor * llama_kv_ragged_build_largest(ggml_context * ctx, ggml_tensor * rows);

// the larger ones of two [ne0, 1, ne2]
ggml_tensor * llama_kv_ragged_build_larger(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b);

struct ggml_ragged_scores;
struct ggml_ragged_scores_steps;

// the steps of the CPU backend, nullptr for a layer on another
const ggml_ragged_scores_steps * llama_kv_ragged_cpu_steps(const llama_kv_ragged_layer & layer);

// The nodes of these steps, which read what a graph computes before; p has to outlive it. Expand what it returns, which has no value of
// its own.
ggml_tensor * llama_kv_ragged_build_steps(
        ggml_context * ctx, const ggml_ragged_scores_steps & steps, ggml_ragged_scores & p, const std::vector<ggml_tensor *> & reads);

// Scores of one layer by window i_window: for the kv heads in turn [n_cells]; by query head [n_gqa, n_cells]. Returns how many.
// i_window = 1: dst holds the scores by the first window, which those by the second take the place of. Queries that are in
// both are not asked again then, if the second window is the larger one.
// Throws std::runtime_error if there is nothing to score or the graph fails.
size_t llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring, size_t i_window,
        llama_kv_ragged_workspace & workspace, float * dst);

// takes the scores of some heads, F32 [n_cells, n_res, n] from head ih on, into the graph that computes them; adds 8 tensors at most
using llama_kv_ragged_score_fn = std::function<void(llama_kv_ragged_compute & graph, ggml_tensor * scores, int64_t ih)>;

// by all windows at once, one after the other, for scores that stay where they are
void llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring,
        llama_kv_ragged_workspace & workspace, const llama_kv_ragged_score_fn & stay);

// by all windows, one plane after the other
std::vector<float> llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring);
