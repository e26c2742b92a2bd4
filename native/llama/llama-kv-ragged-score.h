#pragma once

// Scores of the cells of one layer: the attention that observed queries pay to them. Graphs only, nothing is kept.

#include "llama-kv-ragged-compute.h"
#include "llama-kv-ragged-seq.h"

#include <cstdint>
#include <functional>
#include <vector>

struct llama_kv_ragged_scoring {
    // observation windows in tokens: the last queries of the sequence, or those of them that were observed
    std::vector<int32_t> window_sizes;

    // false: the mean over the queries of a window and the query heads of a kv head, one plane of scores per window
    // true:  the mean over the queries of the first window for every query head by itself
    bool by_query_head = false;

    // largest tensor of attention weights in bytes, more are computed in parts; ggml_acc() keeps distances in 32 bits
    int64_t n_bytes_max = INT32_MAX;

    // bytes of attention weights that may be computed for several heads at once; -1: what suits the device
    int64_t n_bytes_group = -1;
};

// takes the scores of some heads, F32 [n_cells, n_res, n] from head ih on, into the graph that computes them
using llama_kv_ragged_score_fn = std::function<void(llama_kv_ragged_compute & graph, ggml_tensor * scores, int64_t ih)>;

// Of one layer: for one plane after the other the kv heads in turn, [n_cells] each; by query head for the kv heads in turn
// [n_gqa, n_cells].
// Throws std::runtime_error if there is nothing to score or the graph fails.
// With dst: planes begin n_stride floats after one another; returns how many floats of each were written. With stay, which adds 8
// tensors at most for a call, scores stay where they are, and nothing is written.
size_t llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring,
        llama_kv_ragged_workspace & workspace, float * dst, size_t n_stride, const llama_kv_ragged_score_fn & stay = nullptr);

std::vector<float> llama_kv_ragged_score(
        llama_context & lctx, const llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_scoring & scoring);
