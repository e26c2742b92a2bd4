#pragma once

// Policies: which cells of a cache stay. Pure functions over scores and positions, without llama.cpp's headers; what a policy is
// says windowkv-policy.h.
//
// scoring:    what a score is                             wkv-scoring.cpp
// allocation: cells per layer and head                    wkv-layers.cpp, wkv-heads.cpp         -> budgets()
// selection:  the cells of a head for its budget          wkv-selection.cpp, wkv-windows*.cpp   -> select()
// cells that stay: one bit each                         wkv-marks.cpp

#include "windowkv-policy.h"
#include "wkv-marks.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace wkv {

// "" or what is wrong with the policy; nothing else may be asked about one that this refuses
std::string policy_error(const wkv_policy & policy);

// "" or what is wrong with the shapes, or with the policy for these shapes
std::string shapes_error(const wkv_policy & policy, const wkv_shapes & shapes);

// The observation windows that score planes are needed for, in the order of the planes; none if positions alone decide. With
// query_heads = each a plane has one row per query head, see cache_view.
std::vector<int32_t> window_sizes(const wkv_policy & policy);

// whether budgets() looks at positions and scores
bool needs_scores_for_budgets(const wkv_policy & policy);

// whether no layer holds more than n_cells cells per head on average: there is nothing to evict then
bool fits(const wkv_shapes & shapes, int64_t n_cells);

// positions of one head's cells, ascending: some that are listed, then all from next on
struct cell_positions {
    const int32_t * listed   = nullptr;
    int32_t         n_listed = 0;
    int32_t         next     = 0;

    int32_t operator[](int32_t i) const { return i < n_listed ? listed[i] : next + (i - n_listed); }
};

// The cells that one selection chooses from. Everything it points to is the caller's and has to outlive it.
struct cache_view {
    const wkv_policy & policy;
    const wkv_shapes & shapes;

    std::vector<size_t>         offsets;   // [n_layer*n_head_kv + 1], of cells
    std::vector<cell_positions> positions; // [n_layer*n_head_kv]; empty: none are known

    // results do not depend on them
    int32_t n_threads      = 1;
    int32_t n_cells_thread = 1; // that are worth a thread

    // positions: for every (layer, kv head) in turn, or nullptr; scores: planes of all layers, or nullptr
    cache_view(const wkv_policy & policy, const wkv_shapes & shapes, const int32_t * positions, const float * scores);
    cache_view(const wkv_policy & policy, const wkv_shapes & shapes, std::vector<cell_positions> positions);

    // Planes of the layers il0 to il1 - 1, one after the other, for every (layer, kv head) in turn [cells]; in the first one, with
    // query_heads = each, row major [n_gqa, cells].
    void set_scores(int32_t il0, int32_t il1, const float * scores);

    // one of them; no other is known then
    void set_plane(int32_t il0, int32_t plane, const float * scores);

    size_t index(int32_t il, int32_t ih) const { return size_t(il)*shapes.n_head_kv + ih; }

    int32_t                n_cells(int32_t il, int32_t ih) const { return shapes.cells[index(il, ih)]; }
    const cell_positions & pos    (int32_t il, int32_t ih) const { return positions[index(il, ih)]; }

    // rows of scores that every kv head has in the first plane
    int32_t n_rows() const { return policy.scoring.query_heads == WKV_QUERY_HEADS_EACH ? shapes.n_gqa : 1; }

    bool has_plane(int32_t plane) const { return planes[plane] != nullptr; }

    const float * score(int32_t il, int32_t ih, int32_t row = 0) const {
        return planes[0] + (offsets[index(il, ih)] - first)*n_rows() + size_t(row)*n_cells(il, ih);
    }

    // by the last token_window_size tokens
    const float * token_score(int32_t il, int32_t ih) const { return planes[1] + (offsets[index(il, ih)] - first); }

    // for work on the layers il0 to il1 - 1
    int32_t n_threads_for(int32_t il0, int32_t il1) const;

private:
    const float * planes[2] = { nullptr, nullptr };
    size_t        first     = 0; // cells of the layers before those that scores are known of
};

std::string not_finite(int32_t il, int32_t ih);

// "" or the first of the layers il0 to il1 - 1, and its head, whose scores are not finite in a plane that is known: every choice among
// them would be arbitrary
std::string scores_error(const cache_view & view, int32_t il0, int32_t il1);

// What an allocation leaves to every (layer, kv head), each [n_layer*n_head_kv]
struct head_budgets {
    int64_t mean = 0; // cells per head that were asked for

    std::vector<int32_t> n_cells;   // cells that stay
    std::vector<int32_t> own;       // those that would stay if no heads competed, which rankings depend on
    std::vector<int32_t> due;       // own, or more of a head that would hold it if none of its cells had been evicted; empty: own
    std::vector<int32_t> n_windows; // token_share and heads that compete: cells that windows take of these; empty: not known
};

// The cells that stay; their mean is n_cells unless the cache holds fewer, or accounting = paper. Every head that holds a cell
// keeps one.
// "" or why these inputs cannot be served
std::string budgets(const cache_view & view, int64_t n_cells, head_budgets & res);

// the same from budgets that somebody else has kept, [n_layer, n_head_kv]; what exceeds a head's cells is cut
// "" or what is wrong with them
std::string given_budgets(const cache_view & view, const int32_t * n_cells, head_budgets & res);

// Marks as many cells of every head as its budget says; nothing may be marked before.
// whole_windows counts by itself: more by less than omega, or fewer.
// "" or why these inputs cannot be served; nothing is marked then
std::string select(const cache_view & view, const head_budgets & budgets, marks & keep);

// A plane of scores for some layers. It stays valid until the next call, and the second plane of the same layers may take the place of
// the first.
using scores_fn = std::function<const float *(int32_t il0, int32_t il1, int32_t plane)>;

class device_keys;

// budgets() and select() in one, for scores that come when they are needed: layer by layer, unless heads compete over the model, of a
// group that shares its first layer's windows those of that layer, and the second plane when the windows are marked.
// devices: layers are chosen there if they can be, with the same result; or nullptr
std::string select_cells(cache_view & view, int64_t n_cells, const scores_fn & scores, marks & keep, device_keys * devices = nullptr);

// A policy for scores by replay alone: all heads of the model compete, and each keeps its newest cell.
wkv_policy replay_policy();

// Makes marks of n_cells cells per head on average out of fewer: those that are marked, and of all others those with the best scores by
// replay, whichever head holds them. scores: of every (layer, kv head) in turn, which are written to.
// "" or why these inputs cannot be served
std::string add_replayed(const cache_view & view, int64_t n_cells, float * scores, marks & keep);

// host memory that select_cells() takes beside scores and marks, in bytes at most
int64_t select_bytes(const cache_view & view);

// "" or what is wrong with a selection of the caller's: over n_cells cells per (layer, kv head) on average, or a head without any
std::string keep_error(const wkv_shapes & shapes, int64_t n_cells, const uint8_t * keep);

} // namespace wkv
