#pragma once

// Scores of cells on the CPU: softmax of queries times keys over the cells of a kv head, summed over its queries, or the largest over
// them. Attention weights exist for one tile of cells at a time.
//
// The softmax of a query needs its sum over all cells, so keys and queries are multiplied twice: scan() finds the largest logit and
// the sum for a piece of the cells, combine() puts the pieces of a head together, weigh() adds up the weights. That takes less time
// than to store the logits, which are 4*n_queries*n_gqa bytes for every cell, and no memory.
//
// libllama builds nodes of a graph from the three; it finds them by the name below in the CPU backend, which may be a library that
// was loaded.

#include "ggml.h"

#include <atomic>
#include <cstddef>
#include <cstdint>

// with ggml_backend_reg_get_proc_address(), a function () -> const ggml_ragged_scores_steps *
#define GGML_RAGGED_SCORES_PROC "ggml_cpu_ragged_scores"

// What the steps of one layer share; it has to outlive the graph. Results do not depend on the number of threads.
struct ggml_ragged_scores {
    // [n_embd, n_rows] of a pool: the cells of head ih are the rows first[ih] to first[ih] + n_cells[ih] - 1
    const ggml_tensor * k;

    int64_t         n_head_kv;
    int64_t         n_gqa;
    const int64_t * first;   // [n_head_kv]
    const int64_t * n_cells; // [n_head_kv]

    // F16 [n_embd, n_held, n_head], of which these rows of every head observe
    const ggml_tensor * q;

    int64_t         n_queries;
    const int32_t * rows;     // [n_queries]
    const int64_t * n_hidden; // [n_queries, n_head_kv], cells at the end of a head that a query does not see, fewer than there are

    float         kq_scale;
    float         softcap; // 0: none
    const float * sinks;   // [n_head], nullptr: none

    // dst[i][j] = keep*dst[i][j] + weight*(sum of the weights of cell j), over all queries of a kv head, or of query head i of it;
    // largest: dst[i][j] = the largest of the weight of cell j, times the cells that the query sees where weight is 0, else times weight;
    // and of dst[i][j], where keep is not 0
    bool          by_query_head;
    bool          largest;
    float         weight;
    float         keep; // 0: dst is not read
    float * const * dst; // [n_head_kv] or [n_gqa, n_head_kv], pointers to [n_cells[ih]], or [n_scored]

    int64_t n_scored = 0; // the first cells of every head, which alone get scores; 0: all
    int64_t n_piece  = 0; // cells of a head that a thread takes at once; 0: as many as suit few queries and many cells

    int n_threads; // that there is work memory for

    std::atomic<int64_t> next[3] = {}; // pieces that were taken of every step
};

struct ggml_ragged_scores_steps {
    bool    (*supports)(const ggml_ragged_scores * p); // the type of the cells
    int64_t (*n_work)  (const ggml_ragged_scores * p); // F32 values of work memory

    // Nodes that follow each other, with the struct above as userdata. The result of the first is the work memory, and src[0] of the
    // others.
    ggml_custom_op_t scan;
    ggml_custom_op_t combine;
    ggml_custom_op_t weigh;
};

const ggml_ragged_scores_steps * ggml_cpu_ragged_scores();
