// Which models and contexts get a ragged cache, and where it stands inside the memories of upstream's.

#include "llama-kv-ragged-create.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-ragged.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

//
// the request
//

struct ragged_request {
    uint32_t n_observed = 0;
    int32_t  type       = -1; // of the cells, if they fit

    // what the context asked for
    const llama_cparams * cparams = nullptr;
    ggml_type             type_k  = GGML_TYPE_F16;
    ggml_type             type_v  = GGML_TYPE_F16;

    bool offered = false; // the memory that is being created may ask
    bool taken   = false; // it did

    // of the cache that is being constructed
    const llama_memory_i::layer_filter_cb * filter = nullptr;
};

static thread_local ragged_request   pending;           // of the next context
static thread_local ragged_request * current = nullptr; // while the memory of that context is created
static thread_local bool             asked   = false;   // until it is created

static thread_local char last_error[1024];

// sets a variable until the end of a block
template <typename T>
struct scoped_set {
    scoped_set(T & var, T value) : var(var) { var = value; }
    ~scoped_set() { var = nullptr; }

    T & var;
};

void llama_kv_ragged_pending_set(uint32_t n_observed, int32_t type) {
    asked   = n_observed > 0;
    pending = {};
    pending.n_observed = n_observed;
    pending.type       = type;
}

void llama_kv_ragged_no_context(const std::exception & err) {
    if (!asked) {
        return;
    }
    // upstream throws a text where a buffer cannot be had
    const bool no_memory = dynamic_cast<const std::bad_alloc *>(&err) || strstr(err.what(), "failed to allocate");
    if (no_memory) {
        char msg[512];
        snprintf(msg, sizeof(msg), "kv_policy: memory ran out while the context was created (%s)", err.what());
        llama_kv_ragged_set_error(msg);
    } else if (last_error[0] == '\0') {
        llama_kv_ragged_set_error(err.what());
    }
}

bool llama_kv_ragged_offer() {
    if (current) {
        current->offered = true;
    }
    return llama_kv_ragged_wanted();
}

bool llama_kv_ragged_wanted() {
    return current && current->offered && !current->taken;
}

void llama_kv_ragged_set_error(const char * msg) {
    snprintf(last_error, sizeof(last_error), "%s", msg);
}

const char * llama_kv_ragged_get_error() {
    return last_error;
}

// the reason of a failure inside has its prefix already
static void set_error(const std::string & msg) {
    const bool has_prefix = msg.rfind("kv_policy: ", 0) == 0;
    llama_kv_ragged_set_error((has_prefix ? msg : "kv_policy: " + msg).c_str());
}

bool llama_kv_ragged_refuse_batch(const std::string & msg) {
    set_error(msg);
    LLAMA_LOG_ERROR("%s: %s\n", __func__, msg.c_str());
    return false;
}

const char * llama_kv_ragged_reason(const std::exception & err) {
    return dynamic_cast<const std::bad_alloc *>(&err) ? "kv_policy: host memory ran out" : err.what();
}

[[noreturn]] void llama_kv_ragged_refuse(const std::string & msg) {
    set_error(msg);
    throw std::runtime_error(last_error);
}

[[noreturn]] void llama_kv_ragged_refuse_unsupported(const std::string & msg) {
    set_error(msg);
    throw llama_kv_ragged_unsupported(last_error);
}

//
// what is not served
//

[[noreturn]] static void refuse_model(const llama_model & model, const std::string & what) {
    llama_kv_ragged_refuse("a " + std::string(llm_arch_name(model.arch)) + " model with " + what + " is not supported yet, use it without a policy");
}

static void check_model(const llama_model & model) {
    const auto & hparams = model.hparams;

    const auto no = [&](const std::string & what) { refuse_model(model, what); };

    if (llama_model_has_encoder(&model))               { no("an encoder"); }
    if (hparams.swa_type == LLAMA_SWA_TYPE_SYMMETRIC)  { no("windows that look ahead"); }
    if (hparams.is_mla())                              { no("multi-head latent attention"); }
    if (hparams.f_max_alibi_bias > 0.0f)               { no("ALiBi positions"); }
    if (hparams.n_pos_per_embd() > 1)                  { no("M-RoPE positions"); }
    if (!hparams.causal_attn)                          { no("non-causal attention"); }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) { no("tensors split over devices"); }
    if (hparams.router_layer >= 0)                     { no("a router layer"); }

    // the one that no hyperparameter tells: build_attn_mha() asks for the architecture as well
    if (model.arch == LLM_ARCH_GROK)                   { no("a tanh of its own on the attention logits"); }

    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il)) { no("layers that share a KV cache"); }
    }
}

// a memory that did not ask for a ragged cache
static void check_kind(const llama_model & model, const llama_memory_i * mem) {
    const auto no = [&](const std::string & what) { refuse_model(model, what); };

    if (!mem)                                                  { no("no KV cache"); }
    if (dynamic_cast<const llama_memory_recurrent   *>(mem)) { no("recurrent layers alone"); }
    if (dynamic_cast<const llama_memory_hybrid_iswa *>(mem)) { no("recurrent layers beside sliding-window attention"); }

    no("a cache of its own kind (expected a plain one, or one beside sliding windows or recurrent layers)");
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

//
// creation
//

static bool accepts(const llama_model & model, const llama_memory_i::layer_filter_cb & filter, int32_t il) {
    return filter ? filter(il) : !model.hparams.is_recr(il);
}

// the lines that upstream's caches write about themselves
static void log_cache(const llama_kv_cache_ragged & kv, uint32_t n_observed) {
    const char * name = "llama_kv_cache_ragged";

    for (const auto & [buft, size] : kv.memory_breakdown()) {
        LLAMA_LOG_INFO("%s: %10s buffer size = %8.2f MiB (%u observed queries)\n", name, ggml_backend_buft_name(buft),
                size/1024.0/1024.0, n_observed);
    }

    const auto & layers = kv.get_layers();

    const uint32_t n_pos = kv.get_size();

    size_t size_k = 0;
    size_t size_v = 0;
    for (const auto & layer : layers) {
        size_k += n_pos*layer.n_head_kv*ggml_row_size(layer.type_k, layer.n_embd_head_k);
        size_v += n_pos*layer.n_head_kv*ggml_row_size(layer.type_v, layer.n_embd_head_v);
    }

    LLAMA_LOG_INFO("%s: size = up to %7.2f MiB (%6u cells, %3d layers, %2d kv heads), K (%s): %7.2f MiB, V (%s): %7.2f MiB\n", name,
            (size_k + size_v)/1024.0/1024.0, n_pos, (int) layers.size(), (int) layers[0].n_head_kv,
            ggml_type_name(layers[0].type_k), size_k/1024.0/1024.0,
            ggml_type_name(layers[0].type_v), size_v/1024.0/1024.0);
}

llama_memory_i * llama_kv_ragged_create_memory(
        const llama_model         & model,
        const llama_memory_params & params,
        const llama_cparams       & cparams) {
    if (pending.n_observed == 0) {
        return model.create_memory(params, cparams);
    }

    ragged_request request = pending;
    pending = {};

    check_model(model);
    check_params(params, cparams);

    request.cparams = &cparams;
    request.type_k  = params.type_k;
    request.type_v  = params.type_v;

    const scoped_set<ragged_request *> creating(current, &request);

    std::unique_ptr<llama_memory_i> res(model.create_memory(params, cparams));
    if (!request.taken) {
        check_kind(model, res.get());
    }
    return res.release();
}

std::unique_ptr<llama_kv_cache> llama_kv_ragged_create_cache(const llama_model & model, const llama_memory_i::layer_filter_cb & filter) {
    GGML_ASSERT(llama_kv_ragged_wanted());
    auto & request = *current;

    request.taken = true;

    const llama_memory_i::layer_filter_cb own = [&](int32_t il) { return accepts(model, filter, il); };

    bool fits = request.type >= 0;
    for (uint32_t il = 0; fits && il < model.hparams.n_layer(); ++il) {
        if (own(il)) {
            const int64_t n_block = ggml_blck_size(ggml_type(request.type));
            fits = model.hparams.n_embd_head_k(il) % n_block == 0 && model.hparams.n_embd_head_v(il) % n_block == 0;
        }
    }
    const ggml_type type_k = fits ? ggml_type(request.type) : request.type_k;
    const ggml_type type_v = fits ? ggml_type(request.type) : request.type_v;

    const scoped_set<const llama_memory_i::layer_filter_cb *> constructing(request.filter, &own);

    auto res = std::make_unique<llama_kv_cache_ragged>(
            model, *request.cparams, type_k, type_v, request.type_k, request.type_v, request.n_observed, own);
    log_cache(*res, request.n_observed);
    return res;
}

void llama_kv_ragged_set_rotation(const llama_hparams & hparams, int32_t & n_embd_head_k_all, int32_t & n_embd_head_v_all) {
    if (!current || !current->filter) {
        return;
    }

    const auto merge = [](int32_t & all, int32_t n) { all = all == 0 || all == n ? n : -1; };
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if ((*current->filter)(il)) {
            merge(n_embd_head_k_all, hparams.n_embd_head_k(il));
            merge(n_embd_head_v_all, hparams.n_embd_head_v(il));
        }
    }
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
