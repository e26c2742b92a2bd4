#pragma once

// What the parts of a policy are to each other: each says which choices and options of its own are valid, an allocation divides
// cells, a selection ranks them.

#include "wkv-policy.h"

#include <cmath>

namespace wkv {

//
// checks
//

// an int of a C struct that stands for one of its enum's values, which are 0 to count - 1
struct choice {
    const char * name;
    int32_t      value;
    int32_t      count;
};

// by policy_error(), before anything else looks at them
std::vector<choice> scoring_choices  (const wkv_scoring    & p);
std::vector<choice> layers_choices   (const wkv_allocation & p);
std::vector<choice> heads_choices    (const wkv_allocation & p);
std::vector<choice> selection_choices(const wkv_selection  & p);

// "" or which option is wrong
std::string scoring_error  (const wkv_policy & policy);
std::string layers_error   (const wkv_policy & policy);
std::string heads_error    (const wkv_policy & policy);
std::string selection_error(const wkv_policy & policy);
std::string windows_error  (const wkv_policy & policy);

// "" or why these shapes do not have what the heads are divided by
std::string importance_error(const wkv_policy & policy, const wkv_shapes & shapes);

std::string range (const char * name, int64_t got, const char * want);
std::string range (const char * name, double  got, const char * want);
std::string unused(const char * name, const char * where);

inline bool is_share(double x) {
    return x >= 0.0 && x <= 1.0;
}

// neither infinite nor no number at all
inline bool is_at_least(double x, double low) {
    return x >= low && std::isfinite(x);
}

//
// whole cells that sum up
//

// Integers with lo[i] <= b[i] <= hi[i] that sum to total (itself clamped to the sums of the bounds), as near to want as the bounds
// allow: what clamping takes from some is given to the others in equal parts, the indivisible rest to the first of them.
std::vector<int64_t> apportion(
        const std::vector<int64_t> & want,
        const std::vector<int64_t> & lo,
        const std::vector<int64_t> & hi,
                         int64_t     total);

// weights of the same ratios, the largest between 2^(exponent - 1) and 2^exponent: sums of any weights are finite then. Powers of
// two keep the digits.
std::vector<double> to_scale(std::vector<double> weight, int exponent);

// apportion() by water-filling: base + level*weight[i] in place of want, for the level that spends total, so that what clamping takes
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

//
// scoring
//

// each of the n scores becomes what policy.scoring pools it to
std::vector<float>  pool(const wkv_scoring & scoring, const float  * score, int32_t n);
std::vector<double> pool(const wkv_scoring & scoring, const double * score, int32_t n);

//
// allocation
//

// whether layers divides by beta
bool layers_use_beta(const wkv_allocation & p);

// mean budgets of the layers, [n_layer]; hi: what a head of each layer can take
std::vector<int64_t> layer_budgets(const wkv_policy & policy, const std::vector<int64_t> & hi, int64_t n_cells);

// all heads of the model compete with each other, so that their rankings have to be there together
bool competes_in_model(const wkv_allocation & p);

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

// AdaKV (arXiv 2407.11550, algorithm 1): every head is sure of the share alpha_safeguard of its own budget, and of n_least cells of
// it; the rest goes to the best cells, whoever holds them; ties to the earlier place, then to the earlier head.
// keys and own of n heads, res: cells that stay
void compete(const ranked_keys * keys, const int32_t * own, size_t n, double alpha_safeguard, int32_t n_least, int32_t * res);

//
// selection
//

// "" or why it cannot choose among these cells
std::string selection_misfit(const cache_view & view);

// layers whose heads are ranked at the same time, from the first one or a multiple of it on
int32_t n_layers_ranked(const cache_view & view);

// Rankings of the heads of the layers il0 to il1 - 1: n_layers_ranked(), the rest of the model, or all of it. own: budgets of all
// heads if none competed.
void rank_keys(const cache_view & view, const std::vector<int32_t> & own, int32_t il0, int32_t il1, ranked_keys * keys);

// the n best of the cells (indices), ties to the earlier one: set in keep
void take_best(const float * score, std::vector<int32_t> & cells, size_t n, uint8_t * keep);

// kind = tokens: the ranking of one head
ranked_keys keys_tokens(const cache_view & view, int32_t il, int32_t ih);

// kind = windows
std::string windows_misfit(const cache_view & view);
void        select_windows(const cache_view & view, const head_budgets & budgets, uint8_t * keep);
void        keys_windows  (const cache_view & view, const std::vector<int32_t> & own, int32_t il0, int32_t il1, ranked_keys * keys);

} // namespace wkv
