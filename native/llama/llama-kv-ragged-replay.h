#pragma once

// Replay: tokens that repeat a piece of the sequence score its cells, in the graph that evaluates them (KVzip, arXiv 2505.23416,
// section 3). What repeating a piece needs of the cache serves any question about it.

#include "llama-kv-ragged-seq.h"

#include "ggml-cpu/ragged-scores.h"

#include <cstdint>
#include <deque>
#include <vector>

struct llm_graph_context;

// Who scores, and what. A score is the largest attention that a replayed token pays to the cell, over these tokens and the query heads
// of its kv head. Its softmax is about three kinds of keys alone: the piece, the first cells of the head, on which attention rests that
// goes nowhere else, and the replayed tokens up to the one that asks. So what it costs does not grow with what lies before the piece,
// and nothing is kept of a query.
class llama_kv_ragged_replay {
public:
    // The positions [p0, p1) will be repeated, by n_tokens behind all that seq holds. Throws std::invalid_argument if they cannot be, and
    // std::runtime_error if there is no memory for the scores.
    llama_kv_ragged_replay(const llama_kv_ragged_seq & seq, int32_t p0, int32_t p1, int32_t n_tokens);

    int32_t get_n_tokens() const { return n_tokens; }

    int64_t n_keys(uint32_t n_pos) const { return p1 - p0 + n_sink + n_pos - n_held; }

    // keys in a layer's pool with n_pos positions, I32 [n_keys, n_head_kv]: those of the piece come first
    void set_rows(const llama_kv_ragged_seq & seq, size_t i, int32_t * rows) const;

    // F32 [n_keys, n_tokens], 0 or minus infinity, for the last n_tokens positions
    void set_mask(uint32_t n_pos, int64_t n_tokens, float * mask) const;

    // The nodes of a layer, whose K rows are stored; this object has to outlive the graph.
    //   q [n_embd_head_k, n_tokens, n_head], k [n_embd_head_k, n_rows], rows and mask as above; on the CPU nobody needs a mask
    void build(
            const llm_graph_context & g,
            ggml_tensor  * q,
            ggml_tensor  * k,
            ggml_tensor  * rows,
            ggml_tensor  * mask,
            ggml_tensor  * sinks,
            float          kq_scale,
            float          softcap,
            size_t         i);

    // What the graphs have found becomes part of the cells, the larger of two scores where there is one. Only the positions that
    // were there from the beginning may be left of seq. Throws std::bad_alloc with nothing changed.
    void give(llama_kv_ragged_seq & seq) const;

private:
    ggml_tensor * build_on_cpu(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * keys, ggml_tensor * sinks, float kq_scale,
            float softcap, size_t i);

    int32_t  p0;
    int32_t  p1;
    int32_t  n_tokens;
    uint32_t n_held; // positions before those who repeat
    int64_t  n_sink; // first cells of every head, before the piece

    const std::vector<llama_kv_ragged_layer> * layers;

    // of a layer on the CPU: what the steps of its scores share, and what that points to
    struct cpu_scores {
        ggml_ragged_scores   p;
        std::vector<int64_t> first;
        std::vector<int64_t> n_cells;
        std::vector<int32_t> rows;
        std::vector<int64_t> n_hidden;
        std::vector<float *> dst;
    };
    std::deque<cpu_scores> on_cpu; // of every graph

    std::vector<llama_kv_ragged_tensor> scores; // [layers], F32 [p1 - p0, n_head_kv], on the device of the layer
};
