// Tests of saved states: what goes on from one is bit for bit what went on without, and no bytes leave a cache that cannot be used.

#include "test-ragged.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <unistd.h>

static const llama_state_seq_flags NONE    = LLAMA_STATE_SEQ_FLAGS_NONE;
static const llama_state_seq_flags PARTIAL = LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;

using bytes = std::vector<uint8_t>;

static bytes save(llama_context * ctx, llama_state_seq_flags flags = NONE) {
    bytes res(llama_state_seq_get_size_ext(ctx, 0, flags));
    CHECK(!res.empty());
    CHECK(llama_state_seq_get_data_ext(ctx, res.data(), res.size(), 0, flags) == res.size());
    return res;
}

static bool load(llama_context * ctx, const bytes & state, llama_state_seq_flags flags = NONE) {
    return llama_state_seq_set_data_ext(ctx, state.data(), state.size(), 0, flags) == state.size();
}

static int n_past(llama_context * ctx) {
    return llama_memory_seq_pos_max(llama_get_memory(ctx), 0) + 1;
}

// what a session does next: tokens one by one, more than its windows hold, a compaction
static std::vector<float> go_on(llama_context * ctx, const wkv_policy & policy) {
    std::vector<float> res;
    const auto evaluate = [&](const std::vector<llama_token> & tokens) {
        CHECK(decode(ctx, tokens, n_past(ctx)) == 0);
        const auto got = logits(ctx);
        res.insert(res.end(), got.begin(), got.end());
    };
    for (int i = 0; i < 3; ++i) {
        evaluate(prompt(1, i));
    }
    evaluate(prompt(150, 5));
    CHECK(wkv_compact(ctx, &policy, 30) > 0);
    evaluate(prompt(1, 6));
    wkv_stats stats;
    CHECK(wkv_get_stats(ctx, &stats) == WKV_OK);
    for (int head = 0; head < stats.n_head_kv; ++head) {
        const auto own = positions(ctx, 0, head);
        res.insert(res.end(), own.begin(), own.end());
    }
    return res;
}

// a session in the middle of an answer behind a compacted prompt
static context_ptr answering(llama_model * model, const wkv_policy & policy, const llama_context_params & params) {
    auto ctx = make(model, 8, params);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(wkv_compact(ctx.get(), &policy, 40) > 0);
    for (int i = 0; i < 5; ++i) {
        CHECK(decode(ctx.get(), prompt(1, i), 300 + i) == 0);
    }
    return ctx;
}

static void test_goes_on(llama_model * model, const wkv_policy & policy, const llama_context_params & params) {
    auto ctx = answering(model, policy, params);

    const auto state = save(ctx.get());
    const auto want  = go_on(ctx.get(), policy);
    CHECK(n_past(ctx.get()) == 459);

    auto other = make(model, 8, params);
    CHECK(load(other.get(), state));
    CHECK(n_past(other.get()) == 305);
    CHECK(save(other.get()) == state);

    // room as after a compaction: what was saved, and slack
    const auto cells = stats(other.get());
    CHECK(cells.n_boundary == 300);
    CHECK(go_on(other.get(), policy) == want);

    // over what another prompt left, and again
    for (int i = 0; i < 2; ++i) {
        CHECK(load(ctx.get(), state));
        CHECK(stats(ctx.get()).bytes_live == cells.bytes_live);
        CHECK(go_on(ctx.get(), policy) == want);
    }

    // the whole context's state
    CHECK(load(ctx.get(), state));
    bytes whole(llama_state_get_size(ctx.get()));
    CHECK(llama_state_get_data(ctx.get(), whole.data(), whole.size()) == whole.size());
    CHECK(llama_state_set_data(other.get(), whole.data(), whole.size()) == whole.size());
    CHECK(go_on(other.get(), policy) == want);

    // what was not compacted, and nothing at all
    llama_memory_clear(llama_get_memory(ctx.get()), true);
    const auto empty = save(ctx.get());
    CHECK(decode(ctx.get(), prompt(200), 0) == 0);
    const auto all      = save(ctx.get());
    const auto want_all = go_on(ctx.get(), policy);
    CHECK(load(ctx.get(), empty));
    CHECK(n_past(ctx.get()) == 0 && stats(ctx.get()).bytes_pool == 0);
    CHECK(load(ctx.get(), all));
    CHECK(go_on(ctx.get(), policy) == want_all);
}

static std::string scratch() {
    const char * folder = getenv("TMPDIR");
    char name[512];
    snprintf(name, sizeof(name), "%s/test-ragged-state-XXXXXX", folder ? folder : "/tmp");
    const int file = mkstemp(name);
    CHECK(file >= 0);
    return name;
}

static void test_files(llama_model * model, const wkv_policy & policy, const llama_context_params & params) {
    auto ctx = answering(model, policy, params);
    auto other = make(model, 8, params);

    const auto tokens = prompt(305);
    const auto path   = scratch();

    std::vector<llama_token> got(400);
    size_t n = 0;

    CHECK(llama_state_save_file(ctx.get(), path.c_str(), tokens.data(), tokens.size()));
    CHECK(llama_state_load_file(other.get(), path.c_str(), got.data(), got.size(), &n));
    CHECK(n == 305 && std::equal(tokens.begin(), tokens.end(), got.begin()));
    CHECK(save(other.get()) == save(ctx.get()));

    CHECK(llama_state_seq_save_file(ctx.get(), path.c_str(), 0, tokens.data(), tokens.size()) > 0);
    CHECK(llama_state_seq_load_file(other.get(), path.c_str(), 0, got.data(), got.size(), &n) > 0);
    CHECK(save(other.get()) == save(ctx.get()));

    // a file that was cut: the cache is what it was
    const auto before = save(other.get());
    FILE * file = fopen(path.c_str(), "rb+");
    CHECK(file && fseek(file, 0, SEEK_END) == 0);
    const long size = ftell(file);
    fclose(file);
    for (const long cut : { size - 1, size - 5, size/2, size/4, 1300L }) {
        CHECK(truncate(path.c_str(), cut) == 0);
        CHECK(llama_state_seq_load_file(other.get(), path.c_str(), 0, got.data(), got.size(), &n) == 0);
        CHECK(save(other.get()) == before);
    }
    remove(path.c_str());

    CHECK(go_on(other.get(), policy) == go_on(ctx.get(), policy));
}

static void test_refused(llama_model * model, const wkv_policy & policy, const llama_context_params & params) {
    auto ctx = answering(model, policy, params);

    // sequences and flags
    CHECK(llama_state_seq_get_size(ctx.get(), 1) == 0);
    CHECK(last_error_has("expected 0"));
    CHECK(llama_state_seq_get_size_ext(ctx.get(), 0, LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) == 0);
    CHECK(last_error_has("ON_DEVICE"));
    CHECK(llama_state_seq_get_size_ext(ctx.get(), 0, 64) == 0);
    const auto state = save(ctx.get());
    bytes small(state.size() - 1);
    CHECK(llama_state_seq_get_data(ctx.get(), small.data(), small.size(), 0) == 0);
    CHECK(llama_state_seq_set_data(ctx.get(), state.data(), state.size(), 1) == 0);
    CHECK(last_error_has("expected 0"));

    // contexts that it does not fit
    const auto refused = [&](int window, llama_context_params other, const char * why) {
        auto into = make(model, window, other);
        CHECK(decode(into.get(), prompt(20), 0) == 0);
        const auto before = save(into.get());
        CHECK(!load(into.get(), state));
        CHECK(last_error_has(why));
        CHECK(save(into.get()) == before);
        CHECK(decode(into.get(), prompt(1), 20) == 0);
    };
    auto own = params;
    own.n_ctx = 256;
    refused(8, own, "n_ctx");
    refused(16, params, "observed queries");
    own = params;
    own.type_k = params.type_k == GGML_TYPE_F32 ? GGML_TYPE_F16 : GGML_TYPE_F32;
    refused(8, own, "type of K is");

    // stock's state into ours, ours into stock's
    auto stock = make(model, 0, params);
    CHECK(decode(stock.get(), prompt(20), 0) == 0);
    const auto stocks = save(stock.get());
    CHECK(!load(ctx.get(), stocks));
    CHECK(last_error_has("by a context with a policy"));
    CHECK(save(ctx.get()) == state);
    CHECK(!load(stock.get(), state));

    // a larger n_ctx, other batches: windows may have other sizes then
    own = params;
    own.n_ctx    = 2048;
    own.n_ubatch = 256;
    auto wider = make(model, 8, own);
    CHECK(load(wider.get(), state));
    CHECK(n_past(wider.get()) == 305);
    for (int layer = 0; layer < stats(ctx.get()).n_layer; ++layer) {
        CHECK(rows(wider.get(), layer, 0, 1) == rows(ctx.get(), layer, 0, 1));
    }
    CHECK(decode(wider.get(), prompt(1), 305) == 0);
    own.n_ubatch = 32;
    auto narrower = make(model, 8, own);
    CHECK(load(narrower.get(), state));
    CHECK(decode(narrower.get(), prompt(1), 305) == 0);
    CHECK(decode(ctx.get(), prompt(1), 305) == 0);
    const auto want = logits(ctx.get());
    for (const auto & got : { logits(wider.get()), logits(narrower.get()) }) {
        for (size_t i = 0; i < want.size(); ++i) {
            CHECK(std::abs(got[i] - want[i]) < 2e-2f); // other rows, other sums in F16; logits are up to 3, measured: 3e-3
        }
    }
}

// what upstream's checkpoints do: windows and recurrent states alone go back, then the cells behind them go
static void test_partial(llama_model * model, const wkv_policy & policy, const llama_context_params & params) {
    auto ctx = answering(model, policy, params);

    const auto whole   = save(ctx.get());
    const auto partial = save(ctx.get(), PARTIAL);
    if (partial.size() == whole.size()) { // there is nothing else
        CHECK(partial == whole);
        return;
    }
    CHECK(partial.size() < whole.size());
    CHECK(!load(ctx.get(), partial));
    CHECK(!load(ctx.get(), whole, PARTIAL));
    CHECK(last_error_has("parts"));
    CHECK(save(ctx.get()) == whole);

    CHECK(decode(ctx.get(), prompt(2, 3), 305) == 0); // more would take the place of observed queries
    CHECK(load(ctx.get(), partial, PARTIAL));
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx.get()), 0, 305, -1));
    CHECK(save(ctx.get()) == whole);
    const auto want = go_on(ctx.get(), policy); // compacts at 458

    // what it belongs to was compacted since
    CHECK(!load(ctx.get(), partial, PARTIAL));
    CHECK(last_error_has("cannot be removed one by one"));
    CHECK(load(ctx.get(), whole));
    CHECK(go_on(ctx.get(), policy) == want);
}

// from where on positions can be removed, which a saved state's user asks before he takes one
static void test_removable(llama_model * model, const wkv_policy & policy, const llama_context_params & params) {
    auto ctx = make(model, 8, params);
    llama_memory_t mem = llama_get_memory(ctx.get());
    CHECK(wkv_get_removable(ctx.get()) == 0);

    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(wkv_compact(ctx.get(), &policy, 40) > 0);
    CHECK(wkv_get_removable(ctx.get()) == 300);
    for (int i = 0; i < 2; ++i) {
        CHECK(decode(ctx.get(), prompt(150, i), 300 + 150*i) == 0);
    }
    const int p0 = wkv_get_removable(ctx.get());
    CHECK(300 <= p0 && p0 <= 600);
    CHECK(p0 == 300 || !llama_memory_seq_rm(mem, 0, p0 - 1, -1));
    CHECK(n_past(ctx.get()) == 600);
    CHECK(llama_memory_seq_rm(mem, 0, p0, -1));
    CHECK(n_past(ctx.get()) == p0);
}

// any bytes: a reason and the cache as it was, or a state that can be used
static void test_damaged(llama_model * model, const wkv_policy & policy, const llama_context_params & params) {
    auto ctx = answering(model, policy, params);
    const auto state = save(ctx.get());

    auto other = make(model, 8, params);
    CHECK(decode(other.get(), prompt(30), 0) == 0);
    const auto before = save(other.get());

    unsigned seed = 1;
    const auto random = [&](size_t n) {
        seed = seed*1664525u + 1013904223u;
        return (seed >> 8) % n;
    };
    const size_t n_head = std::min<size_t>(state.size(), 4096); // most of what is not rows

    int n_refused = 0;
    for (int i = 0; i < 400; ++i) {
        auto bad = state;
        switch (i % 4) {
            case 0: bad.resize(random(bad.size()));                               break;
            case 1: bad[random(bad.size())] ^= 1 << random(8);                    break;
            case 2: bad[8 + random(n_head - 8)] = random(256);                    break;
            case 3: {
                const uint32_t values[] = { 0, 1, 299, 300, 305, 1024, 0x7fffffff, 0x80000000, 0xffffffff };
                memcpy(bad.data() + 4*random(n_head/4), values + random(9), 4);
            } break;
        }
        if (load(other.get(), bad)) {
            CHECK(decode(other.get(), prompt(2), n_past(other.get())) == 0);
            CHECK(decode(other.get(), prompt(1), n_past(other.get())) == 0);
            CHECK(load(other.get(), before));
        } else {
            n_refused++;
            CHECK(wkv_last_error()[0] != '\0' || memcmp(bad.data(), state.data(), std::min<size_t>(4, bad.size())) != 0);
            CHECK(save(other.get()) == before);
        }
    }
    CHECK(n_refused >= 100); // every cut
    CHECK(decode(other.get(), prompt(1), 30) == 0);
}

void test_state(llama_model * model) {
    auto params = default_params();
    std::vector<wkv_policy> policies = { windowkv() };
    if (!no_ragged) {
        policies.push_back(adakv());
    }
    // where cells lie does not depend on their type
    std::vector<ggml_type> types = { GGML_TYPE_F16, GGML_TYPE_Q8_0 };
    if (!on_device) {
        types.insert(types.end(), { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q4_0 });
    }
    for (const auto & policy : policies) {
        for (const ggml_type type : types) {
            params.type_k = params.type_v = type;
            test_goes_on(model, policy, params);
        }
        params.type_k = params.type_v = GGML_TYPE_F16;
        test_files  (model, policy, params);
        test_refused(model, policy, params);
        test_partial(model, policy, params);
        test_removable(model, policy, params);
        test_damaged(model, policy, params);
    }
}
