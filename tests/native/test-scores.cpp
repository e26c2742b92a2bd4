// Scores of cells on the CPU (native/ggml-cpu/ragged-scores.h), under the sanitizers: every type of cells, shapes that are no whole
// vectors or tiles, heads of different lengths, against sums in double precision; and on several threads bit for bit the same.
//
//   test-scores [N_CASES [SEED]]

#include "ragged-scores.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

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

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "case %d, %s:%d: %s\n", i_case, __FILE__, __LINE__, #x); exit(1); } } while (0)

struct layer {
    ggml_context * ctx;

    std::vector<int64_t> first;
    std::vector<int64_t> n_cells;
    std::vector<int32_t> rows;
    std::vector<int64_t> n_hidden;
    std::vector<float>   sinks;

    std::vector<float> keys;    // [n_embd, rows of the pool]
    std::vector<float> queries; // [n_embd, n_held, n_head]

    ggml_ragged_scores p;

    layer() {
        const ggml_init_params params = { size_t(64) << 20, nullptr, false };
        ctx = ggml_init(params);

        const ggml_type type   = any({ GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 });
        const int64_t   n_embd = ggml_is_quantized(type) ? any({ 32, 64, 96 }) : any({ 1, 20, 64, 80, 128 });
        const int64_t   n_held = 40;

        p.n_head_kv = 1 + below(3);
        p.n_gqa     = any({ 1, 2, 3, 4, 8 });
        p.n_queries = any({ 1, 2, 5, 16, 32, 33 });

        int64_t n_rows = below(5);
        for (int64_t ih = 0; ih < p.n_head_kv; ++ih) {
            n_cells.push_back(any({ 1 + below(9), 1 + below(200), 500 + below(30), 1 + below(1500) }));
            first.push_back(n_rows);
            n_rows += n_cells.back() + below(4);
        }
        for (int64_t i = 0; i < p.n_queries; ++i) {
            rows.push_back((7*i + 3) % n_held);
        }
        for (int64_t i = 0; i < p.n_queries*p.n_head_kv; ++i) {
            n_hidden.push_back(one_in(4) ? 0 : below(std::min<int64_t>(n_cells[i/p.n_queries], any({ 3, 40, 100000 }))));
        }

        std::normal_distribution<float> normal(0.0f, any({ 0.3f, 1.0f, 3.0f }));
        ggml_tensor * k = ggml_new_tensor_2d(ctx, type, n_embd, n_rows);
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, n_embd, n_held, p.n_head_kv*p.n_gqa);
        keys   .resize(ggml_nelements(k));
        queries.resize(ggml_nelements(q));
        for (auto & x : keys) {
            x = normal(rng);
        }
        for (auto & x : queries) {
            x = normal(rng);
        }
        if (type == GGML_TYPE_F32) {
            std::copy(keys.begin(), keys.end(), (float *) k->data);
        } else {
            ggml_quantize_chunk(type, keys.data(), k->data, 0, n_rows, n_embd, nullptr);
            ggml_get_type_traits(type)->to_float(k->data, keys.data(), keys.size());
        }
        ggml_fp32_to_fp16_row(queries.data(), (ggml_fp16_t *) q->data, queries.size());
        ggml_fp16_to_fp32_row((const ggml_fp16_t *) q->data, queries.data(), queries.size());

        for (int64_t i = 0; one_in(4) && i < p.n_head_kv*p.n_gqa; ++i) {
            sinks.push_back(normal(rng) + any({ -100.0f, 0.0f, 30.0f }));
        }
        sinks.resize(sinks.empty() ? 0 : p.n_head_kv*p.n_gqa, 1.0f);

        p.k             = k;
        p.q             = q;
        p.first         = first.data();
        p.n_cells       = n_cells.data();
        p.rows          = rows.data();
        p.n_hidden      = n_hidden.data();
        p.sinks         = sinks.empty() ? nullptr : sinks.data();
        p.kq_scale      = 1.0f/std::sqrt(float(n_embd));
        p.softcap       = one_in(4) ? 20.0f : 0.0f;
        p.by_query_head = one_in(3);
        p.largest       = one_in(3);
        p.keep          = one_in(2) ? 0.0f : 0.5f;
        p.weight        = p.largest ? any({ 0.0f, 1.0f, 0.3f }) : 1.0f/float(p.n_queries*(p.by_query_head ? 1 : p.n_gqa));
        p.n_scored      = one_in(2) ? 0 : 1 + below(any({ 9, 200, 1500 }));
        p.n_piece       = one_in(2) ? 0 : any({ 64, 128, 1000 });
    }

    ~layer() { ggml_free(ctx); }

    // the first cells of a head, which alone have scores
    int64_t n_scored(int64_t ih) const { return p.n_scored > 0 ? std::min(p.n_scored, n_cells[ih]) : n_cells[ih]; }

    int64_t n_res() const { return p.by_query_head ? p.n_gqa : 1; }

    std::vector<std::vector<float>> run(int n_threads) {
        std::vector<std::vector<float>> res;
        for (int64_t i = 0; i < p.n_head_kv*n_res(); ++i) {
            res.emplace_back(n_cells[i/n_res()], p.keep > 0.0f ? 0.25f : NAN); // what is not kept is not read
        }
        std::vector<float *> dst;
        for (auto & row : res) {
            dst.push_back(row.data());
        }
        p.dst       = dst.data();
        p.n_threads = n_threads;
        for (auto & next : p.next) {
            next = 0;
        }

        const auto * steps = ggml_cpu_ragged_scores();
        std::vector<float> memory(steps->n_work(&p), NAN);
        ggml_tensor work  = {};
        ggml_tensor other = {};
        work.data    = memory.data();
        other.src[0] = &work;
        for (const auto step : { steps->scan, steps->combine, steps->weigh }) {
            std::vector<std::thread> team;
            for (int ith = 0; ith < n_threads + 1; ++ith) { // one more than there is memory for
                team.emplace_back([&, ith] { step(step == steps->scan ? &work : &other, ith, n_threads + 1, &p); });
            }
            for (auto & thread : team) {
                thread.join();
            }
        }
        return res;
    }

    // sums of weights, or the largest times the cells that are seen, in double precision; size: the largest sum of the sizes of a logit's products
    std::vector<std::vector<double>> exact(double & size) const {
        const int64_t n_embd = p.k->ne[0];

        std::vector<std::vector<double>> res;
        for (int64_t i = 0; i < p.n_head_kv*n_res(); ++i) {
            res.emplace_back(n_cells[i/n_res()], p.largest && p.keep > 0.0f ? 0.25 : p.keep*0.25);
        }
        for (int64_t i = 0; i < p.n_head_kv*p.n_gqa*p.n_queries; ++i) {
            const int64_t iq = i%p.n_queries;
            const int64_t ig = i/p.n_queries%p.n_gqa;
            const int64_t ih = i/p.n_queries/p.n_gqa;
            const int64_t n  = n_cells[ih] - n_hidden[ih*p.n_queries + iq];

            const float * q = queries.data() + ((ih*p.n_gqa + ig)*p.q->ne[1] + rows[iq])*n_embd;
            std::vector<double> x(n, 0.0);
            double max = p.sinks ? sinks[ih*p.n_gqa + ig] : -INFINITY;
            for (int64_t ic = 0; ic < n; ++ic) {
                double cur = 0.0;
                for (int64_t d = 0; d < n_embd; ++d) {
                    const double product = double(q[d])*keys[(first[ih] + ic)*n_embd + d]*p.kq_scale;
                    x[ic] += product;
                    cur   += std::fabs(product);
                }
                size = std::max(size, cur);
                if (p.softcap > 0.0f) {
                    x[ic] = p.softcap*std::tanh(x[ic]/p.softcap);
                }
                max = std::max(max, x[ic]);
            }
            double sum = p.sinks ? std::exp(sinks[ih*p.n_gqa + ig] - max) : 0.0;
            for (const double cur : x) {
                sum += std::exp(cur - max);
            }
            for (int64_t ic = 0; ic < n; ++ic) {
                double & dst = res[ih*n_res() + (p.by_query_head ? ig : 0)][ic];
                const double weight = std::exp(x[ic] - max)/sum;
                dst = p.largest ? std::max(dst, weight*(p.weight > 0.0f ? p.weight : double(n))) : dst + p.weight*weight;
            }
        }
        return res;
    }
};

static void run(int i_case) {
    layer cur;

    CHECK(ggml_cpu_ragged_scores()->supports(&cur.p));
    const auto got  = cur.run(1);
    double size = 0.0;
    const auto want = cur.exact(size);
    for (const auto & other : { cur.run(3), cur.run(1) }) {
        for (size_t i = 0; i < got.size(); ++i) {
            CHECK(memcmp(got[i].data(), other[i].data(), got[i].size()*sizeof(float)) == 0); // of cells without a score as well
        }
    }

    // A logit is the sum of up to 128 F32 products, whose roundings, of 6e-8 of a sum each, have different signs: about 1e-6 of the
    // sum of their sizes. The difference from the largest is rounded, too. What a logit is wrong by, a weight is wrong by in proportion
    for (size_t i = 0; i < got.size(); ++i) {
        const int64_t n = cur.n_scored(i/cur.n_res());
        for (int64_t ic = n; ic < int64_t(got[i].size()); ++ic) {
            CHECK(cur.p.keep > 0.0f ? got[i][ic] == 0.25f : std::isnan(got[i][ic]));
        }
        for (int64_t ic = 0; ic < n; ++ic) {
            const double bound = (1e-6*(2.0 + size) + 1e-7*std::fabs(std::log(std::max(want[i][ic], 1e-300))))*want[i][ic];
            if (!(std::fabs(got[i][ic] - want[i][ic]) <= bound + 1e-30)) {
                fprintf(stderr, "row %zu, cell %d: %.9g, expected %.9g\n", i, int(ic), got[i][ic], want[i][ic]);
                CHECK(false);
            }
        }
    }

    // keys that overflow are told from the scores
    if (cur.p.k->type == GGML_TYPE_F32 && cur.p.softcap == 0.0f) {
        const float bad = any({ INFINITY, -INFINITY, NAN });
        ((float *) cur.p.k->data)[cur.first[0]*cur.p.k->ne[0]] = bad;

        bool told = std::isnan(bad);
        for (int64_t i = 0; i < cur.p.n_gqa*cur.p.n_queries; ++i) {
            const int64_t row = i/cur.p.n_queries*cur.p.q->ne[1] + cur.rows[i%cur.p.n_queries];
            told = told || cur.queries[row*cur.p.q->ne[0]]*bad > 0.0f;
        }
        bool finite = true;
        const auto rows = cur.run(1);
        for (size_t i = 0; i < rows.size(); ++i) {
            finite = finite && std::all_of(rows[i].begin(), rows[i].begin() + cur.n_scored(i/cur.n_res()), [](float x) { return std::isfinite(x); });
        }
        CHECK(!told || !finite);
    }
}

int main(int argc, char ** argv) {
    ggml_cpu_init();

    const int n_cases = argc > 1 ? atoi(argv[1]) : 300;
    rng.seed(argc > 2 ? atoi(argv[2]) : 1);
    for (int i = 0; i < n_cases; ++i) {
        run(i);
    }
    printf("%d\n", n_cases);
    return 0;
}
