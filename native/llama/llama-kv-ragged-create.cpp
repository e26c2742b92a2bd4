// Which models and contexts get a ragged cache, and where it stands inside the memories of upstream's.

#include "llama-kv-cache-ragged.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>

struct pending_request {
    uint32_t n_window = 0;
    int32_t  type     = -1; // of the cells, if they fit

    // what the context asked for, known while its memory is created
    const llama_cparams * cparams = nullptr;
    ggml_type type_k = GGML_TYPE_F16;
    ggml_type type_v = GGML_TYPE_F16;
};

static thread_local pending_request pending;
static thread_local std::string     last_error;

void llama_kv_ragged_pending_set(uint32_t n_window, int32_t type) {
    pending = {};
    pending.n_window = n_window;
    pending.type     = type;
}

bool llama_kv_ragged_pending() {
    return pending.n_window > 0;
}

void llama_kv_ragged_set_error(const std::string & msg) {
    last_error = msg;
}

const std::string & llama_kv_ragged_get_error() {
    return last_error;
}

[[noreturn]] void llama_kv_ragged_refuse(const std::string & msg) {
    llama_kv_ragged_set_error("kv_policy: " + msg);
    throw std::runtime_error(last_error);
}

// architectures that llama_model::create_memory() gives a cache of their own, or whose cache is part of another context
static bool has_own_cache(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_BERT:
        case LLM_ARCH_JINA_BERT_V2:
        case LLM_ARCH_JINA_BERT_V3:
        case LLM_ARCH_NOMIC_BERT:
        case LLM_ARCH_NOMIC_BERT_MOE:
        case LLM_ARCH_NEO_BERT:
        case LLM_ARCH_EUROBERT:
        case LLM_ARCH_WAVTOKENIZER_DEC:
        case LLM_ARCH_MODERN_BERT:
        case LLM_ARCH_GEMMA_EMBEDDING:
        case LLM_ARCH_DREAM:
        case LLM_ARCH_LLADA:
        case LLM_ARCH_LLADA_MOE:
        case LLM_ARCH_RND1:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_GEMMA4_ASSISTANT:
        case LLM_ARCH_QWEN4EXP:
        case LLM_ARCH_BAILINGMOE3:
            return true;
        default:
            return false;
    }
}

[[noreturn]] static void refuse_model(const llama_model & model, const std::string & what) {
    llama_kv_ragged_refuse("a " + std::string(llm_arch_name(model.arch)) + " model with " + what + " is not supported yet, use it without a policy");
}

static void check_model(const llama_model & model) {
    const auto & hparams = model.hparams;

    const auto no = [&](const std::string & what) { refuse_model(model, what); };

    const bool windows = hparams.swa_type != LLAMA_SWA_TYPE_NONE;

    if (llm_arch_is_recurrent(model.arch))           { no("recurrent layers alone"); }
    if (has_own_cache(model.arch))                   { no("a cache or attention of its own kind"); }
    if (llama_model_has_encoder(&model))             { no("an encoder"); }
    if (llm_arch_is_hybrid(model.arch) && windows)   { no("recurrent layers beside sliding-window attention"); }
    if (hparams.swa_type == LLAMA_SWA_TYPE_SYMMETRIC) { no("windows that look ahead"); }
    if (hparams.is_mla())                            { no("multi-head latent attention"); }
    if (hparams.f_max_alibi_bias > 0.0f)             { no("ALiBi positions"); }
    if (hparams.n_pos_per_embd() > 1)                { no("M-RoPE positions"); }
    if (!hparams.causal_attn)                        { no("non-causal attention"); }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) { no("tensors split over devices"); }
    if (hparams.router_layer >= 0)                   { no("a router layer"); }
    if (model.arch == LLM_ARCH_GROK)                 { no("a tanh of its own on the attention logits"); }

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il)) { no("layers that share a KV cache"); }
    }
}

void llama_kv_ragged_check_layers(const llama_model & model, const std::vector<uint32_t> & layers) {
    const auto & hparams = model.hparams;

    const auto no = [&](const std::string & what) { refuse_model(model, what); };

    if (layers.empty()) { no("no layer that attends to all positions, so that there is nothing to compress,"); }

    for (const uint32_t il : layers) {
        if (hparams.n_head_kv(il) != hparams.n_head_kv(layers[0])) { no("different numbers of kv heads per layer"); }
        if (hparams.n_head_kv(il) == 0)                            { no("layers without attention"); }
        if (hparams.n_embd_head_k(il) % 2 || hparams.n_embd_head_v(il) % 2) { no("an odd head size"); }
    }
}

static void check_params(const llama_memory_params & params, const llama_cparams & cparams) {
    for (const ggml_type type : { params.type_k, params.type_v }) {
        switch (type) {
            case GGML_TYPE_F32:
            case GGML_TYPE_F16:
            case GGML_TYPE_BF16:
            case GGML_TYPE_Q8_0:
            case GGML_TYPE_Q4_0:
                break;
            default:
                llama_kv_ragged_refuse(format("cells of type %s are not supported, expected f32, f16, bf16, q8_0 or q4_0 for type_k and type_v",
                            ggml_type_name(type)));
        }
    }
    if (cparams.n_seq_max > 1) {
        llama_kv_ragged_refuse(format("n_seq_max is %u, expected 1: there are no pools per sequence yet", cparams.n_seq_max));
    }
    if (!cparams.flash_attn || cparams.auto_fa) {
        llama_kv_ragged_refuse("flash attention has to be enabled (flash_attn=True, LLAMA_FLASH_ATTN_TYPE_ENABLED)");
    }
    if (!cparams.causal_attn) {
        llama_kv_ragged_refuse("attention_type is non-causal, expected causal");
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || params.mem_other) {
        llama_kv_ragged_refuse("draft-head contexts and contexts that share memory are not supported, create a plain context");
    }
}

static llama_kv_cache_ragged * make_cache(
        const llama_model & model, const pending_request & request, const llama_memory_i::layer_filter_cb & filter) {
    bool fits = request.type >= 0;
    for (uint32_t il = 0; fits && il < model.hparams.n_layer(); ++il) {
        if (!filter || filter(il)) {
            const int64_t n_block = ggml_blck_size(ggml_type(request.type));
            fits = model.hparams.n_embd_head_k(il) % n_block == 0 && model.hparams.n_embd_head_v(il) % n_block == 0;
        }
    }
    const ggml_type type_k = fits ? ggml_type(request.type) : request.type_k;
    const ggml_type type_v = fits ? ggml_type(request.type) : request.type_v;

    auto * res = new llama_kv_cache_ragged(model, *request.cparams, type_k, type_v, request.n_window, filter);
    res->set_stock_types(request.type_k, request.type_v);
    return res;
}

llama_memory_i * llama_kv_ragged_create(
        const llama_model         & model,
        const llama_memory_params & params,
        const llama_cparams       & cparams) {
    const pending_request request = pending;
    pending = {};

    check_model(model);
    check_params(params, cparams);

    if (model.hparams.swa_type != LLAMA_SWA_TYPE_NONE || llm_arch_is_hybrid(model.arch)) {
        pending = { request.n_window, request.type, &cparams, params.type_k, params.type_v };
        return nullptr;
    }

    return make_cache(model, { request.n_window, request.type, &cparams, params.type_k, params.type_v }, nullptr);
}

llama_kv_cache * llama_kv_ragged_attn(const llama_model & model, const llama_memory_i::layer_filter_cb & filter) {
    const pending_request request = pending;
    pending = {};

    if (!request.cparams) {
        llama_kv_ragged_refuse("this model creates a memory that no policy serves, use it without a policy");
    }

    const auto attends = [&](int32_t il) { return !model.hparams.is_recr(il); };

    return make_cache(model, request, filter ? filter : llama_memory_i::layer_filter_cb(attends));
}

//
// inside a memory of upstream's
//

llama_kv_cache * llama_kv_ragged_attn_cache(llama_memory_i * mem) {
    if (const auto * cur = dynamic_cast<llama_memory_hybrid_iswa *>(mem)) {
        return cur->get_mem_attn()->get_base();
    }
    if (const auto * cur = dynamic_cast<llama_memory_hybrid *>(mem)) {
        return cur->get_mem_attn();
    }
    if (const auto * cur = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
        return cur->get_base();
    }
    return dynamic_cast<llama_kv_cache *>(mem);
}

llama_kv_cache_ragged * llama_kv_ragged_find(llama_memory_i * mem) {
    return dynamic_cast<llama_kv_cache_ragged *>(llama_kv_ragged_attn_cache(mem));
}

bool llama_kv_ragged_can_rm(const llama_kv_cache * kv, const llama_kv_cache * swa, llama_seq_id & seq_id, llama_pos p0, llama_pos p1) {
    const auto * ragged = dynamic_cast<const llama_kv_cache_ragged *>(kv);
    if (!ragged) {
        return true;
    }
    seq_id = std::max(seq_id, 0);

    const bool nothing = seq_id > 0 || (p1 >= 0 && p1 <= p0);
    return ragged->can_rm(seq_id, p0, p1) && (nothing || !swa || ragged->can_rm_window(*swa, p0));
}

bool llama_kv_ragged_no_shift(const llama_kv_cache * kv) {
    const bool res = dynamic_cast<const llama_kv_cache_ragged *>(kv) != nullptr;
    if (res) {
        LLAMA_LOG_ERROR("%s: positions of a cache with a policy are final, shifting and dividing them is refused\n", __func__);
    }
    return res;
}
