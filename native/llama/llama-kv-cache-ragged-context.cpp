#include "llama-kv-cache-ragged-context.h"

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"
#include "llama-memory-hybrid.h"

#include <algorithm>
#include <cassert>
#include <new>

llama_kv_cache_context * llama_kv_ragged_context_make(
        llama_kv_cache * kv,
        llama_kv_cache::slot_info_vec_t sinfos,
        std::vector<llama_ubatch> ubatches) {
    auto * ragged = dynamic_cast<llama_kv_cache_ragged *>(kv);
    if (!ragged) {
        return new llama_kv_cache_context(kv, std::move(sinfos), std::move(ubatches));
    }

    // all memory that the batch needs is there before any part of a compound memory changes
    if (!ragged->prepare_room(ubatches)) {
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
    try {
        observed_rows = kv->append(get_ubatch().n_tokens);
    } catch (const std::bad_alloc &) {
        return false;
    }
    return llama_kv_cache_context::apply();
}

llama_kv_cache_ragged_context::layer_view llama_kv_cache_ragged_context::get_view(ggml_context * ctx, int32_t il) const {
    const size_t i     = get_index(il);
    const auto & seq   = kv->get_seq();
    const auto & layer = kv->get_layers()[i];

    if (!full) {
        const auto & pool = seq.cells[i].pool;
        return { pool.k, pool.v, pool.cap(0) };
    }

    const int64_t n = kv->get_size();

    layer_view res;
    res.k   = ggml_new_tensor_2d(ctx, layer.type_k, layer.n_embd_head_k, n*layer.n_head_kv);
    res.v   = ggml_new_tensor_2d(ctx, layer.type_v, layer.n_embd_head_v, n*layer.n_head_kv);
    res.cap = n;
    res.k->buffer = res.v->buffer = layer.buf_full.get();
    return res;
}

llama_kv_ragged_kernel llama_kv_cache_ragged_context::get_kernel(int32_t il, int64_t n_tokens) const {
    return kv->get_kernel(get_index(il), n_tokens);
}

llama_kv_cache_ragged_context::cells_view llama_kv_cache_ragged_context::get_cells(int32_t il, int32_t ih) const {
    const size_t i   = get_index(il);
    const auto & seq = kv->get_seq();

    const int32_t ih0 = std::max(ih, 0);
    if (full) {
        const int64_t n = kv->get_size();
        return { ih0*n, n, n };
    }
    const int64_t n_cells = seq.n_cells(i, ih0);
    return { seq.cells[i].pool.first[ih0], n_cells, ih == ALL_HEADS ? seq.n_read(i, n_cells) : seq.n_read_by_head(i, ih) };
}

const std::vector<llama_kv_ragged_layer> & llama_kv_cache_ragged_context::get_layers() const {
    return kv->get_layers();
}

const llama_kv_ragged_layer & llama_kv_cache_ragged_context::get_layer(int32_t il) const {
    return kv->get_layers()[get_index(il)];
}

ggml_tensor * llama_kv_cache_ragged_context::get_queries(int32_t il) const {
    return kv->get_seq().observed.queries[get_index(il)].tensor;
}

std::pair<ggml_backend_dev_t, ggml_tensor *> llama_kv_cache_ragged_context::get_table(int32_t il, int64_t n_tokens) const {
    const auto dev = get_layer(il).dev;

    ggml_tensor * table = n_tokens > llama_kv_ragged_tables::N_TOKENS_MAX ? nullptr : kv->get_tables().find(dev);
    return { table ? dev : nullptr, table };
}

void llama_kv_cache_ragged_context::set_table(ggml_backend_dev_t dev, ggml_tensor * table, const std::vector<int32_t> & data) const {
    if (dev) {
        kv->get_tables().set(dev, data);
    } else {
        ggml_backend_tensor_set(table, data.data(), 0, data.size()*sizeof(data[0]));
    }
}

void llama_kv_cache_ragged_context::get_ranges(int32_t il, int32_t * ranges) const {
    const size_t i   = get_index(il);
    const auto & seq = kv->get_seq();

    for (size_t ih = 0; ih < seq.cells[i].kept.size(); ++ih) {
        ranges[2*ih + 0] = seq.cells[i].pool.first[ih];
        ranges[2*ih + 1] = seq.n_cells(i, ih);
    }
}

int32_t llama_kv_cache_ragged_context::get_index(int32_t il) const {
    return kv->get_index(il);
}

int32_t llama_kv_cache_ragged_context::get_n_layer() const {
    return kv->get_layers().size();
}

int64_t llama_kv_cache_ragged_context::get_n_observed(int64_t n_tokens) const {
    return std::min<int64_t>(n_tokens, kv->get_seq().observed.n_observed);
}

void llama_kv_cache_ragged_context::note_keys(int32_t il, const ggml_tensor * k_cur) const {
    kv->set_rope(il, llama_kv_ragged_find_rope(k_cur));
}

llama_kv_ragged_replay * llama_kv_cache_ragged_context::get_replay() const {
    return full ? nullptr : kv->get_replay();
}

int64_t llama_kv_cache_ragged_context::n_replay_keys() const {
    return get_replay()->n_keys(kv->get_seq().n_pos);
}

void llama_kv_cache_ragged_context::set_replay_rows(int32_t il, int32_t * rows) const {
    get_replay()->set_rows(kv->get_seq(), get_index(il), rows);
}

void llama_kv_cache_ragged_context::set_replay_mask(int64_t n_tokens, float * mask) const {
    get_replay()->set_mask(kv->get_seq().n_pos, n_tokens, mask);
}

uint64_t llama_kv_cache_ragged_context::get_epoch() const {
    return kv->get_epoch();
}
