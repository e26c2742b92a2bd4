// Helpers, see test-ragged.h.

#include "test-ragged.h"

#include <cstring>

llama_context_params default_params() {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 1024;
    params.n_batch         = 512;
    params.n_ubatch        = 128;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return params;
}

context_ptr make(llama_model * model, int window, llama_context_params params) {
    if (window > 0) {
        CHECK(wkv_pending_set(window, -1) == WKV_OK);
    }
    context_ptr res { llama_init_from_model(model, params) };
    wkv_pending_clear();
    return res;
}

std::vector<llama_token> prompt(int n, int seed) {
    std::vector<llama_token> res(n);
    unsigned state = seed;
    for (auto & token : res) {
        state = state*1664525u + 1013904223u;
        token = (state >> 16) % 120;
    }
    return res;
}

int decode(llama_context * ctx, std::vector<llama_token> tokens, int p0) {
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

std::vector<float> logits(llama_context * ctx) {
    const float * data = llama_get_logits_ith(ctx, -1);
    return std::vector<float>(data, data + llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))));
}

wkv_stats stats(llama_context * ctx) {
    wkv_stats res;
    CHECK(wkv_get_stats(ctx, &res) == WKV_OK);
    return res;
}

std::vector<int32_t> positions(llama_context * ctx, int layer, int head) {
    std::vector<int32_t> res(stats(ctx).n_past);
    res.resize(wkv_get_positions(ctx, layer, head, res.data(), res.size()));
    return res;
}

std::vector<float> rows(llama_context * ctx, int layer, int head, int which) {
    std::vector<float> res(1 << 18);
    const int64_t n = wkv_get_rows(ctx, layer, head, which, res.data(), res.size());
    CHECK(n >= 0);
    res.resize(n);
    return res;
}

std::vector<int32_t> observed(llama_context * ctx) {
    std::vector<float>   rows(1 << 16);
    std::vector<int32_t> res(stats(ctx).n_observed, -1);
    CHECK(wkv_get_queries(ctx, 0, 0, rows.data(), rows.size(), res.data(), res.size()) >= 0);
    return res;
}

std::vector<float> scores(llama_context * ctx, int window_size) {
    std::vector<float> res(1 << 16);
    const int64_t n = wkv_get_scores(ctx, 0, window_size, 0, res.data(), res.size());
    CHECK(n > 0);
    res.resize(n);
    return res;
}

wkv_policy windowkv() {
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

wkv_policy snapkv() {
    wkv_policy res = {};
    res.scoring.window_size = 8;
    res.scoring.kernel_size = 7;
    res.selection.kind      = WKV_KIND_TOKENS;
    res.selection.n_recent  = 8;
    return res;
}

wkv_policy pyramidkv() {
    wkv_policy res = snapkv();
    res.allocation.layers = WKV_LAYERS_PYRAMID;
    res.allocation.beta   = 5.0;
    return res;
}

wkv_policy adakv() {
    wkv_policy res = snapkv();
    res.allocation.heads           = WKV_HEADS_SCORE;
    res.allocation.alpha_safeguard = 0.1;
    return res;
}

wkv_policy windowkv_headkv(const std::vector<double> & importance) {
    wkv_policy res = windowkv();
    res.allocation.heads        = WKV_HEADS_IMPORTANCE;
    res.allocation.beta         = 1.0/0.9;
    res.allocation.importance   = importance.data();
    res.allocation.n_importance = importance.size();
    return res;
}

bool last_error_has(const char * text) {
    return strstr(wkv_last_error(), text) != nullptr;
}
