#include "llama-kv-cache-ragged-context.h"

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"
#include "llama-memory-hybrid.h"

#include <algorithm>
#include <cassert>

llama_kv_cache_context * llama_kv_ragged_context_make(
        llama_kv_cache * kv,
        llama_kv_cache::slot_info_vec_t sinfos,
        std::vector<llama_ubatch> ubatches) {
    auto * ragged = dynamic_cast<llama_kv_cache_ragged *>(kv);
    if (!ragged) {
        return new llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches));
    }

    // all memory that the batch needs is there before any part of a compound memory changes
    const std::string error = ragged->prepare_room(ubatches);
    if (!error.empty()) {
        llama_kv_ragged_refuse_batch(error);
    }
    if (!error.empty() || ragged->is_due()) {
        return new llama_kv_cache_ragged_context(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    return new llama_kv_cache_ragged_context(ragged, std::move(sinfos), std::move(ubatches));
}

//
// llama_kv_cache_ragged_context
//

llama_kv_cache_ragged_context::llama_kv_cache_ragged_context(llama_memory_status status) :
    llama_kv_cache_context(status) {}

llama_kv_cache_ragged_context::llama_kv_cache_ragged_context(llama_kv_cache_ragged * kv) :
    llama_kv_cache_context(kv), kv(kv), full(true) {}

llama_kv_cache_ragged_context::llama_kv_cache_ragged_context(
        llama_kv_cache_ragged * kv,
        slot_info_vec_t sinfos,
        std::vector<llama_ubatch> ubatches) :
    llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches)), kv(kv) {}

llama_kv_cache_ragged_context::llama_kv_cache_ragged_context(
        llama_kv_cache_ragged * kv,
        std::function<void()> fn) :
    llama_kv_cache_context(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv), update(std::move(fn)) {}

const llama_kv_cache_ragged_context * llama_kv_cache_ragged_context::cast(const llama_kv_cache_context * mctx) {
    return dynamic_cast<const llama_kv_cache_ragged_context *>(mctx);
}

const llama_kv_cache_ragged_context * llama_kv_cache_ragged_context::find(const llama_memory_context_i * mctx) {
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx)) {
        return cast(iswa->get_base());
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_context *>(mctx)) {
        return cast(hybrid->get_attn());
    }
    return dynamic_cast<const llama_kv_cache_ragged_context *>(mctx);
}

bool llama_kv_cache_ragged_context::apply() {
    assert(!llama_memory_status_is_fail(get_status()));

    if (update) {
        update();
        return true;
    }
    if (!llama_kv_cache_context::apply()) {
        return false;
    }
    observed_rows = kv->seq.append(get_ubatch().n_tokens, kv->on_prompt != nullptr);
    return true;
}

llama_kv_cache_ragged_context::layer_view llama_kv_cache_ragged_context::get_view(ggml_context * ctx, int32_t il) const {
    const size_t i     = get_index(il);
    const auto & layer = kv->layers[i];

    if (!full) {
        const int64_t n_cells = kv->seq.n_cells(i, 0);
        return { kv->pools[i].k, kv->pools[i].v, kv->is_stock(i), kv->pools[i].cap(0), n_cells, kv->n_read(i, n_cells) };
    }

    const int64_t n = kv->get_size();

    layer_view res = { nullptr, nullptr, kv->is_stock(i), n, n, n };
    if (ctx) {
        res.k = ggml_new_tensor_2d(ctx, layer.type_k, layer.n_embd_head_k, n*layer.n_head_kv);
        res.v = ggml_new_tensor_2d(ctx, layer.type_v, layer.n_embd_head_v, n*layer.n_head_kv);
        res.k->buffer = res.v->buffer = kv->bufs_reserve.at(layer.buft).get();
    }
    return res;
}

std::vector<llama_kv_cache_ragged_context::layer_view> llama_kv_cache_ragged_context::get_stock_views() const {
    std::vector<layer_view> res;
    for (const auto & layer : kv->layers) {
        res.push_back(get_view(nullptr, layer.il));
        if (!res.back().stock) {
            res.pop_back();
        }
    }
    return res;
}

std::pair<ggml_backend_dev_t, ggml_tensor *> llama_kv_cache_ragged_context::get_table(int32_t il, int64_t n_tokens) const {
    const auto dev = kv->layers[get_index(il)].dev;

    ggml_tensor * table = n_tokens > llama_kv_ragged_tables::N_TOKENS_MAX ? nullptr : kv->tables.find(dev);
    return { table ? dev : nullptr, table };
}

void llama_kv_cache_ragged_context::set_table(ggml_backend_dev_t dev, ggml_tensor * table, const std::vector<int32_t> & data) const {
    if (dev) {
        kv->tables.set(*kv->lctx, dev, data);
    } else {
        ggml_backend_tensor_set(table, data.data(), 0, data.size()*sizeof(data[0]));
    }
}

void llama_kv_cache_ragged_context::get_ranges(int32_t il, int32_t * ranges) const {
    const size_t i = get_index(il);

    for (int64_t ih = 0; ih < kv->layers[i].n_head_kv; ++ih) {
        ranges[2*ih + 0] = kv->pools[i].first[ih];
        ranges[2*ih + 1] = kv->seq.n_cells(i, ih);
    }
}

int32_t llama_kv_cache_ragged_context::get_index(int32_t il) const {
    return kv->map_layer.at(il);
}

int32_t llama_kv_cache_ragged_context::get_n_layer() const {
    return kv->layers.size();
}

int64_t llama_kv_cache_ragged_context::get_n_observed(int64_t n_tokens) const {
    return std::min<int64_t>(n_tokens, kv->seq.observed.n_observed);
}

uint64_t llama_kv_cache_ragged_context::get_epoch() const {
    return kv->epoch;
}
