#pragma once

#include "llama-kv-cache.h"
#include "llama-kv-ragged-pool.h"

#include "windowkv.h"

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct llm_graph_context;

//
// llama_kv_cache_ragged
//

// A KV cache in which every layer holds its own cells in pools of its own.
//
// The base class is the ledger of positions: it is constructed without layers and keeps its slot search, sequence
// operations and position checks. The pools hold what attention reads; a head's cells are in position order, new
// cells are always last, so that a length replaces the cell metadata and a triangle replaces the mask search.
class llama_kv_cache_ragged : public llama_kv_cache {
public:
    // holds the layers that the filter accepts, all without one
    // throws std::runtime_error with the reason if a layer or the backend cannot be served
    llama_kv_cache_ragged(
            const llama_model     & model,
            const llama_cparams   & cparams,
                  ggml_type         type_k,
                  ggml_type         type_v,
                  uint32_t          n_window,
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

    // "" or why these ubatches cannot follow what the cache holds
    std::string check_ubatches(const std::vector<llama_ubatch> & ubatches) const;

    // the same, and memory for all of their cells, so that nothing that follows can fail for want of it
    std::string prepare_room(const std::vector<llama_ubatch> & ubatches);

    // "" or why a layer's attention does not run through this cache, or lacks what the policy needs
    std::string ready(bool ragged) const;

    // room for n_tokens more positions without slack
    bool reserve(int64_t n_tokens);

    // throws std::runtime_error and changes nothing if memory runs out
    void set_window(uint32_t n_window);

    // score, select, gather; returns the number of cells released
    // throws std::invalid_argument before anything changed, std::runtime_error if a graph fails or memory runs out
    int64_t compact(llama_context * lctx, const wkv_policy & policy, int64_t n_cells);

    // the same with a selection of the caller's, see wkv_compact_custom()
    int64_t compact(llama_context * lctx, int32_t alpha, int64_t n_cells, wkv_select_fn fn, void * user);

    // keep a copy of the cache, go back to it any number of times, give it up
    // mem is the memory of the context that holds this cache; what it keeps for other layers is part of the copy
    // clearing the cache gives it up as well; false if memory runs out or there is none
    bool snapshot_save(llama_memory_i * mem);
    bool snapshot_restore();
    void snapshot_drop();

    void get_stats(wkv_stats & stats) const;

    const std::vector<llama_kv_ragged_layer> & get_layers() const { return layers; }

    int64_t n_cells(const llama_kv_ragged_layer & layer, int64_t ih) const; // cells of a head now

    std::vector<int64_t> n_cells(const llama_kv_ragged_layer & layer) const; // of every head

    // whether all heads of a layer hold equally many cells; stock attention can serve these
    bool is_uniform(const llama_kv_ragged_layer & layer) const;

    // whether stock attention does serve a layer
    bool is_stock(const llama_kv_ragged_layer & layer) const;

    void set_attention(wkv_attention value);

    // types of the cells that stock would hold, for the statistics
    void set_stock_types(ggml_type type_k, ggml_type type_v) { stock_type_k = type_k; stock_type_v = type_v; }

    std::vector<int32_t> positions(const llama_kv_ragged_layer & layer, int64_t ih) const;

    // positions of the ring rows whose queries are still part of the sequence, -1 elsewhere; [n_window]
    const std::vector<int32_t> & get_ring_pos() const { return ring_pos; }

    // Mean attention of the last alpha observed queries over the cells of every head in turn; for several alphas one such
    // plane behind the other. Throws std::runtime_error.
    std::vector<float> score(llama_context * lctx, const llama_kv_ragged_layer & layer, const std::vector<int32_t> & alphas);

    // attention of the last query of every query head: for each kv head row major [n_gqa, n_cells]
    std::vector<float> score_heads(llama_context * lctx, const llama_kv_ragged_layer & layer);

private:
    friend class llama_kv_cache_ragged_context;

    const llama_model   & model;
    const llama_hparams & hparams;
    const llama_cparams & cparams;

    // counts the buffers of the members below, so it has to outlive them
    llama_kv_ragged_meter meter;

    std::vector<llama_kv_ragged_layer> layers;
    std::vector<int32_t>               map_layer; // [n_layer of the model], index into layers or -1

    uint32_t n_window;
    uint32_t n_pos    = 0; // positions of the sequence
    uint32_t boundary = 0; // positions below were subject to the last compaction

    wkv_attention attention = WKV_ATTENTION_AUTO;

    ggml_type stock_type_k = GGML_TYPE_F16;
    ggml_type stock_type_v = GGML_TYPE_F16;

    // bumped whenever a pool moves; graphs of an older epoch hold stale pointers
    uint64_t epoch = 0;

    ggml_context_ptr                     ring_ctx;
    std::vector<ggml_backend_buffer_ptr> ring_bufs;
    std::vector<int32_t>                 ring_pos;

    // what graphs of a few tokens look up about heads of different lengths, on every device that is not a CPU: an input of the
    // graph would be copied, and waited for, once for every layer
    struct table_t {
        ggml_tensor * tensor = nullptr;

        // what was written last, which the device may read later: as many as there are graphs in flight
        std::array<std::vector<int32_t>, 4> data;
        size_t                              i_data = 0;
    };
    std::map<ggml_backend_dev_t, table_t> tables;
    ggml_context_ptr                      tables_ctx;
    std::vector<ggml_backend_buffer_ptr>  tables_bufs;

    // empty buffers that stand for the pools of worst-case graphs, which are measured and never computed
    std::map<ggml_backend_buffer_type_t, ggml_backend_buffer_ptr> bufs_reserve;

    struct snapshot_t {
        std::vector<llama_kv_ragged_pool>              pools; // [layers]
        std::vector<std::vector<std::vector<int32_t>>> kept;  // [layers][n_head_kv]
        std::vector<uint32_t>                          bounds; // [layers]
        std::vector<std::vector<uint8_t>>              rings; // [layers]
        std::vector<int32_t>                           ring_pos;

        // put back the ledger and the caches of window and recurrent layers
        std::vector<std::function<void()>> others;

        uint32_t n_pos    = 0;
        uint32_t boundary = 0;
    };
    std::unique_ptr<snapshot_t> snapshot;

    // the scheduler of this context may still be computing when a pool has to move
    llama_context * lctx = nullptr;

    int32_t n_compactions  = 0;
    int64_t bytes_released = 0;
    double  t_score_ms     = 0.0;
    double  t_select_ms    = 0.0;
    double  t_gather_ms    = 0.0;

    void init_layers(ggml_type type_k, ggml_type type_v, const layer_filter_cb & filter);
    void alloc_ring(uint32_t n);
    void alloc_tables();
    void synchronize() const;

    // cells that attention reads of a layer with len cells per head
    int64_t n_read(const llama_kv_ragged_layer & layer, int64_t len) const;

    static std::string no_ragged_attention(const llama_kv_ragged_layer & layer);

    // room for n_tokens more cells in every head, with slack cells beyond
    bool ensure(int64_t n_tokens, bool exact);

    // account for an ubatch whose cells have room
    void append(const llama_ubatch & ubatch);

    // throws std::invalid_argument if a policy that observes alpha tokens cannot keep n_cells cells per head
    void check_compaction(int32_t alpha, int64_t n_cells) const;

    std::vector<int32_t> all_cells() const; // of every (layer, kv head)

    wkv_shapes shapes_of(const std::vector<int32_t> & cells) const; // points into cells

    // sets keep to 1 where a cell stays, see wkv_select(); what it throws leaves the cache as it was
    using keep_fn = std::function<void(const int32_t * positions, const float * scores, uint8_t * keep)>;

    std::vector<float> score(
            llama_context * lctx, const llama_kv_ragged_layer & layer, const std::vector<int32_t> & alphas, bool mean);

    // a plane of scores for every alpha; without any they are 0
    int64_t compact(llama_context * lctx, const std::vector<int32_t> & alphas, const wkv_shapes & shapes, const keep_fn & fn);

    void gather(llama_context * lctx, llama_kv_ragged_layer & layer, const uint8_t * keep, const int32_t * n_keep);
};

//
// llama_kv_cache_ragged_context
//

class llama_kv_cache_ragged_context : public llama_kv_cache_context {
public:
    llama_kv_cache_ragged_context(llama_memory_status status);

    // worst case, for measuring graphs
    llama_kv_cache_ragged_context(llama_kv_cache_ragged * kv);

    llama_kv_cache_ragged_context(
            llama_kv_cache_ragged * kv,
            slot_info_vec_t sinfos,
            std::vector<llama_ubatch> ubatches);

    // the ragged context behind a KV cache context, nullptr if there is none
    static const llama_kv_cache_ragged_context * cast(const llama_kv_cache_context * mctx);

    // the one inside the context of any memory, nullptr if there is none
    static const llama_kv_cache_ragged_context * find(const llama_memory_context_i * mctx);

    bool apply() override;

    // what the graph of the current ubatch sees of a layer
    struct layer_view {
        ggml_tensor * k;  // [n_embd_head_k, n_rows]
        ggml_tensor * v;  // [n_embd_head_v, n_rows]
        bool stock;       // stock attention serves the layer, its heads hold equally many cells; what follows is for it
        int64_t cap;      // rows per head
        int64_t n_cells;  // cells per head, those of the ubatch included
        int64_t n_read;   // cells per head that attention reads
    };

    layer_view get_view(ggml_context * ctx, int32_t il) const;

    // the device that holds the table of a layer's cells for graphs of n_tokens, and the table; nullptr if it is an input
    std::pair<ggml_backend_dev_t, ggml_tensor *> get_table(int32_t il, int64_t n_tokens) const;

    // write a table before its graph runs
    void set_table(ggml_backend_dev_t dev, ggml_tensor * table, const std::vector<int32_t> & data) const;

    // first row and cells of every head, those of the ubatch included, {first, cells} x n_head_kv
    void get_ranges(int32_t il, int32_t * ranges) const;

    int32_t get_index  (int32_t il) const; // of a layer of the model among those of the cache
    int32_t get_n_layer() const;

    uint64_t get_epoch()  const;
    uint32_t get_window() const;
    uint32_t get_n_pos()  const; // positions, those of the ubatch included

    // store k_cur and v_cur, observe q_cur and attend
    //   q_cur [n_embd_head_k, n_head, n_tokens], k_cur, v_cur [n_embd_head_k/v, n_head_kv, n_tokens]
    //   returns [n_embd_head_v*n_head, n_tokens]
    ggml_tensor * build_attn(
            const llm_graph_context & g,
            ggml_tensor * q_cur,
            ggml_tensor * k_cur,
            ggml_tensor * v_cur,
            ggml_tensor * kq_b,
            ggml_tensor * sinks,
                  float   kq_scale,
                    int   il) const;

private:
    llama_kv_cache_ragged * kv = nullptr;

    bool full = false;
};

// n_tokens positions with random cells in an empty cache of any kind, see wkv_fill()
// throws std::invalid_argument before anything changed, std::runtime_error if memory runs out
void llama_kv_ragged_fill(llama_context & ctx, int32_t n_tokens);

// backend of a device in a context, nullptr if it has none
ggml_backend_t llama_kv_ragged_backend(llama_context & lctx, ggml_backend_dev_t dev);
