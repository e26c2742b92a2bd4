#pragma once

// Context shift of a sequence: positions are given up in every head, the later ones move down, and their keys are rotated to where they
// are then, as upstream's build_rope_shift() does for caches of its own.

#include "llama-kv-ragged-compute.h"
#include "llama-kv-ragged-rope.h"
#include "llama-kv-ragged-seq.h"

#include <cstdint>
#include <memory>
#include <vector>

struct llama_context;
class llama_kv_cache;
class llama_kv_cache_ragged;

// What moving the keys of a sequence takes. Everything that needs memory is there once it is constructed, and every layer's device has
// shown that it computes what is asked of it; the sequence is as it was until apply().
class llama_kv_ragged_shift {
public:
    // kv: the cache that holds the sequence, for its rotation of cells; hole: inside of the positions, more follow
    // throws std::runtime_error, llama_kv_ragged_unsupported where a device does not serve the outcome
    llama_kv_ragged_shift(llama_context & lctx, const llama_kv_cache_ragged & kv, llama_kv_ragged_seq & seq, const llama_kv_ragged_hole & hole);

    // throws llama_kv_ragged_unsupported where a device does not serve the outcome
    static void check(const llama_kv_ragged_seq & seq, const llama_kv_ragged_hole & hole);

    // throws std::runtime_error if a backend fails all the same; what the sequence holds is undefined then
    void apply(llama_kv_ragged_seq & seq);

private:
    // of a layer, as its graph rotates keys, but for the length of the rotated vectors, which stays
    struct rope {
        llama_kv_ragged_rope own;

        bool  rotates;
        float attn_factor;

        std::vector<float> factors; // [n_rot/2] or empty
    };

    llama_context & lctx;

    const llama_kv_ragged_hole hole;

    int64_t n_chunk = 1; // rows that are rotated at once

    std::vector<rope>    ropes;    // [layers]
    std::vector<float>   hadamard; // [n_hadamard, n_hadamard], empty where cells are not rotated before they are quantised
    int64_t              n_hadamard = 0;
    std::vector<int32_t> down;     // [n_chunk], by how much a position moves
    std::vector<int32_t> moves;    // the same for the rows of the observed queries, of all heads

    // graphs of cells and of queries, which differ; of each their memory stays that of the largest one
    llama_kv_ragged_workspace of_cells;
    llama_kv_ragged_workspace of_queries;

    // [layers] where rows of V lie while they move, nullptr where they need not; layers alike share one
    std::vector<ggml_tensor *>          between;
    std::vector<llama_kv_ragged_tensor> buffers;

    static rope make_rope(const llama_kv_ragged_rope & own);

    // n_gap: cells that each head loses at least
    ggml_tensor * make_between(const llama_kv_ragged_seq & seq, size_t i, int64_t n_gap);

    void set_hadamard(const llama_kv_cache & kv);

    // Rotates n rows of src from row i0 on by what pos says of each, and writes them to the rows of dst from j0 on; dst = nullptr: nowhere
    void rotate(
            const llama_kv_ragged_layer     & layer,
            const rope                      & own,
                  llama_kv_ragged_workspace & workspace,
                  ggml_tensor               * src,
                  int64_t                     i0,
                  int64_t                     n,
                  ggml_tensor               * dst,
                  int64_t                     j0,
            const int32_t                   * pos) const;

    void apply_cells  (llama_kv_ragged_seq & seq, size_t i);
    void apply_queries(llama_kv_ragged_seq & seq, size_t i);
};
