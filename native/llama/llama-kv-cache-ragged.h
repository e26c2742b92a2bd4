#pragma once

#include "llama-kv-cache.h"
#include "llama-kv-ragged-compact.h"
#include "llama-kv-ragged-replay.h"
#include "llama-kv-ragged-seq.h"
#include "llama-kv-ragged-shift.h"
#include "llama-arch.h"
#include "llama-kv-ragged-snapshot.h"
#include "llama-kv-ragged-stats.h"
#include "llama-kv-ragged-table.h"
#include "policy/wkv-pinned.h"

#include <functional>
#include <memory>
#include <vector>

// true until the end of a block
struct llama_kv_ragged_while {
    bool & flag;

    explicit llama_kv_ragged_while(bool & flag) : flag(flag) { GGML_ASSERT(!flag); flag = true; }
    ~llama_kv_ragged_while() { flag = false; }
};

//
// llama_kv_cache_ragged
//

// A KV cache in which every head of every layer holds its own cells, in pools of its own.
//
// The base class keeps the cell metadata: it is constructed without layers and keeps its slot search, sequence operations and
// position checks. The sequence holds what attention reads; a head's cells are in position order, new cells are always last, so that
// a length replaces the cell metadata and a triangle replaces the mask search.

class llama_kv_cache_ragged : public llama_kv_cache {
public:
    // which attention layers run, see wkv_attention
    enum attention_type { ATTENTION_AUTO, ATTENTION_STOCK, ATTENTION_RAGGED };

    // holds the layers that the filter accepts, all without one
    // stock_type_k, stock_type_v: of the cells that stock would hold, for the statistics
    // throws std::runtime_error with the reason if a layer or the backend cannot be served
    llama_kv_cache_ragged(
            const llama_model     & model,
            const llama_cparams   & cparams,
                  ggml_type         type_k,
                  ggml_type         type_v,
                  ggml_type         stock_type_k,
                  ggml_type         stock_type_v,
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

    // state write/load

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // llama_kv_cache_ragged specific API
    //
    // everything that needs memory throws std::runtime_error if there is none; nothing is lost then
    //

    const std::vector<llama_kv_ragged_layer> & get_layers() const { return layers; }
    const llama_kv_ragged_seq                & get_seq()    const { return seq; }
    const llama_kv_ragged_stats              & get_stats()  const { return stats; }

    // a compaction runs, or what set_on_prompt() was given, so that nothing else may change the cache
    bool is_busy() const { return selecting || prompting; }

    // a compaction runs, which on_prompt may not do twice
    bool is_selecting() const { return selecting; }

    // what seq_rm() will answer, of this cache and of one for the windows of the same sequence beside it
    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1, const llama_kv_cache * swa = nullptr) const;

    // room for n_tokens more positions without slack
    void reserve(int64_t n_tokens);

    // resize the observed queries, which are forgotten
    void set_observed(uint32_t n_observed);

    void set_attention(attention_type value);

    // positions whose cells stay in every compaction, whatever is evaluated or cleared
    void set_pinned(std::vector<wkv::position_range> value) { pinned = std::move(value); }

    const std::vector<wkv::position_range> & get_pinned() const { return pinned; }

    // called before a single token is evaluated behind a prompt that nobody has ended; it may compact
    void set_on_prompt(std::function<void()> fn);

    // the positions so far end a prompt, whose last queries stay until the next one ends
    void end_prompt();

    // rows that a compaction leaves free in every head at least
    void set_room(uint32_t n_tokens) { seq.n_room = std::min(n_tokens, get_size()); }

    // how the keys of each layer got their positions, as the last graph said
    const std::vector<llama_kv_ragged_rope> & get_ropes() const { return ropes; }

    void set_rope(int32_t il, const llama_kv_ragged_rope & rope) { ropes[get_index(il)] = rope; }

    // whether the windows of the same memory can be shifted
    bool can_shift_beside(const llama_kv_cache & swa) const;

    // add the attention of the queries that are in no sum yet, as far as they are observed, to the sums of the cells
    void accumulate(llama_context & lctx);

    // Keep the cells that are selected, free the others; returns how many. Throws what select throws. If it fails while cells move, the
    // layers before are compacted and the others hold all their cells, which the message says.
    int64_t compact(llama_context & lctx, const llama_kv_ragged_request & request);

    // hold the cells of another sequence, whose positions the cell metadata holds already; gives the copy below up
    void replace(llama_kv_ragged_seq && next);

    // Give up positions [p0, p0 + n) in every head, move the later ones down, and do the same for what lies beside in the memory of the
    // context. Throws std::invalid_argument, llama_kv_ragged_unsupported or std::runtime_error with nothing changed; if a backend fails
    // while cells move, which it has shown before that it can, the cache is cleared, and the message says so.
    void shift(llama_context & lctx, int32_t p0, int32_t n);

    // the last seq_add() was refused or failed
    bool has_stayed() const { return stayed; }

    // throws std::invalid_argument if positions were removed and the ones behind them did not move
    void check_closed() const;

    // keep a copy of the cache, go back to it any number of times, give it up; clearing the cache gives it up as well
    // mem is the memory of the context that holds this cache; what it keeps for other layers is part of the copy
    void snapshot_save(llama_memory_i & mem);
    void snapshot_restore();
    void snapshot_drop();

    // Tokens evaluated between the two are only observed: their positions are given up again, with what they did to windows and recurrent
    // states, and their queries are the newest ones for a compaction that follows at once. Clearing the cache ends it, too; ending it
    // says whether there was something to end; a second time forgets the queries.
    // With a replay they repeat some positions, whose cells have scores then.
    void observe_begin(llama_memory_i & mem, std::unique_ptr<llama_kv_ragged_replay> replay = nullptr);
    bool observe_end();

    // what repeats was not evaluated as a whole: no cell gets a score of it
    void drop_replay();

    // nullptr: nothing is repeated
    llama_kv_ragged_replay * get_replay() const { return visit ? visit->replay.get() : nullptr; }

    bool is_observing() const { return visit != nullptr; }
    void check_not_observing() const; // throws std::invalid_argument

    //
    // preparation and graph API
    //

    // Room for ubatches that follow what the cache holds. Moves cells to larger pools where it has to, changes nothing else.
    // False if they cannot follow, with the reason in the log, or if a compaction has to come first: the batch fails, init_update() runs
    // the compaction, and upstream tries the batch again.
    bool prepare_room(const std::vector<llama_ubatch> & ubatches);

    // add positions behind the last one, returns the rows of the queries that are observed of them
    std::vector<int64_t> append(uint32_t n_tokens);

    // index of a layer of the model
    int32_t get_index(int32_t il) const { return map_layer.at(il); }

    // what attends in a layer in a graph of n_tokens
    llama_kv_ragged_kernel get_kernel(size_t i, int64_t n_tokens) const;

    // graphs of an older epoch hold stale pointers
    uint64_t get_epoch() const { return epoch; }

    llama_kv_ragged_tables & get_tables() { return tables; }

private:
    const llama_hparams & hparams;
    const llama_cparams & cparams;

    const std::vector<llama_kv_ragged_layer> layers;

    std::vector<int32_t> map_layer; // [n_layer of the model], index into layers or -1

    // its meter counts the buffers of the members below, so it has to outlive them
    llama_kv_ragged_stats stats;

    llama_kv_ragged_tables tables;

    llama_kv_ragged_seq seq;

    std::unique_ptr<llama_kv_ragged_snapshot> snapshot;

    // what observe_end() goes back to
    struct llama_kv_ragged_visit {
        uint32_t               n_pos;
        int32_t                prompt_begin;
        uint32_t               n_prompt;
        llama_kv_ragged_others others;

        std::unique_ptr<llama_kv_ragged_claim>  claim;
        std::unique_ptr<llama_kv_ragged_replay> replay;

        bool dropped = false;
    };
    std::unique_ptr<llama_kv_ragged_visit> visit;

    const llm_arch arch; // of the model

    std::vector<llama_kv_ragged_rope> ropes; // [layers]

    // removed by seq_rm(), until seq_add() closes it
    llama_kv_ragged_hole hole;

    std::unique_ptr<llama_kv_ragged_shift> planned; // of shift(), for seq_add()

    bool stayed = false;

    attention_type attention = ATTENTION_AUTO;

    std::vector<wkv::position_range> pinned;

    uint64_t epoch = 0; // bumped whenever a pool moves

    bool selecting = false;
    bool prompting = false; // on_prompt runs
    bool due       = false; // a batch waits for it

    std::function<void()> on_prompt;

    // the scheduler of this context may still be computing when a pool has to move
    llama_context * lctx = nullptr;

    void synchronize() const;

    // whether positions in the middle can be removed, for a shift
    bool can_open(llama_pos p0, llama_pos p1, const llama_kv_cache * swa) const;

    // move what lies behind the hole
    void close(llama_context & lctx);

    void make_room(int64_t n_tokens, bool exact);

    // what changes in a compaction
    void commit(llama_context & lctx, const llama_kv_ragged_plan & plan);
};
