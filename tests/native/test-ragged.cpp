// The ragged cache through its public interfaces, and its scores by themselves, run under the sanitizers on a tiny model with random weights.
//
//   test-ragged MODEL.gguf [LAYERS_ON_THE_GPU [uniform]]
//
// uniform: the GPU has no attention over heads of different lengths.
// GGML_BACKEND_PATH names a library with one more backend.

#include "llama-context.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"

#include "ggml-backend.h"
#include "llama.h"
#include "windowkv.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

static int  n_failed  = 0;
static bool on_device = false; // a GPU holds layers
static bool no_ragged = false; // and has no attention over heads of different lengths

#define CHECK(cond)                                                            \
    do {                                                                       \
        if (!(cond)) {                                                         \
            fprintf(stderr, "%s:%d: %s failed\n", __FILE__, __LINE__, #cond);  \
            n_failed++;                                                        \
        }                                                                      \
    } while (0)

struct context_deleter {
    void operator()(llama_context * ctx) { llama_free(ctx); }
};
using context_ptr = std::unique_ptr<llama_context, context_deleter>;

static llama_context_params default_params() {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 1024;
    params.n_batch         = 512;
    params.n_ubatch        = 128;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return params;
}

static context_ptr make(llama_model * model, int window, llama_context_params params = default_params()) {
    if (window > 0) {
        CHECK(wkv_pending_set(window, -1) == WKV_OK);
    }
    context_ptr res { llama_init_from_model(model, params) };
    wkv_pending_clear();
    return res;
}

static std::vector<llama_token> prompt(int n, int seed = 1) {
    std::vector<llama_token> res(n);
    unsigned state = seed;
    for (auto & token : res) {
        state = state*1664525u + 1013904223u;
        token = (state >> 16) % 120;
    }
    return res;
}

static int decode(llama_context * ctx, std::vector<llama_token> tokens, int p0) {
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = p0 + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = i + 1 == tokens.size();
    }
    batch.n_tokens = tokens.size();
    const int status = llama_decode(ctx, batch);
    llama_batch_free(batch);
    return status;
}

static std::vector<float> logits(llama_context * ctx) {
    const float * data = llama_get_logits_ith(ctx, -1);
    return std::vector<float>(data, data + llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))));
}

static wkv_stats stats(llama_context * ctx) {
    wkv_stats res;
    CHECK(wkv_get_stats(ctx, &res) == WKV_OK);
    return res;
}

static std::vector<int32_t> positions(llama_context * ctx, int layer, int head) {
    std::vector<int32_t> res(stats(ctx).n_past);
    res.resize(wkv_get_positions(ctx, layer, head, res.data(), res.size()));
    return res;
}

static std::vector<float> rows(llama_context * ctx, int layer, int head, int which) {
    std::vector<float> res(1 << 18);
    const int64_t n = wkv_get_rows(ctx, layer, head, which, res.data(), res.size());
    CHECK(n >= 0);
    res.resize(n);
    return res;
}

static wkv_policy windowkv() {
    wkv_policy res = {};
    res.scoring.window_size    = 8;
    res.scoring.kernel_size    = 1;
    res.selection.kind         = WKV_KIND_WINDOWS;
    res.selection.n_recent     = 8;
    res.selection.omega        = 4;
    res.selection.top_p        = 4;
    res.selection.gamma        = 1;
    res.selection.scope        = WKV_SCOPE_HEAD;
    res.selection.recent_share = 1.0;
    return res;
}

static wkv_policy snapkv() {
    wkv_policy res = {};
    res.scoring.window_size = 8;
    res.scoring.kernel_size = 7;
    res.selection.kind      = WKV_KIND_TOKENS;
    res.selection.n_recent  = 8;
    return res;
}

static wkv_policy pyramidkv() {
    wkv_policy res = snapkv();
    res.allocation.layers = WKV_LAYERS_PYRAMID;
    res.allocation.beta   = 5.0;
    return res;
}

static wkv_policy adakv() {
    wkv_policy res = snapkv();
    res.allocation.heads           = WKV_HEADS_SCORE;
    res.allocation.alpha_safeguard = 0.1;
    return res;
}

// windows inside budgets that fall from head to head
static wkv_policy windowkv_headkv(const std::vector<double> & importance) {
    wkv_policy res = windowkv();
    res.allocation.heads        = WKV_HEADS_IMPORTANCE;
    res.allocation.beta         = 1.0/0.9;
    res.allocation.importance   = importance.data();
    res.allocation.n_importance = importance.size();
    return res;
}

static bool last_error_has(const char * text) {
    return strstr(wkv_last_error(), text) != nullptr;
}

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

static void test_sequence_rules(llama_model * model) {
    auto ctx = make(model, 8);
    llama_memory_t mem = llama_get_memory(ctx.get());

    CHECK(!llama_memory_can_shift(mem));
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    const auto want = [&] {
        CHECK(decode(ctx.get(), prompt(5, 7), 300) == 0);
        return logits(ctx.get());
    }();

    // behind the end: nothing to do
    CHECK(llama_memory_seq_rm(mem, 0, 305, -1));
    CHECK(stats(ctx.get()).n_past == 305);

    // a tail, then other tokens, then the first ones again: stale rows are never read
    CHECK(llama_memory_seq_rm(mem, 0, 300, -1));
    CHECK(decode(ctx.get(), prompt(40, 9), 300) == 0);
    CHECK(llama_memory_seq_rm(mem, 0, 300, -1));
    CHECK(decode(ctx.get(), prompt(5, 7), 300) == 0);
    CHECK(logits(ctx.get()) == want);

    // a hole, a head: refused, nothing changes
    CHECK(!llama_memory_seq_rm(mem, 0, 10, 20));
    CHECK(!llama_memory_seq_rm(mem, 0, 0, 20));
    CHECK(stats(ctx.get()).n_past == 305);
    CHECK(llama_memory_seq_rm(mem, 0, 20, 20)); // empty
    CHECK(llama_memory_seq_rm(mem, 3, 0, -1));  // no such sequence
    CHECK(stats(ctx.get()).n_past == 305);

    // shifting: refused
    llama_memory_seq_add(mem, 0, 10, -1, 5);
    llama_memory_seq_div(mem, 0, 10, -1, 2);
    llama_memory_seq_cp (mem, 0, 1, -1, -1);
    CHECK(llama_memory_seq_pos_max(mem, 0) == 304);
    CHECK(llama_memory_seq_pos_max(mem, 1) == -1);

    // below the compaction boundary: refused; from it on: the tail
    const auto policy = windowkv();
    CHECK(wkv_compact(ctx.get(), &policy, 40) > 0);
    CHECK(decode(ctx.get(), prompt(10, 3), 305) == 0);
    CHECK(!llama_memory_seq_rm(mem, 0, 304, -1));
    CHECK(stats(ctx.get()).n_past == 315);
    CHECK(llama_memory_seq_rm(mem, 0, 305, -1));
    CHECK(stats(ctx.get()).n_past == 305);
    CHECK(positions(ctx.get(), 0, 0).size() == 40);
    CHECK(llama_memory_seq_pos_max(mem, 0) == 304);

    // keep the only sequence, then clear: memory is back, and a new prompt starts over
    llama_memory_seq_keep(mem, 0);
    CHECK(stats(ctx.get()).n_past == 305);
    CHECK(llama_memory_seq_rm(mem, -1, 0, -1));
    CHECK(stats(ctx.get()).n_past == 0);
    CHECK(stats(ctx.get()).bytes_pool == 0);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(decode(ctx.get(), prompt(5, 7), 300) == 0);
    CHECK(logits(ctx.get()) == want);

    llama_memory_clear(mem, true);
    CHECK(stats(ctx.get()).n_past == 0);
    CHECK(llama_memory_seq_rm(mem, 0, 0, -1));
}

static void test_trimmed_queries_are_forgotten(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0); // 292 to 299 are observed
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 295, -1));
    CHECK(decode(ctx.get(), prompt(2, 3), 295) == 0);

    std::vector<float> queries(8*256);
    std::vector<int32_t> pos(8, -1);
    CHECK(wkv_get_queries(ctx.get(), 0, 0, queries.data(), queries.size(), pos.data(), pos.size()) > 0);
    CHECK((pos == std::vector<int32_t>{ 292, 293, 294, 295, 296, -1, -1, -1 }));

    // fewer observed than asked for: the mean is over those that are left
    std::vector<float> scores(4096);
    const int64_t n = wkv_get_scores(ctx.get(), 0, 8, 0, scores.data(), scores.size());
    CHECK(n == int64_t(stats(ctx.get()).n_head_kv)*297);
    CHECK(std::fabs(std::accumulate(scores.begin(), scores.begin() + 297, 0.0f) - 1.0f) < 1e-3f);
}

static std::vector<int32_t> observed(llama_context * ctx) {
    std::vector<float>   rows(1 << 16);
    std::vector<int32_t> res(stats(ctx).n_observed, -1);
    CHECK(wkv_get_queries(ctx, 0, 0, rows.data(), rows.size(), res.data(), res.size()) >= 0);
    return res;
}

static std::vector<float> scores(llama_context * ctx, int window_size) {
    std::vector<float> res(1 << 16);
    const int64_t n = wkv_get_scores(ctx, 0, window_size, 0, res.data(), res.size());
    CHECK(n > 0);
    res.resize(n);
    return res;
}

// an answer of any length can be taken back, and the prompt's end is observed as before
static void test_queries_of_the_prompt_stay(llama_model * model) {
    auto ctx = make(model, 8);
    llama_memory_t mem = llama_get_memory(ctx.get());

    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(wkv_prompt_done(ctx.get()) == WKV_OK);
    const auto want = scores(ctx.get(), 8);

    for (const int n : { 3, 8, 50 }) {
        for (int i = 0; i < n; ++i) {
            CHECK(decode(ctx.get(), prompt(1, i), 300 + i) == 0);
        }
        CHECK(observed(ctx.get()).back() == 300 + n - 1);
        CHECK(llama_memory_seq_rm(mem, 0, 300, -1));
        CHECK(observed(ctx.get()).front() == 292 && observed(ctx.get()).back() == 299);
        CHECK(scores(ctx.get(), 8) == want);
    }

    // the last token evaluated again, as llama-cpp-python does with a prompt that it knows
    CHECK(llama_memory_seq_rm(mem, 0, 299, -1));
    CHECK(decode(ctx.get(), { prompt(300).back() }, 299) == 0);
    CHECK(wkv_prompt_done(ctx.get()) == WKV_OK);
    for (int i = 0; i < 20; ++i) {
        CHECK(decode(ctx.get(), prompt(1, i), 300 + i) == 0);
    }
    CHECK(llama_memory_seq_rm(mem, 0, 300, -1));
    CHECK(observed(ctx.get()).front() == 292);

    // a compaction declares the end as well, and the next prompt replaces it
    const auto policy = windowkv();
    CHECK(wkv_compact(ctx.get(), &policy, 40) > 0);
    for (int i = 0; i < 20; ++i) {
        CHECK(decode(ctx.get(), prompt(1, i), 300 + i) == 0);
    }
    CHECK(llama_memory_seq_rm(mem, 0, 300, -1));
    CHECK(observed(ctx.get()).front() == 292);
    CHECK(wkv_compact(ctx.get(), &policy, 30) > 0);
    CHECK(decode(ctx.get(), prompt(30, 2), 300) == 0);
    CHECK(wkv_prompt_done(ctx.get()) == WKV_OK);
    CHECK(observed(ctx.get()).front() == 322);
}

struct prompt_log {
    llama_context * ctx;
    wkv_policy      policy;
    int             n_cells = 0; // compact to, 0 = not at all
    std::vector<int> at;         // positions when called
};

static void on_prompt(void * user) {
    auto & log = *static_cast<prompt_log *>(user);
    log.at.push_back(stats(log.ctx).n_past);
    if (log.n_cells > 0) {
        CHECK(wkv_compact(log.ctx, &log.policy, log.n_cells) > 0);
    }
}

// whoever decodes: a prompt that nobody compacted is found before the first token behind it
static void test_prompts_are_found(llama_model * model) {
    auto ctx = make(model, 8);
    prompt_log log = { ctx.get(), windowkv(), 40, {} };
    CHECK(wkv_on_prompt(ctx.get(), on_prompt, &log) == WKV_OK);

    CHECK(decode(ctx.get(), prompt(200), 0) == 0);
    CHECK(decode(ctx.get(), prompt(100, 2), 200) == 0); // the rest of the prompt
    llama_set_causal_attn(ctx.get(), false); // refused for that, which ends no prompt
    CHECK(decode(ctx.get(), prompt(1), 300) == 1);
    llama_set_causal_attn(ctx.get(), true);
    CHECK(log.at.empty());
    CHECK(decode(ctx.get(), prompt(1), 300) == 0);
    CHECK((log.at == std::vector<int>{ 300 }));
    CHECK(stats(ctx.get()).n_boundary == 300);
    CHECK(positions(ctx.get(), 0, 0).size() == 41);
    const auto want = logits(ctx.get());

    CHECK(decode(ctx.get(), prompt(1), 301) == 0); // an answer is none
    CHECK(log.at.size() == 1);

    CHECK(decode(ctx.get(), prompt(5), 302) == 0); // a draft that is taken back
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 302, -1));
    CHECK(decode(ctx.get(), prompt(1), 302) == 0);
    CHECK(log.at.size() == 1);
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 302, -1));

    CHECK(decode(ctx.get(), prompt(20), 302) == 0); // declared done before
    CHECK(wkv_prompt_done(ctx.get()) == WKV_OK);
    CHECK(decode(ctx.get(), prompt(1), 322) == 0);
    CHECK(log.at.size() == 1);

    log.n_cells = 0; // and it need not compact
    CHECK(decode(ctx.get(), prompt(20), 323) == 0);
    CHECK(decode(ctx.get(), prompt(1), 343) == 0);
    CHECK((log.at == std::vector<int>{ 300, 343 }));
    CHECK(stats(ctx.get()).n_boundary == 300);

    CHECK(wkv_on_prompt(ctx.get(), nullptr, nullptr) == WKV_OK);
    CHECK(decode(ctx.get(), prompt(20), 344) == 0);
    CHECK(decode(ctx.get(), prompt(1), 364) == 0);
    CHECK(log.at.size() == 2);

    // nor does a piece of the prompt that is refused for want of room
    auto full = make(model, 8);
    prompt_log other = { full.get(), windowkv(), 40, {} };
    CHECK(wkv_on_prompt(full.get(), on_prompt, &other) == WKV_OK);
    CHECK(decode(full.get(), prompt(512), 0) == 0);
    CHECK(decode(full.get(), prompt(400), 512) == 0);
    CHECK(decode(full.get(), prompt(200), 912) == 1);
    CHECK(other.at.empty());
    CHECK(decode(full.get(), prompt(1), 912) == 0);
    CHECK((other.at == std::vector<int>{ 912 }));

    // the same as a compaction by hand
    auto hand = make(model, 8);
    CHECK(decode(hand.get(), prompt(200), 0) == 0);
    CHECK(decode(hand.get(), prompt(100, 2), 200) == 0);
    CHECK(wkv_compact(hand.get(), &log.policy, 40) > 0);
    CHECK(decode(hand.get(), prompt(1), 300) == 0);
    CHECK(logits(hand.get()) == want);
}

// everything that changes the cache is refused while a selection looks at it
static int meddle(void * user, const wkv_shapes *, int64_t, const int32_t *, const float *, uint8_t *) {
    auto * ctx = static_cast<llama_context *>(user);
    llama_memory_t mem = llama_get_memory(ctx);

    const auto before = stats(ctx);
    const auto policy = windowkv();
    CHECK(wkv_compact(ctx, &policy, 10) == WKV_ERR_ARGUMENT);
    CHECK(last_error_has("a selection is running"));
    CHECK(wkv_reserve(ctx, 500) == WKV_ERR_ARGUMENT);
    CHECK(wkv_set_observed(ctx, 4) == WKV_ERR_ARGUMENT);
    CHECK(wkv_snapshot_save(ctx) == WKV_ERR_ARGUMENT);
    CHECK(wkv_prompt_done(ctx) == WKV_ERR_ARGUMENT);
    CHECK(decode(ctx, prompt(1), before.n_past) == 1);
    CHECK(last_error_has("a selection is running"));
    CHECK(!llama_memory_seq_rm(mem, 0, before.n_past - 1, -1));
    CHECK(!llama_memory_seq_rm(mem, -1, 0, -1));
    llama_memory_clear(mem, true);
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
}

// attention weights that are too large for one tensor are computed in parts
static void test_scores_in_parts(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);

    auto & kv = *llama_kv_ragged_find(ctx->get_memory());
    for (const bool by_query_head : { false, true }) {
        llama_kv_ragged_scoring scoring;
        scoring.window_sizes  = by_query_head ? std::vector<int32_t>{ 8 } : std::vector<int32_t>{ 8, 3 };
        scoring.by_query_head = by_query_head;
        const auto want = llama_kv_ragged_score(*ctx, kv.get_source(0), scoring, kv.get_meter());
        for (const int64_t n_columns : { 8, 3, 1 }) {
            scoring.n_bytes_max = n_columns*300*sizeof(float);
            const auto got = llama_kv_ragged_score(*ctx, kv.get_source(0), scoring, kv.get_meter());
            CHECK(got.size() == want.size());
            for (size_t i = 0; i < want.size(); ++i) {
                CHECK(std::fabs(got[i] - want[i]) <= 1e-6f);
            }
        }
    }
}

// layers of distinct lengths that stock attention serves look at columns of one mask in large batches
static void test_layers_of_distinct_lengths(llama_model * model) {
    const auto policy = pyramidkv();

    std::vector<float> want;
    for (const int attention : { WKV_ATTENTION_STOCK, WKV_ATTENTION_RAGGED }) {
        if (attention == WKV_ATTENTION_RAGGED && no_ragged) {
            continue;
        }
        auto ctx = make(model, 8);
        CHECK(decode(ctx.get(), prompt(400), 0) == 0);
        CHECK(wkv_compact(ctx.get(), &policy, 60) > 0);
        CHECK(stats(ctx.get()).n_layer == 1 || positions(ctx.get(), 0, 0).size() > positions(ctx.get(), 1, 0).size());
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

static void test_queries_older_than_every_cell(llama_model * model) {
    auto ctx = make(model, 16);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    auto policy = windowkv();
    CHECK(wkv_compact(ctx.get(), &policy, 4) > 0); // the last four stay, sixteen are still observed
    CHECK(decode(ctx.get(), prompt(2, 3), 300) == 0);

    std::vector<float> scores(64);
    const int64_t n = wkv_get_scores(ctx.get(), 0, 16, 0, scores.data(), scores.size());
    CHECK(n == int64_t(stats(ctx.get()).n_head_kv)*6);
    for (int64_t i = 0; i < n; ++i) {
        CHECK(std::isfinite(scores[i]));
    }
}

static void test_batches_that_do_not_fit(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(10), 0) == 0);

    CHECK(decode(ctx.get(), prompt(3), 12) == -1); // leaves a gap: upstream's own check
    CHECK(decode(ctx.get(), prompt(3), 5)  == -1); // overwrites
    CHECK(stats(ctx.get()).n_past == 10);

    CHECK(decode(ctx.get(), prompt(512), 10)  == 0);
    CHECK(decode(ctx.get(), prompt(512), 522) != 0); // over n_ctx
    CHECK(last_error_has("no room for 512 more"));
    CHECK(stats(ctx.get()).n_past == 522);
    CHECK(decode(ctx.get(), prompt(502), 522) == 0);
    CHECK(decode(ctx.get(), prompt(1), 1024)  != 0);
}

static void test_aborted_ubatch_leaves_no_trace(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(200), 0) == 0);
    CHECK(decode(ctx.get(), prompt(1, 5), 200) == 0);
    const auto want = logits(ctx.get());
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 200, -1));

    int n_calls = 0;
    llama_set_abort_callback(ctx.get(), [](void * data) { return ++*(int *) data > 30; }, &n_calls);
    CHECK(decode(ctx.get(), prompt(300, 2), 200) == 2);
    llama_set_abort_callback(ctx.get(), nullptr, nullptr);

    CHECK(stats(ctx.get()).n_past % 128 == 200 % 128); // whole ubatches stay, the aborted one is gone
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 200, -1));
    CHECK(decode(ctx.get(), prompt(1, 5), 200) == 0);
    CHECK(logits(ctx.get()) == want);
}

static void test_snapshot(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(wkv_snapshot_restore(ctx.get()) == WKV_ERR_COMPUTE);

    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(wkv_snapshot_save(ctx.get()) == WKV_OK);

    const auto policy = windowkv();
    std::vector<float> want;
    for (int i = 0; i < 3; ++i) {
        CHECK(wkv_compact(ctx.get(), &policy, 40) > 0);
        CHECK(decode(ctx.get(), prompt(20, 4), 300) == 0);
        const auto got = logits(ctx.get());
        CHECK(want.empty() || want == got);
        want = got;
        CHECK(wkv_snapshot_restore(ctx.get()) == WKV_OK);
        CHECK(stats(ctx.get()).n_past == 300);
        CHECK(positions(ctx.get(), 0, 0).size() == 300);
    }
    CHECK(wkv_snapshot_drop(ctx.get()) == WKV_OK);
    CHECK(wkv_snapshot_restore(ctx.get()) == WKV_ERR_COMPUTE);
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

    // saved states are refused, not written wrong
    CHECK(llama_state_get_size(ctx.get()) == 0);
    CHECK(last_error_has("not supported yet"));
    CHECK(llama_state_seq_get_size(ctx.get(), 0) == 0);

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

int main(int argc, char ** argv) {
    if (argc < 2 || argc > 4 || (argc == 4 && strcmp(argv[3], "uniform") != 0)) {
        fprintf(stderr, "usage: %s MODEL.gguf [LAYERS_ON_THE_GPU [uniform]]\n", argv[0]);
        return 2;
    }

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    ggml_backend_load_all();

    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = argc > 2 ? atoi(argv[2]) : 0;

    on_device = params.n_gpu_layers > 0;
    if (on_device && !ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU)) {
        fprintf(stderr, "there is no GPU for %d layers\n", params.n_gpu_layers);
        return 2;
    }

    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) {
        fprintf(stderr, "cannot load %s\n", argv[1]);
        return 2;
    }

    no_ragged = argc == 4;

    test_equals_stock(model);
    test_pools_grow_with_the_prompt(model);
    test_compaction_moves_the_right_rows(model, windowkv());
    test_compaction_moves_the_right_rows(model, pyramidkv());
    {
        auto ctx = make(model, 8);
        const auto shape = stats(ctx.get());
        std::vector<double> importance(shape.n_layer*shape.n_head_kv);
        for (size_t i = 0; i < importance.size(); ++i) {
            importance[i] = 1.0/(1 + i);
        }
        for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            test_ragged_compaction(model, adakv(), type);
            test_ragged_compaction(model, windowkv_headkv(importance), type);
            test_compaction_moves_the_right_rows(model, windowkv(), type);
        }
    }
    test_sequence_rules(model);
    test_trimmed_queries_are_forgotten(model);
    test_queries_of_the_prompt_stay(model);
    test_prompts_are_found(model);
    test_selections_cannot_meddle(model);
    test_scores_in_parts(model);
    test_layers_of_distinct_lengths(model);
    test_queries_older_than_every_cell(model);
    test_batches_that_do_not_fit(model);
    if (!on_device) {
        test_aborted_ubatch_leaves_no_trace(model); // GPUs do not ask whether to abort
    }
    test_snapshot(model);
    test_custom_selection(model);
    test_refusals(model);
    test_cells_f32(model);
    test_fill(model);

    llama_model_free(model);
    llama_backend_free();

    printf("%s\n", n_failed ? "failed" : "ok");
    return n_failed ? 1 : 0;
}
