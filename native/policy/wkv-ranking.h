#pragma once

// How cells rank, between allocation and selection.

#include "wkv-policy.h"

#include <cmath>

namespace wkv {

// The places of a head's ranking, best first, by their keys: n_stays cells that stay before all others (key +inf), then keys that
// fall, finite, then cells that go before all others (key -inf). Heads that compete keep these alone: 4 bytes a cell, or 12 a window.
struct ranked_keys {
    int32_t n_cells = 0; // places
    int32_t n_stays = 0;

    std::vector<float>   place; // keys of the places from n_stays on, or
    std::vector<double>  run;   // keys that runs of places share
    std::vector<int32_t> end;   // the place behind every run

    int32_t n_over(double key) const; // places with a larger key
    int32_t n_from(double key) const; // and with this one
};

// AdaKV (arXiv 2407.11550, algorithm 1): every head is sure of the share alpha_safeguard of its own budget, the rest goes to the
// best cells, whoever holds them; ties to the earlier place, then to the earlier head. keys and own of n heads, res: cells that stay
void compete(const ranked_keys * keys, const int32_t * own, size_t n, double alpha_safeguard, int32_t * res);

// Integers with lo[i] <= b[i] <= hi[i] that sum to total (itself clamped to the sums of the bounds), as near to want as the bounds
// allow: what clamping takes from some is given to the others in equal parts, the indivisible rest to the first of them.
std::vector<int64_t> apportion(
        const std::vector<int64_t> & want,
        const std::vector<int64_t> & lo,
        const std::vector<int64_t> & hi,
                         int64_t     total);

// The same by water-filling: base + level*weight[i] in place of want, for the level that spends total, so that what clamping takes
// from some is given to the others by weight. Rounding favours the largest fractions.
std::vector<int64_t> water_fill(
                          double     base,
        const std::vector<double>  & weight,
        const std::vector<int64_t> & lo,
        const std::vector<int64_t> & hi,
                         int64_t     total);

// Python's a // b of floats, for b > 0: the floor of the exact quotient
inline int64_t floor_div(double a, double b) {
    const double rest = std::fmod(a, b);
    return std::llround((a - rest)/b) - (rest < 0.0 ? 1 : 0);
}

// mean budgets of the layers, [n_layer]; hi: what a head of each layer can take
std::vector<int64_t> layer_budgets(const policy & policy, const std::vector<int64_t> & hi, int64_t n_cells);

// budgets by importance over the model, [n_layer*n_head_kv]; hi: cells of every head
std::vector<int64_t> importance_budgets(const policy & policy, const std::vector<int64_t> & hi, int64_t n_cells);

// what each head would hold if none competed, from what all hold together: budgets that heads are ranked with, [n_layer*n_head_kv]
std::vector<int32_t> own_budgets(const cache_view & view, const int32_t * budgets);

// each of the n scores becomes the best of the span that policy.scoring pools
std::vector<float>  max_pool(const scoring & scoring, const float  * score, int32_t n);
std::vector<double> max_pool(const scoring & scoring, const double * score, int32_t n);

// the n best of the cells (indices), ties to the earlier one: set in keep
void take_best(const float * score, std::vector<int32_t> & cells, size_t n, uint8_t * keep);

// kind = recent, kind = tokens: one head
void        select_recent(const cache_view & view, int32_t il, int32_t ih, int32_t budget, uint8_t * keep);
void        select_tokens(const cache_view & view, int32_t il, int32_t ih, int32_t budget, uint8_t * keep);
ranked_keys keys_tokens  (const cache_view & view, int32_t il, int32_t ih);

// kind = windows: all heads; keys of the layers il0 to il1 - 1, which compete together or are whole groups
std::string windows_misfit(const cache_view & view); // "" or why these heads cannot share windows
void        select_windows(const cache_view & view, const int32_t * budgets, uint8_t * keep);
void        keys_windows  (const cache_view & view, const std::vector<int32_t> & own, int32_t il0, int32_t il1, ranked_keys * keys);

} // namespace wkv
