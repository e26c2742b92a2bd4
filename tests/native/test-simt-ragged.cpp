// The GPU kernels of GGML_OP_FLASH_ATTN_RAGGED and GGML_OP_RAGGED_SELECT in the emulator: the cases of test-backend-ops-ragged, and
// planted faults.
//
//   test-simt-ragged cuda|metal [-p TEXT] [--part I/N]
//   test-simt-ragged faults
//   test-simt-ragged cost

#include "ragged-cases.h"
#include "select-cases.h"

#include "ggml-cpu.h"

#include "simt/simt-primitives.h"

#include "test-simt-ragged.h"

#include <set>

static const simt_device DEVICES[] = { simt_cuda(), simt_metal() };

struct result {
    std::vector<float> out;
    std::string        error;
    size_t             n_skipped = 0;

    std::vector<simt::launch_cost> costs;
};

// the op of a graph whose tensors lie in host memory
static result compute(const simt_device & device, const ragged_graph & g, uint32_t seed, const std::function<void(simt::machine &)> & prepare = {}) {
    simt::machine machine(seed);
    for (const auto & [t, name] : { std::pair{ g.q, "q" }, { g.k, "k" }, { g.v, "v" }, { g.ranges, "ranges" }, { g.sinks, "sinks" } }) {
        if (t) {
            machine.add(t->data, ggml_nbytes(t), name);
        }
    }
    // the result with what the device wants behind it, full of NaN
    ggml_tensor out = *g.out;
    std::vector<char> memory(ggml_nbytes(&out) + device.extra(&out), (char) 0xFF);
    out.data = memory.data();
    machine.add(out.data, ggml_nbytes(&out), "the result");
    if (memory.size() > ggml_nbytes(&out)) {
        machine.add(memory.data() + ggml_nbytes(&out), memory.size() - ggml_nbytes(&out), "the parts");
    }
    if (prepare) {
        prepare(machine);
    }

    result res;
    try {
        device.compute(machine, &out);
    } catch (const simt::failure & e) {
        res.error = e.what();
    }
    res.out.assign((float *) out.data, (float *) out.data + ggml_nelements(&out));
    res.n_skipped = machine.n_barriers_skipped;
    res.costs     = machine.costs;
    return res;
}

static bool test(const simt_device & device, const ragged_case & tc, ggml_backend_t backend, bool & supported) {
    ragged_graph g = build_graph(tc, backend);

    supported = device.supports(g.out);
    if (!supported) {
        return true;
    }
    const result res   = compute(device, g, 1);
    const double worst = res.error.empty() ? worst_nmse(tc, g, res.out) : INFINITY;
    const bool   ok    = worst <= MAX_NMSE_GPU;

    printf("  FLASH_ATTN_RAGGED(%s): %s (%.1e) %s\n", tc.vars().c_str(), ok ? "OK" : "FAIL", worst, res.error.c_str());
    return ok;
}

//
// faults
//

static int n_failed = 0;

static void expect(bool ok, const char * what, const std::string & got) {
    printf("  %s: %s (%s)\n", what, ok ? "OK" : "FAIL", got.c_str());
    n_failed += !ok;
}

// what a kernel of one block of 64 threads is told; data: 64 floats of device memory
static std::string run_kernel(const std::function<void(simt_ids, SIMT_GLOBAL(float), SIMT_SHARED(float))> & kernel) {
    std::vector<float> data(64, 1.0f);
    simt::machine machine(3);
    machine.add(data.data(), data.size()*sizeof(float), "data");
    try {
        machine.launch(1, 64, [&] { kernel(simt_get_ids(), SIMT_ENTER(data.data()), simt::shared_array<float>(0, 64)); });
    } catch (const simt::failure & e) {
        return e.what();
    }
    return "";
}

static void test_faults_of_small_kernels() {
    using ids = simt_ids;
    const auto has = [](const std::string & text, const char * part) { return text.find(part) != std::string::npos; };

    std::string got = run_kernel([](ids id, auto data, auto sh) {
        sh[id.tid] = data[id.tid];
        simt_barrier();
        data[id.tid] = sh[63 - id.tid] + simt_shuffle_xor(1.0f, 5);
    });
    expect(got.empty(), "a right kernel", got);

    got = run_kernel([](ids id, auto data, auto sh) {
        sh[id.tid] = data[id.tid];
        data[id.tid] = sh[63 - id.tid];
    });
    expect(has(got, "nobody wrote") || has(got, "race"), "a missing barrier", got);

    got = run_kernel([](ids id, auto data, auto sh) {
        sh[id.tid] = 0.0f;
        simt_barrier();
        sh[id.tid/2] = data[id.tid];
    });
    expect(has(got, "race"), "two threads write", got);

    got = run_kernel([](ids id, auto data, auto sh) {
        sh[id.tid] = 0.0f;
        simt_barrier();
        data[id.tid] = sh[(id.tid + 32) % 64];
        sh[id.tid]   = 1.0f;
    });
    expect(has(got, "race"), "a write after another warp's read", got);

    got = run_kernel([](ids id, auto data, auto) {
        simt_atomic_add(SIMT_CAST(int32_t, data), id.tid/2, 1);
        simt_atomic_or(SIMT_CAST(uint32_t, data), 63 - id.tid/2, 1u << id.tid%32);
    });
    expect(got.empty(), "atomic writes", got);

    got = run_kernel([](ids id, auto data, auto) {
        simt_atomic_add(SIMT_CAST(int32_t, data), id.tid/2, 1);
        data[id.tid] = 1.0f;
    });
    expect(has(got, "race"), "a write beside atomic ones", got);

    got = run_kernel([](ids id, auto data, auto sh) {
        data[id.tid] = 1.0f;
        simt_atomic_add(SIMT_CAST(int32_t, data), 63 - id.tid, 1);
        sh[id.tid] = 0.0f;
    });
    expect(has(got, "race"), "an atomic write beside others", got);

    got = run_kernel([](ids id, auto data, auto) { data[id.tid/2] = 1.0f; });
    expect(has(got, "race"), "two threads write to the device", got);

    got = run_kernel([](ids id, auto data, auto) { data[id.tid] = 1.0f + data[(id.tid + 1) % 64]; });
    expect(has(got, "race"), "a write to what another thread read from the device", got);

    got = run_kernel([](ids id, auto data, auto sh) { sh[id.tid] = data[id.tid + 1]; });
    expect(has(got, "reads byte 256 of data"), "a read behind the end", got);

    got = run_kernel([](ids id, auto, auto sh) { sh[id.tid + 1] = 0.0f; });
    expect(has(got, "writes byte 256 of an array of 256"), "a write behind shared memory", got);

    got = run_kernel([](ids id, auto data, auto sh) { data[id.tid] = sh[id.tid]; });
    expect(has(got, "nobody wrote"), "a read of what nobody wrote", got);

    got = run_kernel([](ids id, auto, auto) {
        if (id.tid < 40) {
            simt_barrier();
        }
    });
    expect(has(got, "divergence"), "a barrier for some", got);

    got = run_kernel([](ids id, auto, auto) {
        if (id.tid % 2 == 0) {
            simt_shuffle_xor(0.0f, 2);
        } else {
            simt_shuffle_xor(0.0f, 2);
        }
    });
    expect(has(got, "divergence"), "a shuffle for some", got);

    got = run_kernel([](ids, auto data, auto) { simt_load_u32x4(SIMT_CAST(const char, data) + 8); });
    expect(has(got, "not aligned"), "a load that is not aligned", got);

    // 64 threads read what 16 of them copy, without the wait or the barrier that they should come to first
    const auto copy = [](bool waits, bool meets, int n_commits, auto id, auto data, auto sh) {
        if (id.tid < 16) {
            simt_copy_async(SIMT_SHARED_CAST(simt_f16, sh) + 8*id.tid, SIMT_CAST(const char, data) + 16*id.tid);
        }
        simt_copy_commit();
        if (n_commits == 2) {
            simt_copy_commit();
        }
        if (waits) {
            simt_copy_wait<1>();
        }
        if (meets) {
            simt_barrier();
        }
        const float x = sh[63 - id.tid];
        if (!waits || n_commits == 1) {
            simt_copy_wait<0>();
        }
        simt_barrier();
        sh[id.tid] = x;
    };
    got = run_kernel([&](ids id, auto data, auto sh) { copy(true, true, 2, id, data, sh); });
    expect(got.empty(), "a copy that is waited for", got);
    got = run_kernel([&](ids id, auto data, auto sh) { copy(false, true, 2, id, data, sh); });
    expect(has(got, "on its way"), "a copy that nobody waits for", got);
    got = run_kernel([&](ids id, auto data, auto sh) { copy(true, true, 1, id, data, sh); });
    expect(has(got, "on its way"), "a wait for all but the last copies", got);
    got = run_kernel([&](ids id, auto data, auto sh) { copy(true, false, 2, id, data, sh); });
    expect(has(got, "nobody wrote") || has(got, "race") || has(got, "on its way"), "a wait without a barrier", got);

    got = run_kernel([](ids id, auto data, auto sh) {
        sh[id.tid] = data[id.tid];
        simt_barrier();
        simt_mma_a a;
        simt_mma_load_a(a, SIMT_SHARED_CAST(simt_f16, sh) + id.lane);
    });
    expect(has(got, "not aligned"), "rows of an operand that are not aligned", got);
}

// our kernels without one of their barriers, and with ranges that reach behind the pool
static void test_faults_of_our_kernels(const simt_device & device, ggml_backend_t backend) {
    printf("%s\n", device.name);
    const std::vector<ragged_case> cases = {
        { 64,  64,  GGML_TYPE_F16,  GGML_TYPE_F16,  3, 1,  { 700, 0, 33 }, 0.0f, false, true, 1 },
        { 128, 128, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 4, 20, { 300, 90 },    0.0f, true,  true, 1 },
        // several heads in a share, of every 24 blocks
        { 128, 128, GGML_TYPE_F16,  GGML_TYPE_F16,  4, 1,  std::vector<int64_t>(30, 90), 0.0f, false, true, 1 },
        { 72,  72,  GGML_TYPE_F32,  GGML_TYPE_F32,  4, 20, { 300, 90 },    0.0f, true,  true, 1 },
    };
    for (const auto & tc : cases) {
        rng.seed(1);
        ragged_graph g = build_graph(tc, backend);

        std::set<int> sites;
        const result right = compute(device, g, 1, [&](simt::machine & m) { m.skip_barrier = [&](int line) { sites.insert(line); return false; }; });
        expect(right.error.empty() && worst_nmse(tc, g, right.out) <= MAX_NMSE_GPU && sites.size() >= 2, "our kernel", right.error);

        for (const int site : sites) {
            const result res = compute(device, g, 1, [&](simt::machine & m) { m.skip_barrier = [=](int line) { return line == site; }; });
            const std::string what = "without the barrier in line " + std::to_string(site);
            expect(res.n_skipped > 0 && !res.error.empty(), what.c_str(), res.error);
        }

        if (device.extra(g.out) > 0) {
            const result res = compute(device, g, 1, [&](simt::machine & m) { m.skip_device_barriers = true; });
            expect(res.error.find("of the parts, which thread") != std::string::npos, "without the barrier between two kernels", res.error);
        }

        auto * range = (int32_t *) g.ranges->data + 2*tc.n_cells.size()*LAYER;
        range[0] = g.k->ne[1] - range[1] + 1;
        const result res = compute(device, g, 1);
        expect(res.error.find(" of k, which has ") != std::string::npos || res.error.find(" of v, which has ") != std::string::npos,
                "a range that ends behind the pool", res.error);
    }
}

//
// GGML_OP_RAGGED_SELECT
//

static std::vector<int32_t> compute_select(select_tensors & t, ggml_tensor * op, ggml_backend_t backend, uint32_t seed,
        const std::function<void(simt::machine &)> & prepare = {}) {
    ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors(t.ctx.get(), backend));
    simt::machine machine(seed);
    machine.add(op->data, ggml_nbytes(op), "the result");
    for (const auto & [tensor, values] : t.data) {
        memcpy(tensor->data, values.data(), ggml_nbytes(tensor));
        machine.add(tensor->data, ggml_nbytes(tensor), tensor->name);
    }
    if (prepare) {
        prepare(machine);
    }
    DEVICES[0].compute(machine, op);
    return { (int32_t *) op->data, (int32_t *) op->data + ggml_nelements(op) };
}

static bool test(const select_case & tc, ggml_backend_t backend) {
    std::string error;
    try {
        error = select_test(tc, [&](select_tensors & t, ggml_tensor * op) { return compute_select(t, op, backend, 1); }).check();
    } catch (const simt::failure & e) {
        error = e.what();
    }
    printf("  RAGGED_SELECT(%s): %s %s\n", tc.vars().c_str(), error.empty() ? "OK" : "FAIL", error.c_str());
    return error.empty();
}

// Without one of their barriers, or the one between two kernels, and with tables that reach behind the keys and the marks.
static void test_faults_of_select(ggml_backend_t backend) {
    const select_case tc = { { 1000, 300 }, 8, 3, 3, 4, 4, 1, 5, 1.0f };

    std::string error;
    const auto check = [&](const std::function<void(simt::machine &)> & prepare, const std::function<void(select_tensors &)> & spoil) {
        error = "";
        try {
            return select_test(tc, [&](select_tensors & t, ggml_tensor * op) {
                spoil(t);
                return compute_select(t, op, backend, 1, prepare);
            }).check();
        } catch (const simt::failure & e) {
            error = e.what();
        }
        return error;
    };
    const auto nothing = [](select_tensors &) {};

    std::set<int> sites;
    expect(check([&](simt::machine & m) { m.skip_barrier = [&](int line) { sites.insert(line); return false; }; }, nothing).empty() &&
            sites.size() >= 6, "selection", error);
    for (const int site : sites) {
        check([&](simt::machine & m) { m.skip_barrier = [=](int line) { return line == site; }; }, nothing);
        expect(!error.empty(), ("selection without the barrier in line " + std::to_string(site)).c_str(), error);
    }
    check([](simt::machine & m) { m.skip_device_barriers = true; }, nothing);
    expect(error.find("race: ") == 0, "selection without the barrier between two kernels", error);

    for (const auto column : { GGML_RAGGED_HEAD_KEYS, GGML_RAGGED_HEAD_WORDS }) {
        check({}, [column](select_tensors & t) {
            for (auto & [tensor, values] : t.data) {
                if (tensor->name == std::string("heads")) {
                    values[GGML_RAGGED_N_HEAD + column] += 33;
                }
            }
        });
        const char * what = column == GGML_RAGGED_HEAD_KEYS ? " of keys, which has " : ", which has ";
        expect(error.find(what) != std::string::npos, "a head behind the end", error);
    }
}

// A query with an element that is no number, or infinite: its result is NaN as a whole, whatever the keys are, and the others are right
static void test_queries_that_are_not_finite(const simt_device & device, ggml_backend_t backend) {
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (const float softcap : { 0.0f, 10.0f }) {
            for (const int i : { 0, 1, 2, 3 }) {
                const float x = i % 2 ? INFINITY : NAN;
                const ragged_case tc = { 64, 64, type, type, i < 2 ? 3 : 4, 1, { 300, 33 }, softcap, true, true, 1 };
                rng.seed(1);
                ragged_graph g = build_graph(tc, backend);
                result right = compute(device, g, 1);

                ((float *) g.q->data)[2*tc.hsk + 37] = x;
                result res = compute(device, g, 1);

                // a softcap makes infinite scores finite, as it should; products of whole numbers never were infinite
                const bool has_mma   = tc.n_gqa == 4 && device.name == std::string("CUDA");
                const bool is_finite = softcap != 0.0f && (type == GGML_TYPE_F16 || has_mma) && std::isinf(x);
                const auto row = res.out.begin() + 2*tc.hsv;
                const bool ok  = is_finite || std::all_of(row, row + tc.hsv, [](float y) { return std::isnan(y); });
                std::fill_n(row, tc.hsv, 0.0f);
                std::fill_n(right.out.begin() + 2*tc.hsv, tc.hsv, 0.0f);
                expect(ok && res.error.empty() && res.out == right.out, "a query that is not finite",
                        tc.vars() + " " + std::to_string(x) + res.error);
            }
        }
    }
}

//
// cost
//

// loads of a lane for its part of a row: 16 bytes of F16, words of values and the one with the scale
static int64_t n_loads_of(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:  return 1;
        case GGML_TYPE_Q8_0: return 3;
        case GGML_TYPE_Q4_0: return 2;
        default: GGML_ABORT("no bound for %s", ggml_type_name(type));
    }
}

// what a kernel for cells reads and how its turns come about: those of the texts
struct cost_shape {
    int64_t n_rows;    // of a block
    int64_t n_tile;    // cells of a turn
    int64_t n_parts;   // loads of a lane of a turn, of K and of V each, that are parts of rows
    int64_t n_rounds;  // waits of a turn
    int64_t n_barriers, n_barriers_head; // of a turn, and of a head
    int64_t n_queries; // loads of a lane for a head
    int64_t n_blocks_sm;
};

// flash-attn-ragged-vec.h
static cost_shape vec_shape(const ragged_case & tc) {
    const int64_t n_rows  = tc.n_gqa*tc.n_tokens == 3 ? 4 : tc.n_gqa*tc.n_tokens;
    const int64_t n_steps = n_rows > 4 ? 2 : 4;
    return { n_rows, 64/(tc.hsk/8)*n_steps*2, n_steps, 1, 0, 2*n_rows, (8 + 3)*n_rows, n_rows <= 2 ? 4 : n_rows <= 4 ? 3 : 2 };
}

// flash-attn-ragged-mma.h: 16 KiB of keys and of values in parts of 16 bytes for 128 threads, or half of that
static cost_shape mma_shape(const ragged_case & tc) {
    const int64_t n_all  = tc.n_gqa*tc.n_tokens;
    const int64_t n_rows = n_all <= 8 ? 8 : n_all <= 16 ? 16 : n_all <= 32 ? 32 : 64;
    const int64_t n_n    = n_rows > 16 ? 2 : 1; // products of 8 rows of a warp
    const int64_t n_kib  = n_rows > 32 ? 8 : 16;
    return { n_rows, 512*n_kib/tc.hsk, n_kib/2, 2, 2, 3, n_n*(tc.hsk/4 + 2) + 6, n_rows > 16 ? 2 : n_rows == 8 && tc.type_k == GGML_TYPE_F16 ? 4 : 3 };
}

// What tokens cost on a device of 132 multiprocessors, as in tests/gpu/README.md's measurements; what is far longer has more turns of
// the same loop. Bounds:
//   blocks                           what a device keeps in flight at a time: 4 to 2 of a multiprocessor, by their registers (CUDA),
//                                    2 of the largest device (Metal). More would wait for their turn, and write parts
//   rounds of the kernel for cells   a turn of the loop over tiles is a round with few rows. With products of matrices, whose turns have
//                                    as many cells as fit into 16 KiB, it is two, for keys and for values, which were loaded half a turn
//                                    or a turn before. 4 are for the table of heads, queries and the parts' ends, of every head of a share
//   loads of the kernel for cells    of a lane: those of a turn, which are independent, and for every head of a share those of queries
//                                    and of the table. Quantised rows read two bytes at a time take 5 loads where 3 and 2 are enough
//   barriers of it                   with few rows two a row and head of a share, none in the loop; with products two a turn, as slots
//                                    are full and free again, and three a head
//   rounds that combine parts        32 parts a round (4 warps, FATTN_N_PARTS_STEP each), and 4 for the table and the softmaxes.
//                                    A loop over all parts in every thread, 2 rounds a part, took 70 to 174 of 90 to 190 us
//   bytes read                       cells are read once: 2 % for rows whose first and last bytes share a word with others
//   bytes written                    every result once; a part for every row, block and head at most: a share ends in one head and
//                                    begins in another
static void test_cost_of(const simt_device & device, const ragged_case & tc, const cost_shape & shape, ggml_backend_t backend) {
    rng.seed(1);
    ragged_graph g   = build_graph(tc, backend);
    const result res = compute(device, g, 1);

    const bool cuda = device.name == std::string("CUDA");
    printf("%s %s\n", device.name, tc.vars().c_str());
    if (res.costs.size() != 2) {
        expect(false, "two kernels", res.error);
        return;
    }
    const simt::launch_cost & cells   = res.costs[0];
    const simt::launch_cost & combine = res.costs[1];

    int64_t n_cells = 0;
    for (const int64_t n : tc.n_cells) {
        n_cells += n;
    }
    const int64_t n_heads = tc.n_cells.size();
    const int64_t n_min   = shape.n_rounds > 1 ? (2*shape.n_rows + shape.n_tile - 1)/shape.n_tile : 1; // turns of a share: N_TILES_MIN
    const int64_t n_turns = std::max(n_min, (n_cells/shape.n_tile + n_heads + cells.n_blocks - 1)/cells.n_blocks + 1);
    const int64_t n_parts = *std::max_element(tc.n_cells.begin(), tc.n_cells.end())*cells.n_blocks/n_cells + 2;

    // heads that a share of so many turns reaches into
    int64_t n_heads_share = 1;
    for (int64_t ih = 0; ih < n_heads; ++ih) {
        int64_t n = 0, rest = n_turns - 1;
        for (int64_t i = ih; i < n_heads && rest > 0; ++i, ++n) {
            rest -= i == ih ? 1 : (tc.n_cells[i] + shape.n_tile - 1)/shape.n_tile;
        }
        n_heads_share = std::max(n_heads_share, n);
    }

    const auto at_most = [](const char * what, int64_t got, int64_t bound) {
        expect(got <= bound, what, std::to_string(got) + ", at most " + std::to_string(bound));
    };
    at_most("blocks", cells.n_blocks, cuda ? 132*shape.n_blocks_sm : 160);
    at_most("rounds over cells", cells.n_rounds, n_turns*shape.n_rounds + (shape.n_rounds > 1 ? 4*n_heads_share : 4));
    at_most("loads for cells", cells.n_loads,
            n_turns*shape.n_parts*(n_loads_of(tc.type_k) + n_loads_of(tc.type_v)) + n_heads_share*shape.n_queries + n_heads + 8);
    at_most("barriers over cells", cells.n_barriers, n_turns*shape.n_barriers + n_heads_share*shape.n_barriers_head);
    at_most("rounds over parts", combine.n_rounds, (n_parts + 31)/32 + 4);
    at_most("barriers of combine", combine.n_barriers, 1);
    for (const char * pool : { "k", "v" }) {
        const ggml_tensor * t = pool[0] == 'k' ? g.k : g.v;
        at_most(pool, cells.bytes_read.at(pool), n_cells*t->nb[1]*102/100);
    }
    const int64_t n_rows = tc.n_gqa*tc.n_tokens;
    at_most("bytes of results", cells.bytes_written.at("the result") + combine.bytes_written.at("the result"), n_heads*n_rows*tc.hsv*4);
    at_most("bytes of parts", cells.bytes_written.at(cuda ? "scratch" : "the parts"), (cells.n_blocks + n_heads)*n_rows*(tc.hsv + 2)*4);
}

// what the kernels without products in registers cost, those of a device of sm_70, beside those with
static void print_costs(const ragged_case & tc, ggml_backend_t backend) {
    for (const int cc : { 700, 800 }) {
        simt_cuda_cc = cc;
        rng.seed(1);
        ragged_graph g   = build_graph(tc, backend);
        const result res = compute(DEVICES[0], g, 1);
        if (res.costs.empty()) {
            expect(false, "costs", res.error);
            continue;
        }
        const simt::launch_cost & c = res.costs[0];
        printf("  %s: %d blocks, %d rounds, %d loads, %d barriers, %.1f MB of cells, %.2f MB of parts\n", cc == 700 ? "sm_70" : "sm_80", c.n_blocks,
                c.n_rounds, c.n_loads, c.n_barriers, (c.bytes_read.at("k") + c.bytes_read.at("v"))*1e-6,
                c.bytes_written.count("scratch") ? c.bytes_written.at("scratch")*1e-6 : 0.0);
    }
}

static void test_cost(ggml_backend_t backend) {
    const auto uniform = [](int64_t n_head_kv, int64_t n) { return std::vector<int64_t>(n_head_kv, n); };
    const std::vector<int64_t> ragged = { 8192, 200, 4096, 1, 12000, 2048, 6000, 231 };

    std::vector<ragged_case> cases;
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        cases.push_back({ 128, 128, type, type, 4, 1, uniform(8, 4096),  0.0f, false, true, 1 });
        cases.push_back({ 128, 128, type, type, 4, 1, ragged,            0.0f, false, true, 1 });
        cases.push_back({ 64,  64,  type, type, 3, 1, uniform(3, 16384), 0.0f, false, true, 1 });
    }
    cases.push_back({ 64,  64,  GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 3, 1, uniform(3, 491),  0.0f, false, true, 1 });
    cases.push_back({ 128, 128, GGML_TYPE_Q4_0, GGML_TYPE_Q4_0, 1, 1, uniform(40, 300), 0.0f, false, true, 1 });

    // what products in registers serve beside those
    std::vector<ragged_case> groups;
    groups.push_back({ 128, 128, GGML_TYPE_F16,  GGML_TYPE_F16,  4, 1, uniform(8, 16384), 0.0f, false, true, 1 });
    groups.push_back({ 128, 128, GGML_TYPE_F16,  GGML_TYPE_F16,  8, 8, uniform(4, 4096),  0.0f, false, true, 1 });
    groups.push_back({ 128, 128, GGML_TYPE_F16,  GGML_TYPE_F16,  4, 8, uniform(8, 4096),  0.0f, false, true, 1 });
    groups.push_back({ 128, 128, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 4, 8, ragged,            0.0f, false, true, 1 });
    groups.push_back({ 64,  64,  GGML_TYPE_F16,  GGML_TYPE_F16,  3, 8, uniform(3, 4096),  0.0f, false, true, 1 });

    const int n_sm = simt_cuda_n_sm;
    const int cc   = simt_cuda_cc;
    simt_cuda_n_sm = 132;
    for (const auto & tc : cases) {
        for (const simt_device & device : DEVICES) {
            const bool has_mma = device.name == std::string("CUDA") && tc.n_gqa*tc.n_tokens >= 4;
            test_cost_of(device, tc, has_mma ? mma_shape(tc) : vec_shape(tc), backend);
            if (has_mma) {
                print_costs(tc, backend);
            }
        }
    }
    for (const auto & tc : groups) {
        test_cost_of(DEVICES[0], tc, mma_shape(tc), backend);
        print_costs(tc, backend);
    }
    simt_cuda_n_sm = n_sm;
    simt_cuda_cc   = cc;
}

int main(int argc, char ** argv) {
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ); // who ends this has the lines so far

    std::string text;
    int  part = 0, n_parts = 1;
    bool faults = false;
    bool cost   = false;
    const simt_device * device = nullptr;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "faults") {
            faults = true;
        } else if (arg == "cost") {
            cost = true;
        } else if (arg == "cuda" || arg == "metal") {
            device = &DEVICES[arg == "metal"];
        } else if (arg == "-p" && i + 1 < argc) {
            text = argv[++i];
        } else if (arg == "--part" && i + 1 < argc && sscanf(argv[i + 1], "%d/%d", &part, &n_parts) == 2) {
            ++i;
        } else {
            device = nullptr;
            break;
        }
    }
    if (!device && !faults && !cost) {
        fprintf(stderr, "usage: %s cuda|metal [-p TEXT] [--part I/N]\n       %s faults|cost\n", argv[0], argv[0]);
        return 1;
    }

    ggml_backend_ptr backend(ggml_backend_cpu_init());
    if (faults) {
        test_faults_of_small_kernels();
        for (const auto & own : DEVICES) {
            test_faults_of_our_kernels(own, backend.get());
            test_queries_that_are_not_finite(own, backend.get());
        }
        test_faults_of_select(backend.get());
    }
    if (cost) {
        test_cost(backend.get());
    }
    if (faults || cost) {
        printf("%d failed\n", n_failed);
        return n_failed == 0 ? 0 : 1;
    }

    max_reference = 2e6;

    int n_tested  = 0;
    int n_refused = 0;
    int i         = 0;
    for (const auto & tc : make_test_cases(false)) {
        rng.seed(1);
        if (i++ % n_parts != part || tc.vars().find(text) == std::string::npos) {
            continue;
        }
        bool supported;
        n_failed  += !test(*device, tc, backend.get(), supported);
        n_refused += !supported;
        n_tested  += supported;
    }
    if (device == &DEVICES[0]) {
        for (const auto & tc : make_select_cases()) {
            if (i++ % n_parts == part && ("RAGGED_SELECT " + tc.vars()).find(text) != std::string::npos) {
                n_failed += !test(tc, backend.get());
                n_tested++;
            }
        }
    }
    printf("%d tested, %d failed, %d not supported\n", n_tested, n_failed, n_refused);
    return n_failed == 0 && n_tested > 0 ? 0 : 1;
}
