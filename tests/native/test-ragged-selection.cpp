// Tests of selections of the caller's, and what is refused.

#include "test-ragged.h"

#include <cstring>
#include <numeric>
#include <vector>

// everything that changes the cache is refused while a selection looks at it
static int meddle(void * user, const wkv_shapes *, int64_t, const int32_t *, const float *, uint8_t *) {
    auto * ctx = static_cast<llama_context *>(user);
    llama_memory_t mem = llama_get_memory(ctx);

    const auto before = stats(ctx);
    const auto policy = windowkv();
    CHECK(wkv_compact(ctx, &policy, 10) == WKV_ERR_ARGUMENT);
    CHECK(last_error_has("a selection is running"));
    CHECK(wkv_compact_custom(ctx, 8, 10, meddle, user) == WKV_ERR_ARGUMENT);
    for (const int status : { wkv_reserve(ctx, 500), wkv_set_observed(ctx, 4), wkv_set_attention(ctx, WKV_ATTENTION_STOCK),
            wkv_prompt_done(ctx), wkv_on_prompt(ctx, nullptr, nullptr), wkv_fill(ctx, 10),
            wkv_snapshot_save(ctx), wkv_snapshot_restore(ctx), wkv_snapshot_drop(ctx) }) {
        CHECK(status == WKV_ERR_ARGUMENT);
    }
    CHECK(last_error_has("a selection is running"));
    CHECK(decode(ctx, prompt(1), before.n_past) == 1);
    CHECK(last_error_has("a selection is running"));
    CHECK(!llama_memory_seq_rm(mem, 0, before.n_past - 1, -1));
    CHECK(!llama_memory_seq_rm(mem, -1, 0, -1));
    llama_memory_clear(mem, true);
    llama_memory_seq_keep(mem, 3);
    llama_memory_seq_cp  (mem, 0, 1, -1, -1);
    llama_memory_seq_add (mem, 0, 0, -1, 1);
    llama_memory_seq_div (mem, 0, 0, -1, 2);

    const std::vector<uint8_t> state(64, 0);
    CHECK(llama_state_set_data    (ctx, state.data(), state.size()) == 0);
    CHECK(llama_state_seq_set_data(ctx, state.data(), state.size(), 0) == 0);
    CHECK(llama_memory_seq_pos_max(mem, 0) == before.n_past - 1);
    CHECK(stats(ctx).n_past == before.n_past && stats(ctx).bytes_pool == before.bytes_pool);
    return 1;
}

static void test_selections_cannot_meddle(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(wkv_compact_custom(ctx.get(), 8, 40, meddle, ctx.get()) == WKV_ERR_ARGUMENT);
    CHECK(last_error_has("given up"));
    CHECK(positions(ctx.get(), 0, 0).size() == 300);
    CHECK(decode(ctx.get(), prompt(1), 300) == 0);

    // nor where there is nothing yet
    auto empty = make(model, 8);
    const auto fill = [](void * user, const wkv_shapes *, int64_t, const int32_t *, const float *, uint8_t *) {
        CHECK(wkv_fill(static_cast<llama_context *>(user), 10) == WKV_ERR_ARGUMENT);
        return 0;
    };
    wkv_compact_custom(empty.get(), 0, 40, fill, empty.get());
    CHECK(stats(empty.get()).n_past == 0);
}

// keeps the last cells of every head; user is how many
static int keep_last(void * user, const wkv_shapes * shapes, int64_t n_cells, const int32_t * positions, const float * scores, uint8_t * keep) {
    const int n_keep = *static_cast<const int *>(user);
    CHECK(n_cells == 40);

    for (int i = 0; i < shapes->n_layer*shapes->n_head_kv; ++i) {
        const int n = shapes->cells[i];
        float total = 0.0f;
        for (int j = 0; j < n; ++j) {
            CHECK(keep[j] == 0);
            CHECK(j == 0 || positions[j] > positions[j - 1]);
            total += scores[j];
            keep[j] = j >= n - n_keep;
        }
        CHECK(total > 0.99f && total < 1.01f);
        positions += n;
        scores    += n;
        keep      += n;
    }
    return n_keep < 0;
}

static void test_custom_selection(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);

    // nothing is evicted by a selection that is given up, empty, or too large
    for (const auto & [n_keep, message] : { std::make_pair(-1, "given up"), { 0, "no cell of layer 0, kv head 0" }, { 41, "expected at most" } }) {
        int n = n_keep;
        CHECK(wkv_compact_custom(ctx.get(), 8, 40, keep_last, &n) == WKV_ERR_ARGUMENT);
        CHECK(last_error_has(message));
        CHECK(positions(ctx.get(), 0, 0).size() == 300);
    }
    int n = 40;
    CHECK(wkv_compact_custom(ctx.get(), 9, 40, keep_last, &n) == WKV_ERR_ARGUMENT);
    CHECK(last_error_has("8 queries are held"));
    CHECK(wkv_compact_custom(ctx.get(), 8, 0, keep_last, &n) == WKV_ERR_ARGUMENT);
    CHECK(wkv_compact_custom(ctx.get(), 8, 40, nullptr, &n) == WKV_ERR_ARGUMENT);

    CHECK(wkv_compact_custom(ctx.get(), 8, 40, keep_last, &n) == int64_t(260)*stats(ctx.get()).n_layer*stats(ctx.get()).n_head_kv);
    CHECK(positions(ctx.get(), 0, 0).front() == 260);
    CHECK(positions(ctx.get(), 0, 0).size() == 40);
    CHECK(decode(ctx.get(), prompt(20, 4), 300) == 0);
}

static void test_refusals(llama_model * model) {
    {
        auto params = default_params();
        params.n_seq_max = 2;
        CHECK(!make(model, 8, params));
        CHECK(last_error_has("n_seq_max is 2, expected 1"));
    }
    for (const ggml_type type : { GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1 }) {
        auto params = default_params();
        params.type_k = type;
        CHECK(!make(model, 8, params));
        CHECK(last_error_has("expected f32, f16, bf16, q8_0 or q4_0"));
    }
    for (const auto type : { LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_AUTO }) {
        auto params = default_params();
        params.flash_attn_type = type;
        CHECK(!make(model, 8, params));
        CHECK(last_error_has("flash attention has to be enabled"));
    }
    {
        auto params = default_params();
        params.attention_type = LLAMA_ATTENTION_TYPE_NON_CAUSAL;
        CHECK(!make(model, 8, params));
        CHECK(last_error_has("non-causal"));
    }

    CHECK(wkv_pending_set(0, -1) == WKV_ERR_ARGUMENT);
    {
        auto all = make(model, 1000000); // no more than there are positions
        CHECK(stats(all.get()).n_observed == 1024);
        CHECK(decode(all.get(), prompt(300), 0) == 0);
        CHECK(scores(all.get(), 1000000) == scores(all.get(), 300));
        auto wide = windowkv();
        wide.scoring.window_size = 1000000;
        CHECK(wkv_compact(all.get(), &wide, 40) > 0);
    }
    CHECK(wkv_pending_set(8, 1000) == WKV_ERR_ARGUMENT);

    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(100), 0) == 0);

    auto policy = windowkv();
    CHECK(wkv_compact(ctx.get(), &policy, 0) == WKV_ERR_ARGUMENT);
    CHECK(last_error_has("expected at least 1"));
    CHECK(wkv_compact(ctx.get(), nullptr, 10) == WKV_ERR_ARGUMENT);
    policy.scoring.window_size = policy.selection.n_recent = 9;
    CHECK(wkv_compact(ctx.get(), &policy, 10) == WKV_ERR_ARGUMENT);
    CHECK(last_error_has("8 queries are held"));
    policy.selection.omega = 0;
    CHECK(wkv_compact(ctx.get(), &policy, 10) == WKV_ERR_ARGUMENT);
    CHECK(stats(ctx.get()).n_compactions == 0);

    int32_t pos[4];
    float   out[4];
    CHECK(wkv_get_positions(ctx.get(), 99, 0, pos, 4) == WKV_ERR_ARGUMENT);
    CHECK(wkv_get_positions(ctx.get(), 0, 99, pos, 4) < 0);
    CHECK(wkv_get_positions(ctx.get(), 0, 0, pos, 4) == 100); // says how many there are, writes four
    CHECK(wkv_get_rows(ctx.get(), 0, 0, 0, out, 4) < 0);
    CHECK(wkv_get_stats(nullptr, nullptr) < 0);

    // non-causal later on
    llama_set_causal_attn(ctx.get(), false);
    CHECK(decode(ctx.get(), prompt(1), 100) != 0);
    llama_set_causal_attn(ctx.get(), true);
    CHECK(decode(ctx.get(), prompt(1), 100) == 0);

    // what is observed can be resized; it is forgotten, so a prompt has to come first
    CHECK(wkv_set_observed(ctx.get(), 16) == WKV_OK);
    policy = windowkv();
    CHECK(wkv_compact(ctx.get(), &policy, 10) == WKV_ERR_COMPUTE);
    CHECK(last_error_has("evaluate a prompt first"));
    CHECK(decode(ctx.get(), prompt(20), 101) == 0);
    CHECK(wkv_compact(ctx.get(), &policy, 10) > 0);
    CHECK(wkv_set_observed(ctx.get(), 0) == WKV_ERR_ARGUMENT);

    // a budget beyond all cells evicts nothing, however large, and whoever selects
    CHECK(wkv_compact(ctx.get(), &policy, INT64_MAX) == 0);
    policy = adakv();
    CHECK(no_ragged || wkv_compact(ctx.get(), &policy, INT64_MAX) == 0);
    const auto all = [](void *, const wkv_shapes * shapes, int64_t, const int32_t *, const float *, uint8_t * keep) {
        memset(keep, 1, std::accumulate(shapes->cells, shapes->cells + shapes->n_layer*shapes->n_head_kv, 0));
        return 0;
    };
    CHECK(wkv_compact_custom(ctx.get(), 8, INT64_MAX, all, nullptr) == 0);

    CHECK(wkv_get_queries(ctx.get(), 0, 0, rows(ctx.get(), 0, 0, 0).data(), 1, pos, 4) == WKV_ERR_ARGUMENT);
    std::vector<float> queries(1 << 16);
    CHECK(wkv_get_queries(ctx.get(), 0, 0, queries.data(), queries.size(), pos, 4) == WKV_ERR_ARGUMENT); // 16 are observed
}

void test_selection(llama_model * model) {
    test_selections_cannot_meddle(model);
    test_custom_selection(model);
    test_refusals(model);
}
