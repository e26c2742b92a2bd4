// Tests of the context shift: what stays, where it is then, what is refused, and that upstream's own two calls do the same.

#include "test-ragged.h"

#include "ggml.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

using positions_list = std::vector<std::vector<int32_t>>;

static positions_list all_positions(llama_context * ctx) {
    positions_list res;
    const auto own = stats(ctx);
    for (int il = 0; il < own.n_layer; ++il) {
        for (int ih = 0; ih < own.n_head_kv; ++ih) {
            res.push_back(positions(ctx, il, ih));
        }
    }
    return res;
}

// what is left of positions, as a plain list
static std::vector<int32_t> closed(const std::vector<int32_t> & list, int p0, int n) {
    std::vector<int32_t> res;
    for (const int32_t p : list) {
        if (p < p0 || p >= p0 + n) {
            res.push_back(p < p0 ? p : p - n);
        }
    }
    return res;
}

// a row at a position n before its own: pairs of neighbours turn by one angle each (LLaMA's RoPE, arXiv 2104.09864, eq. 34)
static std::vector<float> turned(const float * row, int n_embd, int n) {
    std::vector<float> res(n_embd);
    for (int i = 0; i < n_embd; i += 2) {
        const double theta = -n*std::pow(10000.0, -double(i)/n_embd);
        res[i + 0] = row[i]*std::cos(theta) - row[i + 1]*std::sin(theta);
        res[i + 1] = row[i]*std::sin(theta) + row[i + 1]*std::cos(theta);
    }
    return res;
}

static std::vector<uint8_t> state(llama_context * ctx) {
    std::vector<uint8_t> res(llama_state_seq_get_size(ctx, 0));
    CHECK(!res.empty() && llama_state_seq_get_data(ctx, res.data(), res.size(), 0) == res.size());
    return res;
}

static context_ptr evaluated(llama_model * model, ggml_type type, int n_compact, const wkv_policy & policy) {
    auto params = default_params();
    params.type_k = params.type_v = type;
    auto ctx = make(model, 8, params);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    if (n_compact > 0) {
        CHECK(wkv_compact(ctx.get(), &policy, n_compact) > 0);
    }
    CHECK(decode(ctx.get(), prompt(20, 3), 300) == 0);
    return ctx;
}

// rows against those before
static void check_rows(llama_context * ctx, int il, int ih, const std::vector<int32_t> & pos, const std::vector<float> & k,
                       const std::vector<float> & v, int p0, int n, float tolerance) {
    const auto   got_k    = rows(ctx, il, ih, 0);
    const auto   got_v    = rows(ctx, il, ih, 1);
    const size_t n_embd_k = k.size()/pos.size();
    const size_t n_embd_v = v.size()/pos.size();

    size_t j = 0;
    float  largest = 0.0f;
    for (size_t i = 0; i < pos.size(); ++i) {
        if (pos[i] >= p0 && pos[i] < p0 + n) {
            continue;
        }
        CHECK(std::equal(v.begin() + i*n_embd_v, v.begin() + (i + 1)*n_embd_v, got_v.begin() + j*n_embd_v));
        if (pos[i] < p0) {
            CHECK(std::equal(k.begin() + i*n_embd_k, k.begin() + (i + 1)*n_embd_k, got_k.begin() + j*n_embd_k));
        } else {
            const auto want = turned(k.data() + i*n_embd_k, n_embd_k, n);
            for (size_t c = 0; c < n_embd_k; ++c) {
                largest = std::max(largest, std::abs(want[c] - got_k[j*n_embd_k + c]));
            }
        }
        ++j;
    }
    CHECK(got_k.size() == j*n_embd_k && got_v.size() == j*n_embd_v);
    if (largest >= tolerance) {
        std::fprintf(stderr, "keys are off by %g, %g is allowed\n", largest, tolerance);
    }
    CHECK(largest < tolerance);
}

static void test_cells_move(llama_model * model) {
    const auto ragged  = no_ragged ? snapkv() : adakv();
    const struct { int p0, n; } holes[] = { { 4, 150 }, { 0, 1 }, { 0, 310 }, { 250, 60 }, { 305, 10 }, { 4, 315 } };

    for (const auto type : { GGML_TYPE_F32, GGML_TYPE_F16 }) {
        for (const int n_compact : { 0, 60 }) {
            for (const auto & hole : holes) {
                if (no_ragged && n_compact > 0) {
                    continue; // heads would differ
                }
                auto ctx = evaluated(model, type, n_compact, ragged);
                const auto own    = stats(ctx.get());
                const auto before = all_positions(ctx.get());

                std::vector<std::vector<float>> k, v;
                for (int il = 0; il < own.n_layer; ++il) {
                    for (int ih = 0; ih < own.n_head_kv; ++ih) {
                        k.push_back(rows(ctx.get(), il, ih, 0));
                        v.push_back(rows(ctx.get(), il, ih, 1));
                    }
                }
                CHECK(wkv_shift(ctx.get(), hole.p0, hole.n) == WKV_OK);
                CHECK(stats(ctx.get()).n_past == 320 - hole.n);
                CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx.get()), 0) == 319 - hole.n);
                for (int il = 0; il < own.n_layer; ++il) {
                    for (int ih = 0; ih < own.n_head_kv; ++ih) {
                        const size_t i = il*own.n_head_kv + ih;
                        CHECK(positions(ctx.get(), il, ih) == closed(before[i], hole.p0, hole.n));
                        // f16: 11 bits of values below 8, rounded twice; CUDA's cosines are fast ones, of up to 315 radians
                        const float tolerance = type == GGML_TYPE_F16 ? 8e-3f : on_device ? 4e-3f : 1e-4f;
                        check_rows(ctx.get(), il, ih, before[i], k[i], v[i], hole.p0, hole.n, tolerance);
                    }
                }
                // what was compacted stays what cannot be taken back, and no more
                CHECK(wkv_get_removable(ctx.get()) >= 1 && wkv_get_removable(ctx.get()) <= std::max(1, stats(ctx.get()).n_boundary));
                CHECK(decode(ctx.get(), prompt(7, 4), 320 - hole.n) == 0);
                CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 320 - hole.n, -1));
            }
        }
    }
}

// upstream's two calls; what goes on from a saved state
static void test_upstreams_calls(llama_model * model) {
    for (const auto type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const int n_compact : { 0, 60 }) {
            if (no_ragged && n_compact > 0) {
                continue;
            }
            auto ours   = evaluated(model, type, n_compact, adakv());
            auto theirs = evaluated(model, type, n_compact, adakv());
            CHECK(state(ours.get()) == state(theirs.get()));

            llama_memory_t mem = llama_get_memory(theirs.get());
            CHECK(llama_memory_can_shift(mem) && wkv_can_shift(theirs.get()) == 1);
            CHECK(wkv_shift(ours.get(), 4, 100) == WKV_OK);
            CHECK(llama_memory_seq_rm(mem, 0, 4, 104));
            llama_memory_seq_add(mem, 0, 104, -1, -100);
            const auto saved = state(ours.get());
            CHECK(saved == state(theirs.get()));

            auto next = default_params();
            next.type_k = next.type_v = type;
            auto loaded = make(model, 8, next);
            CHECK(llama_state_seq_set_data(loaded.get(), saved.data(), saved.size(), 0) == saved.size());
            for (int i = 0; i < 3; ++i) {
                for (auto * ctx : { ours.get(), theirs.get(), loaded.get() }) {
                    CHECK(decode(ctx, prompt(1, i), 220 + i) == 0);
                }
                CHECK(logits(ours.get()) == logits(theirs.get()));
                CHECK(on_device || logits(ours.get()) == logits(loaded.get()));
            }
            if (!no_ragged) {
                const auto policy = adakv();
                for (auto * ctx : { ours.get(), theirs.get(), loaded.get() }) {
                    CHECK(wkv_compact(ctx, &policy, 30) > 0);
                }
                CHECK(all_positions(ours.get()) == all_positions(theirs.get()));
                CHECK(on_device || all_positions(ours.get()) == all_positions(loaded.get()));
            }
        }
    }
}

// between the two calls
static void test_an_open_hole(llama_model * model) {
    auto ctx = evaluated(model, GGML_TYPE_F16, 0, snapkv());
    llama_memory_t mem = llama_get_memory(ctx.get());
    const auto policy = snapkv();
    const auto before = all_positions(ctx.get());

    CHECK(llama_memory_seq_rm(mem, 0, 10, 30));
    CHECK(decode(ctx.get(), prompt(1), 320) != 0);
    CHECK(last_error_has("llama_memory_seq_add(mem, 0, 30, -1, -20)"));
    CHECK(wkv_compact(ctx.get(), &policy, 40) == WKV_ERR_ARGUMENT);
    CHECK(wkv_shift(ctx.get(), 40, 10) == WKV_ERR_ARGUMENT);
    CHECK(wkv_snapshot_save(ctx.get()) == WKV_ERR_ARGUMENT);
    CHECK(wkv_observe_begin(ctx.get()) == WKV_ERR_ARGUMENT);
    CHECK(llama_state_seq_get_size(ctx.get(), 0) == 0);
    CHECK(!llama_memory_seq_rm(mem, 0, 50, 60)); // a second one
    for (const auto & [p0, p1, shift] : { std::array<int, 3> { 30, -1, -10 }, { 30, 100, -20 }, { 31, -1, -20 }, { 9, -1, -20 }, { 30, -1, 20 } }) {
        llama_memory_seq_add(mem, 0, p0, p1, shift);
        CHECK(last_error_has("cannot be moved"));
    }
    CHECK(all_positions(ctx.get()) == before);

    llama_memory_seq_add(mem, 0, 30, 320, -20); // as llama.cpp's server says it
    CHECK(stats(ctx.get()).n_past == 300);
    CHECK(decode(ctx.get(), prompt(1), 300) == 0);

    // a tail that begins inside of the hole takes it along, one behind it leaves it
    CHECK(llama_memory_seq_rm(mem, 0, 10, 30));
    CHECK(llama_memory_seq_rm(mem, 0, 200, -1));
    CHECK(decode(ctx.get(), prompt(1), 200) != 0);
    CHECK(llama_memory_seq_rm(mem, 0, 20, -1));
    CHECK(stats(ctx.get()).n_past == 10);
    CHECK(decode(ctx.get(), prompt(5), 10) == 0);

    CHECK(llama_memory_seq_rm(mem, 0, 0, 4));
    CHECK(llama_memory_seq_rm(mem, 0, 2, -1)); // all that is left
    CHECK(stats(ctx.get()).n_past == 0);
    CHECK(decode(ctx.get(), prompt(5), 0) == 0);
    CHECK(llama_memory_seq_rm(mem, 0, 0, 4));
    llama_memory_clear(mem, true);
    CHECK(decode(ctx.get(), prompt(5), 0) == 0);
}

static void test_what_is_refused(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(wkv_shift(ctx.get(), 0, 1) == WKV_ERR_ARGUMENT);
    CHECK(decode(ctx.get(), prompt(50), 0) == 0);
    for (const auto & [p0, n] : { std::pair<int, int> { -1, 5 }, { 0, 0 }, { 0, 50 }, { 49, 1 }, { 10, 40 }, { 10, -1 }, { 60, 5 },
            { 1, INT32_MAX }, { INT32_MAX, INT32_MAX } }) {
        CHECK(wkv_shift(ctx.get(), p0, n) == WKV_ERR_ARGUMENT);
        CHECK(last_error_has("are to be given up"));
    }
    CHECK(wkv_observe_begin(ctx.get()) == WKV_OK);
    CHECK(decode(ctx.get(), prompt(4), 50) == 0);
    CHECK(wkv_shift(ctx.get(), 4, 10) == WKV_ERR_ARGUMENT);
    CHECK(!llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 4, 14));
    CHECK(wkv_observe_end(ctx.get()) == 1);
    CHECK(wkv_observe_end(ctx.get()) == 0);
    CHECK(decode(ctx.get(), prompt(1), 50) == 0);
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 50, -1));
    CHECK(stats(ctx.get()).n_past == 50);

    auto stock = make(model, 0);
    CHECK(wkv_shift(stock.get(), 0, 1) == WKV_ERR_NO_POLICY && wkv_can_shift(stock.get()) == WKV_ERR_NO_POLICY);
}

// Keys and queries turned by the same angle attend as before: what is left shares out the attention of what went
static void test_queries_move(llama_model * model) {
    for (const auto type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        auto ctx = evaluated(model, type, 0, snapkv());
        const int n = 200;

        const auto weights = [&] {
            std::vector<float> res(1 << 16);
            const int64_t n_weights = wkv_get_attention(ctx.get(), 0, res.data(), res.size());
            CHECK(n_weights > 0);
            res.resize(n_weights);
            return res;
        };
        const auto before = weights();
        const auto at     = observed(ctx.get());
        CHECK(wkv_shift(ctx.get(), 0, n) == WKV_OK);
        const auto after = weights();
        CHECK(observed(ctx.get()) == closed(at, 0, n));

        float largest = 0.0f;
        for (size_t ir = 0; ir < before.size()/320; ++ir) {
            const float * own = before.data() + ir*320 + n;
            float sum = 0.0f;
            for (int i = 0; i < 320 - n; ++i) {
                sum += own[i];
            }
            for (int i = 0; i < 320 - n; ++i) {
                largest = std::max(largest, std::abs(after[ir*(320 - n) + i] - own[i]/sum));
            }
        }
        CHECK(largest < (type == GGML_TYPE_F16 ? 2e-4f : 5e-3f));
    }
}

// a snapshot is a state of its own
static void test_snapshot_before(llama_model * model) {
    auto ctx = evaluated(model, GGML_TYPE_F16, 0, snapkv());
    const auto before = state(ctx.get());
    CHECK(wkv_snapshot_save(ctx.get()) == WKV_OK);
    CHECK(wkv_shift(ctx.get(), 4, 100) == WKV_OK);
    CHECK(wkv_snapshot_restore(ctx.get()) == WKV_OK);
    CHECK(state(ctx.get()) == before);
    CHECK(decode(ctx.get(), prompt(1), 320) == 0);
}

static int keep_first(void *, const wkv_shapes * shapes, int64_t n_cells, const int32_t *, const float *, uint8_t * keep) {
    for (int i = 0; i < shapes->n_layer*shapes->n_head_kv; ++i) {
        std::fill(keep, keep + n_cells, 1);
        keep += shapes->cells[i];
    }
    return 0;
}

// all that a head held is given up
static void test_heads_without_a_cell(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(wkv_compact_custom(ctx.get(), 0, 30, keep_first, nullptr) > 0);
    CHECK(wkv_shift(ctx.get(), 0, 100) == WKV_OK);
    CHECK(positions(ctx.get(), 0, 0).empty());

    const auto policy = snapkv();
    CHECK(wkv_compact(ctx.get(), &policy, 10) == 0);
    const auto saved = state(ctx.get());
    CHECK(llama_state_seq_set_data(ctx.get(), saved.data(), saved.size(), 0) == saved.size());
    CHECK(decode(ctx.get(), prompt(40), 200) == 0);
    CHECK(wkv_compact(ctx.get(), &policy, 10) > 0);
    CHECK(positions(ctx.get(), 0, 0).size() == 10);
    CHECK(wkv_shift(ctx.get(), 0, 100) == WKV_OK);
    CHECK(decode(ctx.get(), prompt(1), 140) == 0);
}

static void test_memory(llama_model * model) {
    auto ctx = evaluated(model, GGML_TYPE_F16, 0, snapkv());
    const auto before = stats(ctx.get());
    CHECK(wkv_shift(ctx.get(), 4, 100) == WKV_OK);
    const auto after = stats(ctx.get());
    CHECK(after.bytes_live == before.bytes_live); // rows for what comes
    CHECK(after.bytes_peak - before.bytes_live <= std::max(before.bytes_peak - before.bytes_live, before.bytes_pool/before.n_layer));
}

void test_shift(llama_model * model) {
    test_cells_move(model);
    test_upstreams_calls(model);
    test_an_open_hole(model);
    test_what_is_refused(model);
    test_queries_move(model);
    test_snapshot_before(model);
    test_heads_without_a_cell(model);
    test_memory(model);
}
