#include "llama-kv-cache-ragged.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged-context.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-state.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

//
// llama_kv_cache_ragged
//

llama_kv_cache_ragged::llama_kv_cache_ragged(
        const llama_model     & model,
        const llama_cparams   & cparams,
              ggml_type         type_k,
              ggml_type         type_v,
              ggml_type         stock_type_k,
              ggml_type         stock_type_v,
              uint32_t          n_observed,
        const layer_filter_cb & filter) :
    llama_kv_cache(model, model.hparams, type_k, type_v, /*v_trans =*/ false, cparams.offload_kqv,
            /*unified =*/ true, cparams.n_ctx_seq, cparams.n_seq_max, /*n_pad =*/ 1, /*n_swa =*/ 0, LLAMA_SWA_TYPE_NONE,
            /*mem_other =*/ nullptr, /*filter =*/ [](int32_t) { return false; }, nullptr, nullptr),
    hparams(model.hparams),
    cparams(cparams),
    layers(llama_kv_ragged_make_layers(model, cparams, type_k, type_v, filter)),
    map_layer(hparams.n_layer_all, -1),
    seq(layers, cparams.n_ctx_seq, n_observed, stats.meter),
    arch(model.arch),
    ropes(layers.size()) {
    if (cparams.n_seq_max > 1) {
        llama_kv_ragged_refuse(format("n_seq_max is %u, expected 1: the cache holds one sequence", cparams.n_seq_max));
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        map_layer[layers[i].il] = i;
    }
    tables.init(layers, stats.meter);

    stats.stock_type_k = stock_type_k;
    stats.stock_type_v = stock_type_v;
}

//
// llama_memory_i
//

llama_memory_context_ptr llama_kv_cache_ragged::init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) {
    GGML_UNUSED(embd_all);

    do {
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
            // failed to find a suitable split
            break;
        }

        auto sinfos = prepare(ubatches);
        if (sinfos.empty()) {
            break;
        }

        return llama_memory_context_ptr(llama_kv_ragged_context_make(this, std::move(sinfos), std::move(ubatches)));
    } while (false);

    return std::make_unique<llama_kv_cache_ragged_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr llama_kv_cache_ragged::init_full() {
    return std::make_unique<llama_kv_cache_ragged_context>(this);
}

llama_memory_context_ptr llama_kv_cache_ragged::init_update(llama_context * lctx, bool optimize) {
    this->lctx = lctx;
    tables.bind(*lctx);

    if (optimize && due) {
        due = false;
        return std::make_unique<llama_kv_cache_ragged_context>(this, [this, fn = on_prompt] {
            end_prompt();
            {
                const llama_kv_ragged_while guard(prompting);
                fn(); // a copy: it may ask for no more calls
            }
            llama_kv_ragged_set_error(""); // what failed in there is no reason of this batch
        });
    }

    return llama_kv_cache::init_update(lctx, optimize);
}

void llama_kv_cache_ragged::clear(bool data) {
    if (llama_kv_ragged_is_busy(this)) {
        return;
    }
    synchronize();

    llama_kv_cache::clear(data);

    snapshot_drop();
    visit.reset();
    hole = {};
    seq.clear();
    llama_kv_ragged_trim();
    epoch++;
    due = false;
}

// sequences other than 0 are empty
static bool rm_nothing(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos n_pos) {
    return seq_id > 0 || p0 >= n_pos || (p1 >= 0 && p1 <= p0);
}

bool llama_kv_cache_ragged::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);

    if (!can_rm(seq_id, p0, p1)) {
        return false;
    }
    if (rm_nothing(seq_id, p0, p1, seq.n_pos)) {
        return true;
    }
    if (p1 >= 0 && p1 < (llama_pos) seq.n_pos) {
        hole = { p0, p1 };
        return true;
    }
    if (!hole.empty() && p0 <= hole.p1) {
        p0   = std::min(p0, hole.p0);
        hole = {};
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

void llama_kv_cache_ragged::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);
    GGML_UNUSED(d);
    llama_kv_ragged_no_div(this);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_ragged::memory_breakdown() const {
    auto res = tables.memory_breakdown();
    for (size_t i = 0; i < layers.size(); ++i) {
        res[layers[i].buft] += seq.cells[i].pool.bytes() + seq.observed.queries[i].bytes();
    }
    return res;
}

void llama_kv_cache_ragged::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    llama_kv_ragged_state_write(this, nullptr, nullptr, io, seq_id, flags);
}

void llama_kv_cache_ragged::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    llama_kv_ragged_state_read(this, nullptr, nullptr, io, seq_id, flags);
}

//
// llama_kv_cache_ragged specific API
//

bool llama_kv_cache_ragged::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1, const llama_kv_cache * swa) const {
    p0 = std::max(p0, 0);

    if (is_busy()) {
        LLAMA_LOG_ERROR("%s: a selection is running, nothing is removed\n", __func__);
        return false;
    }

    if (rm_nothing(seq_id, p0, p1, std::max<llama_pos>(seq.n_pos, swa ? swa->seq_pos_max(0) + 1 : 0))) {
        return true;
    }

    if (p1 >= 0 && p1 < (llama_pos) seq.n_pos) {
        return can_open(p0, p1, swa);
    }
    if (!hole.empty() && p0 <= hole.p1) {
        if (p0 > hole.p0 && llm_arch_is_hybrid(arch)) {
            LLAMA_LOG_DEBUG("%s: position %d lies in a hole, and the recurrent state would stay behind its begin (%d)\n", __func__, p0, hole.p0);
            return false;
        }
        p0 = std::min(p0, hole.p0);
    }

    if (visit && p0 > 0 && p0 < (llama_pos) visit->n_pos) {
        LLAMA_LOG_DEBUG("%s: position %d is older than the tokens that are only observed (from %u)\n", __func__, p0, visit->n_pos);
        return false;
    }

    if (p0 > 0 && p0 < (llama_pos) seq.boundary) {
        LLAMA_LOG_DEBUG("%s: position %d lies in what was compacted (below %u)\n", __func__, p0, seq.boundary);
        return false;
    }

    // a window cache overwrites the oldest positions; the newest of those it lost has to be out of sight of a query at p0
    const llama_pos pos_min = p0 > 0 && swa ? swa->seq_pos_min(0) : 0;
    if (pos_min > 0 && !llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, pos_min - 1, p0)) {
        LLAMA_LOG_DEBUG("%s: the window before position %d is gone (below %d)\n", __func__, p0, pos_min);
        return false;
    }
    return true;
}

void llama_kv_cache_ragged::synchronize() const {
    if (lctx && lctx->get_sched()) {
        ggml_backend_sched_synchronize(lctx->get_sched());
    }
}

void llama_kv_cache_ragged::make_room(int64_t n_tokens, bool exact) {
    if (!seq.has_room(n_tokens)) {
        synchronize();
        epoch++;
        seq.reserve(n_tokens, exact);
    }
}

void llama_kv_cache_ragged::reserve(int64_t n_tokens) {
    make_room(std::min<int64_t>(n_tokens, get_size() - seq.n_pos), /*exact =*/ true);
}

void llama_kv_cache_ragged::set_observed(uint32_t n_observed) {
    synchronize();
    seq.set_observed(n_observed);
    epoch++;
}

void llama_kv_cache_ragged::set_attention(attention_type value) {
    attention = value;
    epoch++;
}

void llama_kv_cache_ragged::set_on_prompt(std::function<void()> fn) {
    on_prompt = std::move(fn);
    due       = false;
}

void llama_kv_cache_ragged::end_prompt() {
    seq.end_prompt();
}

void llama_kv_cache_ragged::replace(llama_kv_ragged_seq && next) {
    synchronize();

    snapshot_drop();
    visit.reset();
    hole = {};
    seq = std::move(next);
    llama_kv_ragged_trim();
    epoch++;
    due = false;
}

void llama_kv_cache_ragged::snapshot_save(llama_memory_i & mem) {
    check_not_observing();
    check_closed();
    synchronize();
    snapshot = std::make_unique<llama_kv_ragged_snapshot>(seq, *this, mem);
}

void llama_kv_cache_ragged::snapshot_restore() {
    if (!snapshot || snapshot->seq.observed.n_observed != seq.observed.n_observed) {
        llama_kv_ragged_refuse("no snapshot to go back to: none was saved, the cache was cleared or its observed queries resized since");
    }
    synchronize();

    auto next = snapshot->seq.copy(/*exact =*/ false); // nothing changes until it exists
    snapshot->others.restore();
    next.n_room = seq.n_room; // the context's
    seq = std::move(next);
    visit.reset();
    hole = {};
    epoch++;
}

void llama_kv_cache_ragged::snapshot_drop() {
    snapshot.reset();
}

void llama_kv_cache_ragged::check_not_observing() const {
    if (visit) {
        throw std::invalid_argument("tokens that are only observed are still in the cache: end that first (wkv_observe_end)");
    }
}

void llama_kv_cache_ragged::observe_begin(llama_memory_i & mem, std::unique_ptr<llama_kv_ragged_replay> replay) {
    check_not_observing();
    check_closed();
    synchronize();

    llama_kv_ragged_others others(*this, mem);
    auto claim = std::make_unique<llama_kv_ragged_claim>(stats.meter, others.bytes());
    const bool repeats = replay != nullptr;
    visit = std::make_unique<llama_kv_ragged_visit>(llama_kv_ragged_visit {
            seq.n_pos, seq.prompt_begin, seq.observed.n_prompt, std::move(others), std::move(claim), std::move(replay) });
    if (repeats) {
        seq.observed.n_prompt = seq.n_pos; // the queries that are held are not forgotten for those who repeat
        epoch++;                           // graphs have more nodes meanwhile
    }
}

void llama_kv_cache_ragged::drop_replay() {
    if (visit) {
        visit->dropped = true; // graphs may still point to it
    }
}

bool llama_kv_cache_ragged::observe_end() {
    if (!visit) {
        seq.observed.trim(seq.n_pos); // nobody compacted
        return false;
    }
    synchronize();
    const auto own = std::move(visit);
    epoch += own->replay != nullptr;
    const int64_t n_seen = int64_t(seq.n_pos) - own->n_pos;
    if (seq.n_pos > own->n_pos) {
        own->others.restore();
        seq.withdraw(own->n_pos);
    }
    if (seq.n_pos == own->n_pos) {
        seq.prompt_begin      = own->prompt_begin;
        seq.observed.n_prompt = own->n_prompt;
        if (own->replay) {
            seq.observed.trim(seq.n_pos); // they do not observe
        }
        if (own->replay && !own->dropped && n_seen == own->replay->get_n_tokens()) {
            own->replay->give(seq);
        }
    }
    return true;
}

bool llama_kv_cache_ragged::prepare_room(const std::vector<llama_ubatch> & ubatches) {
    due = false;

    if (!cparams.causal_attn) {
        return llama_kv_ragged_refuse_batch("the context was switched to non-causal attention, switch it back");
    }

    if (!hole.empty()) {
        return llama_kv_ragged_refuse_batch(format("the positions %d to %d were removed and the ones behind them did not move: call "
                "llama_memory_seq_add(mem, 0, %d, -1, %d) before the next batch", hole.p0, hole.p1 - 1, hole.p1, -hole.n()));
    }

    // new cells have to be the last ones of every head
    llama_pos pos = seq.n_pos;
    for (const auto & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i, ++pos) {
            if (ubatch.n_seq_id[i] != 1 || ubatch.seq_id[i][0] != 0 || ubatch.pos[i] != pos) {
                return llama_kv_ragged_refuse_batch(format("batch entry at position %d of sequence %d, expected position %d of sequence 0",
                        ubatch.pos[i], ubatch.seq_id[i][0], pos));
            }
        }
    }
    const uint32_t n_tokens = pos - seq.n_pos;

    due = on_prompt && !visit && seq.in_prompt() && n_tokens == 1;
    if (due) {
        return false;
    }

    try {
        make_room(n_tokens, /*exact =*/ false);
    } catch (const std::exception &) { // a device has none, or the host
        return llama_kv_ragged_refuse_batch(format("no memory for %u more tokens behind %u", n_tokens, seq.n_pos));
    }
    return true;
}

std::vector<int64_t> llama_kv_cache_ragged::append(uint32_t n_tokens) {
    return seq.append(n_tokens, on_prompt && !visit);
}

llama_kv_ragged_kernel llama_kv_cache_ragged::get_kernel(size_t i, int64_t n_tokens) const {
    const auto & layer = layers[i];

    const bool is_uniform = seq.cells[i].is_uniform();
    if (!layer.has_ragged || attention == ATTENTION_STOCK) {
        return is_uniform ? LLAMA_KV_RAGGED_KERNEL_STOCK : layer.has_by_head() ? LLAMA_KV_RAGGED_KERNEL_BY_HEAD : LLAMA_KV_RAGGED_KERNEL_RAGGED;
    }
    if (attention == ATTENTION_RAGGED) {
        return LLAMA_KV_RAGGED_KERNEL_RAGGED;
    }
    if (!is_uniform) {
        // With many tokens stock's tensor-core kernels are far ahead of ours: 512 tokens at 16,384 cells took 499 us against 2,385 on an
        // H100, all heads in one launch. That 8 launches of an eighth each stay below 1.3 times as much is an estimate. Since then CUDA has
        // flash-attn-ragged-mma.h, which would attend to all heads in one launch; whether that is faster nobody has measured
        return layer.has_by_head() && n_tokens > llama_kv_ragged_tables::N_TOKENS_MAX ? LLAMA_KV_RAGGED_KERNEL_BY_HEAD : LLAMA_KV_RAGGED_KERNEL_RAGGED;
    }

    // as long as nothing was evicted the logits are those of stock bit for bit; the kernels differ in rounding only, but
    // quantised weights amplify that. Stock's kernel for quantised cells on the CPU is too slow for this to be worth it
    if (visit && visit->replay && layer.on_cpu()) {
        return LLAMA_KV_RAGGED_KERNEL_RAGGED; // nothing of it stays, and ours is faster there
    }
    const bool quantised = ggml_is_quantized(layer.type_k) || ggml_is_quantized(layer.type_v);
    return !layer.on_cpu() || (seq.boundary == 0 && !quantised) ? LLAMA_KV_RAGGED_KERNEL_STOCK : LLAMA_KV_RAGGED_KERNEL_RAGGED;
}

//
// what the memories of upstream's ask
//

static const llama_kv_cache_ragged * as_ragged(const llama_kv_cache * kv) {
    return dynamic_cast<const llama_kv_cache_ragged *>(kv);
}

size_t llama_kv_ragged_n_nodes(llama_memory_i * mem) {
    size_t res = 0;
    if (const auto * ragged = llama_kv_ragged_find(mem)) {
        for (const auto & layer : ragged->get_layers()) {
            res += layer.n_nodes_by_head();
        }
    }
    return res;
}

llama_seq_id llama_kv_ragged_seq_id(const llama_kv_cache * kv, llama_seq_id seq_id) {
    return as_ragged(kv) ? std::max(seq_id, 0) : seq_id;
}

bool llama_kv_ragged_can_rm(const llama_kv_cache * kv, const llama_kv_cache * swa, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const auto * ragged = as_ragged(kv);
    return !ragged || ragged->can_rm(seq_id, p0, p1, swa);
}

bool llama_kv_ragged_no_div(const llama_kv_cache * kv) {
    const bool res = as_ragged(kv) != nullptr;
    if (res) {
        LLAMA_LOG_ERROR("%s: positions of a cache with a policy move down as a whole, dividing them is refused\n", __func__);
    }
    return res;
}

bool llama_kv_ragged_no_copy(const llama_kv_cache * kv, llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    const bool res = seq_id_src != seq_id_dst && as_ragged(kv);
    if (res) {
        LLAMA_LOG_ERROR("%s: a cache with a policy holds one sequence, copying %d to %d is refused\n", __func__, seq_id_src, seq_id_dst);
    }
    return res;
}

bool llama_kv_ragged_is_busy(const llama_kv_cache * kv) {
    const auto * ragged = as_ragged(kv);
    const bool   res    = ragged && ragged->is_busy();
    if (res) {
        LLAMA_LOG_ERROR("%s: a selection is running, the cache stays as it is\n", __func__);
    }
    return res;
}

void llama_kv_ragged_check_idle(const llama_kv_cache * kv) {
    const auto * ragged = as_ragged(kv);
    if (ragged && ragged->is_busy()) {
        throw std::invalid_argument("a selection is running, the cache cannot be changed until it has returned");
    }
}

bool llama_kv_ragged_no_batch(llama_memory_i * mem) {
    const auto * ragged = llama_kv_ragged_find(mem);
    if (!ragged) {
        return false;
    }
    llama_kv_ragged_set_error("");
    return ragged->is_busy() && !llama_kv_ragged_refuse_batch("a selection is running, nothing can be evaluated until it has returned");
}

bool llama_kv_ragged_no_slot(llama_memory_i * mem, uint32_t n_tokens) {
    const auto * ragged = llama_kv_ragged_find(mem);
    if (!ragged) {
        return false;
    }
    const uint32_t n_pos = ragged->get_seq().n_pos;
    if (n_pos + n_tokens > ragged->get_size()) {
        return !llama_kv_ragged_refuse_batch(format("%u positions of %u are taken, no room for %u more",
                    n_pos, ragged->get_size(), n_tokens));
    }
    return llama_kv_ragged_get_error()[0] != '\0';
}

void llama_kv_ragged_failed(llama_memory_i * mem, llama_pos p0, uint32_t n_tokens, ggml_status status) {
    if (!llama_kv_ragged_find(mem)) {
        return;
    }
    const char * what = status == GGML_STATUS_ABORTED      ? "evaluation was aborted" :
                        status == GGML_STATUS_ALLOC_FAILED ? "memory ran out" : "the backend failed or found no memory";
    const char * rest = "they are taken back, what was there before stays";
    if (mem->seq_pos_max(0) >= p0) {
        mem->clear(true);
        rest = "a recurrent state cannot go back, the cache was cleared";
    }
    llama_kv_ragged_refuse_batch(format("%s while %u tokens were computed; %s", what, n_tokens, rest));
}
