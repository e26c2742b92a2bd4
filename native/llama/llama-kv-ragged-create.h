#pragma once

// How a context gets a ragged KV cache, and what the memories of upstream's ask about a cache that may be one: all that the patches
// call outside the graph.

#include "llama-kv-cache.h"

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct llama_cparams;
struct llama_hparams;
struct llama_model;

class llama_kv_cache_ragged;

//
// the request: the next context created on this thread gets a ragged cache
//

// n_observed: queries per layer that the cache observes, 0 takes the request back; type: of the cells, see wkv_pending_set()
void llama_kv_ragged_pending_set(uint32_t n_observed, int32_t type = -1);

// The memory of a context: what llama_model::create_memory() makes, which asks below for a ragged cache if there is a request.
// Consumes the request. Throws std::runtime_error with the reason if a property of the model or of the context rules a ragged cache out,
// or if the memory is of a kind that asked for none.
llama_memory_i * llama_kv_ragged_create_memory(
        const llama_model         & model,
        const llama_memory_params & params,
        const llama_cparams       & cparams);

// Called where the model is about to create a memory of a kind that can hold a ragged cache: from here on that memory may ask for it.
// Returns llama_kv_ragged_wanted().
bool llama_kv_ragged_offer();

// whether the cache that attends to all positions has to be a ragged one
bool llama_kv_ragged_wanted();

// that cache; call it once, if it is wanted. It holds the layers that the filter accepts; without one those that are not recurrent
// throws std::runtime_error with the reason if a layer or its device cannot be served
std::unique_ptr<llama_kv_cache> llama_kv_ragged_create_cache(const llama_model & model, const llama_memory_i::layer_filter_cb & filter);

// Called by every KV cache that is constructed. The cell metadata of a ragged cache is one without layers; whether its cells are rotated
// before they are quantised follows from the head sizes of the layers that the ragged cache holds.
void llama_kv_ragged_set_rotation(const llama_hparams & hparams, int32_t & n_embd_head_k_all, int32_t & n_embd_head_v_all);

//
// a ragged cache inside a memory of upstream's: what that memory asks, answered for stock caches too; beside the class in
// llama-kv-cache-ragged.cpp
//

// Where the cache stands: that of the layers that attend to all positions; nullptr for kinds that have none or keep something else there
llama_kv_cache * llama_kv_ragged_attn_cache(llama_memory_i * mem);

// the same if it is a ragged one, else nullptr
llama_kv_cache_ragged * llama_kv_ragged_find(llama_memory_i * mem);

// tensors that a ragged cache puts into a graph beyond those of a stock one, 0 for other memories
size_t llama_kv_ragged_n_nodes(llama_memory_i * mem);

// the sequence that is meant: a ragged cache holds one, so that "every sequence" (-1) is that one. Recurrent caches need to be told,
// they remove nothing from every sequence
llama_seq_id llama_kv_ragged_seq_id(const llama_kv_cache * kv, llama_seq_id seq_id);

// whether kv and the cache of the sliding windows beside it, which may be nullptr, can remove these positions
bool llama_kv_ragged_can_rm(const llama_kv_cache * kv, const llama_kv_cache * swa, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

// true, with a line in the log, if positions cannot be divided
bool llama_kv_ragged_no_div(const llama_kv_cache * kv);

// true if a ragged cache refused the last seq_add(), so that positions beside it have to stay too
bool llama_kv_ragged_stayed(const llama_kv_cache * kv);

// true for a ragged cache, beside which windows are no larger than they have to be, if their positions can be moved all the same
bool llama_kv_ragged_windows_shift(const llama_kv_cache * kv, const llama_kv_cache * swa);

// the same if a ragged cache would have to hold a second sequence
bool llama_kv_ragged_no_copy(const llama_kv_cache * kv, llama_seq_id seq_id_src, llama_seq_id seq_id_dst);

// the same while a selection of a ragged cache runs
bool llama_kv_ragged_is_busy(const llama_kv_cache * kv);

// throws std::invalid_argument then
void llama_kv_ragged_check_idle(const llama_kv_cache * kv);

//
// the same for a batch of any memory; the reason is in the log and in the message of the last failure
//

// true if a batch cannot be evaluated now; forgets the last failure, so that what follows is about this batch
bool llama_kv_ragged_no_batch(llama_memory_i * mem);

// true if the memory has said why there is no slot for a batch
bool llama_kv_ragged_no_slot(llama_memory_i * mem, uint32_t n_tokens);

// an ubatch was not computed, and was taken back from p0 on where that is possible; where it is not, the memory is cleared
void llama_kv_ragged_failed(llama_memory_i * mem, llama_pos p0, uint32_t n_tokens, ggml_status status);

// the context of a batch that has slots; that of a ragged cache fails if the batch does not follow what it holds
llama_kv_cache_context * llama_kv_ragged_context_make(
        llama_kv_cache * kv,
        llama_kv_cache::slot_info_vec_t sinfos,
        std::vector<llama_ubatch> ubatches);

//
// why something is not served
//

// the model, the device or the cache as it is cannot serve a call, however much memory there is
struct llama_kv_ragged_unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// throws std::runtime_error, or the kind above, with the reason why a model, a context or a call is not served
[[noreturn]] void llama_kv_ragged_refuse(const std::string & msg);
[[noreturn]] void llama_kv_ragged_refuse_unsupported(const std::string & msg);

// a context was not created; where it was to have a ragged cache, the message of the last failure says why
void llama_kv_ragged_no_context(const std::exception & err);

// says in the log and in the message of the last failure why a batch is not served; false
bool llama_kv_ragged_refuse_batch(const std::string & msg);

// an exception in words, valid as long as it is
const char * llama_kv_ragged_reason(const std::exception & err);

// refuses a model for the layers that the cache is going to hold
void llama_kv_ragged_check_layers(const llama_model & model, const std::vector<uint32_t> & layers);

// message of the last failure on this thread; setting it allocates nothing, a longer one is cut
void         llama_kv_ragged_set_error(const char * msg);
const char * llama_kv_ragged_get_error();
