// The speed of GGML_OP_FLASH_ATTN_RAGGED beside ggml_flash_attn_ext over the same cells.

#pragma once

#include "ragged-cases.h"

#include <array>
#include <functional>
#include <numeric>
#include <thread>

static void set_n_threads(ggml_backend_t backend, int n_threads) {
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    auto * fn  = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (fn) {
        fn(backend, n_threads);
    }
}

struct perf_case {
    int64_t   hs;
    ggml_type type;
    int64_t   n_head_kv, n_gqa;
    int64_t   n_tokens, n_cells; // of a head, on average
    int       n_threads;

    bool ragged = false; // the last head holds n_head_kv times as many cells as the first

    std::vector<int64_t> cells_of_heads() const;
    std::string          vars() const;
};

std::string perf_case::vars() const {
    return "hs=" + std::to_string(hs) + ",type=" + ggml_type_name(type) + ",n_tokens=" + std::to_string(n_tokens) +
        ",n_cells=" + std::to_string(n_cells) + ",n_threads=" + std::to_string(n_threads) + ",ragged=" + std::to_string(ragged);
}

std::vector<int64_t> perf_case::cells_of_heads() const {
    std::vector<int64_t> res(n_head_kv, n_cells);
    for (int64_t ih = 0; ragged && ih < n_head_kv; ++ih) {
        res[ih] = 2*n_cells*(ih + 1)/(n_head_kv + 1);
    }
    res.back() += n_cells*n_head_kv - std::accumulate(res.begin(), res.end(), int64_t(0)); // what division left over
    return res;
}

// the least of many: what other load on the machine disturbs least
static double best_us(const std::function<void()> & fn) {
    fn();
    double res = INFINITY;
    int    n   = 0;
    for (const int64_t t_start = ggml_time_us(); n < 5 || (ggml_time_us() - t_start < 300000 && n < 500); ++n) {
        const int64_t t0 = ggml_time_us();
        fn();
        res = std::min<double>(res, ggml_time_us() - t0);
    }
    return res;
}

// the speed at which these threads can read the pools and do nothing else
static double read_us(const std::vector<ggml_tensor *> & pools, int n_threads) {
    std::vector<uint64_t> sums(n_threads);

    // starting a thread takes as long as reading some hundred cells
    const int n_times = 50;

    const auto read = [&](int ith) {
        uint64_t sum[8] = {};
        for (int it = 0; it < n_times; ++it) {
            asm volatile("" ::: "memory"); // read it again
            for (const ggml_tensor * pool : pools) {
                const size_t n = ggml_nbytes(pool)/sizeof(sum);
                const auto * x = (const uint64_t *) pool->data;
                for (size_t i = n*ith/n_threads; i < n*(ith + 1)/n_threads; ++i) {
                    for (int j = 0; j < 8; ++j) {
                        sum[j] += x[8*i + j];
                    }
                }
            }
        }
        for (const uint64_t cur : sum) {
            sums[ith] += cur;
        }
    };

    const double res = best_us([&] {
        std::vector<std::thread> threads;
        for (int ith = 1; ith < n_threads; ++ith) {
            threads.emplace_back(read, ith);
        }
        read(0);
        for (auto & thread : threads) {
            thread.join();
        }
    });

    // the compiler must not drop the loop
    volatile uint64_t sink = std::accumulate(sums.begin(), sums.end(), uint64_t(0));
    GGML_UNUSED(sink);
    return res/n_times;
}

// the time that a device takes to move as many bytes as the pools have: half of what a copy takes, which reads and writes
static double move_us(const std::vector<ggml_tensor *> & pools, ggml_backend_t backend) {
    ggml_context_ptr ctx(ggml_init({ 2*(pools.size() + 1)*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_cgraph *    gf  = ggml_new_graph(ctx.get());
    ggml_tensor *    to  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, ggml_nbytes(pools[0])/sizeof(int32_t));

    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
    for (ggml_tensor * pool : pools) {
        ggml_tensor * from = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, to->ne[0]);
        GGML_ASSERT(ggml_backend_tensor_alloc(pool->buffer, from, pool->data) == GGML_STATUS_SUCCESS);
        ggml_build_forward_expand(gf, ggml_cpy(ctx.get(), from, to));
    }
    return 0.5*best_us([&] { ggml_backend_graph_compute(backend, gf); });
}

// a pool attended by either op, by stock as if its heads were uniform; every layer reads its own cells, as a model does
struct perf_graphs {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;

    ggml_tensor * q;      // [hs, n_head, n_tokens]
    ggml_tensor * mask;   // [n_cells, n_tokens], for stock
    ggml_tensor * ranges; // [2, n_head_kv, 1]

    std::vector<ggml_tensor *> pools; // K and V of every layer: [hs, n_cells*n_head_kv]

    ggml_cgraph * ragged;
    ggml_cgraph * ext;
};

static perf_graphs build_perf(const perf_case & pc, ggml_backend_t backend, int n_layer) {
    const int64_t n_head = pc.n_head_kv*pc.n_gqa;

    perf_graphs g;
    g.ctx.reset(ggml_init({ (16 + 8*n_layer)*ggml_tensor_overhead() + 2*ggml_graph_overhead(), nullptr, true }));
    ggml_context * ctx = g.ctx.get();

    g.q      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, pc.hs, n_head, pc.n_tokens);
    g.mask   = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, pc.n_cells, pc.n_tokens);
    g.ranges = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, pc.n_head_kv, 1);
    g.ragged = ggml_new_graph(ctx);
    g.ext    = ggml_new_graph(ctx);

    const float scale = 1.0f/sqrtf(pc.hs);
    ggml_tensor * q_view = ggml_permute(ctx, g.q, 0, 2, 1, 3);
    for (int il = 0; il < n_layer; ++il) {
        ggml_tensor * k = ggml_new_tensor_2d(ctx, pc.type, pc.hs, pc.n_cells*pc.n_head_kv);
        ggml_tensor * v = ggml_new_tensor_2d(ctx, pc.type, pc.hs, pc.n_cells*pc.n_head_kv);
        g.pools.push_back(k);
        g.pools.push_back(v);

        ggml_tensor * k_view = ggml_view_3d(ctx, k, pc.hs, pc.n_cells, pc.n_head_kv, k->nb[1], pc.n_cells*k->nb[1], 0);
        ggml_tensor * v_view = ggml_view_3d(ctx, v, pc.hs, pc.n_cells, pc.n_head_kv, v->nb[1], pc.n_cells*v->nb[1], 0);

        ggml_tensor * ext = ggml_flash_attn_ext(ctx, q_view, k_view, v_view, g.mask, scale, 0.0f, 0.0f);
        ggml_prec_set_acc(ext, GGML_PREC_F32);
        ggml_build_forward_expand(g.ext, ext);
        ggml_build_forward_expand(g.ragged, ggml_flash_attn_ragged(ctx, q_view, k, v, g.ranges, nullptr, 0, scale, 0.0f, true));
    }
    g.buffer.reset(ggml_backend_alloc_ctx_tensors(ctx, backend));
    return g;
}

static void fill_perf(const perf_case & pc, perf_graphs & g) {
    const auto q_data = random_normal(ggml_nelements(g.q), 1.0f);
    ggml_backend_tensor_set(g.q, q_data.data(), 0, ggml_nbytes(g.q));

    std::vector<ggml_fp16_t> mask_data(ggml_nelements(g.mask), ggml_fp32_to_fp16(-INFINITY));
    for (int64_t it = 0; it < pc.n_tokens; ++it) {
        std::fill_n(mask_data.begin() + it*pc.n_cells, pc.n_cells - pc.n_tokens + it + 1, ggml_fp32_to_fp16(0.0f));
    }
    ggml_backend_tensor_set(g.mask, mask_data.data(), 0, ggml_nbytes(g.mask));

    std::vector<int32_t> ranges_data;
    int32_t first = 0;
    for (const int64_t n : pc.cells_of_heads()) {
        ranges_data.insert(ranges_data.end(), { first, (int32_t) n });
        first += n;
    }
    ggml_backend_tensor_set(g.ranges, ranges_data.data(), 0, ggml_nbytes(g.ranges));

    // the same cells in all pools: they differ in where they lie
    ggml_tensor * pool = g.pools[0];
    std::vector<uint8_t> raw(ggml_nbytes(pool));
    const auto data = random_normal(ggml_nelements(pool), 1.0f);
    ggml_quantize_chunk(pc.type, data.data(), raw.data(), 0, pool->ne[1], pool->ne[0], nullptr);
    for (ggml_tensor * cur : g.pools) {
        ggml_backend_tensor_set(cur, raw.data(), 0, raw.size());
    }
}

// one row of the table
static void perf(const perf_case & pc, ggml_backend_t backend) {
    const int n_layer = pc.n_tokens > 1 ? 1 : pc.n_cells > 32768 ? 2 : 8; // more than caches hold

    perf_graphs g = build_perf(pc, backend, n_layer);
    if (!ggml_backend_supports_op(backend, ggml_graph_node(g.ragged, -1))) {
        return;
    }
    fill_perf(pc, g);

    set_n_threads(backend, pc.n_threads);
    const double us_ext    = best_us([&] { ggml_backend_graph_compute(backend, g.ext);    })/n_layer;
    const double us_ragged = best_us([&] { ggml_backend_graph_compute(backend, g.ragged); })/n_layer;

    // prompts are bound by arithmetic
    char of_read[16] = "";
    if (pc.n_tokens == 1) {
        const double us_read = ggml_backend_buffer_is_host(g.buffer.get()) ? read_us(g.pools, pc.n_threads) : move_us(g.pools, backend);
        snprintf(of_read, sizeof(of_read), "%.0f %%", 100.0*us_read/n_layer/us_ragged);
    }

    printf("| %3d | %4s | %d x %d | %4d | %5d%s | %d | %9.1f | %9.1f | %5.2f | %5s |\n", (int) pc.hs, ggml_type_name(pc.type),
            (int) pc.n_head_kv, (int) pc.n_gqa, (int) pc.n_tokens, (int) (pc.n_cells*pc.n_head_kv), pc.ragged ? " ragged" : "",
            pc.n_threads, us_ext, us_ragged, us_ext/us_ragged, of_read);
}

static std::vector<perf_case> make_perf_cases(bool is_cpu) {
    std::vector<perf_case> res;
    if (!is_cpu) {
        for (const auto type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            for (const int64_t n_cells : { 4096, 16384, 131072 }) {
                for (const bool ragged : { false, true }) {
                    res.push_back({ 128, type, 8, 4, 1, n_cells, 1, ragged });
                }
                res.push_back({ 128, type, 8, 4, 8, n_cells, 1 });
            }
            res.push_back({ 128, type, 8, 4, 512, 16384, 1 });
            res.push_back({ 64,  type, 3, 3, 1,   16384, 1 });
        }
        return res;
    }
    for (const auto & shape : { std::array<int64_t, 3>{ 64, 3, 3 }, std::array<int64_t, 3>{ 128, 8, 4 } }) {
        for (const auto type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            for (const int n_threads : { 1, 2 }) {
                res.push_back({ shape[0], type, shape[1], shape[2], 1, 8192/shape[1], n_threads, true });
                for (const int64_t n_cells : { 512, 4096, 16384 }) {
                    res.push_back({ shape[0], type, shape[1], shape[2], 1, n_cells, n_threads });
                }
                res.push_back({ shape[0], type, shape[1], shape[2], 512, 4096, n_threads });
            }
        }
    }
    return res;
}
