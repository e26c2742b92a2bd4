// Heads that compete with the keys of their cells.

#include "wkv-parts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace wkv {

int32_t ranked_keys::n_over(double key) const {
    if (key == std::numeric_limits<double>::infinity()) {
        return 0;
    }
    if (!run.empty()) {
        const auto it = std::partition_point(run.begin(), run.end(), [&](double x) { return x > key; });
        return it == run.begin() ? n_stays : end[it - run.begin() - 1];
    }
    return n_stays + (std::partition_point(place.begin(), place.end(), [&](float x) { return x > key; }) - place.begin());
}

int32_t ranked_keys::n_from(double key) const {
    if (key == -std::numeric_limits<double>::infinity()) {
        return n_cells;
    }
    if (!run.empty()) {
        const auto it = std::partition_point(run.begin(), run.end(), [&](double x) { return x >= key; });
        return it == run.begin() ? n_stays : end[it - run.begin() - 1];
    }
    return n_stays + (std::partition_point(place.begin(), place.end(), [&](float x) { return x >= key; }) - place.begin());
}

// doubles in their order as integers, so that bisection reaches each
static double nth_double(uint64_t i) {
    const uint64_t bits = i >> 63 ? i ^ (uint64_t(1) << 63) : ~i;
    double res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

static uint64_t double_index(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
}

// the last of the integers from lo to hi for which ok holds; it holds for lo, and for none behind the first for which it does not
template <typename F>
static uint64_t last_ok(uint64_t lo, uint64_t hi, F ok) {
    while (lo < hi) {
        const uint64_t mid = hi - (hi - lo)/2;
        if (ok(mid)) {
            lo = mid;
        } else {
            hi = mid - 1;
        }
    }
    return lo;
}

void compete(const ranked_keys * keys, const int32_t * own, size_t n, double alpha_safeguard, int32_t n_least, int32_t * res) {
    int64_t rest = 0;
    int64_t open = 0;
    for (size_t i = 0; i < n; ++i) {
        const int32_t n_stays = std::min(own[i], keys[i].n_stays);
        const int32_t n_sure  = n_stays + int32_t(std::floor((own[i] - n_stays)*alpha_safeguard));

        res[i] = std::min(keys[i].n_cells, std::max(n_sure, std::min(own[i], n_least)));
        rest += own[i] - res[i];
        open += keys[i].n_cells - res[i];
    }
    rest = std::min(rest, open);
    if (rest <= 0) {
        return;
    }

    // The key of the last cell that is won, found by counting in rankings that are sorted already: a list of candidates would take
    // more memory than the scores.
    const double inf = std::numeric_limits<double>::infinity();
    const double key = nth_double(last_ok(double_index(-inf), double_index(inf), [&](uint64_t x) {
        int64_t n_won = 0;
        for (size_t i = 0; i < n; ++i) {
            n_won += std::max(0, keys[i].n_from(nth_double(x)) - res[i]);
        }
        return n_won >= rest;
    }));

    std::vector<int32_t> tied(n); // end of the places with this key
    int64_t most = 0;
    for (size_t i = 0; i < n; ++i) {
        const int32_t won = std::max(res[i], keys[i].n_over(key));
        tied[i] = std::max(won, keys[i].n_from(key));
        rest   -= won - res[i];
        res[i]  = won;
        most    = std::max<int64_t>(most, tied[i]);
    }

    // of these all up to some place, and of that place the first heads
    const auto n_before = [&](int64_t place, size_t i) { return std::clamp<int64_t>(place - res[i], 0, tied[i] - res[i]); };

    const int64_t place = last_ok(0, most, [&](uint64_t x) {
        int64_t n_tied = 0;
        for (size_t i = 0; i < n; ++i) {
            n_tied += n_before(x, i);
        }
        return n_tied <= rest;
    });
    for (size_t i = 0; i < n; ++i) {
        const int64_t cur = n_before(place, i);
        rest   -= cur;
        res[i] += cur;
    }
    for (size_t i = 0; i < n && rest > 0; ++i) {
        if (res[i] == place && res[i] < tied[i]) {
            res[i]++;
            rest--;
        }
    }
}

} // namespace wkv
