// Positions that were never evaluated, see wkv_fill() in windowkv.h.

#include "llama-kv-ragged-fill.h"

#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <random>
#include <stdexcept>
#include <vector>

// rows repeat after this many, which no kernel notices
static constexpr int64_t N_ROWS_RANDOM = 1024;

static void set_random(ggml_tensor * dst, std::mt19937 & rng) {
    const int64_t n_embd = dst->ne[0];
    const int64_t n_rows = std::min(N_ROWS_RANDOM, ggml_nrows(dst));

    std::normal_distribution<float> normal;
    std::vector<float> values(n_embd*n_rows);
    std::generate(values.begin(), values.end(), [&] { return normal(rng); });

    std::vector<uint8_t> rows(ggml_row_size(dst->type, n_embd)*n_rows);
    ggml_quantize_chunk(dst->type, values.data(), rows.data(), 0, n_rows, n_embd, nullptr);

    for (size_t i = 0; i < ggml_nbytes(dst); i += rows.size()) {
        ggml_backend_tensor_set(dst, rows.data(), i, std::min(rows.size(), ggml_nbytes(dst) - i));
    }
}

// latent attention keeps no V
static void set_random(const llama_kv_cache & kv, bool has_v, std::mt19937 & rng) {
    if (const auto * ragged = dynamic_cast<const llama_kv_cache_ragged *>(&kv)) {
        const auto & seq = ragged->get_seq();
        for (size_t i = 0; i < seq.cells.size(); ++i) {
            for (ggml_tensor * dst : { seq.cells[i].pool.k, seq.cells[i].pool.v, seq.observed.queries[i].tensor }) {
                set_random(dst, rng);
            }
        }
        return;
    }

    const ggml_init_params params = {
        /*.mem_size   =*/ ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    for (const uint32_t il : kv.get_layer_ids()) {
        set_random(kv.get_k_storage(il), rng);
        if (has_v) {
            ggml_context_ptr ctx { ggml_init(params) };

            llama_kv_cache::slot_info sinfo;
            sinfo.s0 = sinfo.s1 = 0;

            set_random(kv.get_v(ctx.get(), il, 1, sinfo)->view_src, rng);
        }
    }
}

static void append(llama_context & ctx, int32_t n_tokens) {
    std::vector<llama_token> tokens(n_tokens, 0);

    llama_batch_compat compat(&ctx, llama_batch_get_one(tokens.data(), n_tokens));
    llama_batch_allocr balloc(ctx.get_model().hparams.n_pos_per_embd());
    if (!balloc.init(*compat.batch_ext, ctx.get_model().vocab, false)) {
        throw std::runtime_error("the batch of new positions was refused");
    }

    const auto mctx = ctx.get_memory()->init_batch(balloc, ctx.get_cparams().n_ubatch, false);
    if (!mctx || mctx->get_status() != LLAMA_MEMORY_STATUS_SUCCESS) {
        throw std::runtime_error(format("no room for %d more positions", n_tokens));
    }
    do {
        if (!mctx->apply()) {
            throw std::runtime_error("no memory for the cells of new positions");
        }
    } while (mctx->next());
}

void llama_kv_ragged_fill(llama_context & ctx, int32_t n_tokens) {
    const llama_memory_t mem = ctx.get_memory();

    const llama_kv_cache * kv = llama_kv_ragged_attn_cache(mem);
    if (!kv) {
        throw std::invalid_argument("this context has no KV cache");
    }
    if (mem->seq_pos_max(0) >= 0) {
        throw std::invalid_argument(format("the cache holds %d positions, expected an empty one", mem->seq_pos_max(0) + 1));
    }
    if (n_tokens < 1 || n_tokens > (int32_t) ctx.n_ctx()) {
        throw std::invalid_argument(format("n_tokens is %d, expected 1 to %u", n_tokens, ctx.n_ctx()));
    }

    const int32_t n_batch = ctx.n_batch();
    for (int32_t i = 0; i < n_tokens; i += n_batch) {
        append(ctx, std::min(n_batch, n_tokens - i));
        if (auto * ragged = llama_kv_ragged_find(mem)) {
            ragged->end_prompt(); // nobody has to compact it before the next piece
        }
    }

    const bool has_v = !ctx.get_model().hparams.is_mla();

    std::mt19937 rng(n_tokens);
    set_random(*kv, has_v, rng);

    const auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa *>(mem);
    const auto * iswa   = hybrid ? hybrid->get_mem_attn() : dynamic_cast<const llama_kv_cache_iswa *>(mem);
    if (iswa) {
        set_random(*iswa->get_swa(), has_v, rng);
    }
}
