#include "llama-kv-cache-ragged.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-probe.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include "ggml-flash-attn-ragged.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <stdexcept>

// sets the message of a batch that is refused
static void refuse_batch(const std::string & msg) {
    llama_kv_ragged_set_error(msg);
    LLAMA_LOG_ERROR("%s\n", msg.c_str());
}

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
        refuse_batch(error);
        return new llama_kv_cache_ragged_context(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    return new llama_kv_cache_ragged_context(ragged, std::move(sinfos), std::move(ubatches));
}

//
// llama_kv_cache_ragged
//

llama_kv_cache_ragged::llama_kv_cache_ragged(
        const llama_model     & model,
        const llama_cparams   & cparams,
              ggml_type         type_k,
              ggml_type         type_v,
              uint32_t          n_window,
        const layer_filter_cb & filter) :
    llama_kv_cache(model, model.hparams, type_k, type_v, /*v_trans =*/ false, cparams.offload_kqv,
            /*unified =*/ true, cparams.n_ctx_seq, cparams.n_seq_max, /*n_pad =*/ 1, /*n_swa =*/ 0, LLAMA_SWA_TYPE_NONE,
            /*mem_other =*/ nullptr, /*filter =*/ [](int32_t) { return false; }, nullptr, nullptr),
    model(model), hparams(model.hparams), cparams(cparams), n_window(n_window) {
    GGML_ASSERT(n_window > 0);

    init_layers(type_k, type_v, filter);
    alloc_ring(n_window);
    alloc_tables();
}

void llama_kv_cache_ragged::init_layers(ggml_type type_k, ggml_type type_v, const layer_filter_cb & filter) {
    map_layer.assign(hparams.n_layer_all, -1);

    std::vector<uint32_t> ils;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!filter || filter(il)) {
            ils.push_back(il);
        }
    }
    llama_kv_ragged_check_layers(model, ils);

    for (const uint32_t il : ils) {
        llama_kv_ragged_layer layer;
        layer.il            = il;
        layer.n_head        = hparams.n_head(il);
        layer.n_head_kv     = hparams.n_head_kv(il);
        layer.n_embd_head_k = hparams.n_embd_head_k(il);
        layer.n_embd_head_v = hparams.n_embd_head_v(il);
        layer.type_k        = type_k;
        layer.type_v        = type_v;
        layer.dev           = cparams.offload_kqv ? model.dev_layer(il) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        layer.buft          = ggml_backend_dev_buffer_type(layer.dev);
        layer.kept.resize(layer.n_head_kv);

        // GPU kernels want lengths in multiples of 256 (see llama_kv_cache::get_n_kv), the CPU reads what it needs
        layer.n_pad = ggml_backend_dev_type(layer.dev) == GGML_BACKEND_DEVICE_TYPE_CPU ? 32 : 256;

        layer.sinks = model.layers[il].attn_sinks;

        const llama_kv_ragged_probe probe = { layer.dev, layer.n_head, layer.n_head_kv, layer.n_embd_head_k, layer.n_embd_head_v,
            layer.type_k, layer.type_v, hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f, layer.sinks != nullptr };

        if (const char * missing = llama_kv_ragged_missing_stock(probe)) {
            llama_kv_ragged_refuse(format("%s lacks %s for layer %u (head size %" PRId64 ", %s and %s cells%s), load the model with "
                        "n_gpu_layers=0, with f16 cells or without a policy", ggml_backend_dev_name(layer.dev), missing, il,
                        layer.n_embd_head_k, ggml_type_name(layer.type_k), ggml_type_name(layer.type_v),
                        layer.sinks ? ", learned attention sinks" : ""));
        }

        layer.has_ragged = llama_kv_ragged_has_ragged(probe);

        if (!bufs_reserve.count(layer.buft)) {
            bufs_reserve[layer.buft].reset(ggml_backend_buft_alloc_buffer(layer.buft, 0));
        }

        map_layer[il] = layers.size();
        layers.push_back(std::move(layer));
    }

    const bool on_device = std::any_of(ils.begin(), ils.end(), [&](uint32_t il) {
        return ggml_backend_dev_type(model.dev_layer(il)) != GGML_BACKEND_DEVICE_TYPE_CPU;
    });
    if (on_device && !cparams.offload_kqv) {
        LLAMA_LOG_WARN("%s: offload_kqv is off: the cells lie in host memory and the CPU attends to them, every layer on a device waits for "
            "it at every token\n", __func__);
    }
}

void llama_kv_cache_ragged::alloc_ring(uint32_t n) {
    const ggml_init_params params = {
        /*.mem_size   =*/ layers.size()*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr ctx { ggml_init(params) };

    std::vector<ggml_tensor *> rings;
    for (const auto & layer : layers) {
        rings.push_back(ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, layer.n_embd_head_k, n, layer.n_head));
        ggml_format_name(rings.back(), "ragged_ring_l%u", layer.il);
    }

    std::vector<ggml_backend_buffer_ptr> bufs;
    for (const auto & [buft, _] : bufs_reserve) {
        size_t size = 0;
        for (size_t i = 0; i < layers.size(); ++i) {
            size += layers[i].buft == buft ? GGML_PAD(ggml_backend_buft_get_alloc_size(buft, rings[i]), ggml_backend_buft_get_alignment(buft)) : 0;
        }

        bufs.emplace_back(ggml_backend_buft_alloc_buffer(buft, size));
        if (!bufs.back()) {
            llama_kv_ragged_refuse(format("no memory for an observation ring of %u rows (%zu bytes)", n, size));
        }
        ggml_backend_buffer_clear(bufs.back().get(), 0);

        ggml_tallocr alloc = ggml_tallocr_new(bufs.back().get());
        for (size_t i = 0; i < layers.size(); ++i) {
            if (layers[i].buft == buft) {
                ggml_tallocr_alloc(&alloc, rings[i]);
            }
        }
    }

    for (const auto & buf : ring_bufs) {
        meter.add(-(int64_t) ggml_backend_buffer_get_size(buf.get()));
    }
    for (const auto & buf : bufs) {
        meter.add(ggml_backend_buffer_get_size(buf.get()));
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        layers[i].ring = rings[i];
    }
    ring_bufs = std::move(bufs);
    ring_ctx  = std::move(ctx);
    n_window  = n;
    ring_pos.assign(n_window, -1);
    epoch++;
}

// tokens of the largest batch whose table a device holds: what decodes, with drafts
static constexpr int64_t N_TOKENS_TABLE = 8;

void llama_kv_cache_ragged::alloc_tables() {
    for (const auto & layer : layers) {
        if (layer.has_ragged && ggml_backend_dev_type(layer.dev) != GGML_BACKEND_DEVICE_TYPE_CPU) {
            tables[layer.dev] = {};
        }
    }

    const ggml_init_params params = {
        /*.mem_size   =*/ tables.size()*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    tables_ctx.reset(ggml_init(params));

    for (auto & [dev, table] : tables) {
        table.tensor = ggml_new_tensor_1d(tables_ctx.get(), GGML_TYPE_I32, (2 + N_TOKENS_TABLE)*layers[0].n_head_kv*layers.size());
        ggml_format_name(table.tensor, "ragged_table_%s", ggml_backend_dev_name(dev));

        const ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(dev);

        const size_t size = GGML_PAD(ggml_backend_buft_get_alloc_size(buft, table.tensor), ggml_backend_buft_get_alignment(buft));
        tables_bufs.emplace_back(ggml_backend_buft_alloc_buffer(buft, size));
        if (!tables_bufs.back()) {
            llama_kv_ragged_refuse(format("no memory for a table of %zu bytes on %s", size, ggml_backend_dev_name(dev)));
        }
        ggml_backend_buffer_clear(tables_bufs.back().get(), 0);
        meter.add(ggml_backend_buffer_get_size(tables_bufs.back().get()));

        ggml_tallocr alloc = ggml_tallocr_new(tables_bufs.back().get());
        ggml_tallocr_alloc(&alloc, table.tensor);
    }
}

ggml_backend_t llama_kv_ragged_backend(llama_context & lctx, ggml_backend_dev_t dev) {
    ggml_backend_sched_t sched = lctx.get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t cur = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(cur) == dev) {
            return cur;
        }
    }
    return nullptr;
}

void llama_kv_cache_ragged::synchronize() const {
    if (lctx && lctx->get_sched()) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }
}

std::string llama_kv_cache_ragged::ready(bool ragged) const {
    for (const auto & layer : layers) {
        if (ragged && !layer.has_ragged) {
            return no_ragged_attention(layer);
        }
        if (!layer.hooked) {
            return format("kv_policy: the attention of layer %u does not run through the KV cache, use the model without a policy", layer.il);
        }
    }
    return "";
}

//
// cells
//

int64_t llama_kv_cache_ragged::n_cells(const llama_kv_ragged_layer & layer, int64_t ih) const {
    return layer.kept[ih].size() + (n_pos - layer.boundary);
}

std::vector<int64_t> llama_kv_cache_ragged::n_cells(const llama_kv_ragged_layer & layer) const {
    std::vector<int64_t> res(layer.n_head_kv);
    for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
        res[ih] = n_cells(layer, ih);
    }
    return res;
}

bool llama_kv_cache_ragged::is_uniform(const llama_kv_ragged_layer & layer) const {
    for (const auto & kept : layer.kept) {
        if (kept.size() != layer.kept[0].size()) {
            return false;
        }
    }
    return true;
}

bool llama_kv_cache_ragged::is_stock(const llama_kv_ragged_layer & layer) const {
    if (!layer.has_ragged || attention == WKV_ATTENTION_STOCK) {
        return is_uniform(layer);
    }
    if (attention == WKV_ATTENTION_RAGGED || !is_uniform(layer)) {
        return false;
    }

    // as long as nothing was evicted the logits are those of stock bit for bit; the kernels differ in rounding only, but
    // quantised weights amplify that. Stock's kernel for quantised cells on the CPU is too slow for this to be worth it
    const bool cpu       = ggml_backend_dev_type(layer.dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
    const bool quantised = ggml_is_quantized(layer.type_k) || ggml_is_quantized(layer.type_v);
    return !cpu || (boundary == 0 && !quantised);
}

void llama_kv_cache_ragged::set_attention(wkv_attention value) {
    attention = value;
    epoch++;
}

std::vector<int32_t> llama_kv_cache_ragged::positions(const llama_kv_ragged_layer & layer, int64_t ih) const {
    std::vector<int32_t> res = layer.kept[ih];
    res.reserve(n_cells(layer, ih));
    for (uint32_t pos = layer.boundary; pos < n_pos; ++pos) {
        res.push_back(pos);
    }
    return res;
}

int64_t llama_kv_cache_ragged::n_read(const llama_kv_ragged_layer & layer, int64_t len) const {
    // before the first compaction the stock length, so that the results are those of the stock cache bit for bit
    return boundary == 0 ? std::max<int64_t>(256, GGML_PAD(len, 256)) : GGML_PAD(len, layer.n_pad);
}

bool llama_kv_cache_ragged::ensure(int64_t n_tokens, bool exact) {
    bool synced = false;

    for (auto & layer : layers) {
        const auto len = n_cells(layer);

        bool    fits = true;
        int64_t sum  = 0;
        for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
            fits = fits && len[ih] + n_tokens <= layer.pool.cap(ih);
            sum += len[ih] + n_tokens;
        }
        if (fits) {
            continue;
        }

        // a prompt that arrives in pieces doubles its pool in six steps, a compressed cache stays within 2 %; heads of
        // different lengths grow by the same number of cells, because they fill together
        const int64_t need  = sum/layer.n_head_kv;
        const int64_t slack = exact ? 0 : boundary == 0 ? need/8 : std::max<int64_t>(is_uniform(layer) ? 0 : 16, need/64);
        const int64_t room  = n_tokens + std::min<int64_t>(slack, std::max<int64_t>(0, get_size() - n_pos - n_tokens));

        if (!synced) {
            synchronize();
            synced = true;
        }
        llama_kv_ragged_pool next = layer.copy_pool(layer.pool, layer.capacity(len, room, boundary > 0), len, &meter);
        if (next.empty()) {
            LLAMA_LOG_ERROR("%s: no memory for %" PRId64 " cells per head in layer %u\n", __func__, need, layer.il);
            return false;
        }
        layer.pool = std::move(next);
        epoch++;
    }

    return true;
}

void llama_kv_cache_ragged::append(const llama_ubatch & ubatch) {
    for (uint32_t i = ubatch.n_tokens - std::min(ubatch.n_tokens, n_window); i < ubatch.n_tokens; ++i) {
        ring_pos[ubatch.pos[i] % n_window] = ubatch.pos[i];
    }
    n_pos += ubatch.n_tokens;
}

bool llama_kv_cache_ragged::reserve(int64_t n_tokens) {
    return ensure(std::min<int64_t>(n_tokens, get_size() - n_pos), /*exact =*/ true);
}

void llama_kv_cache_ragged::set_window(uint32_t n) {
    if (n != n_window) {
        synchronize();
        alloc_ring(n);
    }
}

//
// llama_memory_i
//

std::string llama_kv_cache_ragged::check_ubatches(const std::vector<llama_ubatch> & ubatches) const {
    if (!cparams.causal_attn) {
        return "kv_policy: the context was switched to non-causal attention, switch it back";
    }

    // new cells have to be the last ones of every head
    llama_pos pos = n_pos;
    for (const auto & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i, ++pos) {
            if (ubatch.n_seq_id[i] != 1 || ubatch.seq_id[i][0] != 0 || ubatch.pos[i] != pos) {
                return format("kv_policy: batch entry at position %d of sequence %d, expected position %d of sequence 0",
                        ubatch.pos[i], ubatch.seq_id[i][0], pos);
            }
        }
    }
    return "";
}

std::string llama_kv_cache_ragged::prepare_room(const std::vector<llama_ubatch> & ubatches) {
    std::string error = check_ubatches(ubatches);

    int64_t n_tokens = 0;
    for (const auto & ubatch : ubatches) {
        n_tokens += ubatch.n_tokens;
    }
    if (error.empty() && !ensure(n_tokens, /*exact =*/ false)) {
        error = format("kv_policy: no memory for %" PRId64 " more tokens", n_tokens);
    }
    return error;
}

llama_memory_context_ptr llama_kv_cache_ragged::init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) {
    GGML_UNUSED(embd_all);

    const auto fail = [](const std::string & msg) {
        refuse_batch(msg);
        return std::make_unique<llama_kv_cache_ragged_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    };

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    for (auto ubatch = balloc.split_simple(n_ubatch); ubatch.n_tokens > 0; ubatch = balloc.split_simple(n_ubatch)) {
        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    const std::string error = check_ubatches(ubatches);
    if (!error.empty()) {
        return fail(error);
    }

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return fail("kv_policy: the batch cannot be split into ubatches");
    }

    auto sinfos = prepare(ubatches);
    if (sinfos.empty()) {
        return fail(format("kv_policy: %u positions of %u are taken, no room for %d more", n_pos, get_size(), (int) balloc.get_n_tokens()));
    }

    return llama_memory_context_ptr(llama_kv_ragged_context_make(this, std::move(sinfos), std::move(ubatches)));
}

llama_memory_context_ptr llama_kv_cache_ragged::init_full() {
    return std::make_unique<llama_kv_cache_ragged_context>(this);
}

llama_memory_context_ptr llama_kv_cache_ragged::init_update(llama_context * lctx, bool optimize) {
    this->lctx = lctx;

    return llama_kv_cache::init_update(lctx, optimize);
}

bool llama_kv_cache_ragged::get_can_shift() const {
    return false;
}

void llama_kv_cache_ragged::clear(bool data) {
    synchronize();

    llama_kv_cache::clear(data);

    snapshot_drop();
    for (auto & layer : layers) {
        layer.pool     = {};
        layer.boundary = 0;
        for (auto & kept : layer.kept) {
            kept.clear();
        }
    }
    ring_pos.assign(n_window, -1);
    llama_kv_ragged_trim();

    n_pos    = 0;
    boundary = 0;
    epoch++;
}

// sequences other than 0 are empty
static bool rm_nothing(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos n_pos) {
    return seq_id > 0 || p0 >= n_pos || (p1 >= 0 && p1 <= p0);
}

bool llama_kv_cache_ragged::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    p0 = std::max(p0, 0);

    if (rm_nothing(seq_id, p0, p1, n_pos)) {
        return true;
    }

    if (p1 >= 0 && p1 < (llama_pos) n_pos) {
        LLAMA_LOG_DEBUG("%s: [%d, %d) is not a tail of the %u positions\n", __func__, p0, p1, n_pos);
        return false;
    }

    if (p0 > 0 && p0 < (llama_pos) boundary) {
        LLAMA_LOG_DEBUG("%s: position %d lies in what was compacted (below %u)\n", __func__, p0, boundary);
        return false;
    }
    return true;
}

bool llama_kv_cache_ragged::can_rm_window(const llama_kv_cache & swa, llama_pos p0) const {
    if (p0 <= 0 || swa.seq_pos_max(0) < p0) {
        return true;
    }

    // a window cache overwrites the oldest positions; the newest of those it lost has to be out of sight
    const llama_pos pos_min = swa.seq_pos_min(0);
    if (pos_min > 0 && !llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, pos_min - 1, p0)) {
        LLAMA_LOG_DEBUG("%s: the window before position %d is gone (below %d)\n", __func__, p0, pos_min);
        return false;
    }
    return true;
}

bool llama_kv_cache_ragged::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);

    if (!can_rm(seq_id, p0, p1)) {
        return false;
    }
    if (rm_nothing(seq_id, p0, p1, n_pos)) {
        return true;
    }
    if (p0 == 0) {
        clear(false);
        return true;
    }

    llama_kv_cache::seq_rm(0, p0, -1);
    n_pos = p0;
    for (auto & pos : ring_pos) {
        pos = pos < p0 ? pos : -1;
    }
    return true;
}

void llama_kv_cache_ragged::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    if (seq_id_src != seq_id_dst) {
        LLAMA_LOG_ERROR("%s: a cache with a policy holds one sequence, copying %d to %d is refused\n", __func__, seq_id_src, seq_id_dst);
    }
}

void llama_kv_cache_ragged::seq_keep(llama_seq_id seq_id) {
    if (seq_id != 0) {
        clear(false);
    }
}

void llama_kv_cache_ragged::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    LLAMA_LOG_ERROR("%s: positions of a cache with a policy are final, shifting sequence %d, [%d, %d) by %d is refused\n", __func__, seq_id, p0, p1, shift);
}

void llama_kv_cache_ragged::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    LLAMA_LOG_ERROR("%s: positions of a cache with a policy are final, dividing sequence %d, [%d, %d) by %d is refused\n", __func__, seq_id, p0, p1, d);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_ragged::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & layer : layers) {
        res[layer.buft] += layer.pool.bytes();
    }
    for (const auto * bufs : { &ring_bufs, &tables_bufs }) {
        for (const auto & buf : *bufs) {
            res[ggml_backend_buffer_get_type(buf.get())] += ggml_backend_buffer_get_size(buf.get());
        }
    }
    return res;
}

void llama_kv_cache_ragged::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(io);
    GGML_UNUSED(seq_id);
    GGML_UNUSED(flags);
    llama_kv_ragged_refuse("saving the state of a cache with a policy is not supported yet");
}

void llama_kv_cache_ragged::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_UNUSED(io);
    GGML_UNUSED(seq_id);
    GGML_UNUSED(flags);
    llama_kv_ragged_refuse("loading a state into a cache with a policy is not supported yet");
}

void llama_kv_cache_ragged::get_stats(wkv_stats & stats) const {
    stats = {};
    stats.n_layer        = layers.size();
    stats.n_head_kv      = layers[0].n_head_kv;
    stats.n_gqa          = layers[0].n_head/layers[0].n_head_kv;
    stats.n_past         = n_pos;
    stats.n_boundary     = boundary;
    stats.n_compactions  = n_compactions;
    stats.n_window       = n_window;
    stats.type_k         = layers[0].type_k;
    stats.type_v         = layers[0].type_v;
    stats.bytes_live     = meter.live;
    stats.bytes_peak     = meter.peak;
    stats.bytes_released = bytes_released;
    stats.t_score_ms     = t_score_ms;
    stats.t_select_ms    = t_select_ms;
    stats.t_gather_ms    = t_gather_ms;
    for (const auto & layer : layers) {
        stats.bytes_pool += layer.pool.bytes();
        stats.bytes_full += layer.n_head_kv*n_pos*
            (ggml_row_size(stock_type_k, layer.n_embd_head_k) + ggml_row_size(stock_type_v, layer.n_embd_head_v));
    }
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
    const llama_ubatch & ubatch = get_ubatch();

    if (!llama_kv_cache_context::apply()) {
        return false;
    }

    kv->append(ubatch);
    return true;
}

llama_kv_cache_ragged_context::layer_view llama_kv_cache_ragged_context::get_view(ggml_context * ctx, int32_t il) const {
    const auto & layer = kv->layers.at(kv->map_layer.at(il));

    if (!full) {
        const int64_t n_cells = kv->n_cells(layer, 0);
        return { layer.pool.k, layer.pool.v, kv->is_stock(layer), layer.pool.cap(0), n_cells, kv->n_read(layer, n_cells) };
    }

    const int64_t n = kv->get_size();

    layer_view res = { nullptr, nullptr, kv->is_stock(layer), n, n, n };
    if (ctx) {
        res.k = ggml_new_tensor_2d(ctx, layer.type_k, layer.n_embd_head_k, n*layer.n_head_kv);
        res.v = ggml_new_tensor_2d(ctx, layer.type_v, layer.n_embd_head_v, n*layer.n_head_kv);
        res.k->buffer = res.v->buffer = kv->bufs_reserve.at(layer.buft).get();
    }
    return res;
}

std::pair<ggml_backend_dev_t, ggml_tensor *> llama_kv_cache_ragged_context::get_table(int32_t il, int64_t n_tokens) const {
    const auto it = kv->tables.find(kv->layers.at(kv->map_layer.at(il)).dev);
    if (it == kv->tables.end() || n_tokens > N_TOKENS_TABLE) {
        return { nullptr, nullptr };
    }
    return { it->first, it->second.tensor };
}

void llama_kv_cache_ragged_context::set_table(ggml_backend_dev_t dev, ggml_tensor * table, const std::vector<int32_t> & data) const {
    const size_t size = data.size()*sizeof(data[0]);

    if (!dev) {
        ggml_backend_tensor_set(table, data.data(), 0, size);
        return;
    }
    auto & own  = kv->tables.at(dev);
    auto & held = own.data[own.i_data++ % own.data.size()];
    held = data;

    // in the order of the device's work: graphs before this one may still read the table
    ggml_backend_t backend = llama_kv_ragged_backend(*kv->lctx, dev);
    GGML_ASSERT(backend);
    ggml_backend_tensor_set_async(backend, table, held.data(), 0, size);
}

void llama_kv_cache_ragged_context::get_ranges(int32_t il, int32_t * ranges) const {
    const auto & layer = kv->layers.at(kv->map_layer.at(il));

    for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
        ranges[2*ih + 0] = layer.pool.first[ih];
        ranges[2*ih + 1] = kv->n_cells(layer, ih);
    }
}

int32_t llama_kv_cache_ragged_context::get_index(int32_t il) const {
    return kv->map_layer.at(il);
}

int32_t llama_kv_cache_ragged_context::get_n_layer() const {
    return kv->layers.size();
}

uint64_t llama_kv_cache_ragged_context::get_epoch() const {
    return kv->epoch;
}

uint32_t llama_kv_cache_ragged_context::get_window() const {
    return kv->n_window;
}

uint32_t llama_kv_cache_ragged_context::get_n_pos() const {
    return kv->n_pos;
}
