#pragma once

#include "llama-kv-cache.h"
#include "llama-kv-ragged-compact.h"
#include "llama-kv-ragged-layer.h"
#include "llama-kv-ragged-seq.h"
#include "llama-kv-ragged-state.h"
#include "llama-kv-ragged-stats.h"
#include "llama-kv-ragged-table.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

class llama_kv_cache_ragged_context;

//
// llama_kv_cache_ragged
//

// A KV cache in which every head of every layer holds its own cells, in pools of its own.
//
// The base class keeps the cell metadata: it is constructed without layers and keeps its slot search, sequence operations and
// position checks. The pools hold what attention reads; a head's cells are in position order, new cells are always last, so that
// a length replaces the cell metadata and a triangle replaces the mask search.

class llama_kv_cache_ragged : public llama_kv_cache {
public:
    // which attention a layer runs whose heads hold equally many cells, see wkv_attention
    enum attention_type { ATTENTION_AUTO, ATTENTION_STOCK, ATTENTION_RAGGED };

    // holds the layers that the filter accepts, all without one
    // throws std::runtime_error with the reason if a layer or the backend cannot be served
    llama_kv_cache_ragged(
            const llama_model     & model,
            const llama_cparams   & cparams,
                  ggml_type         type_k,
                  ggml_type         type_v,
                  uint32_t          n_observed,
            const layer_filter_cb & filter);

    ~llama_kv_cache_ragged() = default;

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(
            llama_batch_allocr & balloc,
            uint32_t n_ubatch,
            bool embd_all) override;

    llama_memory_context_ptr init_full() override;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_ragged specific API
    //

    // what seq_rm() will answer
    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // the same for a window cache of the same sequence: whether the query at p0 would find the cells that it looks at
    bool can_rm_window(const llama_kv_cache & swa, llama_pos p0) const;

    // Room for ubatches that follow what the cache holds. Moves cells to larger pools where it has to, changes nothing else.
    // "" or why they cannot follow. Where a compaction has to come first there is no room yet and is_due() is true: the batch
    // fails, init_update() runs the compaction, and upstream tries the batch again.
    std::string prepare_room(const std::vector<llama_ubatch> & ubatches);

    bool is_due() const { return due; }

    // room for n_tokens more positions without slack
    bool reserve(int64_t n_tokens);

    // resize the observed queries, which are forgotten; throws std::runtime_error and changes nothing if memory runs out
    void set_observed(uint32_t n_observed);

    // the positions so far end a prompt, whose last queries stay until the next one ends
    void end_prompt();

    // called before a single token is evaluated behind a prompt that nobody has ended; it may compact
    void set_on_prompt(std::function<void()> fn);

    // keep the planned cells, free the others; throws std::runtime_error if memory runs out or a graph fails: the layers before
    // are compacted then, the others hold all their cells
    void commit(llama_context & lctx, const llama_kv_ragged_plan & plan);

    // while a selection runs nothing else may change the cache
    void set_busy(bool value) { busy = value; }
    bool is_busy() const      { return busy; }

    // throws std::invalid_argument while a selection runs
    void check_idle() const;

    // keep a copy of the cache, go back to it any number of times, give it up; clearing the cache gives it up as well
    // mem is the memory of the context that holds this cache; what it keeps for other layers is part of the copy
    // false if memory runs out or there is none
    bool snapshot_save(llama_memory_i & mem);
    bool snapshot_restore();
    void snapshot_drop();

    void set_attention(attention_type value);

    void set_stock_types(ggml_type type_k, ggml_type type_v);

    // whether stock attention serves a layer; it needs heads that hold equally many cells
    bool is_stock(size_t i) const;

    // "" or why a layer's attention does not run through this cache, or lacks what the policy needs
    std::string ready(bool ragged) const;

    static std::string no_ragged_attention(const llama_kv_ragged_layer & layer);

    const std::vector<llama_kv_ragged_layer> & get_layers() const { return layers; }
    const std::vector<llama_kv_ragged_pool>  & get_pools()  const { return pools; }
    const llama_kv_ragged_seq                & get_seq()    const { return seq; }
    const llama_kv_ragged_stats              & get_stats()  const { return stats; }
          llama_kv_ragged_meter              & get_meter()        { return meter; }

    // observed queries of a layer, F16 [n_embd_head_k, n_rows, n_head]
    ggml_tensor * get_queries(size_t i) const { return queries[i].tensor; }

    // what scores and moves the cells of a layer
    llama_kv_ragged_source get_source(size_t i) const;

private:
    friend class llama_kv_cache_ragged_context;

    const llama_model   & model;
    const llama_hparams & hparams;
    const llama_cparams & cparams;

    // counts the buffers of the members below, so it has to outlive them
    llama_kv_ragged_meter meter;

    std::vector<llama_kv_ragged_layer> layers;
    std::vector<int32_t>               map_layer; // [n_layer of the model], index into layers or -1

    std::vector<llama_kv_ragged_pool>   pools;   // [layers]
    std::vector<llama_kv_ragged_buffer> queries; // [layers]
    llama_kv_ragged_tables              tables;

    llama_kv_ragged_seq seq;

    std::unique_ptr<llama_kv_ragged_snapshot> snapshot;

    // empty buffers that stand for the pools of worst-case graphs, which are measured and never computed
    std::map<ggml_backend_buffer_type_t, ggml_backend_buffer_ptr> bufs_reserve;

    llama_kv_ragged_stats stats;

    attention_type attention = ATTENTION_AUTO;

    // bumped whenever a pool moves; graphs of an older epoch hold stale pointers
    uint64_t epoch = 0;

    bool busy = false; // a selection runs
    bool due  = false; // a batch waits for on_prompt

    std::function<void()> on_prompt;

    // the scheduler of this context may still be computing when a pool has to move
    llama_context * lctx = nullptr;

    void synchronize() const;

    // cells that attention reads of a layer with len cells per head
    int64_t n_read(size_t i, int64_t len) const;

    std::string check_ubatches(const std::vector<llama_ubatch> & ubatches) const;

    // empty if memory runs out
    llama_kv_ragged_buffer copy_queries(size_t i, const ggml_tensor * src);

    // room for n_tokens more cells in every head, with slack cells beyond
    bool ensure(int64_t n_tokens, bool exact);
};
