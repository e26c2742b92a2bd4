#include "llama-kv-cache-ragged.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged-context.h"
#include "llama-kv-ragged-create.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>

//
// llama_kv_cache_ragged
//

llama_kv_cache_ragged::llama_kv_cache_ragged(
        const llama_model     & model,
        const llama_cparams   & cparams,
              ggml_type         type_k,
              ggml_type         type_v,
              uint32_t          n_observed,
        const layer_filter_cb & filter) :
    llama_kv_cache(model, model.hparams, type_k, type_v, /*v_trans =*/ false, cparams.offload_kqv,
            /*unified =*/ true, cparams.n_ctx_seq, cparams.n_seq_max, /*n_pad =*/ 1, /*n_swa =*/ 0, LLAMA_SWA_TYPE_NONE,
            /*mem_other =*/ nullptr, /*filter =*/ [](int32_t) { return false; }, nullptr, nullptr),
    model(model), hparams(model.hparams), cparams(cparams) {
    GGML_ASSERT(n_observed > 0);

    layers = llama_kv_ragged_make_layers(model, cparams, type_k, type_v, filter);
    pools.resize(layers.size());

    map_layer.assign(hparams.n_layer_all, -1);
    for (size_t i = 0; i < layers.size(); ++i) {
        map_layer[layers[i].il] = i;

        auto & buf = bufs_reserve[layers[i].buft];
        if (!buf) {
            buf.reset(ggml_backend_buft_alloc_buffer(layers[i].buft, 0));
        }
    }

    set_observed(n_observed);
    tables.init(layers, meter);
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
            return format("the attention of layer %u does not run through the KV cache, use the model without a policy", layer.il);
        }
    }
    return "";
}

std::string llama_kv_cache_ragged::no_ragged_attention(const llama_kv_ragged_layer & layer) {
    return format("%s has no attention over heads of different lengths (layer %u, head size %" PRId64 "%s): choose a policy "
            "that gives all heads of a layer the same number of cells, or keep the cells in host memory, where the CPU attends to them, "
            "with offload_kqv=False (slower), or load the model with n_gpu_layers=0",
            ggml_backend_dev_name(layer.dev), layer.il, layer.n_embd_head_k, layer.sinks ? ", learned attention sinks" : "");
}

llama_kv_ragged_source llama_kv_cache_ragged::get_source(size_t i) const {
    return { hparams, layers[i], pools[i], queries[i].tensor, seq, i };
}

bool llama_kv_cache_ragged::is_stock(size_t i) const {
    const auto & layer = layers[i];

    const bool is_uniform = seq.cells[i].is_uniform();
    if (!layer.has_ragged || attention == ATTENTION_STOCK) {
        return is_uniform;
    }
    if (attention == ATTENTION_RAGGED || !is_uniform) {
        return false;
    }

    // as long as nothing was evicted the logits are those of stock bit for bit; the kernels differ in rounding only, but
    // quantised weights amplify that. Stock's kernel for quantised cells on the CPU is too slow for this to be worth it
    const bool quantised = ggml_is_quantized(layer.type_k) || ggml_is_quantized(layer.type_v);
    return !layer.on_cpu() || (seq.boundary == 0 && !quantised);
}

void llama_kv_cache_ragged::set_attention(attention_type value) {
    attention = value;
    epoch++;
}

void llama_kv_cache_ragged::set_stock_types(ggml_type type_k, ggml_type type_v) {
    stats.stock_type_k = type_k;
    stats.stock_type_v = type_v;
}

int64_t llama_kv_cache_ragged::n_read(size_t i, int64_t len) const {
    // before the first compaction the stock length, so that the results are those of the stock cache bit for bit
    return seq.boundary == 0 ? std::max<int64_t>(256, GGML_PAD(len, 256)) : GGML_PAD(len, layers[i].n_pad);
}

bool llama_kv_cache_ragged::ensure(int64_t n_tokens, bool exact) {
    bool synced = false;

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto len = seq.n_cells(i);

        bool    fits = true;
        int64_t sum  = 0;
        for (size_t ih = 0; ih < len.size(); ++ih) {
            fits = fits && len[ih] + n_tokens <= pools[i].cap(ih);
            sum += len[ih] + n_tokens;
        }
        if (fits) {
            continue;
        }

        // a prompt that arrives in pieces doubles its pool in six steps, a compressed cache stays within 2 %; heads of
        // different lengths grow by the same number of cells, because they fill together
        const int64_t n_mean = sum/(int64_t) len.size();

        int64_t slack = 0;
        if (!exact && seq.boundary == 0) {
            slack = n_mean/8;
        } else if (!exact) {
            slack = std::max<int64_t>(seq.cells[i].is_uniform() ? 0 : 16, n_mean/64);
        }

        const int64_t room = n_tokens + std::min<int64_t>(slack, std::max<int64_t>(0, get_size() - seq.n_pos - n_tokens));

        if (!synced) {
            synchronize();
            synced = true;
        }
        llama_kv_ragged_pool next = layers[i].copy_pool(pools[i], layers[i].capacity(len, room, seq.boundary > 0), len, &meter);
        if (next.empty()) {
            LLAMA_LOG_ERROR("%s: no memory for %" PRId64 " cells per head in layer %u\n", __func__, n_mean, layers[i].il);
            return false;
        }
        pools[i] = std::move(next);
        epoch++;
    }

    return true;
}

bool llama_kv_cache_ragged::reserve(int64_t n_tokens) {
    return ensure(std::min<int64_t>(n_tokens, get_size() - seq.n_pos), /*exact =*/ true);
}

void llama_kv_cache_ragged::set_observed(uint32_t n) {
    n = std::min(n, get_size()); // there are no more
    if (n == seq.observed.n_observed) {
        return;
    }
    synchronize();

    std::vector<llama_kv_ragged_buffer> next;
    for (const auto & layer : layers) {
        next.push_back(llama_kv_ragged_buffer::make(layer.buft, GGML_TYPE_F16, { layer.n_embd_head_k, 2*int64_t(n), layer.n_head },
                    format("ragged_queries_l%u", layer.il).c_str(), &meter));
        if (next.back().empty()) {
            llama_kv_ragged_refuse(format("no memory for %u observed queries of layer %u", n, layer.il));
        }
    }
    if (seq.cells.empty()) {
        seq = llama_kv_ragged_seq(layers, n);
    }
    seq.observed = llama_kv_ragged_observed(n);
    queries      = std::move(next);
    epoch++;
}

void llama_kv_cache_ragged::end_prompt() {
    seq.end_prompt();
}

void llama_kv_cache_ragged::set_on_prompt(std::function<void()> fn) {
    on_prompt = std::move(fn);
    due       = false;
}

void llama_kv_cache_ragged::check_idle() const {
    if (busy) {
        throw std::invalid_argument("a selection is running, the cache cannot be changed until it has returned");
    }
}

std::string llama_kv_cache_ragged::check_ubatches(const std::vector<llama_ubatch> & ubatches) const {
    if (!cparams.causal_attn) {
        return "the context was switched to non-causal attention, switch it back";
    }

    // new cells have to be the last ones of every head
    llama_pos pos = seq.n_pos;
    for (const auto & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i, ++pos) {
            if (ubatch.n_seq_id[i] != 1 || ubatch.seq_id[i][0] != 0 || ubatch.pos[i] != pos) {
                return format("batch entry at position %d of sequence %d, expected position %d of sequence 0",
                        ubatch.pos[i], ubatch.seq_id[i][0], pos);
            }
        }
    }
    return "";
}

std::string llama_kv_cache_ragged::prepare_room(const std::vector<llama_ubatch> & ubatches) {
    due = false;

    const std::string error = check_ubatches(ubatches);
    if (!error.empty()) {
        return error;
    }

    uint32_t n_tokens = 0;
    for (const auto & ubatch : ubatches) {
        n_tokens += ubatch.n_tokens;
    }

    due = on_prompt && seq.in_prompt() && n_tokens == 1;
    if (due) {
        return "";
    }

    try {
        if (ensure(n_tokens, /*exact =*/ false)) {
            return "";
        }
    } catch (const std::bad_alloc &) {
        // as if a device had none
    }
    return format("no memory for %u more tokens behind %u", n_tokens, seq.n_pos);
}

//
// llama_memory_i
//

llama_memory_context_ptr llama_kv_cache_ragged::init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) {
    GGML_UNUSED(embd_all);

    const auto fail = [](const std::string & msg) {
        llama_kv_ragged_refuse_batch(msg);
        return std::make_unique<llama_kv_cache_ragged_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    };

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = balloc.split_simple(n_ubatch);

        if (ubatch.n_tokens == 0) {
            break;
        }

        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return fail("the batch cannot be split into ubatches");
    }

    // a batch that cannot follow is refused for that and not for want of room
    const std::string error = check_ubatches(ubatches);
    if (!error.empty()) {
        return fail(error);
    }

    auto sinfos = prepare(ubatches);
    if (sinfos.empty()) {
        return fail(format("%u positions of %u are taken, no room for %d more", seq.n_pos, get_size(), (int) balloc.get_n_tokens()));
    }

    return llama_memory_context_ptr(llama_kv_ragged_context_make(this, std::move(sinfos), std::move(ubatches)));
}

llama_memory_context_ptr llama_kv_cache_ragged::init_full() {
    return std::make_unique<llama_kv_cache_ragged_context>(this);
}

llama_memory_context_ptr llama_kv_cache_ragged::init_update(llama_context * lctx, bool optimize) {
    this->lctx = lctx;

    if (optimize && due) {
        due = false;
        return std::make_unique<llama_kv_cache_ragged_context>(this, [this, fn = on_prompt] {
            end_prompt();
            fn(); // a copy: it may ask for no more calls
        });
    }

    return llama_kv_cache::init_update(lctx, optimize);
}

bool llama_kv_cache_ragged::get_can_shift() const {
    return false;
}

void llama_kv_cache_ragged::clear(bool data) {
    if (llama_kv_ragged_is_busy(this)) {
        return;
    }
    synchronize();

    llama_kv_cache::clear(data);

    snapshot_drop();
    for (auto & pool : pools) {
        pool = {};
    }
    llama_kv_ragged_trim();

    seq.clear();
    epoch++;
}

// sequences other than 0 are empty
static bool rm_nothing(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos n_pos) {
    return seq_id > 0 || p0 >= n_pos || (p1 >= 0 && p1 <= p0);
}

bool llama_kv_cache_ragged::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    p0 = std::max(p0, 0);

    if (busy) {
        LLAMA_LOG_ERROR("%s: a selection is running, nothing is removed\n", __func__);
        return false;
    }

    if (rm_nothing(seq_id, p0, p1, seq.n_pos)) {
        return true;
    }

    if (p1 >= 0 && p1 < (llama_pos) seq.n_pos) {
        LLAMA_LOG_DEBUG("%s: [%d, %d) is not a tail of the %u positions\n", __func__, p0, p1, seq.n_pos);
        return false;
    }

    if (p0 > 0 && p0 < (llama_pos) seq.boundary) {
        LLAMA_LOG_DEBUG("%s: position %d lies in what was compacted (below %u)\n", __func__, p0, seq.boundary);
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
    if (rm_nothing(seq_id, p0, p1, seq.n_pos)) {
        return true;
    }
    if (p0 == 0) {
        clear(false);
        return true;
    }

    llama_kv_cache::seq_rm(0, p0, -1);
    seq.trim(p0);
    return true;
}

void llama_kv_cache_ragged::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    llama_kv_ragged_no_copy(this, seq_id_src, seq_id_dst);
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
    auto res = tables.memory_breakdown();
    for (size_t i = 0; i < layers.size(); ++i) {
        res[layers[i].buft] += pools[i].bytes() + queries[i].bytes();
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
