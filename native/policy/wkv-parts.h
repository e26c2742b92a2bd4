#pragma once

// What the parts of a policy are to each other: each says which choices and options of its own are valid, an allocation divides
// cells, a selection ranks them.

#include "wkv-policy.h"

#include <cmath>
#include <functional>
#include <limits>

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
std::vector<float>  pool(const wkv_scoring & scoring, const float  * score, const cell_positions & pos, int32_t n);
std::vector<double> pool(const wkv_scoring & scoring, const double * score, const cell_positions & pos, int32_t n);

//
// allocation
//

// whether layers divides by beta
bool layers_use_beta(const wkv_allocation & p);

// mean budgets of the layers, [n_layer]; hi: what a head of each layer can take
std::vector<int64_t> layer_budgets(const wkv_policy & policy, const std::vector<int64_t> & hi, int64_t n_cells);

// all heads of the model compete with each other, so that their rankings have to be there together
bool competes_in_model(const wkv_allocation & p);

// Keys of a head's cells, by which heads compete. Some cells stay before all others, and what no run tells goes behind all of them.
struct key_run {
    double  key; // finite, or KEY_STAYS
    int32_t n;   // cells that have it
};

constexpr double KEY_STAYS = std::numeric_limits<double>::infinity();

// a digit of keys: the `width` bits from `shift` on, of those keys whose bits above are known
struct key_digit {
    int32_t          shift;
    int32_t          width;
    size_t           n_group;
    const uint64_t * known; // [groups]
    const uint8_t  * open;  // [groups], 0: its heads need no counts
};

// takes runs of one head, in any order and in any number of calls
using run_fn = std::function<void(size_t i, const key_run * runs, size_t n)>;

// AdaKV (arXiv 2407.11550, algorithm 1): every head is sure of the share alpha_safeguard of its own budget, and of n_least cells of
// it; the rest goes to the best cells, whoever holds them; ties to the earlier place, then to the earlier head. Where a head has lost
// cells, the share is that of what is due to it, as far as its own budget reaches: else it would lose a part of them at every compaction.
struct competition {
    size_t          n;       // heads
    size_t          n_group; // so many, one after the other, compete with each other
    const int32_t * n_cells; // [n], cells of each
    const int32_t * own;     // [n], budgets
    const int32_t * due;     // [n], own or more; nullptr: own

    double  alpha_safeguard;
    int32_t n_least;
    int32_t n_threads;

    // Runs of the heads, unit by unit: a unit is what is ranked together, a head belongs to one. Called several times, and for
    // different units at once.
    size_t                                            n_units;
    std::function<void(size_t iu, const run_fn & fn)> runs;

    // In place of them, where keys are counted elsewhere: cells of every head by the next digit of their keys, [n << width]. Cells that
    // stay are told beforehand, [n].
    std::function<void(const key_digit & digit, int32_t * counts)> count   = {};
    const int32_t *                                                n_stays = nullptr;
    int32_t                                                        n_bits  = 64; // of a key
};

constexpr int32_t BUDGET_OPEN = INT32_MAX; // no head holds so many

// res: [n], cells that stay
void compete(const competition & c, int32_t * res);

// The same without runs, for groups in which the cells that stay before all others, n_stays of each head, take everything; BUDGET_OPEN
// for the heads of other groups.
void compete_with_stays(const competition & c, const int32_t * n_stays, int32_t * res);

// heads of the layers il0 to il1 - 1 that compete, without runs
competition competition_of(const cache_view & view, const head_budgets & budgets, int32_t il0, int32_t il1);

// what heads hold if none compete
void own_budgets(const cache_view & view, int64_t n_cells, head_budgets & res);

// Heads of the layers il0 to il1 - 1 that compete: n_layers_ranked(), the rest of the model, or all of it. With token_share the
// budgets of heads whose single tokens decide stay BUDGET_OPEN, and budget_tokens() goes on.
void compete_layers(const cache_view & view, int32_t il0, int32_t il1, head_budgets & res);

//
// selection
//

// "" or why it cannot choose among the cells of the layers il0 to il1 - 1
std::string selection_misfit(const cache_view & view, int32_t il0, int32_t il1);

// layers whose heads are ranked at the same time, from the first one or a multiple of it on
int32_t n_layers_ranked(const cache_view & view);

// The n best cells by their scores among those of a head that are not marked yet, ties to the earlier one, become marked.
void take_best(const float * score, int32_t n_cells, int32_t n, mark_row keep);

// kind = tokens: the scores of a head's cells before the observation window
std::vector<float> pooled_review(const cache_view & view, int32_t il, int32_t ih);

// runs of n cells with a key each
template <typename F>
void each_run(size_t i, int32_t n, const run_fn & fn, F run) {
    key_run cur[256];
    size_t  n_cur = 0;
    for (int32_t ic = 0; ic < n; ++ic) {
        cur[n_cur] = run(ic);
        n_cur += cur[n_cur].n > 0;
        if (n_cur == 256 || ic == n - 1) {
            fn(i, cur, n_cur);
            n_cur = 0;
        }
    }
}

// kind = windows, of the layers il0 to il1 - 1: n_layers_ranked(), the rest of the model, or all of it
std::string windows_misfit(const cache_view & view, int32_t il0, int32_t il1);
void        budget_windows(const cache_view & view, int32_t il0, int32_t il1, head_budgets & res); // of heads that compete
void        mark_windows  (const cache_view & view, const head_budgets & budgets, int32_t il0, int32_t il1, marks & keep);

// single tokens beside marked windows: budgets that budget_windows() left open, and the cells
void budget_tokens(const cache_view & view, int32_t il0, int32_t il1, const marks & keep, head_budgets & res);
void mark_tokens  (const cache_view & view, const head_budgets & budgets, int32_t il0, int32_t il1, marks & keep);

} // namespace wkv
