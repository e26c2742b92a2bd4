#pragma once

// Saved states of a memory that holds a ragged cache: what llama_state_*() and llama_state_seq_*() write and read.
//
// One format for the whole memory, windows and recurrent states included: upstream's own moves the cells of windows to other rows, whose
// sums round differently, and changes its caches while it still reads. All numbers are those of the machine, as upstream's are.
//
//   u32 magic, version; u32 parts, a bit for each of the following; u32 n_pos
//   cells of all positions:
//     shapes, to be compared: u32 n_layer, n_observed, rotation, of each layer u32 il, n_head, n_head_kv, n_embd_head_k, n_embd_head_v,
//       i32 type_k, type_v
//     u32 boundary, i32 prompt_begin, u32 n_prompt; of each layer u32 boundary and of each kv head u32 n_kept, i32 positions[n_kept]
//     of each layer, for summed and for replayed attention: u32 n_pos, n_head_kv or 0, of each of these heads u32 n, f32[n] of its first cells
//     u32 n_queries, i32 positions[n_queries]
//     of each layer the cells of every kv head: rows of K, then of V; then of each query head n_queries rows
//   windows:
//     u32 n_rows, head, rotation, n_tensors, of each u32 il, i32 type, u64 bytes of a row
//     u32 n_cells, rows[n_cells], i32 positions[n_cells]; of each tensor n_cells rows
//   recurrent states:
//     u32 n_tensors, of each i32 type, u64 bytes of a row; of each tensor a row
//   u32 magic

#include "llama.h"

class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cache;
class llama_memory_recurrent;

// False if kv is no ragged cache, whose state upstream writes. swa and recr stand beside kv in the memory, nullptr if they do not.
// Throws what io throws, and std::runtime_error with the reason if the sequence or the flags are not served; it is the message of the last
// failure too.
bool llama_kv_ragged_state_write(
        const llama_kv_cache         * kv,
        const llama_kv_cache         * swa,
        const llama_memory_recurrent * recr,
              llama_io_write_i       & io,
              llama_seq_id             seq_id,
              llama_state_seq_flags    flags);

// The same for reading. All of it is read and checked before anything changes: if it throws, the memory is what it was.
bool llama_kv_ragged_state_read(
              llama_kv_cache         * kv,
              llama_kv_cache         * swa,
              llama_memory_recurrent * recr,
              llama_io_read_i        & io,
              llama_seq_id             seq_id,
              llama_state_seq_flags    flags);
