// Cases of GGML_OP_FLASH_ATTN_RAGGED and a reference in double precision.

#pragma once

#include "ggml-flash-attn-ragged.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct ragged_case {
    int64_t   hsk, hsv;
    ggml_type type_k, type_v;
    int64_t   n_gqa, n_tokens;

    std::vector<int64_t> n_cells; // of the kv heads

    float softcap;
    bool  sinks;
    bool  causal;
    int   n_threads;

    bool permuted = true; // q as the models compute it, [hsk, n_head, n_tokens] in memory

    std::string vars() const;
};

std::string ragged_case::vars() const {
    std::string list;
    for (const int64_t n : n_cells) {
        list += (list.empty() ? "" : ",") + std::to_string(n);
    }
    char buf[512];
    snprintf(buf, sizeof(buf),
            "hsk=%d,hsv=%d,type_k=%s,type_v=%s,n_gqa=%d,n_tokens=%d,n_cells=[%s],softcap=%.0f,sinks=%d,causal=%d,permuted=%d,n_threads=%d",
            (int) hsk, (int) hsv, ggml_type_name(type_k), ggml_type_name(type_v), (int) n_gqa, (int) n_tokens, list.c_str(),
            softcap, sinks, causal, permuted, n_threads);
    return buf;
}

static constexpr int N_LAYER = 3;
static constexpr int LAYER   = 1;

// tensors and data of a case
struct ragged_graph {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_cgraph           * gf;

    ggml_tensor * q; // the leaf, [hsk, n_tokens, n_head] or permuted
    ggml_tensor * k;
    ggml_tensor * v;
    ggml_tensor * ranges;
    ggml_tensor * sinks;
    ggml_tensor * out;

    float scale;

    // what the backend reads, in F32
    std::vector<float>   q_data; // [n_head][n_tokens][hsk]
    std::vector<float>   k_data; // [n_rows][hsk]
    std::vector<float>   v_data;
    std::vector<float>   sinks_data;
    std::vector<int32_t> ranges_data;
};

static std::mt19937 rng;

// Pieces of one long list: drawing every number takes longer than the op and its reference do.
static std::vector<float> random_normal(size_t n, float sigma) {
    static const std::vector<float> list = [] {
        std::mt19937 gen(1);
        std::normal_distribution<float> dist(0.0f, 1.0f);
        std::vector<float> cur((1 << 20) - 3); // no multiple of a row
        for (auto & x : cur) {
            x = dist(gen);
        }
        return cur;
    }();

    std::vector<float> res(n);
    size_t i = rng() % list.size();
    for (auto & x : res) {
        x = sigma*list[i];
        i = i + 1 < list.size() ? i + 1 : 0;
    }
    return res;
}

// rows of the ranges get random values, the others stay NaN: all bits set is NaN in F32, F16 and BF16 and as a scale
static std::vector<float> init_pool(ggml_tensor * pool, const std::vector<int32_t> & ranges, int64_t n_head_kv) {
    const size_t  nb   = pool->nb[1];
    const int64_t n    = pool->ne[0];
    const auto  * type = ggml_get_type_traits(pool->type);

    std::vector<uint8_t> raw(ggml_nbytes(pool), 0xFF);
    std::vector<float>   res(ggml_nelements(pool), NAN);

    for (int64_t ih = 0; ih < n_head_kv; ++ih) {
        const int32_t * range = ranges.data() + 2*(LAYER*n_head_kv + ih);
        const auto      data  = random_normal(n*range[1], 1.0f);

        ggml_quantize_chunk(pool->type, data.data(), raw.data() + range[0]*nb, 0, range[1], n, nullptr);
        for (int64_t row = range[0]; row < range[0] + range[1]; ++row) {
            if (pool->type == GGML_TYPE_F32) {
                memcpy(res.data() + row*n, raw.data() + row*nb, nb);
            } else {
                type->to_float(raw.data() + row*nb, res.data() + row*n, n);
            }
        }
    }
    ggml_backend_tensor_set(pool, raw.data(), 0, raw.size());
    return res;
}

static ragged_graph build_graph(const ragged_case & tc, ggml_backend_t backend) {
    ragged_graph g;

    const int64_t n_head_kv = tc.n_cells.size();
    const int64_t n_head    = n_head_kv*tc.n_gqa;

    // regions in descending order of heads, gaps between them; the other layers' planes point into the gaps
    int64_t n_rows = 3;
    g.ranges_data.assign(2*n_head_kv*N_LAYER, 0);
    for (int64_t ih = n_head_kv - 1; ih >= 0; --ih) {
        for (int il = 0; il < N_LAYER; ++il) {
            int32_t * range = g.ranges_data.data() + 2*(il*n_head_kv + ih);
            range[0] = il == LAYER ? n_rows : 0;
            range[1] = il == LAYER ? tc.n_cells[ih] : 3;
        }
        n_rows += tc.n_cells[ih] + 5;
    }

    g.ctx.reset(ggml_init({ 16*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_context * ctx = g.ctx.get();

    g.q = tc.permuted ?
        ggml_new_tensor_3d(ctx, GGML_TYPE_F32, tc.hsk, n_head, tc.n_tokens) :
        ggml_new_tensor_3d(ctx, GGML_TYPE_F32, tc.hsk, tc.n_tokens, n_head);
    g.k      = ggml_new_tensor_2d(ctx, tc.type_k, tc.hsk, n_rows);
    g.v      = ggml_new_tensor_2d(ctx, tc.type_v, tc.hsv, n_rows);
    g.ranges = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, n_head_kv, N_LAYER);
    g.sinks  = tc.sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head) : nullptr;

    ggml_tensor * q = tc.permuted ? ggml_permute(ctx, g.q, 0, 2, 1, 3) : g.q;

    g.scale = 2.0f/sqrtf(tc.hsk);
    g.out   = ggml_flash_attn_ragged(ctx, q, g.k, g.v, g.ranges, g.sinks, LAYER, g.scale, tc.softcap, tc.causal);

    g.gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(g.gf, g.out);

    g.buffer.reset(ggml_backend_alloc_ctx_tensors(ctx, backend));

    g.q_data = random_normal(tc.hsk*tc.n_tokens*n_head, 1.0f);
    std::vector<float> q_raw = g.q_data;
    if (tc.permuted) {
        for (int64_t ih = 0; ih < n_head; ++ih) {
            for (int64_t it = 0; it < tc.n_tokens; ++it) {
                memcpy(&q_raw[(it*n_head + ih)*tc.hsk], &g.q_data[(ih*tc.n_tokens + it)*tc.hsk], tc.hsk*sizeof(float));
            }
        }
    }
    ggml_backend_tensor_set(g.q, q_raw.data(), 0, ggml_nbytes(g.q));

    g.k_data = init_pool(g.k, g.ranges_data, n_head_kv);
    g.v_data = init_pool(g.v, g.ranges_data, n_head_kv);
    ggml_backend_tensor_set(g.ranges, g.ranges_data.data(), 0, ggml_nbytes(g.ranges));

    if (g.sinks) {
        g.sinks_data = random_normal(n_head, 2.0f);
        ggml_backend_tensor_set(g.sinks, g.sinks_data.data(), 0, ggml_nbytes(g.sinks));
    }
    return g;
}

// several sums, so that the compiler can use vectors
static double dot(const float * a, const float * b, int64_t n) {
    double sum[8] = { 0.0 };
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; ++j) {
            sum[j] += (double) a[i + j]*b[i + j];
        }
    }
    double res = 0.0;
    for (; i < n; ++i) {
        res += (double) a[i]*b[i];
    }
    for (const double x : sum) {
        res += x;
    }
    return res;
}

// attention of query it of query head ih, by definition
static std::vector<double> reference(const ragged_case & tc, const ragged_graph & g, int64_t ih, int64_t it) {
    const int64_t n_head_kv = tc.n_cells.size();
    const int64_t ih_kv     = ih/tc.n_gqa;

    const int32_t * range = g.ranges_data.data() + 2*(LAYER*n_head_kv + ih_kv);
    const int64_t   n     = tc.causal ? std::max<int64_t>(0, range[1] - tc.n_tokens + it + 1) : range[1];

    std::vector<double> res(tc.hsv, 0.0);
    if (n == 0) {
        return res;
    }

    const float * q = g.q_data.data() + (ih*tc.n_tokens + it)*tc.hsk;

    std::vector<double> w(n);
    for (int64_t j = 0; j < n; ++j) {
        const float * k = g.k_data.data() + (range[0] + j)*tc.hsk;
        w[j] = dot(q, k, tc.hsk)*g.scale;
        if (tc.softcap != 0.0f) {
            w[j] = tc.softcap*tanh(w[j]/tc.softcap);
        }
    }

    const double max = *std::max_element(w.begin(), w.end());
    double sum = tc.sinks ? exp(g.sinks_data[ih] - max) : 0.0;
    for (auto & x : w) {
        x = exp(x - max);
        sum += x;
    }
    for (int64_t j = 0; j < n; ++j) {
        const float * v = g.v_data.data() + (range[0] + j)*tc.hsv;
        const double wj = w[j]/sum;
        for (int64_t d = 0; d < tc.hsv; ++d) {
            res[d] += wj*v[d];
        }
    }
    return res;
}

// other backends may hold weights and queries in F16, 5e-4 each
static constexpr double MAX_NMSE_GPU = 1e-5;

// multiplications that the reference may spend on a case; beyond, it takes some of the queries
static double max_reference = 1e7;

// worst squared error of an output row relative to its square, infinite where something is not finite; out as the op's result
static double worst_nmse(const ragged_case & tc, const ragged_graph & g, const std::vector<float> & out) {
    const int64_t n_head = tc.n_cells.size()*tc.n_gqa;

    double cost = 0.0;
    for (const int64_t n : tc.n_cells) {
        cost += (double) n*tc.n_gqa*(tc.hsk + tc.hsv);
    }
    const int64_t n_tested = std::clamp<int64_t>(max_reference/std::max(cost, 1.0), 3, tc.n_tokens);

    if (!std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); })) {
        return INFINITY;
    }

    double worst = 0.0;
    for (int64_t i = 0; i < std::min(n_tested, tc.n_tokens); ++i) {
        // the first and the last query are always among them
        const int64_t it = n_tested >= tc.n_tokens ? i : i*(tc.n_tokens - 1)/(n_tested - 1);
        for (int64_t ih = 0; ih < n_head; ++ih) {
            const auto    want = reference(tc, g, ih, it);
            const float * got  = out.data() + (it*n_head + ih)*tc.hsv;

            double err = 0.0;
            double ref = 0.0;
            for (int64_t d = 0; d < tc.hsv; ++d) {
                err += (got[d] - want[d])*(got[d] - want[d]);
                ref += want[d]*want[d];
            }
            worst = std::max(worst, ref > 0.0 ? err/ref : err > 0.0 ? INFINITY : 0.0);
        }
    }
    return worst;
}

static std::vector<int64_t> mixed_n_cells(int i, int64_t n_tokens, int64_t max_cells) {
    const int64_t n = max_cells - i*37 % (max_cells/2);
    switch (i % 4) {
        case 0:  return { n_tokens + 37, 0, n, 1 };
        case 1:  return { n | 1 };
        case 2:  return { 1, n_tokens, n/7 };
        default: return { n/2, n, n_tokens + 64 };
    }
}

static std::vector<ragged_case> make_test_cases(bool all) {
    const std::vector<int64_t>   head_sizes = { 64, 80, 96, 112, 128, 192, 256 };
    const std::vector<ggml_type> types      = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };
    const std::vector<int64_t>   gqas       = { 1, 2, 3, 4, 7, 8 };
    const std::vector<int64_t>   n_tokens   = { 1, 2, 3, 8, 17, 64, 300 };
    const std::vector<int>       threads    = { 1, 2, 7 };

    std::vector<ragged_case> res;

    // what is not looped over takes turns; the periods have no common factor with those of the loops
    int i = 0;
    const auto add = [&](int64_t hsk, int64_t hsv, ggml_type type_k, ggml_type type_v, int64_t n_gqa, int64_t n_t, int64_t max_cells) {
        if (hsk % ggml_blck_size(type_k) == 0 && hsv % ggml_blck_size(type_v) == 0) {
            res.push_back({ hsk, hsv, type_k, type_v, n_gqa, n_t, mixed_n_cells(i, n_t, max_cells),
                    i % 3 == 1 ? 10.0f : 0.0f, i/2 % 2 == 1, i % 5 != 2, threads[i % 3], i % 7 != 3 });
            i++;
        }
    };

    int n = 0;
    for (const auto hs : head_sizes) {
        for (const auto type_k : types) {
            for (const auto type_v : types) {
                if (!all) {
                    add(hs, hs, type_k, type_v, gqas[n % 6], n_tokens[n % 7], 5000);
                    n++;
                    continue;
                }
                for (const auto n_gqa : gqas) {
                    for (const auto n_t : n_tokens) {
                        add(hs, hs, type_k, type_v, n_gqa, n_t, 5000);
                    }
                }
            }
        }
    }
    for (const auto n_gqa : gqas) {
        for (const auto n_t : n_tokens) {
            add(64, 64, GGML_TYPE_F16, GGML_TYPE_F16, n_gqa, n_t, n_t <= 17 ? 5000 : 900);
            add(128, 64, GGML_TYPE_F32, GGML_TYPE_Q8_0, n_gqa, n_t, 600);
        }
    }

    // keys and values of different size, sizes that are not whole vectors
    for (const auto n_t : { 1, 5, 40 }) {
        add(192, 128, GGML_TYPE_F16,  GGML_TYPE_F16, 4, n_t, 1500);
        add(64,  32,  GGML_TYPE_Q8_0, GGML_TYPE_F16, 2, n_t, 1500);
        add(40,  72,  GGML_TYPE_F16,  GGML_TYPE_F16, 3, n_t, 1500);
        add(42,  35,  GGML_TYPE_F32,  GGML_TYPE_F32, 1, n_t, 1500);
        add(20,  4,   GGML_TYPE_BF16, GGML_TYPE_F32, 2, n_t, 1500);
    }

    // Decoding with quantised cells: a kernel of its own where keys and values have one type, which hardly any case above comes to
    int j = 0;
    for (const auto type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (const int64_t hs : { 64, 128, 256 }) {
            for (const int64_t n_gqa : { 1, 2, 4, 8 }) {
                const int64_t n = 300 + j*59 % 400;
                res.push_back({ hs, hs, type, type, n_gqa, 1, { n, 0, n/2 | 1 }, j % 5 == 3 ? 10.0f : 0.0f, j % 3 == 2, true, threads[j % 3] });
                if (n_gqa <= 4 && j % 3 == 0) {
                    res.push_back({ hs, hs, type, type, n_gqa, 2, { n/2 | 1, 0, n }, 0.0f, j % 3 == 2, true, threads[j % 3] });
                }
                j++;
            }
        }
    }

    // Groups of query heads, and a few tokens: products of 8 to 64 rows and what they leave over, ends of tiles of 32 to 128 cells, shares
    // that begin and end anywhere
    const std::vector<std::array<int64_t, 2>> groups = { { 4, 1 }, { 3, 2 }, { 8, 1 }, { 4, 3 }, { 4, 4 }, { 5, 5 }, { 4, 8 }, { 8, 8 }, { 12, 8 } };
    j = 0;
    for (const auto type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_BF16 }) {
        for (const auto & [hsk, hsv] : std::vector<std::array<int64_t, 2>>{ { 64, 64 }, { 128, 128 }, { 256, 256 }, { 192, 128 }, { 96, 80 } }) {
            for (const auto & [n_gqa, n_t] : groups) {
                const bool whole = hsk % ggml_blck_size(type) == 0 && hsv % ggml_blck_size(type) == 0;
                if (j++ % (type == GGML_TYPE_BF16 ? 4 : hsk % 128 == 0 || hsk == 64 ? 1 : 2) == 0 && whole) {
                    const int64_t n = 130 + j*67 % 450;
                    res.push_back({ hsk, hsv, type, type, n_gqa, n_t, j % 4 == 0 ? std::vector<int64_t>{ n + n_t } :
                            std::vector<int64_t>{ n + n_t, 0, 1, n/3 | 1, 64 }, j % 3 == 1 ? 10.0f : 0.0f, j % 5 < 2, j % 7 != 4, threads[j % 3], j % 2 == 0 });
                }
            }
        }
    }

    // long prompts, long heads, nothing at all, fewer cells than threads
    res.push_back({ 64,  64,  GGML_TYPE_F16,  GGML_TYPE_F16,  3, 2048, { 2048, 3000 },             0.0f, false, true,  2 });
    res.push_back({ 128, 128, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, 2, 2048, { 2500 },                   0.0f, true,  true,  2 });
    res.push_back({ 64,  64,  GGML_TYPE_F16,  GGML_TYPE_F16,  3, 1,    { 100000, 17, 0, 1001 },    0.0f, false, true,  2 });
    res.push_back({ 128, 128, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, 1, 2,    { 99999 },                  10.0f, true, true,  7 });
    res.push_back({ 64,  64,  GGML_TYPE_F16,  GGML_TYPE_F16,  3, 5,    { 0, 0, 0 },                0.0f, false, true,  2 });
    res.push_back({ 64,  64,  GGML_TYPE_F16,  GGML_TYPE_F16,  3, 5,    { 0, 0, 0 },                0.0f, true,  false, 2 });
    res.push_back({ 64,  64,  GGML_TYPE_F32,  GGML_TYPE_F32,  1, 1,    { 1 },                      0.0f, false, true,  7 });
    res.push_back({ 64,  64,  GGML_TYPE_F32,  GGML_TYPE_F32,  8, 40,   { 9 },                      0.0f, false, true,  2 });

    return res;
}
