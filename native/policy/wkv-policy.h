#pragma once

// Policies: which cells of a cache stay. Pure functions over scores and positions, without llama.cpp's headers; the C interface
// (windowkv.h) has structs of the same fields, with the papers, and converts them at the border.
//
// scoring:    what a score is                 (pooling)   wkv-score.cpp
// allocation: cells per layer and head                    wkv-layers.cpp, wkv-heads.cpp, wkv-compete.cpp -> budgets()
// selection:  the cells of a head for its budget          wkv-tokens.cpp, wkv-windows*.cpp               -> select()

#include <cstdint>
#include <string>
#include <vector>

namespace wkv {

enum class pooling     { max, carry };
enum class query_heads { mean, each };
enum class layers      { flat, pyramid, arithmetic };
enum class heads       { equal, importance, score };
enum class across      { layer, model };
enum class accounting  { native, paper };
enum class kind        { full, recent, tokens, windows };
enum class scope       { layer, head };
enum class share       { first, mean };

struct scoring {
    int32_t          window_size       = 0;
    int32_t          token_window_size = 0;
    wkv::pooling     pooling           = wkv::pooling::max;
    int32_t          kernel_size       = 0;
    wkv::query_heads query_heads       = wkv::query_heads::mean;
};

struct allocation {
    wkv::layers     layers           = wkv::layers::flat;
    wkv::heads      heads            = wkv::heads::equal;
    wkv::across     across           = wkv::across::layer;
    wkv::accounting accounting       = wkv::accounting::native;
    double          lam              = 0.0;
    double          beta             = 0.0;
    double          alpha_safeguard  = 0.0;
    int32_t         importance_floor = 0;
    const double *  importance       = nullptr; // the caller's, [n_layer, n_head_kv]
    int64_t         n_importance     = 0;

    bool competes_in_model() const { return heads == wkv::heads::score && across == wkv::across::model; }

    // by importance, before heads compete or instead of it
    bool divides() const { return heads == wkv::heads::importance || (competes_in_model() && beta > 0.0); }
};

struct selection {
    wkv::kind  kind          = wkv::kind::full;
    int32_t    n_sink        = 0;
    int32_t    n_recent      = 0;
    int32_t    omega         = 0;
    int32_t    top_p         = 0;
    int32_t    gamma         = 0;
    wkv::share share         = wkv::share::first;
    wkv::scope scope         = wkv::scope::layer;
    bool       protect_first = false;
    bool       whole_windows = false;
    double     recent_share  = 0.0;
    double     token_share   = 0.0;
    int32_t    window_floor  = 0;
};

struct policy {
    wkv::scoring    scoring;
    wkv::allocation allocation;
    wkv::selection  selection;
};

struct shapes {
    int32_t         n_layer   = 0;
    int32_t         n_head_kv = 0;
    int32_t         n_gqa     = 1;
    int32_t         n_past    = 0;
    const int32_t * cells     = nullptr; // the caller's, [n_layer, n_head_kv]
};

// "" or what is wrong with the policy
std::string policy_error(const policy & policy);

// "" or what is wrong with the shapes, or with the policy for these shapes
std::string shapes_error(const policy & policy, const shapes & shapes);

// The observation windows that score planes are needed for, in the order of the planes; none if positions alone decide. With
// query_heads = each a plane has one row per query head, see cache_view.
std::vector<int32_t> window_sizes(const policy & policy);

// whether budgets() looks at positions and scores
bool needs_scores_for_budgets(const policy & policy);

// whether no layer holds more than n_cells cells per head on average: there is nothing to evict then
bool fits(const shapes & shapes, int64_t n_cells);

// The cells that one selection chooses from. Everything it points to is the caller's and has to outlive it.
struct cache_view {
    const wkv::policy & policy;
    const wkv::shapes & shapes;
    const int32_t     * positions; // for every (layer, kv head) in turn its ascending positions
    const float       * scores;    // planes, one after the other, each in the layout of positions; with query_heads = each for
                                   // every (layer, kv head) in turn row major [n_gqa, cells]
    std::vector<size_t> offsets;   // [n_layer*n_head_kv + 1], of cells

    // With token_share and heads that compete: what they hold before single tokens, for these budgets of their own. budgets()
    // leaves it for select(), which would have to rank all windows once more.
    mutable struct {
        std::vector<int32_t> own;     // [n_layer*n_head_kv], -1: not known
        std::vector<int32_t> n_cells;
    } before_tokens;

    cache_view(const wkv::policy & policy, const wkv::shapes & shapes, const int32_t * positions, const float * scores);

    size_t index(int32_t il, int32_t ih) const { return size_t(il)*shapes.n_head_kv + ih; }

    int32_t         n_cells(int32_t il, int32_t ih) const { return shapes.cells[index(il, ih)]; }
    const int32_t * pos    (int32_t il, int32_t ih) const { return positions + offsets[index(il, ih)]; }

    // rows of scores that every kv head has in the first plane
    int32_t n_rows() const { return policy.scoring.query_heads == query_heads::each ? shapes.n_gqa : 1; }

    const float * score(int32_t il, int32_t ih, int32_t row = 0) const {
        return scores + offsets[index(il, ih)]*n_rows() + size_t(row)*n_cells(il, ih);
    }

    // by the last token_window_size tokens
    const float * token_score(int32_t il, int32_t ih) const { return scores + offsets.back()*n_rows() + offsets[index(il, ih)]; }
};

// "" or the first layer and head whose scores are not finite: every choice among them would be arbitrary
std::string scores_error(const cache_view & view);

// cells that stay, [n_layer, n_head_kv]; their mean is n_cells unless the cache holds fewer, or accounting = paper
// "" or why these inputs cannot be served
std::string budgets(const cache_view & view, int64_t n_cells, std::vector<int32_t> & res);

// Sets keep, in the layout of positions, to 1 for as many cells of every head as its budget says and to 0 for the others.
// whole_windows counts by itself: more by less than omega, or fewer.
// "" or why these inputs cannot be served; keep is written only on success
std::string select(const cache_view & view, const int32_t * budgets, uint8_t * keep);

// "" or what is wrong with a selection of the caller's: over n_cells cells per (layer, kv head) on average, or a head without any
std::string selection_error(const shapes & shapes, int64_t n_cells, const uint8_t * keep);

} // namespace wkv
