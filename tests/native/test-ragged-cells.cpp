// Tests of cells: where they are stored, how pools grow, which rows a compaction moves.

#include "test-ragged.h"

#include <algorithm>
#include <cmath>
#include <vector>

static void test_equals_stock(llama_model * model) {
    auto stock  = make(model, 0);
    auto ragged = make(model, 8);

    int p0 = 0;
    for (const int n : { 300, 1, 1, 77, 1 }) {
        const auto tokens = prompt(n, p0 + 1);
        CHECK(decode(stock.get(),  tokens, p0) == 0);
        CHECK(decode(ragged.get(), tokens, p0) == 0);
        CHECK(logits(stock.get()) == logits(ragged.get()));
        p0 += n;
    }
    CHECK(wkv_ready(ragged.get(), !no_ragged) == WKV_OK);
    CHECK(wkv_ready(stock.get(), false) == WKV_ERR_NO_POLICY);
    CHECK(wkv_compact(stock.get(), nullptr, 1) == WKV_ERR_NO_POLICY);
}

static void test_pools_grow_with_the_prompt(llama_model * model) {
    auto ctx = make(model, 8);

    const auto empty = stats(ctx.get());
    CHECK(empty.bytes_pool == 0);

    CHECK(wkv_reserve(ctx.get(), 300) == WKV_OK);
    const auto reserved = stats(ctx.get());
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(stats(ctx.get()).bytes_live == reserved.bytes_live);

    const int64_t cell = reserved.bytes_pool/512; // 300 cells are padded to 512 as the stock cache reads them
    CHECK(stats(ctx.get()).bytes_full == 300*cell);
    CHECK(reserved.bytes_live - reserved.bytes_pool == empty.bytes_live);

    CHECK(wkv_reserve(ctx.get(), -1) == WKV_ERR_ARGUMENT);
}

static void test_compaction_moves_the_right_rows(llama_model * model, const wkv_policy & policy, ggml_type type = GGML_TYPE_F16) {
    auto params = default_params();
    params.type_k = type;
    params.type_v = type;

    auto ctx = make(model, 8, params);
    CHECK(decode(ctx.get(), prompt(400), 0) == 0);

    const auto before = stats(ctx.get());

    std::vector<std::vector<float>> k;
    std::vector<std::vector<float>> v;
    for (int il = 0; il < before.n_layer; ++il) {
        for (int ih = 0; ih < before.n_head_kv; ++ih) {
            k.push_back(rows(ctx.get(), il, ih, 0));
            v.push_back(rows(ctx.get(), il, ih, 1));
        }
    }

    CHECK(wkv_compact(ctx.get(), &policy, 50) == int64_t(before.n_layer)*before.n_head_kv*(400 - 50));

    const auto after = stats(ctx.get());
    CHECK(after.n_boundary == 400);
    CHECK(after.n_compactions == 1);
    CHECK(after.bytes_released == before.bytes_live - after.bytes_live);
    // equal lengths are padded to 256 on a GPU, and CUDA lays up to 512 elements behind K and V if they are quantised, in steps of 128 bytes
    const int64_t n_behind = on_device && ggml_is_quantized(type) ? 2*before.n_layer*(ggml_row_size(type, 512) + 128) : 0;
    CHECK(after.bytes_pool <= before.bytes_pool/2 + n_behind);
    CHECK(after.bytes_live < (on_device ? before.bytes_live : before.bytes_live/2));
    CHECK(after.bytes_peak >= before.bytes_live);

    for (int il = 0; il < before.n_layer; ++il) {
        for (int ih = 0; ih < before.n_head_kv; ++ih) {
            const auto pos = positions(ctx.get(), il, ih);
            const auto k1  = rows(ctx.get(), il, ih, 0);
            const auto v1  = rows(ctx.get(), il, ih, 1);

            const auto & k0 = k[il*before.n_head_kv + ih];
            const auto & v0 = v[il*before.n_head_kv + ih];

            const size_t dk = k0.size()/400;
            const size_t dv = v0.size()/400;
            CHECK(k1.size() == pos.size()*dk);
            for (size_t i = 0; i < pos.size(); ++i) {
                CHECK(i == 0 || pos[i] > pos[i - 1]);
                CHECK(std::equal(k1.begin() + i*dk, k1.begin() + (i + 1)*dk, k0.begin() + pos[i]*dk));
                CHECK(std::equal(v1.begin() + i*dv, v1.begin() + (i + 1)*dv, v0.begin() + pos[i]*dv));
            }
        }
    }

    // goes on, over several growth steps, and compacts again
    for (int i = 0; i < 100; ++i) {
        CHECK(decode(ctx.get(), prompt(1, i), 400 + i) == 0);
        for (const float x : logits(ctx.get())) {
            CHECK(std::isfinite(x));
        }
    }
    CHECK(wkv_compact(ctx.get(), &policy, 60) > 0);
    CHECK(decode(ctx.get(), prompt(40), 500) == 0);
    CHECK(stats(ctx.get()).n_past == 540);
    CHECK(wkv_compact(ctx.get(), &policy, 100000) == 0); // nothing to evict
    CHECK(stats(ctx.get()).n_compactions == 2);
}

// a policy whose heads differ
static void test_ragged_compaction(llama_model * model, const wkv_policy & policy, ggml_type type) {
    if (!no_ragged) {
        test_compaction_moves_the_right_rows(model, policy, type);
        return;
    }
    auto params = default_params();
    params.type_k = type;
    params.type_v = type;

    auto ctx = make(model, 8, params);
    CHECK(decode(ctx.get(), prompt(400), 0) == 0);
    CHECK(wkv_ready(ctx.get(), true) != WKV_OK);
    CHECK(wkv_compact(ctx.get(), &policy, 50) == WKV_ERR_UNSUPPORTED);
    CHECK(last_error_has("no attention over heads of different lengths"));
    CHECK(positions(ctx.get(), 0, 0).size() == 400);
    CHECK(decode(ctx.get(), prompt(1), 400) == 0);
}

// Layers and heads of distinct lengths that stock attention serves look at columns of one mask: layers in large batches, heads of a
// device, which are attended one by one, in all.
static void test_distinct_lengths(llama_model * model, const wkv_policy & policy) {
    std::vector<float> want;
    for (const int attention : { WKV_ATTENTION_STOCK, WKV_ATTENTION_RAGGED }) {
        if (attention == WKV_ATTENTION_RAGGED && no_ragged) {
            continue;
        }
        auto ctx = make(model, 8);
        CHECK(decode(ctx.get(), prompt(400), 0) == 0);
        CHECK(wkv_compact(ctx.get(), &policy, 60) > 0);
        CHECK(wkv_set_attention(ctx.get(), attention) == WKV_OK);

        std::vector<float> got;
        int p0 = 400;
        for (const int n : { 3, 100, 100, 1, 260 }) {
            CHECK(decode(ctx.get(), prompt(n, n), p0) == 0);
            p0 += n;
            const auto cur = logits(ctx.get());
            got.insert(got.end(), cur.begin(), cur.end());
        }
        for (size_t i = 0; i < want.size(); ++i) {
            CHECK(std::fabs(got[i] - want[i]) <= 2e-2f*(1.0f + std::fabs(want[i])));
        }
        want = got;
    }
}

static void test_cells_f32(llama_model * model) {
    auto params = default_params();
    params.type_k = GGML_TYPE_F32;
    params.type_v = GGML_TYPE_F32;
    auto stock  = make(model, 0, params);
    auto ragged = make(model, 8, params);

    CHECK(decode(stock.get(),  prompt(300), 0) == 0);
    CHECK(decode(ragged.get(), prompt(300), 0) == 0);
    CHECK(logits(stock.get()) == logits(ragged.get()));

    const auto policy = windowkv();
    CHECK(wkv_compact(ragged.get(), &policy, 50) > 0);
    CHECK(decode(ragged.get(), prompt(1), 300) == 0);
}

static void test_fill(llama_model * model) {
    const auto policy = no_ragged ? pyramidkv() : adakv();
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        auto params = default_params();
        params.type_k = type;
        params.type_v = type;
        for (const int window : { 0, 8 }) {
            auto ctx = make(model, window, params);
            CHECK(wkv_fill(ctx.get(), 0)    == WKV_ERR_ARGUMENT);
            CHECK(wkv_fill(ctx.get(), 1025) == WKV_ERR_ARGUMENT);
            CHECK(wkv_fill(ctx.get(), 700)  == WKV_OK);
            CHECK(wkv_fill(ctx.get(), 1)    == WKV_ERR_ARGUMENT);
            CHECK(stats(ctx.get()).n_past == 700);
            if (window > 0) {
                CHECK(wkv_compact(ctx.get(), &policy, 60) > 0);
            }
            CHECK(decode(ctx.get(), prompt(3), 700) == 0);
            for (const float x : logits(ctx.get())) {
                CHECK(std::isfinite(x));
            }
        }
    }
    CHECK(wkv_fill(nullptr, 1) == WKV_ERR_ARGUMENT);
}

void test_cells(llama_model * model) {
    test_equals_stock(model);
    test_pools_grow_with_the_prompt(model);
    test_compaction_moves_the_right_rows(model, windowkv());
    test_compaction_moves_the_right_rows(model, pyramidkv());

    const auto shape = stats(make(model, 8).get());
    std::vector<double> importance(shape.n_layer*shape.n_head_kv);
    for (size_t i = 0; i < importance.size(); ++i) {
        importance[i] = 1.0/(1 + i);
    }
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        test_ragged_compaction(model, adakv(), type);
        test_ragged_compaction(model, windowkv_headkv(importance), type);
        test_compaction_moves_the_right_rows(model, windowkv(), type);
    }

    test_distinct_lengths(model, pyramidkv());
    if (!no_ragged) {
        test_distinct_lengths(model, adakv());
        test_distinct_lengths(model, windowkv_headkv(importance));
    }
    test_cells_f32(model);
    test_fill(model);
}
