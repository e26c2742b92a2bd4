#pragma once

// What one sequence of the ragged KV cache holds: its cells, in pools, and the queries that score them.

#include "llama-kv-ragged-layer.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

// Numbers of a head's first cells, those of the positions before n_pos: they go where the cells go.
struct llama_kv_ragged_carried {
    std::vector<std::vector<float>> heads; // [n_head_kv], empty: there are none
    uint32_t                        n_pos = 0;

    int64_t n_bytes() const;

    // of the first n cells of a head; fill for those that have none
    void copy(size_t ih, size_t n, float fill, float * dst) const;
};

// the cells of one layer
struct llama_kv_ragged_cells {
    // positions below the boundary that each head kept, ascending; [n_head_kv]
    // all positions from the boundary on are held by every head and are not listed
    std::vector<std::vector<int32_t>> kept;
    uint32_t boundary = 0;

    llama_kv_ragged_pool pool; // with free rows for cells to come

    llama_kv_ragged_carried sums;     // attention that the cells got so far from the queries of these positions
    llama_kv_ragged_carried replayed; // the largest that they got from tokens which repeat them

    // both of them
    std::array<llama_kv_ragged_carried *, 2>       carried()       { return { &sums, &replayed }; }
    std::array<const llama_kv_ragged_carried *, 2> carried() const { return { &sums, &replayed }; }

    bool is_uniform() const; // all heads hold equally many cells, and have room for equally many

    int64_t n_bytes_carried() const;

    // the first cell of a head whose position is not below p, of as many as there may be
    size_t find(int64_t ih, int32_t p) const {
        const auto & own = kept[ih];
        return p <= int64_t(boundary) ? std::lower_bound(own.begin(), own.end(), p) - own.begin() : own.size() + (p - boundary);
    }

    // of a head's cell
    int32_t position(int64_t ih, int64_t ic) const {
        const int64_t n_kept = kept[ih].size();
        return ic < n_kept ? kept[ih][ic] : boundary + (ic - n_kept);
    }
};

// Positions [p0, p1) that are given up in all heads while later ones stay; none at first.
struct llama_kv_ragged_hole {
    int32_t p0 = 0;
    int32_t p1 = 0;

    bool    empty() const { return p0 == p1; }
    int32_t n()     const { return p1 - p0; }

    // where what lies before a position ends once the later ones moved down
    int32_t close(int32_t p) const { return p <= p0 ? p : p <= p1 ? p0 : p - n(); }
};

// Which queries are held: a row of the tensors each, found by its position. Twice n_observed rows, so that the last queries of a
// prompt stay while as many of what was generated after it are observed: an answer can be taken back and the prompt scored again.
struct llama_kv_ragged_observed {
    uint32_t n_observed = 0; // queries that a compaction can ask for

    std::vector<int32_t> pos; // [n_rows()] position of a row's query, -1 if it has none

    uint32_t n_prompt = 0; // end of the last prompt, whose last n_observed queries stay

    std::vector<llama_kv_ragged_tensor> queries; // [layers], F16 [n_embd_head_k, n_rows(), n_head]

    int64_t n_rows() const { return pos.size(); }

    // rows for the last of n_tokens new queries, at most n_observed, in the order of their positions; the first new one is at p0
    std::vector<int64_t> observe(int32_t p0, uint32_t n_tokens);

    // forget the queries from p0 on
    void trim(int32_t p0);

    // rows of the queries from p0 on, in the order of their positions
    std::vector<int32_t> find(int32_t p0) const;
};

struct llama_kv_ragged_seq {
    // first positions, on which attention rests that goes nowhere else (StreamingLLM, arXiv 2309.17453, section 3.2)
    static constexpr int32_t N_SINK = 4;

    uint32_t n_pos    = 0; // positions seen
    uint32_t boundary = 0; // positions below were subject to the last compaction

    std::vector<llama_kv_ragged_cells> cells; // [layers]

    llama_kv_ragged_observed observed;

    uint32_t n_room = 0; // rows that a compaction leaves free in every head at least

    // where several tokens came at once, if since then there was neither a compaction nor anybody who said that a prompt ends; else -1
    int32_t prompt_begin = -1;

    // layers and meter have to outlive it; it holds n_pos_max positions at most
    // everything that needs memory throws std::runtime_error if there is none
    llama_kv_ragged_seq(
            const std::vector<llama_kv_ragged_layer> & layers,
                  uint32_t                             n_pos_max,
                  uint32_t                             n_observed,
                  llama_kv_ragged_meter              & meter);

    const std::vector<llama_kv_ragged_layer> & get_layers() const { return *layers; }
          llama_kv_ragged_meter              & get_meter()  const { return *meter; }

    int64_t n_cells(size_t i, int64_t ih) const; // cells of a head now

    std::vector<int64_t> n_cells(size_t i) const; // of every head of a layer

    std::vector<int32_t> n_cells() const; // of every (layer, kv head)

    std::vector<int32_t> positions(size_t i, int64_t ih) const; // of one head's cells, ascending

    // cells that stock attention reads of a layer with n of them per head
    int64_t n_read(size_t i, int64_t n) const;

    // cells that stock attention reads of one head by itself: no fewer than it holds, and for all heads the number changes at once, so
    // that graphs are not built again whenever one of them reaches a multiple
    int64_t n_read_by_head(size_t i, int64_t ih) const;

    // room for n_tokens more cells in every head
    bool has_room(int64_t n_tokens) const;

    // Rows that are free behind a compressed cache's heads, for heads with n_mean cells over all layers: it stays within 2 %, beside what a
    // device asks for (llama_kv_ragged_layer::capacity()). Heads of different lengths are given as many in all layers: they fill
    // together, so that most tokens bring no new pool, and a device's captured graph lasts.
    static int64_t n_slack_compacted(bool uniform, int64_t n_mean);

    // make it, with slack for more unless it has to be exact; moves cells to larger pools and changes nothing else
    void reserve(int64_t n_tokens, bool exact);

    // add positions at the end, returns the rows of the queries that are observed of them; several may be a prompt that somebody
    // waits for the end of
    std::vector<int64_t> append(uint32_t n_tokens, bool may_be_prompt);

    // forget the positions from p0 on; p0 is 0 or not below the boundary
    void trim(uint32_t p0);

    // the same, but their queries stay observed, as if they came next, until others do
    void withdraw(uint32_t p0);

    // behind the newest query that observes: n_pos, or more after withdraw()
    int32_t observed_end() const;

    // positions behind the hole move down into it; allocates nothing where every list of kept positions has room for one. Cells and queries
    // are to be moved before
    void close(const llama_kv_ragged_hole & hole);

    bool in_prompt() const { return prompt_begin >= 0; }

    // the positions so far end a prompt
    void end_prompt();

    // sums of the cells of a layer, for every kv head in turn [n_cells]; 0 of cells that have none
    void copy_sums(size_t i, float * dst) const;

    // take sums over the queries of all positions, in the same layout
    void set_sums(size_t i, const std::vector<float> & sums);

    // Scores by a replay of the positions [p0, p1) in a layer, [p1 - p0, n_head_kv]; the larger one of two. Cells of positions that were
    // passed over have 0.
    void set_replayed(size_t i, int32_t p0, int32_t p1, const float * scores);

    // of the cells of a layer, for every kv head in turn [n_cells]: more than any of those above where there was no replay, and of the
    // first positions, on which attention rests that goes nowhere else
    void copy_replayed(size_t i, float * dst) const;

    void claim_carried(); // the bytes of what cells carry, where it was written directly

    uint32_t n_summed()   const; // queries before this position are in the sums of all layers
    uint32_t n_replayed() const; // positions before this one were repeated

    // what a compaction left of a layer
    void compact(size_t i, llama_kv_ragged_cells && left);

    // whether the queries of the last n tokens can be asked for, as far as there are positions
    bool observes(int32_t n) const { return n >= 0 && int64_t(std::min<uint32_t>(n, n_pos_max)) <= observed.n_observed; }

    // resize the observed queries, which are forgotten
    void set_observed(uint32_t n_observed);

    void clear();

    // one that holds nothing, for the same layers
    llama_kv_ragged_seq make_empty() const;

    // pools for the cells that its positions name, with slack for more
    void make_pools();

    // the same cells and queries; exact: without room for more
    llama_kv_ragged_seq copy(bool exact) const;

private:
    const std::vector<llama_kv_ragged_layer> * layers;

    uint32_t n_pos_max;

    llama_kv_ragged_meter * meter;

    std::unique_ptr<llama_kv_ragged_claim> claim; // of what cells carry

    bool has_room(size_t i, int64_t n_tokens) const; // of a layer

    int64_t n_mean() const; // cells of a head, over all layers
    int64_t n_slack(size_t i, int64_t n_mean) const;

    std::vector<llama_kv_ragged_tensor> make_queries(uint32_t n_observed) const;
};
