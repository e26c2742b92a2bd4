#pragma once

// What one sequence of the ragged KV cache holds: which positions, in which heads, and the queries that score them.

#include "llama-kv-ragged-layer.h"

#include <cstdint>
#include <vector>

// the cells of one layer
struct llama_kv_ragged_cells {
    // positions below the boundary that each head kept, ascending; [n_head_kv]
    // all positions from the boundary on are held by every head and are not listed
    std::vector<std::vector<int32_t>> kept;
    uint32_t boundary = 0;

    bool is_uniform() const; // all heads hold equally many cells
};

// Which queries are held: a row of the buffers each, found by its position. Twice n_observed rows, so that the last queries of a
// prompt stay while as many of what was generated after it are observed: an answer can be taken back and the prompt scored again.
struct llama_kv_ragged_observed {
    uint32_t n_observed = 0; // queries that a compaction can ask for

    std::vector<int32_t> pos; // [n_rows()] position of a row's query, -1 if it has none

    uint32_t n_prompt = 0; // end of the last prompt, whose last n_observed queries stay

    explicit llama_kv_ragged_observed(uint32_t n_observed = 0) : n_observed(n_observed), pos(2*n_observed, -1) {}

    int64_t n_rows() const { return pos.size(); }

    // rows for the last of n_tokens new queries, at most n_observed, in the order of their positions; the first new one is at p0
    std::vector<int64_t> observe(int32_t p0, uint32_t n_tokens);

    // forget the queries from p0 on
    void trim(int32_t p0);

    // rows of the queries from p0 on, in the order of their positions
    std::vector<int32_t> find(int32_t p0) const;
};

struct llama_kv_ragged_seq {
    uint32_t n_pos    = 0; // positions seen
    uint32_t boundary = 0; // positions below were subject to the last compaction

    std::vector<llama_kv_ragged_cells> cells; // [layers]

    llama_kv_ragged_observed observed;

    // where several tokens came at once, if since then there was neither a compaction nor anybody who said that a prompt ends; else -1
    int32_t prompt_begin = -1;

    // without layers or with as many as there are heads of each
    llama_kv_ragged_seq() = default;
    llama_kv_ragged_seq(const std::vector<llama_kv_ragged_layer> & layers, uint32_t n_observed);

    int64_t n_cells(size_t i, int64_t ih) const; // cells of a head now

    std::vector<int64_t> n_cells(size_t i) const; // of every head of a layer

    std::vector<int32_t> n_cells() const; // of every (layer, kv head)

    std::vector<int32_t> positions(size_t i, int64_t ih) const; // of one head's cells, ascending

    // add positions at the end, returns the rows of the queries that are observed of them; several may be a prompt that somebody
    // waits for the end of
    std::vector<int64_t> append(uint32_t n_tokens, bool may_be_prompt);

    // forget the positions from p0 on; p0 is 0 or not below the boundary
    void trim(uint32_t p0);

    bool in_prompt() const { return prompt_begin >= 0; }

    // the positions so far end a prompt
    void end_prompt();

    void clear();
};
