#pragma once

// Parts of a saved state (see llama-kv-ragged-state.h for its format): what writes one and what reads it stand side by side.

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"
#include "llama-memory-recurrent.h"

#include <cinttypes>
#include <string>
#include <utility>
#include <vector>

// what is private in upstream's caches
struct llama_kv_ragged_state_access {
    static uint32_t rotation(const llama_kv_cache & kv) { return (kv.attn_rot_k ? 1 : 0) | (kv.attn_rot_v ? 2 : 0); }

    static uint32_t head(const llama_kv_cache & kv) { return kv.v_heads[0]; }

    // K of all layers, then V
    static std::vector<std::pair<uint32_t, ggml_tensor *>> tensors(const llama_kv_cache & kv) {
        GGML_ASSERT(kv.n_stream == 1 && !kv.v_trans);
        std::vector<std::pair<uint32_t, ggml_tensor *>> res;
        for (const auto & layer : kv.layers) {
            res.emplace_back(layer.il, layer.k);
        }
        for (const auto & layer : kv.layers) {
            res.emplace_back(layer.il, layer.v);
        }
        return res;
    }

    static void set(llama_kv_cache & kv, llama_kv_cells && cells, uint32_t head) {
        kv.v_cells[0] = std::move(cells);
        kv.v_heads[0] = head;
    }
};

namespace llama_kv_ragged_state {

using access = llama_kv_ragged_state_access;

//
// numbers
//

template <typename T>
void put(llama_io_write_i & io, T value) {
    io.write(&value, sizeof(value));
}

template <typename T>
void put(llama_io_write_i & io, const std::vector<T> & values) {
    if (!values.empty()) {
        io.write(values.data(), values.size()*sizeof(T));
    }
}

template <typename T>
T get(llama_io_read_i & io) {
    T res;
    io.read(&res, sizeof(res));
    return res;
}

template <typename T>
std::vector<T> get(llama_io_read_i & io, size_t n) {
    std::vector<T> res(n);
    if (n > 0) {
        io.read(res.data(), n*sizeof(T));
    }
    return res;
}

[[noreturn]] inline void refuse(const std::string & msg) {
    llama_kv_ragged_refuse("the saved state cannot be loaded: " + msg);
}

// a value that has to be the memory's own
template <typename T>
void get_same(llama_io_read_i & io, T own, const std::string & what) {
    const T got = get<T>(io);
    if (got != own) {
        refuse(format("%s is %" PRId64 ", expected %" PRId64, what.c_str(), int64_t(got), int64_t(own)));
    }
}

// a value of a range, both ends included
template <typename T>
T get_within(llama_io_read_i & io, int64_t lo, int64_t hi, const char * what) {
    const T got = get<T>(io);
    if (int64_t(got) < lo || int64_t(got) > hi) {
        refuse(format("%s is %" PRId64 ", expected %" PRId64 " to %" PRId64, what, int64_t(got), lo, hi));
    }
    return got;
}

template <typename T>
void check_ascending(const std::vector<T> & values, int64_t end, const char * what) {
    for (size_t i = 0; i < values.size(); ++i) {
        const int64_t lo = i == 0 ? 0 : int64_t(values[i - 1]) + 1;
        if (int64_t(values[i]) < lo || int64_t(values[i]) >= end) {
            refuse(format("%s: entry %zu is %" PRId64 ", expected %" PRId64 " to %" PRId64, what, i, int64_t(values[i]), lo, end - 1));
        }
    }
}

// [from, to) of numbers that follow each other
template <typename T, typename F>
void for_runs(const std::vector<T> & values, F fn) {
    for (size_t from = 0, to; from < values.size(); from = to) {
        for (to = from + 1; to < values.size() && int64_t(values[to]) == int64_t(values[to - 1]) + 1; ++to) {}
        fn(from, to);
    }
}

//
// cells of all positions
//

void write_cells(llama_io_write_i & io, const llama_kv_cache_ragged & kv);

llama_kv_ragged_seq read_cells(llama_io_read_i & io, const llama_kv_cache_ragged & kv, uint32_t n_pos);

//
// windows
//

// rows of a tensor on the host, until all has been read
struct read_rows {
    ggml_tensor        * tensor;
    std::vector<uint8_t> data;
};

struct read_window {
    std::vector<uint32_t>  rows; // where the cells go; UINT32_MAX for those that have no place
    uint32_t               head = 0;
    llama_kv_cells         cells;
    std::vector<read_rows> data;
};

void write_windows(llama_io_write_i & io, const llama_kv_cache & swa);

read_window read_windows(llama_io_read_i & io, const llama_kv_cache & swa, uint32_t n_pos);

void commit(llama_kv_cache & swa, read_window && next);

//
// recurrent states
//

struct read_recurrent {
    std::vector<llama_memory_recurrent::mem_cell> cells;
    std::vector<read_rows> data;
};

void write_recurrent(llama_io_write_i & io, const llama_memory_recurrent & recr);

read_recurrent read_states(llama_io_read_i & io, const llama_memory_recurrent & recr, uint32_t n_pos);

void commit(llama_memory_recurrent & recr, read_recurrent && next);

}
