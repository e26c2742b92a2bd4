// Cases of GGML_OP_RAGGED_SELECT, step by step against definitions that sort.

#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-ragged-select.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

struct select_case {
    std::vector<int32_t> n_cells; // of the heads
    int32_t window_size;          // of them these have no key, but for single tokens
    int32_t before, after;        // that are pooled
    int32_t omega, top_p, first;
    int32_t n_values;             // distinct scores: few are often tied; 0: all that there are
    float   scale;                // of scores

    std::string vars() const {
        std::string res;
        for (const int32_t n : n_cells) {
            res += (res.empty() ? "n=" : ",") + std::to_string(n);
        }
        for (const auto & [name, value] : { std::pair<const char *, int32_t>{ "window_size", window_size }, { "before", before },
                { "after", after }, { "omega", omega }, { "top_p", top_p }, { "first", first }, { "n_values", n_values } }) {
            res += std::string(" ") + name + "=" + std::to_string(value);
        }
        return res + " scale=" + std::to_string(std::log2(scale));
    }
};

inline std::vector<select_case> make_select_cases() {
    return {
        { { 700, 700 },          16,  7, 0,  4,  4, 0, 0, 1.0f   },
        { { 700, 700, 700 },     16,  7, 0,  2,  2, 0, 5, 1.0f   },
        { { 1000, 300, 1, 64 },  8,   3, 3,  8,  4, 1, 0, 1.0f   },
        { { 1000, 300, 16, 17 }, 16,  0, 0,  32, 5, 1, 3, 1.0f   },
        { { 257, 33, 31, 32 },   1,   1, 0,  3,  2, 0, 2, 1.0f   },
        { { 9000 },              32,  7, 0,  2,  2, 0, 0, 1.0f   }, // several blocks count
        { { 5000, 129 },         32,  10, 10, 1, 1, 0, 1, 1.0f   }, // all tied
        { { 600, 600 },          16,  7, 0,  128, 128, 0, 40, 1.0f },
        { { 600, 600 },          16,  0, 0,  4,  3, 0, 0, 0x1p-130f }, // smaller than a normal float
        { { 40, 7, 0 },          64,  7, 0,  4,  4, 1, 0, 1.0f   }, // nothing but the observation window
    };
}

// tensors of one step, with what they hold
struct select_tensors {
    ggml_context_ptr ctx{ ggml_init({ 16*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };

    std::vector<std::pair<ggml_tensor *, std::vector<int32_t>>> data;

    ggml_tensor * add(ggml_type type, int64_t ne0, int64_t ne1, const void * values, const char * name) {
        ggml_tensor * res = ggml_new_tensor_2d(ctx.get(), type, ne0, ne1);
        ggml_set_name(res, name);
        data.push_back({ res, std::vector<int32_t>(ne0*ne1, -1) });
        if (values) {
            memcpy(data.back().second.data(), values, ne0*ne1*sizeof(int32_t));
        }
        return res;
    }
};

// computes a step and gives its result; throws what the device throws
using select_run = std::function<std::vector<int32_t>(select_tensors & tensors, ggml_tensor * op)>;

inline std::vector<int32_t> compute_select(ggml_backend_t backend, select_tensors & t, ggml_tensor * op) {
    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors(t.ctx.get(), backend));
    for (const auto & [tensor, values] : t.data) {
        ggml_backend_tensor_set(tensor, values.data(), 0, ggml_nbytes(tensor));
    }
    ggml_cgraph * gf = ggml_new_graph(t.ctx.get());
    ggml_build_forward_expand(gf, op);
    GGML_ASSERT(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS);

    std::vector<int32_t> res(ggml_nelements(op));
    ggml_backend_tensor_get(op, res.data(), 0, ggml_nbytes(op));
    return res;
}

// what a head is by definition
struct select_head {
    std::vector<float>    scores; // [n_cells]
    std::vector<float>    pooled; // of the cells before the observation window
    std::vector<double>   windows;
    std::vector<uint8_t>  keep;   // after windows
};

class select_test {
public:
    select_test(const select_case & tc, const select_run & run) : tc(tc), run(run), rng(1) {
        for (const int32_t n : tc.n_cells) {
            heads.push_back(make_head(n));
        }
    }

    // "" or what differs
    std::string check() {
        for (const auto step : { &select_test::check_keys, &select_test::check_counts, &select_test::check_marks }) {
            const std::string error = (this->*step)();
            if (!error.empty()) {
                return error;
            }
        }
        return "";
    }

private:
    const select_case & tc;
    const select_run  & run;
    std::mt19937        rng;

    std::vector<select_head> heads;
    std::vector<int32_t>     keys[2]; // with pooled scores, and without
    std::vector<int32_t>     first;   // of a head in keys

    select_head make_head(int32_t n) {
        select_head res;
        for (int32_t i = 0; i < n; ++i) {
            const float x = tc.n_values > 0 ? float(rng() % tc.n_values) : std::generate_canonical<float, 24>(rng);
            res.scores.push_back(x*tc.scale);
        }
        const int32_t n_review = std::max(0, n - tc.window_size);
        for (int32_t i = 0; i < n_review; ++i) {
            res.pooled.push_back(*std::max_element(res.scores.begin() + std::max(0, i - tc.before),
                        res.scores.begin() + std::min(n_review, i + tc.after + 1)));
        }
        for (int32_t i0 = 0; i0 < n_review; i0 += tc.omega) {
            std::vector<float> own(res.pooled.begin() + i0, res.pooled.begin() + std::min(n_review, i0 + tc.omega));
            std::sort(own.begin(), own.end(), std::greater<float>());
            own.resize(std::min<size_t>(own.size(), tc.top_p));
            res.windows.push_back(std::accumulate(own.begin(), own.end(), 0.0)/double(own.size()));
        }
        return res;
    }

    static uint32_t key_of(float x) {
        int32_t bits;
        memcpy(&bits, &x, sizeof(bits));
        return uint32_t(bits) + 0x80000000u; // scores are not negative
    }

    static uint64_t key_of(double x) {
        uint64_t bits;
        memcpy(&bits, &x, sizeof(bits));
        return bits + (uint64_t(1) << 63);
    }

    ggml_ragged_selection selection(ggml_ragged_places places) const { return { places, tc.omega, tc.top_p, tc.first }; }

    std::string check_keys() {
        for (int plane = 0; plane < 2; ++plane) {
            for (size_t i0 = 0; i0 < heads.size();) {
                size_t i1 = i0 + 1; // heads of one length are pooled together
                while (i1 < heads.size() && tc.n_cells[i1] == tc.n_cells[i0]) {
                    ++i1;
                }
                const int32_t n = tc.n_cells[i0];
                if (n > 0) {
                    const std::string error = check_keys(plane, i0, i1);
                    if (!error.empty()) {
                        return error;
                    }
                }
                for (size_t i = i0; i < i1 && plane == 0; ++i) {
                    first.push_back((i == 0 ? 0 : first.back() + tc.n_cells[i - 1]));
                }
                i0 = i1;
            }
        }
        return "";
    }

    std::string check_keys(int plane, size_t i0, size_t i1) {
        const int32_t n        = tc.n_cells[i0];
        const int32_t n_review = plane == 0 ? heads[i0].pooled.size() : 0;

        std::vector<float>   scores;
        std::vector<int32_t> want;
        for (size_t i = i0; i < i1; ++i) {
            scores.insert(scores.end(), heads[i].scores.begin(), heads[i].scores.end());
            scores.insert(scores.end(), 3, NAN); // rows are further apart than they are long
            for (int32_t ic = 0; ic < n; ++ic) {
                want.push_back(key_of(ic < n_review ? heads[i].pooled[ic] : heads[i].scores[ic]));
            }
        }
        keys[plane].insert(keys[plane].end(), want.begin(), want.end());
        want.insert(want.end(), i1 - i0, 0);

        // a score of the last head that is not finite is found in the observation window, too
        const bool spoilt = plane == 1;
        if (spoilt) {
            scores[(i1 - i0)*(n + 3) - 4] = rng() % 2 == 0 ? NAN : INFINITY;
        }

        select_tensors t;
        ggml_tensor * src = t.add(GGML_TYPE_F32, n + 3, i1 - i0, scores.data(), "scores");
        ggml_tensor * dst = t.add(GGML_TYPE_I32, int64_t(n + 1)*(i1 - i0), 1, nullptr, "the result");
        auto got = run(t, ggml_ragged_keys(t.ctx.get(), ggml_view_2d(t.ctx.get(), src, n, i1 - i0, src->nb[1], 0), dst, n_review,
                    plane == 0 ? tc.before : 0, plane == 0 ? tc.after : 0));
        if (spoilt) {
            want.back() = 1;
            got[(i1 - i0)*n - 1] = want[(i1 - i0)*n - 1];
        }
        return got == want ? "" : "keys of heads " + std::to_string(i0) + " to " + std::to_string(i1 - 1);
    }

    std::vector<int32_t> table(bool rest) const {
        std::vector<int32_t> res(GGML_RAGGED_N_HEAD*heads.size(), 0);
        int32_t n_words = 0;
        for (size_t i = 0; i < heads.size(); ++i) {
            int32_t * row = res.data() + i*GGML_RAGGED_N_HEAD;
            row[GGML_RAGGED_HEAD_KEYS]    = first[i];
            row[GGML_RAGGED_HEAD_N_KEYS]  = rest ? tc.n_cells[i] : heads[i].pooled.size();
            row[GGML_RAGGED_HEAD_WORDS]   = n_words;
            row[GGML_RAGGED_HEAD_N_CELLS] = tc.n_cells[i];
            row[GGML_RAGGED_HEAD_TAIL]    = tc.n_cells[i];
            n_words += (tc.n_cells[i] + 63)/64*2;
        }
        return res;
    }

    std::string check_counts() {
        const int32_t n_most = std::max_element(heads.begin(), heads.end(), [](const auto & a, const auto & b) {
            return a.pooled.size() < b.pooled.size(); })->pooled.size();

        for (const bool windows : { false, true }) {
            for (const int32_t width : { 8, 5 }) {
                for (int32_t shift = (windows ? 64 : 32) - width; shift >= 0; shift -= 2*width) {
                    auto heads_data = table(false);
                    std::vector<int32_t> want(heads.size() << width, 0);
                    for (size_t i = 0; i < heads.size(); ++i) {
                        std::vector<std::pair<uint64_t, int32_t>> own; // keys with their cells
                        for (size_t j = 0; !windows && j < heads[i].pooled.size(); ++j) {
                            own.push_back({ key_of(heads[i].pooled[j]), 1 });
                        }
                        for (size_t j = tc.first; windows && j < heads[i].windows.size(); ++j) {
                            own.push_back({ key_of(heads[i].windows[j]), std::min<int32_t>(tc.omega, heads[i].pooled.size() - j*tc.omega) });
                        }
                        const uint64_t known = own.empty() ? 0 : own[rng() % own.size()].first >> shift >> width;
                        heads_data[i*GGML_RAGGED_N_HEAD + GGML_RAGGED_HEAD_KNOWN]     = uint32_t(known);
                        heads_data[i*GGML_RAGGED_N_HEAD + GGML_RAGGED_HEAD_KNOWN + 1] = uint32_t(known >> 32);
                        for (const auto & [key, n] : own) {
                            if (key >> shift >> width == known) {
                                want[(i << width) + (key >> shift & ((1u << width) - 1))] += n;
                            }
                        }
                    }
                    select_tensors t;
                    ggml_tensor * k = t.add(GGML_TYPE_I32, keys[0].size(), 1, keys[0].data(), "keys");
                    ggml_tensor * h = t.add(GGML_TYPE_I32, GGML_RAGGED_N_HEAD, heads.size(), heads_data.data(), "heads");
                    if (run(t, ggml_ragged_count(t.ctx.get(), k, h, nullptr, selection(windows ? GGML_RAGGED_PLACES_WINDOWS :
                                        GGML_RAGGED_PLACES_TOKENS), shift, width, n_most)) != want) {
                        return std::string("counts of ") + (windows ? "windows" : "tokens") + " at bit " + std::to_string(shift);
                    }
                }
            }
        }
        return "";
    }

    // the first n of some cells by score, ties to the earlier one
    template <typename T>
    static std::vector<int32_t> best(const std::vector<T> & score, std::vector<int32_t> cells, int32_t n) {
        std::stable_sort(cells.begin(), cells.end(), [&](int32_t a, int32_t b) { return score[a] > score[b]; });
        cells.resize(std::min<size_t>(cells.size(), n));
        return cells;
    }

    static std::vector<int32_t> iota(int32_t i0, int32_t i1) {
        std::vector<int32_t> res(i1 - i0);
        std::iota(res.begin(), res.end(), i0);
        return res;
    }

    std::vector<uint8_t> want_windows(const select_head & head, int32_t n) const {
        std::vector<uint8_t> keep(head.scores.size(), 0);
        auto order = best(head.windows, iota(std::min<int32_t>(tc.first, head.windows.size()), head.windows.size()), INT32_MAX);
        if (tc.first && !head.windows.empty()) {
            order.insert(order.begin(), 0);
        }
        for (const int32_t iw : order) {
            for (const int32_t ic : best(head.pooled, iota(iw*tc.omega, std::min<int32_t>(head.pooled.size(), (iw + 1)*tc.omega)), n)) {
                keep[ic] = 1;
                --n;
            }
        }
        return keep;
    }

    static std::vector<int32_t> words_of(const std::vector<std::vector<uint8_t>> & keep) {
        std::vector<int32_t> res;
        for (const auto & own : keep) {
            const size_t i0 = res.size();
            res.resize(i0 + (own.size() + 63)/64*2, 0);
            for (size_t i = 0; i < own.size(); ++i) {
                res[i0 + i/32] |= uint32_t(own[i]) << i%32;
            }
        }
        return res;
    }

    std::string check_marks() {
        // shares of the cells, and few by number
        for (const double share : { 0.0, 0.1, 0.37, 0.9, 1.0, 3.0, 1e4, -1.0 }) {
            const auto n_of = [&](int32_t n) { return share < 0.0 ? n : share > 1.0 ? int32_t(share) : int32_t(n*share); };

            std::vector<std::vector<uint8_t>> tokens, windows, rest;
            auto data      = table(false);
            auto data_rest = table(true);
            for (size_t i = 0; i < heads.size(); ++i) {
                const auto  & head   = heads[i];
                const int32_t n      = tc.n_cells[i];
                const int32_t n_take = n_of(head.pooled.size());
                const int32_t tail   = std::min<int32_t>(n, head.pooled.size() + rng() % 8);
                data     [i*GGML_RAGGED_N_HEAD + GGML_RAGGED_HEAD_N_TAKE] = n_take;
                data     [i*GGML_RAGGED_N_HEAD + GGML_RAGGED_HEAD_TAIL]   = tail;

                tokens.push_back(std::vector<uint8_t>(n, 0));
                for (const int32_t ic : best(head.pooled, iota(0, head.pooled.size()), n_take)) {
                    tokens.back()[ic] = 1;
                }
                windows.push_back(want_windows(head, n_take));
                for (int32_t ic = tail; ic < n; ++ic) {
                    tokens.back()[ic] = windows.back()[ic] = 1;
                }

                std::vector<int32_t> left;
                for (int32_t ic = 0; ic < n; ++ic) {
                    if (!windows.back()[ic]) {
                        left.push_back(ic);
                    }
                }
                const int32_t n_rest = n_of(left.size());
                data_rest[i*GGML_RAGGED_N_HEAD + GGML_RAGGED_HEAD_N_TAKE] = n_rest;
                rest.push_back(windows.back());
                for (const int32_t ic : best(head.scores, left, n_rest)) {
                    rest.back()[ic] = 1;
                }
            }
            const std::string error = check_marks(GGML_RAGGED_PLACES_TOKENS, data, {}, words_of(tokens)) +
                check_marks(GGML_RAGGED_PLACES_WINDOWS, data, {}, words_of(windows)) +
                check_marks(GGML_RAGGED_PLACES_REST, data_rest, words_of(windows), words_of(rest)) +
                check_counts_of_rest(words_of(windows), windows);
            if (!error.empty()) {
                return error + " for a share of " + std::to_string(share);
            }
        }
        return "";
    }

    std::string check_marks(
            ggml_ragged_places places, const std::vector<int32_t> & data, const std::vector<int32_t> & marks, const std::vector<int32_t> & want) {
        const auto & own = keys[places == GGML_RAGGED_PLACES_REST];

        select_tensors t;
        ggml_tensor * k   = t.add(GGML_TYPE_I32, own.size(), 1, own.data(), "keys");
        ggml_tensor * h   = t.add(GGML_TYPE_I32, GGML_RAGGED_N_HEAD, heads.size(), data.data(), "heads");
        ggml_tensor * m   = marks.empty() ? nullptr : t.add(GGML_TYPE_I32, marks.size(), 1, marks.data(), "marks");
        ggml_tensor * dst = t.add(GGML_TYPE_I32, want.size(), 1, nullptr, "the result");
        const char  * names[] = { "tokens", "single tokens", "windows" };
        return run(t, ggml_ragged_mark(t.ctx.get(), k, h, m, dst, selection(places))) == want ? "" : std::string("marks of ") + names[places];
    }

    std::string check_counts_of_rest(const std::vector<int32_t> & marks, const std::vector<std::vector<uint8_t>> & keep) {
        std::vector<int32_t> want(heads.size() << 8, 0);
        for (size_t i = 0; i < heads.size(); ++i) {
            for (int32_t ic = 0; ic < tc.n_cells[i]; ++ic) {
                want[(i << 8) + (key_of(heads[i].scores[ic]) >> 24)] += !keep[i][ic];
            }
        }
        select_tensors t;
        const auto data = table(true);
        ggml_tensor * k = t.add(GGML_TYPE_I32, keys[1].size(), 1, keys[1].data(), "keys");
        ggml_tensor * h = t.add(GGML_TYPE_I32, GGML_RAGGED_N_HEAD, heads.size(), data.data(), "heads");
        ggml_tensor * m = t.add(GGML_TYPE_I32, marks.size(), 1, marks.data(), "marks");
        const int32_t n = *std::max_element(tc.n_cells.begin(), tc.n_cells.end());
        return run(t, ggml_ragged_count(t.ctx.get(), k, h, m, selection(GGML_RAGGED_PLACES_REST), 24, 8, n)) == want ? "" : "counts of single tokens";
    }
};

// whether a backend computes all steps
inline bool supports_select(ggml_backend_t backend) {
    select_tensors t;
    const ggml_ragged_selection windows = { GGML_RAGGED_PLACES_WINDOWS, 4, 4, 0 };
    ggml_tensor * keys  = t.add(GGML_TYPE_I32, 257, 1, nullptr, "keys");
    ggml_tensor * heads = t.add(GGML_TYPE_I32, GGML_RAGGED_N_HEAD, 1, nullptr, "heads");
    ggml_tensor * marks = t.add(GGML_TYPE_I32, 8, 1, nullptr, "marks");
    ggml_tensor * ops[] = {
        ggml_ragged_keys (t.ctx.get(), t.add(GGML_TYPE_F32, 256, 1, nullptr, "scores"), keys, 256, 0, 0),
        ggml_ragged_count(t.ctx.get(), keys, heads, nullptr, windows, 0, 8, 256),
        ggml_ragged_mark (t.ctx.get(), keys, heads, nullptr, marks, windows),
    };
    return std::all_of(ops, ops + 3, [&](ggml_tensor * op) { return ggml_backend_supports_op(backend, op); });
}
