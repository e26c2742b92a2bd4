// Policies with random options, many of them extreme, run under the sanitizers: nothing overflows, every head keeps a cell, the cells
// that stay are as many as the budgets say, and the same where devices count and mark.
//
//   test-policy [N_CASES [SEED]]

#include "wkv-device.h"
#include "wkv-policy.h"
#include "wkv-threads.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <random>

static std::mt19937 rng;

static int32_t below(int32_t n) {
    return rng() % n;
}

static bool one_in(int32_t n) {
    return below(n) == 0;
}

template <typename T>
static T any(std::initializer_list<T> values) {
    return values.begin()[below(values.size())];
}

// mostly valid
static int32_t number(int32_t least) {
    return one_in(100) ? any({ INT32_MIN, -1, 0 }) : one_in(3) ? any({ least, INT32_MAX, INT32_MAX - 1, 1 << 30 }) : least + below(20);
}

static int32_t choice(int32_t count) {
    return one_in(300) ? any({ -1, count, INT32_MAX, INT32_MIN }) : below(count);
}

static double share() {
    return one_in(100) ? any<double>({ -0.1, 1.1, NAN, INFINITY }) : any({ 5e-324, 1e-300, 1e-9, 0.1, 0.5, 1.0 - DBL_EPSILON, 1.0 });
}

static double at_least(double least) {
    return one_in(100) ? any<double>({ -1.0, 0.0, NAN, INFINITY })
                       : least + any({ 5e-324, 1e-300, DBL_EPSILON, 1e-9, 0.5, 14.0, 1e9, 1e300, DBL_MAX });
}

static void random_windows(wkv_scoring & sco, wkv_selection & sel) {
    sel.omega         = number(1);
    sel.top_p         = one_in(2) ? sel.omega : 1;
    sel.recent_share  = share();
    sel.scope         = choice(WKV_SCOPE_COUNT);
    sel.protect_first = below(2);
    sel.gamma         = 1;
    if (sel.scope == WKV_SCOPE_HEAD && one_in(3)) {
        sel.token_share       = share();
        sel.window_floor      = number(0);
        sco.token_window_size = number(1);
        return;
    }
    sel.gamma         = number(1);
    sel.share         = choice(WKV_SHARE_COUNT);
    sel.whole_windows = one_in(3);
    if (one_in(4)) {
        sco.query_heads = WKV_QUERY_HEADS_EACH;
        sco.kernel_size = 1;
        sel.share       = WKV_SHARE_FIRST;
    }
}

static void random_allocation(wkv_allocation & all, const wkv_selection & sel) {
    const bool equal = sel.whole_windows || (sel.kind == WKV_KIND_WINDOWS && sel.scope == WKV_SCOPE_LAYER);

    all.heads      = equal ? WKV_HEADS_EQUAL : choice(sel.kind == WKV_KIND_BEST ? WKV_HEADS_SCORE : WKV_HEADS_COUNT);
    all.across     = all.heads == WKV_HEADS_SCORE ? choice(WKV_ACROSS_COUNT) : 0;
    all.accounting = one_in(3) ? WKV_ACCOUNTING_PAPER : WKV_ACCOUNTING_NATIVE;
    if (all.heads == WKV_HEADS_EQUAL || (all.heads == WKV_HEADS_SCORE && all.across == WKV_ACROSS_LAYER && one_in(2))) {
        all.layers = choice(WKV_LAYERS_COUNT);
    }
    if (all.heads == WKV_HEADS_SCORE) {
        all.alpha_safeguard = one_in(3) ? 0.0 : share();
    }
    if (all.layers == WKV_LAYERS_ARITHMETIC) {
        all.lam = at_least(0.0);
    }
    if (all.layers == WKV_LAYERS_PYRAMID || all.heads == WKV_HEADS_IMPORTANCE || (all.across == WKV_ACROSS_MODEL && one_in(2))) {
        all.beta = at_least(1.0);
        all.importance_floor = all.layers == WKV_LAYERS_PYRAMID || all.accounting == WKV_ACCOUNTING_PAPER ? 0 : number(0);
    }
}

static wkv_policy random_policy() {
    wkv_policy res = {};
    auto & sco = res.scoring;
    auto & sel = res.selection;

    sel.kind = choice(WKV_KIND_COUNT);
    if (sel.kind == WKV_KIND_RECENT) {
        sel.n_sink = number(0);
    }
    if (sel.kind >= WKV_KIND_TOKENS) {
        sco.window_size = number(1);
        sco.pooling     = choice(WKV_POOLING_COUNT);
        sco.kernel_size = number(1) | (sco.pooling == WKV_POOLING_MAX);
        sel.n_recent    = one_in(3) ? 0 : one_in(2) ? sco.window_size : std::min(sco.window_size, number(0));
    }
    if (sel.kind == WKV_KIND_WINDOWS) {
        random_windows(sco, sel);
    }
    if (sel.kind == WKV_KIND_BEST) {
        sco.kernel_size  = 1;
        sco.reduce       = choice(WKV_REDUCE_COUNT);
        sel.n_recent     = one_in(2) ? number(0) : 0; // more than the observation window too
        sel.recent_share = sel.n_recent == 0 ? share() : 0.0;
    }
    if (sel.kind != WKV_KIND_FULL) {
        random_allocation(res.allocation, sel);
    }
    return res;
}

// positions that ascend, up to the largest ones
static std::vector<int32_t> random_positions(int32_t n) {
    const int32_t step = any({ 1, 3, INT32_MAX/std::max(64, n) });
    std::vector<int32_t> res(n);
    for (int32_t i = 0; i < n; ++i) {
        res[i] = i*step;
    }
    return res;
}

#define CHECK(cond)                                                                    \
    do {                                                                               \
        if (!(cond)) {                                                                 \
            fprintf(stderr, "%s:%d: case %d: %s failed\n", __FILE__, __LINE__, i_case, #cond); \
            exit(1);                                                                   \
        }                                                                              \
    } while (0)

// a cache, and head scores if the policy divides by some
struct inputs {
    std::vector<int32_t> cells;
    std::vector<int32_t> pos;
    std::vector<double>  importance;
    std::vector<float>   scores;

    wkv_shapes shapes = {};

    explicit inputs(wkv_policy & policy) {
        shapes = { 1 + below(5), 1 + below(3), 1 + below(3), 1, nullptr };

        const int32_t n_heads = shapes.n_layer*shapes.n_head_kv;
        const bool    alike   = (policy.selection.kind == WKV_KIND_WINDOWS && policy.selection.scope == WKV_SCOPE_LAYER) || one_in(3);

        const int32_t n_most = one_in(100) ? 3000 : 60; // many: last keys are found in several steps

        const auto same = random_positions(1 + below(n_most));
        for (int32_t i = 0; i < n_heads; ++i) {
            const auto own = alike ? same : random_positions(1 + below(n_most));
            cells.push_back(own.size());
            pos.insert(pos.end(), own.begin(), own.end());
        }
        shapes.cells = cells.data();

        // a head that has lost nothing holds as many as the largest, or more, and once in a while an impossible number
        const int32_t n_held = *std::max_element(cells.begin(), cells.end());
        shapes.n_past = one_in(100) ? n_held - 1 : any({ n_held, n_held + below(100), 10*n_held, INT32_MAX });

        auto & p = policy.allocation;
        if (p.heads == WKV_HEADS_IMPORTANCE || (p.heads == WKV_HEADS_SCORE && p.beta > 0.0)) {
            for (int32_t i = 0; i < n_heads; ++i) {
                importance.push_back(any({ 0.0, 5e-324, 1e-300, 1e-3, 1.0, 1e300, DBL_MAX }));
            }
            if (one_in(100)) {
                importance[0] = any<double>({ -1.0, NAN, INFINITY });
            }
            p.importance   = importance.data();
            p.n_importance = n_heads;
        }

        scores.resize(pos.size()*(shapes.n_gqa + 1));
        const int32_t n_levels = any({ 1, 3, 1000 }); // few: many ties
        for (auto & s : scores) {
            s = one_in(2) ? below(n_levels)/1000.0f : any({ 0.0f, -0.0f, 1e-45f, FLT_MIN, FLT_MAX, -FLT_MAX });
        }
    }

    std::vector<uint8_t> bytes(const wkv::marks & marks) const {
        std::vector<uint8_t> res(pos.size(), 2);
        uint8_t * dst = res.data();
        for (size_t i = 0; i < cells.size(); ++i) {
            marks.write(i, dst);
            dst += cells[i];
        }
        return res;
    }

    // positions of every head; as runs: those at the end that follow each other are not listed
    std::vector<wkv::cell_positions> listed(bool as_runs) const {
        std::vector<wkv::cell_positions> res;
        const int32_t * first = pos.data();
        for (const int32_t n : cells) {
            int32_t n_listed = n;
            while (as_runs && n_listed > 0 && (n_listed == n || first[n_listed - 1] + 1 == first[n_listed])) {
                --n_listed;
            }
            res.push_back({ first, n_listed, n_listed < n ? first[n_listed] : 0 });
            first += n;
        }
        return res;
    }

    // of some layers
    std::vector<float> plane(const wkv::cache_view & view, int32_t il0, int32_t il1, int32_t i) const {
        const size_t n_rows = i == 0 ? view.n_rows() : 1;
        const auto   first  = scores.begin() + (i == 0 ? 0 : view.offsets.back()*view.n_rows());

        return { first + view.offsets[view.index(il0, 0)]*n_rows, first + view.offsets[view.index(il1, 0)]*n_rows };
    }
};

static int n_held = 0; // selections of layers whose keys a device held

// A device that sorts and counts in plain loops
class plain_keys : public wkv::device_keys {
public:
    plain_keys(const wkv_policy & policy, const inputs & in, const wkv::cache_view & view) : policy(policy), in(in), view(view) {
    }

    bool hold(int32_t il0, int32_t il1) override {
        if (one_in(10)) {
            return false;
        }
        n_held++;
        planes = in.plane(view, il0, il1, 0);
        if (policy.scoring.token_window_size > 0) {
            const auto second = in.plane(view, il0, il1, 1);
            planes.insert(planes.end(), second.begin(), second.end());
        }
        heads.clear();
        size_t offset = 0;
        for (size_t i = view.index(il0, 0); i < view.index(il1, 0); ++i) {
            const int32_t n = in.cells[i];
            heads.push_back({ planes.data() + offset, nullptr, {}, std::vector<uint8_t>(n, 0) }); // without an order
            heads.back().pooled = wkv::pool(policy.scoring, heads.back().scores, wkv::cell_positions(), std::max(0, n - policy.scoring.window_size)); // it knows no positions
            offset += n;
        }
        for (auto & head : heads) {
            head.token_scores = head.scores + (policy.scoring.token_window_size > 0 ? offset : 0);
        }
        return true;
    }

    int64_t not_finite() override { return -1; }

    void count(wkv::places kind, const wkv::key_digit & digit, int32_t * counts) override {
        for (size_t i = 0; i < heads.size(); ++i) {
            for (const place & own : order(kind, heads[i])) {
                if (digit.open[i/digit.n_group] && own.key >> digit.shift >> digit.width == digit.known[i/digit.n_group]) {
                    counts[(i << digit.width) + (own.key >> digit.shift & ((1u << digit.width) - 1))] += own.is_first ? 0 : own.cells.size();
                }
            }
        }
    }

    void mark(wkv::places kind, const std::vector<wkv::places_taken> & taken) override {
        for (size_t i = 0; i < heads.size(); ++i) {
            int32_t n = taken[i].n;
            for (const place & own : order(kind, heads[i])) {
                for (size_t j = 0; j < own.cells.size() && n > 0; ++j, --n) {
                    heads[i].keep[own.cells[j]] = 1;
                }
            }
            std::fill(heads[i].keep.begin() + taken[i].tail, heads[i].keep.end(), 1);
            heads[i].has_order = false;
        }
    }

    void read(wkv::marks & keep, size_t i0) override {
        for (size_t i = 0; i < heads.size(); ++i) {
            std::vector<uint32_t> words((heads[i].keep.size() + 63)/64*2, 0);
            for (size_t ic = 0; ic < heads[i].keep.size(); ++ic) {
                words[ic/32] |= uint32_t(heads[i].keep[ic]) << ic%32;
            }
            keep.load(i0 + i, words.data());
        }
    }

private:
    struct place {
        uint64_t             key;
        bool                 is_first; // protected
        std::vector<int32_t> cells;    // best ones first
    };

    struct head {
        const float        * scores;
        const float        * token_scores;
        std::vector<float>   pooled;
        std::vector<uint8_t> keep;

        bool               has_order = false;
        wkv::places        kind      = wkv::places::tokens;
        std::vector<place> order     = {};
    };

    const wkv_policy      & policy;
    const inputs          & in;
    const wkv::cache_view & view;

    std::vector<float> planes;
    std::vector<head>  heads;

    static uint64_t key_of(wkv::places kind, double x) {
        if (kind != wkv::places::windows) {
            const float y = float(x) + 0.0f;
            uint32_t bits;
            memcpy(&bits, &y, sizeof(bits));
            return bits >> 31 ? ~bits : bits | 0x80000000u;
        }
        x += 0.0;
        uint64_t bits;
        memcpy(&bits, &x, sizeof(bits));
        return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
    }

    // places from the best one on; until something is marked they stay as they are
    const std::vector<place> & order(wkv::places kind, head & own) const {
        auto & res = own.order;
        if (own.has_order && own.kind == kind) {
            return res;
        }
        own.has_order = true;
        own.kind      = kind;
        res.clear();
        for (int32_t ic = 0; kind == wkv::places::rest && ic < int32_t(own.keep.size()); ++ic) {
            if (!own.keep[ic]) {
                res.push_back({ key_of(kind, own.token_scores[ic]), false, { ic } });
            }
        }
        const int32_t step = kind == wkv::places::windows ? policy.selection.omega : 1;
        for (int32_t i0 = 0; kind != wkv::places::rest && i0 < int32_t(own.pooled.size()); i0 += step) {
            std::vector<int32_t> cells(std::min<int32_t>(step, own.pooled.size() - i0));
            std::iota(cells.begin(), cells.end(), i0);
            std::stable_sort(cells.begin(), cells.end(), [&](int32_t a, int32_t b) { return own.pooled[a] > own.pooled[b]; });

            double        sum = 0.0;
            const int32_t n   = kind == wkv::places::windows ? std::min<int32_t>(cells.size(), policy.selection.top_p) : 1;
            for (int32_t i = 0; i < n; ++i) {
                sum += own.pooled[cells[i]];
            }
            res.push_back({ key_of(kind, sum/n), policy.selection.protect_first && i0 == 0, cells });
        }
        std::stable_sort(res.begin(), res.end(), [](const place & a, const place & b) {
            return a.is_first != b.is_first ? a.is_first : a.key > b.key;
        });
        return res;
    }
};

// whether the policy was valid
static bool run(int i_case) {
    wkv_policy   policy = random_policy();
    const inputs in(policy);
    if (!wkv::policy_error(policy).empty() || !wkv::shapes_error(policy, in.shapes).empty()) {
        return false;
    }

    const wkv::cache_view view(policy, in.shapes, in.pos.data(), in.scores.data());

    const int64_t n_heads = in.cells.size();
    const int64_t n_cells = one_in(3) ? any<int64_t>({ 1, INT32_MAX, int64_t(INT32_MAX) + 1, int64_t(1) << 62, INT64_MAX }) : 1 + below(70);

    wkv::head_budgets budgets;
    CHECK(wkv::budgets(view, n_cells, budgets).empty());
    if (policy.selection.kind != WKV_KIND_FULL && policy.allocation.accounting == WKV_ACCOUNTING_NATIVE && n_cells < INT32_MAX) {
        CHECK(std::accumulate(budgets.n_cells.begin(), budgets.n_cells.end(), int64_t(0)) <= n_cells*n_heads);
    }

    // with the budgets at hand, and from their cells alone
    wkv::head_budgets given;
    CHECK(wkv::given_budgets(view, budgets.n_cells.data(), given).empty());
    wkv::marks marks(in.cells.data(), n_heads), marks_given = marks;
    CHECK(wkv::select(view, budgets, marks).empty());
    CHECK(wkv::select(view, given, marks_given).empty());
    const auto keep = in.bytes(marks);
    CHECK(keep == in.bytes(marks_given));

    // as the runtime selects: from the scores of some layers at a time, on several threads
    for (const int32_t n_threads : { 1, 3 }) {
        wkv::cache_view parts(policy, in.shapes, in.listed(n_threads > 1));
        parts.n_threads = n_threads;
        std::vector<float> cur;
        wkv::marks         marks_parts(in.cells.data(), n_heads);
        CHECK(wkv::select_cells(parts, n_cells, [&](int32_t il0, int32_t il1, int32_t i_plane) {
            cur = in.plane(view, il0, il1, i_plane); // the plane before is gone then
            return cur.data();
        }, marks_parts).empty());
        CHECK(keep == in.bytes(marks_parts));
    }

    // the same where devices count and mark
    {
        wkv::cache_view    parts(policy, in.shapes, in.listed(true));
        std::vector<float> cur;
        wkv::marks         marks_parts(in.cells.data(), n_heads);
        plain_keys         devices(policy, in, view);
        CHECK(wkv::select_cells(parts, n_cells, [&](int32_t il0, int32_t il1, int32_t i_plane) {
            cur = in.plane(view, il0, il1, i_plane);
            return cur.data();
        }, marks_parts, &devices).empty());
        CHECK(keep == in.bytes(marks_parts));
    }

    for (int64_t i = 0; i < n_heads; ++i) {
        const int64_t n_kept = std::count(keep.begin() + view.offsets[i], keep.begin() + view.offsets[i + 1], 1);
        CHECK(n_kept == marks.count(i));
        CHECK(budgets.n_cells[i] >= 1 && budgets.n_cells[i] <= in.cells[i]);
        CHECK(policy.selection.whole_windows ? n_kept >= 1 : n_kept == budgets.n_cells[i]);
    }
    return true;
}

// every call is made once, and an exception comes out on the caller's thread after all threads have ended
static void test_threads() {
    const int i_case = -1;
    for (const int32_t n_threads : { 0, 1, 3, 50 }) {
        std::vector<int> n_calls(40, 0);
        wkv::for_each(n_threads, n_calls.size(), [&](size_t i) { n_calls[i]++; });
        CHECK(std::count(n_calls.begin(), n_calls.end(), 1) == 40);

        bool thrown = false;
        try {
            wkv::for_each(n_threads, n_calls.size(), [&](size_t i) {
                n_calls[i]++;
                if (i % 7 == 3) {
                    throw std::bad_alloc();
                }
            });
        } catch (const std::bad_alloc &) {
            thrown = true;
        }
        CHECK(thrown);
        CHECK(*std::max_element(n_calls.begin(), n_calls.end()) == 2 && n_calls[3] == 2);
    }
}

int main(int argc, char ** argv) {
    test_threads();

    const int n_cases = argc > 1 ? atoi(argv[1]) : 100000;
    rng.seed(argc > 2 ? atoi(argv[2]) : 1);

    int n_valid = 0;
    for (int i = 0; i < n_cases; ++i) {
        n_valid += run(i);
    }
    printf("%d %d\n", n_valid, n_held);
    return 0;
}
