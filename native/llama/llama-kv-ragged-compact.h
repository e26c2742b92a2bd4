#pragma once

// Compaction of a sequence: a plan says which cells stay, gathering moves them to new pools.

#include "llama-kv-ragged-score.h"
#include "policy/wkv-marks.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

// What a selection is told and says, for every (layer, kv head) in turn.
class llama_kv_ragged_choice {
public:
    llama_kv_ragged_choice(llama_context & lctx, const llama_kv_ragged_seq & seq, const llama_kv_ragged_scoring & scoring);

    const std::vector<int32_t> cells; // [n_layer*n_head_kv]

    wkv::marks keep; // nothing at first

    // Scores of the layers il0 to il1 - 1 by one window, computed now: of every (layer, kv head) [cells], by query head [n_gqa, cells];
    // zeros without windows. Valid until the next call. i_window = 1: in place of those by the first window, which the last call gave
    // for the same layers.
    float * score(size_t il0, size_t il1, size_t i_window = 0);

    // the same of one layer by all windows, taken into the graph that computes them
    void score(size_t il, const llama_kv_ragged_score_fn & stay);

    // what the last call gave, and the same given back where somebody has changed it
    const std::vector<float> & get_scores() const { return scores; }
    void                       set_scores(const std::vector<float> & value) { scores = value; }

    void drop_scores(); // nobody asks for them any more

    llama_context                 & get_lctx()    const { return lctx; }
    const llama_kv_ragged_seq     & get_seq()     const { return seq; }
    const llama_kv_ragged_scoring & get_scoring() const { return scoring; }

    // those of the context, as far as memory allows
    int32_t n_threads() const;

    int64_t get_t_score_us() const { return t_score_us; }

private:
    llama_context                 & lctx;
    const llama_kv_ragged_seq     & seq;
    const llama_kv_ragged_scoring & scoring;

    llama_kv_ragged_claim claim;
    std::vector<float>    scores;

    std::unique_ptr<llama_kv_ragged_workspace> workspace; // until the last layer is scored

    int64_t t_score_us = 0;
};

// what a compaction asks for
struct llama_kv_ragged_request {
    llama_kv_ragged_scoring scoring; // no windows: positions alone decide

    // what it throws leaves the cache as it was
    std::function<void(llama_kv_ragged_choice &)> select;
};

struct llama_kv_ragged_plan {
    int64_t n_head_kv = 0; // of every layer

    wkv::marks           keep;   // of every (layer, kv head)
    std::vector<int32_t> before; // [n_layer*n_head_kv], cells held
    std::vector<int32_t> after;  // [n_layer*n_head_kv], cells that stay

    std::unique_ptr<llama_kv_ragged_claim> claim;

    double t_score_ms  = 0.0;
    double t_select_ms = 0.0;

    int64_t n_released() const;
    int64_t n_released(size_t i) const; // in a layer
};

// Score on the layers' backends, select on the host; nothing is changed.
// Throws what select throws, and std::runtime_error if a graph fails, memory runs out or a device has no attention for the outcome.
llama_kv_ragged_plan llama_kv_ragged_make_plan(
        llama_context & lctx, const llama_kv_ragged_seq & seq, const llama_kv_ragged_request & request);

// What the plan leaves of one layer, in a pool with room for what comes next: a new one, or on the CPU the layer's own, where every head
// has as many rows in it as it needs. Throws std::runtime_error if memory runs out, and seq is as it was.
llama_kv_ragged_cells llama_kv_ragged_gather(
        llama_context & lctx, llama_kv_ragged_seq & seq, size_t i, const llama_kv_ragged_plan & plan);
