// Heads that compete with the keys of their cells. The key of the last cell that is won is found digit by digit: all heads count
// their cells by one digit of the key, and the next count is among those with the digits found so far. No list of candidates exists
// but for the few that are left at the end. Ranking a head costs more than counting it, so digits are few.

#include "wkv-parts.h"
#include "wkv-threads.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace wkv {

// doubles in their order as integers; the two zeros are one
static uint64_t key_index(double x) {
    x += 0.0;
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

// what every head is sure of; returns the cells that are left to compete for
static int64_t take_sure(const competition & c, size_t i0, const int32_t * n_stays, int32_t * res) {
    int64_t rest = 0;
    int64_t open = 0;
    for (size_t i = i0; i < i0 + c.n_group; ++i) {
        const int32_t stays = std::min(c.own[i], n_stays[i]);
        const int32_t due   = c.due ? c.due[i] : c.own[i];
        const int32_t sure  = std::min(c.own[i], stays + int32_t(std::floor((due - stays)*c.alpha_safeguard)));

        res[i] = std::min(c.n_cells[i], std::max(sure, std::min(c.own[i], c.n_least)));
        rest += c.own[i] - res[i];
        open += c.n_cells[i] - res[i];
    }
    return std::min(rest, open);
}

// The rest goes to the places over the last key, of which head i has n_over[i], and then to those with it, up to n_from[i]: of these
// all up to some place, and of that place the first heads.
static void take_rest(size_t i0, size_t i1, int64_t rest, const int32_t * n_over, const int32_t * n_from, int32_t * res) {
    std::vector<int32_t> tied(i1 - i0); // end of the places with this key
    int64_t most = 0;
    for (size_t i = i0; i < i1; ++i) {
        const int32_t won = std::max(res[i], n_over[i]);
        tied[i - i0] = std::max(won, n_from[i]);
        rest  -= won - res[i];
        res[i] = won;
        most   = std::max<int64_t>(most, tied[i - i0]);
    }

    const auto n_before = [&](int64_t place, size_t i) { return std::clamp<int64_t>(place - res[i], 0, tied[i - i0] - res[i]); };

    const int64_t place = last_ok(0, most, [&](uint64_t x) {
        int64_t n_tied = 0;
        for (size_t i = i0; i < i1; ++i) {
            n_tied += n_before(x, i);
        }
        return n_tied <= rest;
    });
    for (size_t i = i0; i < i1; ++i) {
        const int64_t cur = n_before(place, i);
        rest   -= cur;
        res[i] += cur;
    }
    for (size_t i = i0; i < i1 && rest > 0; ++i) {
        if (res[i] == place && res[i] < tied[i - i0]) {
            res[i]++;
            rest--;
        }
    }
}

// cells that heads i0 to i1 - 1 win with all places up to n[i]
template <typename F>
static int64_t n_won(size_t i0, size_t i1, const int32_t * res, F n) {
    int64_t sum = 0;
    for (size_t i = i0; i < i1; ++i) {
        sum += std::max(0, n(i) - res[i]);
    }
    return sum;
}

// whether cells that stay before all others take what there is
static bool take_stays(const competition & c, size_t i0, const int32_t * n_stays, int64_t & rest, int32_t * res) {
    const size_t i1 = i0 + c.n_group;

    rest = take_sure(c, i0, n_stays, res);
    if (rest <= 0) {
        return true;
    }
    if (n_won(i0, i1, res, [&](size_t i) { return n_stays[i]; }) < rest) {
        return false;
    }
    take_rest(i0, i1, rest, std::vector<int32_t>(c.n, 0).data(), n_stays, res);
    return true;
}

void compete_with_stays(const competition & c, const int32_t * n_stays, int32_t * res) {
    for (size_t i0 = 0; i0 < c.n; i0 += c.n_group) {
        int64_t rest;
        if (!take_stays(c, i0, n_stays, rest, res)) {
            std::fill(res + i0, res + i0 + c.n_group, BUDGET_OPEN);
        }
    }
}

namespace {

struct near_run {
    uint64_t index;
    int32_t  n;
};

// Keys are shares of attention. Those from 2^-31 to below 2 begin with the same bits, which the first count takes for known, unless it
// finds that they are not.
constexpr int      N_BITS_SHARE = 7;
constexpr uint64_t BITS_SHARE   = 0x5f;

// what is known of the last key of every group
struct digits {
    int shift = 64; // bits that are not known; of keys that are counted elsewhere there may be fewer
    int width;      // of a digit

    std::vector<uint64_t> known;  // [groups], the bits above
    std::vector<uint8_t>  open;   // [groups], whether it is looked for
    std::vector<int64_t>  rest;   // [groups], cells to compete for
    std::vector<int32_t>  n_stays; // [heads], cells before all others
    std::vector<int32_t>  n_keys; // [heads], these and all that have a key
    std::vector<int32_t>  n_over; // [heads], places whose keys are larger
    std::vector<int32_t>  n_from; // [heads], the same with those that have it
    std::vector<int32_t>  counts; // [heads << width], of the next digit; then sums from that digit on

    std::vector<std::vector<near_run>> near; // [heads], those with the known bits, once they are few
    bool is_near = false;
};

} // namespace

// counts cells by the next digit
static void count(const competition & c, digits & d, bool first, bool collect) {
    std::fill(d.counts.begin(), d.counts.end(), 0);

    if (c.count) {
        c.count({ d.shift, d.width, c.n_group, d.known.data(), d.open.data() }, d.counts.data());
        for (size_t i = 0; first && i < c.n; ++i) {
            const auto counts = d.counts.begin() + (i << d.width);
            d.n_stays[i] += c.n_stays[i];
            d.n_keys [i] += std::accumulate(counts, counts + (int64_t(1) << d.width), 0); // no bit is known before
        }
        return;
    }

    const int      shift = d.shift;
    const int      width = d.width;
    const uint64_t mask  = (uint64_t(1) << width) - 1;

    if (d.is_near) {
        for (size_t i = 0; i < c.n; ++i) {
            for (const auto & run : d.near[i]) {
                if (run.index >> shift >> width == d.known[i/c.n_group]) {
                    d.counts[(i << width) + (run.index >> shift & mask)] += run.n;
                }
            }
        }
        return;
    }
    for_each(c.n_threads, c.n_units, [&](size_t iu) {
        c.runs(iu, [&](size_t i, const key_run * runs, size_t n) {
            if (!d.open[i/c.n_group]) {
                return;
            }
            const uint64_t known  = d.known[i/c.n_group];
            int32_t      * counts = d.counts.data() + (i << width);
            for (size_t j = 0; j < n; ++j) {
                if (runs[j].key == KEY_STAYS) {
                    d.n_stays[i] += first ? runs[j].n : 0;
                    continue;
                }
                const uint64_t index = key_index(runs[j].key);
                const uint64_t above = index >> shift >> width;
                if (first) {
                    d.n_keys[i] += runs[j].n;
                    d.n_over[i] += above > known ? runs[j].n : 0;
                }
                if (above == known) {
                    counts[index >> shift & mask] += runs[j].n;
                    if (collect) {
                        d.near[i].push_back({ index, runs[j].n });
                    }
                }
            }
        });
    });
    d.is_near = collect;
}

// the digit with which the last key of a group goes on; returns the cells that have it
static int64_t choose(const competition & c, digits & d, size_t ig, const int32_t * res) {
    const size_t i0 = ig*c.n_group;
    const size_t i1 = i0 + c.n_group;

    const auto n_from = [&](uint64_t x) { return n_won(i0, i1, res, [&](size_t i) { return d.n_over[i] + d.counts[(i << d.width) + x]; }); };

    const uint64_t last  = (uint64_t(1) << d.width) - 1;
    const uint64_t digit = last_ok(0, last, [&](uint64_t x) { return n_from(x) >= d.rest[ig]; });

    int64_t n = 0;
    for (size_t i = i0; i < i1; ++i) {
        const int32_t * counts = d.counts.data() + (i << d.width);
        const int32_t   n_next = digit < last ? counts[digit + 1] : 0;

        d.n_from[i]  = d.n_over[i] + counts[digit];
        d.n_over[i] += n_next;
        n += d.n_from[i] - d.n_over[i];
    }
    d.known[ig] = d.known[ig] << d.width | digit;
    return n;
}

// After the first count: groups that are decided by cells that stay, or because all cells with a key are won. False if the key of
// another does not begin with the bits that are taken for known.
static bool decide_first(const competition & c, digits & d, int32_t * res) {
    for (size_t i = 0; i < c.n; ++i) {
        d.n_over[i] += d.n_stays[i];
        d.n_keys[i] += d.n_stays[i];
    }

    bool ok = true;
    for (size_t ig = 0; ig < d.open.size(); ++ig) {
        const size_t i0 = ig*c.n_group;
        const size_t i1 = i0 + c.n_group;

        d.open[ig] = !take_stays(c, i0, d.n_stays.data(), d.rest[ig], res);
        if (d.open[ig] && n_won(i0, i1, res, [&](size_t i) { return d.n_keys[i]; }) < d.rest[ig]) {
            // cells that go before all others are won, too
            take_rest(i0, i1, d.rest[ig], d.n_keys.data(), c.n_cells, res);
            d.open[ig] = 0;
        }
        ok = ok && (!d.open[ig] || (
                    n_won(i0, i1, res, [&](size_t i) { return d.n_over[i]; }) < d.rest[ig] &&
                    n_won(i0, i1, res, [&](size_t i) { return d.n_over[i] + d.counts[i << d.width]; }) >= d.rest[ig]));
    }
    return ok;
}

// false if the last key of a group does not begin with these bits, as many as d.shift leaves
static bool compete_from(const competition & c, digits & d, uint64_t known, int32_t * res) {
    const size_t  n_groups = c.n/c.n_group;
    const int64_t n_cells  = std::accumulate(c.n_cells, c.n_cells + c.n, int64_t(0));

    d.known  .assign(n_groups, known);
    d.open   .assign(n_groups, 1);
    d.rest   .assign(n_groups, 0);
    d.n_stays.assign(c.n, 0);
    d.n_keys .assign(c.n, 0);
    d.n_over .assign(c.n, 0);
    d.n_from .assign(c.n, 0);
    d.near   .resize(c.n);

    // counts take a quarter of a byte for every cell, the runs that are collected half of that, with what vectors have in reserve
    int width = 4;
    const int width_max = c.count ? 8 : 13;
    while (width < width_max && int64_t(c.n << (width + 1))*16 <= n_cells) {
        ++width;
    }
    const int64_t n_near = c.count ? -1 : 256 + n_cells/256;

    int64_t n_left  = n_cells;
    bool    decided = false;
    for (bool first = true; d.shift > 0 && !decided; first = false) {
        d.width  = std::min(width, d.shift);
        d.shift -= d.width;
        d.counts.resize(c.n << d.width);
        count(c, d, first, n_left <= n_near && !d.is_near);
        for (size_t i = 0; i < c.n; ++i) {
            int32_t * counts = d.counts.data() + (i << d.width);
            for (int64_t j = (int64_t(1) << d.width) - 2; j >= 0; --j) {
                counts[j] += counts[j + 1];
            }
        }
        if (first && !decide_first(c, d, res)) {
            return false;
        }

        n_left  = 0;
        decided = true;
        for (size_t ig = 0; ig < n_groups; ++ig) {
            if (d.open[ig]) {
                const size_t i0 = ig*c.n_group;

                n_left += choose(c, d, ig, res);
                if (c.count && n_won(i0, i0 + c.n_group, res, [&](size_t i) { return d.n_from[i]; }) == d.rest[ig]) {
                    // no other digit is needed: all that have these are won
                    take_rest(i0, i0 + c.n_group, d.rest[ig], d.n_from.data(), d.n_from.data(), res);
                    d.open[ig] = 0;
                }
                decided = decided && !d.open[ig];
            }
        }
    }
    for (size_t ig = 0; ig < n_groups; ++ig) {
        if (d.open[ig]) {
            take_rest(ig*c.n_group, (ig + 1)*c.n_group, d.rest[ig], d.n_over.data(), d.n_from.data(), res);
        }
    }
    return true;
}

void compete(const competition & c, int32_t * res) {
    if (!c.count) {
        digits share;
        share.shift -= N_BITS_SHARE;
        if (compete_from(c, share, BITS_SHARE, res)) {
            return;
        }
    }
    digits any;
    any.shift = c.n_bits;
    compete_from(c, any, 0, res);
}

} // namespace wkv
