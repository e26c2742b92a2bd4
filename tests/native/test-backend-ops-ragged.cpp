// GGML_OP_FLASH_ATTN_RAGGED on every backend against a reference in double precision, and GGML_OP_RAGGED_SELECT where a backend has it.
//
//   test-backend-ops-ragged [test|perf] [-b BACKEND] [-p TEXT] [--all]
//   test-backend-ops-ragged dump FOLDER
//
// test compares, perf measures beside ggml_flash_attn_ext over the same cells, dump writes cases of the first backend
// as .npy files. -b takes one backend, -p the cases whose description contains TEXT, --all many more of them.

#include "ragged-perf.h"
#include "select-cases.h"

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

static bool test(const select_case & tc, ggml_backend_t backend) {
    const std::string error = select_test(tc, [&](select_tensors & t, ggml_tensor * op) { return compute_select(backend, t, op); }).check();
    printf("  RAGGED_SELECT(%s): %s %s\n", tc.vars().c_str(), error.empty() ? "OK" : "FAIL", error.c_str());
    return error.empty();
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

        const int64_t n_head_kv = tc.n_cells.size();
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
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ); // who ends this has the lines so far

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
#if defined(__SANITIZE_ADDRESS__)
    max_reference /= 10; // it is slow here, and the program without sanitizers compares the same cases
#endif

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
        for (const auto & tc : make_select_cases()) {
            if (supports_select(backend.get()) && ("RAGGED_SELECT " + tc.vars()).find(text) != std::string::npos) {
                n_failed += !test(tc, backend.get());
                n_tested++;
            }
        }
    }

    if (mode == "test") {
        printf("%d tested, %d failed, %d not supported\n", n_tested, n_failed, n_refused);
    }
    return n_failed == 0 && n_tested > 0 ? 0 : 1;
}
