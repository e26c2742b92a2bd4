// Tests of prompts: which queries are observed, where one ends, what their scores are.

#include "test-ragged.h"

#include "llama-context.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

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

static void meddle_on_prompt(void * user) {
    auto * ctx = static_cast<llama_context *>(user);
    CHECK(wkv_prompt_done(ctx) == WKV_OK);
    CHECK(decode(ctx, prompt(1, 3), 300) != 0);
    CHECK(wkv_reserve(ctx, 10) == WKV_ERR_ARGUMENT);
    CHECK(wkv_set_observed(ctx, 4) == WKV_ERR_ARGUMENT);
    CHECK(!llama_memory_seq_rm(llama_get_memory(ctx), 0, 299, -1));
    llama_memory_clear(llama_get_memory(ctx), true);
    CHECK(stats(ctx).n_past == 300);
}

// what is called there may compact, and change nothing else
static void test_prompts_functions_cannot_meddle(llama_model * model) {
    auto calm = make(model, 8);
    CHECK(decode(calm.get(), prompt(300), 0) == 0);
    CHECK(decode(calm.get(), prompt(1), 300) == 0);

    auto ctx = make(model, 8);
    CHECK(wkv_on_prompt(ctx.get(), meddle_on_prompt, ctx.get()) == WKV_OK);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);
    CHECK(decode(ctx.get(), prompt(1), 300) == 0);
    CHECK(logits(ctx.get()) == logits(calm.get()));
    CHECK(strcmp(wkv_last_error(), "") == 0);
    CHECK(wkv_reserve(ctx.get(), 10) == WKV_OK);
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

// attention weights that are too large for one tensor are computed in parts
static void test_scores_in_parts(llama_model * model) {
    auto ctx = make(model, 8);
    CHECK(decode(ctx.get(), prompt(300), 0) == 0);

    const auto & seq = llama_kv_ragged_find(ctx->get_memory())->get_seq();
    for (const bool by_query_head : { false, true }) {
        llama_kv_ragged_scoring scoring;
        scoring.window_sizes  = by_query_head ? std::vector<int32_t>{ 8 } : std::vector<int32_t>{ 8, 3 };
        scoring.by_query_head = by_query_head;
        scoring.graph         = true;
        const auto want = llama_kv_ragged_score(*ctx, seq, 0, scoring);
        for (const int64_t n_columns : { 8, 3, 1 }) {
            scoring.n_bytes_max = n_columns*300*sizeof(float);
            const auto got = llama_kv_ragged_score(*ctx, seq, 0, scoring);
            CHECK(got.size() == want.size());
            for (size_t i = 0; i < want.size(); ++i) {
                // a GPU multiplies other numbers of columns by other kernels, some of which add in F16
                CHECK(std::fabs(got[i] - want[i]) <= 1e-6f + (on_device ? 2e-2f*want[i] : 0.0f));
            }
        }
    }
}

// a GPU scores several heads at once: the same scores, bit for bit on the CPU
static void test_scores_of_several_heads(llama_model * model) {
    auto ctx = make(model, 16);
    CHECK(decode(ctx.get(), prompt(303), 0) == 0);
    auto policy = windowkv();
    for (const bool compacted : { false, true }) {
        if (compacted) {
            // heads that hold equally many cells, of other positions each
            CHECK(wkv_compact(ctx.get(), &policy, 40) > 0);
            CHECK(decode(ctx.get(), prompt(7, 3), 303) == 0);
        }
        const auto & seq  = llama_kv_ragged_find(ctx->get_memory())->get_seq();
        const auto   n    = seq.n_cells(0, 0);
        const auto   size = int64_t(n*16*seq.get_layers()[0].n_gqa()*sizeof(float));
        for (const bool by_query_head : { false, true }) {
            llama_kv_ragged_scoring scoring;
            scoring.window_sizes  = by_query_head ? std::vector<int32_t>{ 16 } : std::vector<int32_t>{ 5, 16 };
            scoring.by_query_head = by_query_head;
            scoring.graph         = true;
            scoring.n_bytes_group = 0;
            const auto want = llama_kv_ragged_score(*ctx, seq, 0, scoring);
            for (const int64_t n_heads : { 2, 3, 64 }) {
                scoring.n_bytes_group = n_heads*size;
                const auto got = llama_kv_ragged_score(*ctx, seq, 0, scoring);
                CHECK(got.size() == want.size());
                for (size_t j = 0; j < want.size(); ++j) {
                    CHECK(on_device ? std::fabs(got[j] - want[j]) <= 1e-6f + 2e-2f*want[j] : got[j] == want[j]);
                }
            }
        }
    }
}

// the mean attention of the last n queries to the cells of layer 0, in double precision
static std::vector<double> exact_scores(llama_context * ctx, int32_t n) {
    const auto & seq   = llama_kv_ragged_find(ctx->get_memory())->get_seq();
    const auto & layer = seq.get_layers()[0];
    const auto   d     = size_t(layer.n_embd_head_k);

    std::vector<double> res;
    for (int32_t ih = 0; ih < layer.n_head_kv; ++ih) {
        const auto         pos = seq.positions(0, ih);
        std::vector<float> k(pos.size()*d);
        CHECK(wkv_get_rows(ctx, 0, ih, 0, k.data(), k.size()) == int64_t(k.size()));

        std::vector<double> own(pos.size(), 0.0);
        for (int32_t ig = 0; ig < layer.n_gqa(); ++ig) {
            std::vector<int32_t> at(seq.observed.n_observed);
            std::vector<float>   q(at.size()*d);
            CHECK(wkv_get_queries(ctx, 0, ih*layer.n_gqa() + ig, q.data(), q.size(), at.data(), at.size()) == int64_t(q.size()));
            for (size_t iq = at.size() - n; iq < at.size(); ++iq) {
                std::vector<double> x;
                for (size_t ic = 0; ic < pos.size() && pos[ic] <= at[iq]; ++ic) {
                    x.push_back(0.0);
                    for (size_t i = 0; i < d; ++i) {
                        x.back() += double(q[iq*d + i])*k[ic*d + i];
                    }
                    x.back() = std::exp(x.back()/std::sqrt(double(d)));
                }
                const double sum = std::accumulate(x.begin(), x.end(), 0.0);
                for (size_t ic = 0; ic < x.size(); ++ic) {
                    own[ic] += x[ic]/sum/double(n*layer.n_gqa());
                }
            }
        }
        res.insert(res.end(), own.begin(), own.end());
    }
    return res;
}

// A CPU scores in steps of its own: no further from the exact scores than the graph is. A second window takes the place of the first,
// whether it is larger or smaller.
static void test_scores_are_exact(llama_model * model) {
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_Q8_0 }) {
        auto params = default_params();
        params.type_k = params.type_v = type;
        auto ctx = make(model, 16, params);
        CHECK(decode(ctx.get(), prompt(303), 0) == 0);
        auto policy = windowkv();
        for (const bool compacted : { false, true }) {
            if (compacted) {
                CHECK(wkv_compact(ctx.get(), &policy, 40) > 0);
                CHECK(decode(ctx.get(), prompt(16, 3), 303) == 0);
            }
            const auto & seq = llama_kv_ragged_find(ctx->get_memory())->get_seq();
            for (const auto & sizes : { std::vector<int32_t>{ 5, 16 }, { 16, 5 }, { 7, 7 } }) {
                llama_kv_ragged_scoring scoring;
                scoring.window_sizes = sizes;
                const auto steps = llama_kv_ragged_score(*ctx, seq, 0, scoring);
                scoring.graph = true;
                const auto graph = llama_kv_ragged_score(*ctx, seq, 0, scoring);

                auto       want  = exact_scores(ctx.get(), sizes[0]);
                const auto other = exact_scores(ctx.get(), sizes[1]);
                want.insert(want.end(), other.begin(), other.end());
                CHECK(steps.size() == want.size() && graph.size() == want.size());

                double error_steps = 0.0;
                double error_graph = 0.0;
                for (size_t i = 0; i < want.size(); ++i) {
                    error_steps = std::max(error_steps, std::fabs(steps[i] - want[i]));
                    error_graph = std::max(error_graph, std::fabs(graph[i] - want[i]));
                }
                CHECK(error_steps <= (on_device ? 1e-2 : 2e-7)); // a device may round queries to the type of the cells
                CHECK(error_steps <= error_graph + 1e-7);
            }
        }
    }
}

// the largest weights: the steps of a CPU and a graph, whose heads and queries are computed in parts, choose the same ones
static void test_largest_scores(llama_model * model) {
    auto ctx = make(model, 16);
    CHECK(decode(ctx.get(), prompt(303), 0) == 0);
    auto policy = windowkv();
    for (const bool compacted : { false, true }) {
        if (compacted) {
            CHECK(wkv_compact(ctx.get(), &policy, 40) > 0);
            CHECK(decode(ctx.get(), prompt(7, 3), 303) == 0);
        }
        const auto & seq = llama_kv_ragged_find(ctx->get_memory())->get_seq();

        llama_kv_ragged_scoring scoring;
        scoring.window_sizes = { 16 };
        scoring.reduce       = LLAMA_KV_RAGGED_REDUCE_MAX;
        const auto want = llama_kv_ragged_score(*ctx, seq, 0, scoring);
        CHECK(*std::max_element(want.begin(), want.end()) > 1.0f); // some query attends to some cell more than evenly
        scoring.graph = true;
        for (const int64_t n_bytes_max : { int64_t(INT32_MAX), int64_t(seq.n_cells(0, 0))*7*4 }) {
            for (const int64_t n_bytes_group : { int64_t(0), int64_t(1) << 30 }) {
                scoring.n_bytes_max   = n_bytes_max;
                scoring.n_bytes_group = n_bytes_group;
                std::vector<float> got;
                try {
                    got = llama_kv_ragged_score(*ctx, seq, 0, scoring);
                } catch (const llama_kv_ragged_unsupported &) {
                    CHECK(no_ragged && n_bytes_max < INT32_MAX); // the device lacks what puts parts together
                    continue;
                }
                CHECK(got.size() == want.size());
                for (size_t i = 0; i < want.size(); ++i) {
                    CHECK(std::fabs(got[i] - want[i]) <= (on_device ? 1e-2f : 1e-4f)*(1.0f + want[i]));
                }
            }
        }
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

void test_prompt(llama_model * model) {
    test_trimmed_queries_are_forgotten(model);
    test_queries_of_the_prompt_stay(model);
    test_prompts_functions_cannot_meddle(model);
    test_prompts_are_found(model);
    test_scores_in_parts(model);
    test_scores_of_several_heads(model);
    test_scores_are_exact(model);
    test_largest_scores(model);
    test_queries_older_than_every_cell(model);
}
