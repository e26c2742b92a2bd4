// GGML_OP_FLASH_ATTN_RAGGED on every backend against a reference in double precision.
//
//   test-backend-ops-ragged [test|perf] [-b BACKEND] [-p TEXT] [--all]
//   test-backend-ops-ragged dump FOLDER
//
// test compares, perf measures beside ggml_flash_attn_ext over the same cells, dump writes cases of the first backend
// as .npy files. -b takes one backend, -p the cases whose description contains TEXT, --all many more of them.

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

static std::vector<float> compute(ragged_graph & g, ggml_backend_t backend) {
    std::vector<float> res(ggml_nelements(g.out), NAN);
    ggml_backend_tensor_set(g.out, res.data(), 0, ggml_nbytes(g.out));

    GGML_ASSERT(ggml_backend_graph_compute(backend, g.gf) == GGML_STATUS_SUCCESS);

    ggml_backend_tensor_get(g.out, res.data(), 0, ggml_nbytes(g.out));
    return res;
}

//
// test
//

// the cells are compared as the backend reads them, so the bound is that of the arithmetic: F32 rounds to 6e-8, and sums of some
// thousand terms stay below 1e-5 of the row
static constexpr double MAX_NMSE_CPU = 1e-10;

static bool test(const ragged_case & tc, ggml_backend_t backend, bool & supported) {
    ragged_graph g = build_graph(tc, backend);

    supported = ggml_backend_supports_op(backend, g.out);
    if (!supported) {
        return true;
    }
    set_n_threads(backend, tc.n_threads);

    const bool   is_cpu = ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU;
    const double worst  = worst_nmse(tc, g, compute(g, backend));
    const bool   ok     = worst <= (is_cpu ? MAX_NMSE_CPU : MAX_NMSE_GPU);

    printf("  FLASH_ATTN_RAGGED(%s): %s (%.1e)\n", tc.vars().c_str(), ok ? "OK" : "FAIL", worst);
    return ok;
}

//
// perf
//

struct perf_case {
    int64_t   hs;
    ggml_type type;
    int64_t   n_head_kv, n_gqa;
    int64_t   n_tokens, n_cells; // cells of all heads together: n_cells*n_head_kv
    int       n_threads;

    bool ragged = false; // the last head holds n_head_kv times as many cells as the first

    std::vector<int64_t> lens() const;
    std::string          vars() const;
};

std::string perf_case::vars() const {
    return "hs=" + std::to_string(hs) + ",type=" + ggml_type_name(type) + ",n_tokens=" + std::to_string(n_tokens) +
        ",n_threads=" + std::to_string(n_threads) + (ragged ? ",ragged" : "");
}

std::vector<int64_t> perf_case::lens() const {
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
static void perf(const perf_case & pc, ggml_backend_t backend) {
    const int64_t n_head  = pc.n_head_kv*pc.n_gqa;
    const int     n_layer = pc.n_tokens > 1 ? 1 : pc.n_cells > 32768 ? 2 : 8; // more than caches hold

    ggml_context_ptr ctx_ptr(ggml_init({ (16 + 8*n_layer)*ggml_tensor_overhead() + 2*ggml_graph_overhead(), nullptr, true }));
    ggml_context * ctx = ctx_ptr.get();

    ggml_tensor * q      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, pc.hs, n_head, pc.n_tokens);
    ggml_tensor * mask   = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, pc.n_cells, pc.n_tokens);
    ggml_tensor * ranges = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, 2, pc.n_head_kv, 1);

    ggml_cgraph * gf_ragged = ggml_new_graph(ctx);
    ggml_cgraph * gf_ext    = ggml_new_graph(ctx);

    std::vector<ggml_tensor *> pools;
    const float scale = 1.0f/sqrtf(pc.hs);
    ggml_tensor * q_view = ggml_permute(ctx, q, 0, 2, 1, 3);
    for (int il = 0; il < n_layer; ++il) {
        ggml_tensor * k = ggml_new_tensor_2d(ctx, pc.type, pc.hs, pc.n_cells*pc.n_head_kv);
        ggml_tensor * v = ggml_new_tensor_2d(ctx, pc.type, pc.hs, pc.n_cells*pc.n_head_kv);
        pools.push_back(k);
        pools.push_back(v);

        ggml_tensor * k_view = ggml_view_3d(ctx, k, pc.hs, pc.n_cells, pc.n_head_kv, k->nb[1], pc.n_cells*k->nb[1], 0);
        ggml_tensor * v_view = ggml_view_3d(ctx, v, pc.hs, pc.n_cells, pc.n_head_kv, v->nb[1], pc.n_cells*v->nb[1], 0);

        ggml_tensor * ext = ggml_flash_attn_ext(ctx, q_view, k_view, v_view, mask, scale, 0.0f, 0.0f);
        ggml_prec_set_acc(ext, GGML_PREC_F32);
        ggml_build_forward_expand(gf_ext, ext);
        ggml_build_forward_expand(gf_ragged, ggml_flash_attn_ragged(ctx, q_view, k, v, ranges, nullptr, 0, scale, 0.0f, true));
    }

    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx, backend));
    if (!ggml_backend_supports_op(backend, ggml_graph_node(gf_ragged, -1))) {
        return;
    }

    const auto q_data = random_normal(ggml_nelements(q), 1.0f);
    ggml_backend_tensor_set(q, q_data.data(), 0, ggml_nbytes(q));

    std::vector<ggml_fp16_t> mask_data(ggml_nelements(mask), ggml_fp32_to_fp16(-INFINITY));
    for (int64_t it = 0; it < pc.n_tokens; ++it) {
        std::fill_n(mask_data.begin() + it*pc.n_cells, pc.n_cells - pc.n_tokens + it + 1, ggml_fp32_to_fp16(0.0f));
    }
    ggml_backend_tensor_set(mask, mask_data.data(), 0, ggml_nbytes(mask));

    std::vector<int32_t> ranges_data;
    int32_t first = 0;
    for (const int64_t n : pc.lens()) {
        ranges_data.insert(ranges_data.end(), { first, (int32_t) n });
        first += n;
    }
    ggml_backend_tensor_set(ranges, ranges_data.data(), 0, ggml_nbytes(ranges));

    // the same cells in all pools: they differ in where they lie
    std::vector<uint8_t> raw(ggml_nbytes(pools[0]));
    const auto data = random_normal(ggml_nelements(pools[0]), 1.0f);
    ggml_quantize_chunk(pc.type, data.data(), raw.data(), 0, pools[0]->ne[1], pools[0]->ne[0], nullptr);
    for (ggml_tensor * pool : pools) {
        ggml_backend_tensor_set(pool, raw.data(), 0, raw.size());
    }

    set_n_threads(backend, pc.n_threads);
    const double us_ext    = best_us([&] { ggml_backend_graph_compute(backend, gf_ext);    })/n_layer;
    const double us_ragged = best_us([&] { ggml_backend_graph_compute(backend, gf_ragged); })/n_layer;

    const auto lens    = pc.lens();
    const int  n_cells = std::accumulate(lens.begin(), lens.end(), int64_t(0));

    // prompts are bound by arithmetic
    char of_read[16] = "";
    if (pc.n_tokens == 1) {
        const double us_read = ggml_backend_buffer_is_host(buffer.get()) ? read_us(pools, pc.n_threads) : move_us(pools, backend);
        snprintf(of_read, sizeof(of_read), "%.0f %%", 100.0*us_read/n_layer/us_ragged);
    }

    printf("| %3d | %4s | %d x %d | %4d | %5d%s | %d | %9.1f | %9.1f | %5.2f | %5s |\n", (int) pc.hs, ggml_type_name(pc.type),
            (int) pc.n_head_kv, (int) pc.n_gqa, (int) pc.n_tokens, n_cells, pc.ragged ? " ragged" : "",
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

//
// dump
//

template <typename T>
static void write_npy(const std::string & path, const char * descr, const std::vector<int64_t> & shape, const std::vector<T> & data) {
    std::string dims;
    for (const int64_t n : shape) {
        dims += std::to_string(n) + ",";
    }
    std::string header = std::string("{'descr': '") + descr + "', 'fortran_order': False, 'shape': (" + dims + "), }";
    header.resize(GGML_PAD(10 + header.size() + 1, 64) - 11, ' ');
    header += '\n';
    const uint16_t len = header.size();

    FILE * file = fopen(path.c_str(), "wb");
    GGML_ASSERT(file);
    fwrite("\x93NUMPY\x01\x00", 1, 8, file);
    fwrite(&len, sizeof(len), 1, file);
    fwrite(header.data(), 1, header.size(), file);
    fwrite(data.data(), sizeof(T), data.size(), file);
    fclose(file);
}

static void dump(const std::string & folder, ggml_backend_t backend) {
    const std::vector<ragged_case> cases = {
        { 64, 64, GGML_TYPE_F32,  GGML_TYPE_F32,  3, 1,  { 700, 0, 33 }, 0.0f,  false, true,  2 },
        { 64, 96, GGML_TYPE_F16,  GGML_TYPE_F32,  1, 7,  { 5, 301 },     10.0f, true,  true,  2 },
        { 96, 64, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, 2, 40, { 90, 1, 400 }, 0.0f,  true,  false, 2 },
        { 64, 64, GGML_TYPE_F16,  GGML_TYPE_F16,  4, 65, { 65, 130 },    0.0f,  false, true,  1 },
    };
    for (size_t i = 0; i < cases.size(); ++i) {
        const auto & tc = cases[i];
        set_n_threads(backend, tc.n_threads);
        ragged_graph g   = build_graph(tc, backend);
        const auto   out = compute(g, backend);

        const int64_t n_head_kv = tc.lens.size();
        const int64_t n_head    = n_head_kv*tc.n_gqa;
        const int64_t n_rows    = g.k->ne[1];

        const std::string prefix = folder + "/" + std::to_string(i) + "_";
        write_npy(prefix + "q.npy",      "<f4", { n_head, tc.n_tokens, tc.hsk },     g.q_data);
        write_npy(prefix + "k.npy",      "<f4", { n_rows, tc.hsk },                  g.k_data);
        write_npy(prefix + "v.npy",      "<f4", { n_rows, tc.hsv },                  g.v_data);
        write_npy(prefix + "ranges.npy", "<i4", { N_LAYER, n_head_kv, 2 },           g.ranges_data);
        write_npy(prefix + "sinks.npy",  "<f4", { (int64_t) g.sinks_data.size() },   g.sinks_data);
        write_npy(prefix + "out.npy",    "<f4", { tc.n_tokens, n_head, tc.hsv },     out);
        write_npy(prefix + "params.npy", "<f4", { 4 }, std::vector<float>{ LAYER, g.scale, tc.softcap, (float) tc.causal });
    }
}

static int usage(const char * name) {
    fprintf(stderr, "usage: %s [test|perf] [-b BACKEND] [-p TEXT] [--all]\n       %s dump FOLDER\n", name, name);
    return 1;
}

int main(int argc, char ** argv) {
    std::string mode = "test";
    std::string folder;
    std::string backend_filter;
    std::string text;
    bool all = false;

    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (i == 1 && (arg == "test" || arg == "perf")) {
            mode = arg;
        } else if (i == 1 && arg == "dump" && argc == 3) {
            mode   = arg;
            folder = argv[++i];
        } else if (arg == "-b" && i + 1 < argc) {
            backend_filter = argv[++i];
        } else if (arg == "-p" && i + 1 < argc) {
            text = argv[++i];
        } else if (arg == "--all") {
            all = true;
        } else {
            return usage(argv[0]);
        }
    }
    if (all) {
        max_reference *= 10;
    }

    ggml_backend_load_all();

    int n_tested  = 0;
    int n_failed  = 0;
    int n_refused = 0;

    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (!backend_filter.empty() && backend_filter != ggml_backend_dev_name(dev)) {
            continue;
        }
        ggml_backend_ptr backend(ggml_backend_dev_init(dev, nullptr));
        GGML_ASSERT(backend);
        rng.seed(1);

        if (mode == "dump") {
            dump(folder, backend.get());
            return 0;
        }

        printf("Backend %s (%s)\n", ggml_backend_dev_name(dev), ggml_backend_dev_description(dev));
        if (mode == "perf") {
            printf("| size | type | kv heads x queries | tokens | cells of all heads | threads | flash_attn_ext us | flash_attn_ragged us | ratio | of read speed |\n");
            printf("| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
            const bool is_cpu = ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
            for (const auto & pc : make_perf_cases(is_cpu)) {
                if (pc.vars().find(text) != std::string::npos) {
                    perf(pc, backend.get());
                }
            }
            n_tested++;
            continue;
        }

        for (const auto & tc : make_test_cases(all)) {
            if (tc.vars().find(text) == std::string::npos) {
                continue;
            }
            bool supported;
            const bool ok = test(tc, backend.get(), supported);
            n_refused += !supported;
            n_tested  += supported;
            n_failed  += !ok;
        }
    }

    if (mode == "test") {
        printf("%d tested, %d failed, %d not supported\n", n_tested, n_failed, n_refused);
    }
    return n_failed == 0 && n_tested > 0 ? 0 : 1;
}
