// One file, as the format is one: what writes a part and what reads it stand side by side.

#include "llama-kv-ragged-state.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"
#include "llama-memory-recurrent.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

static constexpr uint32_t MAGIC   = 0x736b7677; // "wvks" in memory
static constexpr uint32_t VERSION = 2;

enum part : uint32_t {
    PART_CELLS     = 1,
    PART_WINDOWS   = 2,
    PART_RECURRENT = 4,
};

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

using access = llama_kv_ragged_state_access;

//
// what both directions share
//

template <typename T>
static void put(llama_io_write_i & io, T value) {
    io.write(&value, sizeof(value));
}

template <typename T>
static void put(llama_io_write_i & io, const std::vector<T> & values) {
    if (!values.empty()) {
        io.write(values.data(), values.size()*sizeof(T));
    }
}

template <typename T>
static T get(llama_io_read_i & io) {
    T res;
    io.read(&res, sizeof(res));
    return res;
}

template <typename T>
static std::vector<T> get(llama_io_read_i & io, size_t n) {
    std::vector<T> res(n);
    if (n > 0) {
        io.read(res.data(), n*sizeof(T));
    }
    return res;
}

[[noreturn]] static void refuse(const std::string & msg) {
    llama_kv_ragged_refuse("the saved state cannot be loaded: " + msg);
}

// a value that has to be the memory's own
template <typename T>
static void get_same(llama_io_read_i & io, T own, const std::string & what) {
    const T got = get<T>(io);
    if (got != own) {
        refuse(format("%s is %" PRId64 ", expected %" PRId64, what.c_str(), int64_t(got), int64_t(own)));
    }
}

// a value of a range, both ends included
template <typename T>
static T get_within(llama_io_read_i & io, int64_t lo, int64_t hi, const char * what) {
    const T got = get<T>(io);
    if (int64_t(got) < lo || int64_t(got) > hi) {
        refuse(format("%s is %" PRId64 ", expected %" PRId64 " to %" PRId64, what, int64_t(got), lo, hi));
    }
    return got;
}

template <typename T>
static void check_ascending(const std::vector<T> & values, int64_t end, const char * what) {
    for (size_t i = 0; i < values.size(); ++i) {
        const int64_t lo = i == 0 ? 0 : int64_t(values[i - 1]) + 1;
        if (int64_t(values[i]) < lo || int64_t(values[i]) >= end) {
            refuse(format("%s: entry %zu is %" PRId64 ", expected %" PRId64 " to %" PRId64, what, i, int64_t(values[i]), lo, end - 1));
        }
    }
}

// [from, to) of numbers that follow each other
template <typename T, typename F>
static void for_runs(const std::vector<T> & values, F fn) {
    for (size_t from = 0, to; from < values.size(); from = to) {
        for (to = from + 1; to < values.size() && int64_t(values[to]) == int64_t(values[to - 1]) + 1; ++to) {}
        fn(from, to);
    }
}

static uint32_t parts(const llama_kv_cache * swa, const llama_memory_recurrent * recr, llama_state_seq_flags flags) {
    const uint32_t beside = (swa ? PART_WINDOWS : 0) | (recr ? PART_RECURRENT : 0);

    // a cache without windows and recurrent states is all there is, and upstream writes it then
    return beside && (flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) ? beside : PART_CELLS | beside;
}

static void check_idle(const llama_kv_cache_ragged & kv) {
    if (kv.is_observing()) {
        llama_kv_ragged_refuse("tokens that are only observed are in the cache, states are saved and loaded without them");
    }
}

static void check_call(const llama_kv_cache & kv, const llama_memory_recurrent * recr, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (seq_id < -1 || seq_id > 0) {
        llama_kv_ragged_refuse_unsupported(format("the state of sequence %d is asked for, expected 0: a cache with a policy holds one",
                seq_id));
    }
    if (flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) {
        llama_kv_ragged_refuse_unsupported("states that stay in device memory (LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) are not supported with a "
                "policy: its pools move; leave the flag out");
    }
    if (flags & ~uint32_t(LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)) {
        llama_kv_ragged_refuse_unsupported(format("the flags of a state are %u, expected 0 or LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY", flags));
    }
    if (kv.has_cell_ext()) {
        llama_kv_ragged_refuse_unsupported("states of models whose cells hold more than a position are not supported with a policy");
    }
    if (recr && recr->size != 1) {
        llama_kv_ragged_refuse_unsupported(format("the memory holds %u recurrent states, expected 1", recr->size));
    }
}

//
// cells of all positions
//

static std::vector<int32_t> shape(const llama_kv_ragged_layer & layer) {
    return { int32_t(layer.il), int32_t(layer.n_head), int32_t(layer.n_head_kv), int32_t(layer.n_embd_head_k), int32_t(layer.n_embd_head_v),
        layer.type_k, layer.type_v };
}

static const char * const SHAPE[] = { "index", "n_head", "n_head_kv", "head size of K", "head size of V", "type of K", "type of V" };

static void write_cells(llama_io_write_i & io, const llama_kv_cache_ragged & kv) {
    const auto & seq    = kv.get_seq();
    const auto & layers = kv.get_layers();

    put<uint32_t>(io, layers.size());
    put<uint32_t>(io, seq.observed.n_observed);
    put<uint32_t>(io, access::rotation(kv));
    for (const auto & layer : layers) {
        put(io, shape(layer));
    }

    put<uint32_t>(io, seq.boundary);
    put<int32_t> (io, seq.prompt_begin);
    put<uint32_t>(io, seq.observed.n_prompt);
    for (const auto & cur : seq.cells) {
        put<uint32_t>(io, cur.boundary);
        for (const auto & kept : cur.kept) {
            put<uint32_t>(io, kept.size());
            put(io, kept);
        }
    }

    for (const auto & cur : seq.cells) {
        put<uint32_t>(io, cur.n_summed);
        put<uint32_t>(io, cur.sums.size());
        for (const auto & sums : cur.sums) {
            put<uint32_t>(io, sums.size());
            put(io, sums);
        }
    }

    // positions below the boundary stay, so that nothing asks for older queries
    const auto rows = seq.observed.find(int32_t(seq.boundary) - int32_t(seq.observed.n_observed));
    put<uint32_t>(io, rows.size());
    for (const int32_t row : rows) {
        put<int32_t>(io, seq.observed.pos[row]);
    }

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & pool = seq.cells[i].pool;
        for (int64_t ih = 0; ih < layers[i].n_head_kv; ++ih) {
            if (const int64_t n = seq.n_cells(i, ih)) {
                io.write_tensor(pool.k, pool.first[ih]*pool.k->nb[1], n*pool.k->nb[1]);
                io.write_tensor(pool.v, pool.first[ih]*pool.v->nb[1], n*pool.v->nb[1]);
            }
        }
        ggml_tensor * queries = seq.observed.queries[i].tensor;
        for (int64_t ih = 0; ih < layers[i].n_head; ++ih) {
            for_runs(rows, [&](size_t from, size_t to) {
                io.write_tensor(queries, ih*queries->nb[2] + rows[from]*queries->nb[1], (to - from)*queries->nb[1]);
            });
        }
    }
}

static void read_shapes(llama_io_read_i & io, const llama_kv_cache_ragged & kv) {
    const auto & layers = kv.get_layers();

    get_same<uint32_t>(io, layers.size(), "the number of layers");
    get_same<uint32_t>(io, kv.get_seq().observed.n_observed, "the number of observed queries (of the policy)");
    get_same<uint32_t>(io, access::rotation(kv), "the rotation of cells");
    for (const auto & layer : layers) {
        const auto own = shape(layer);
        for (size_t j = 0; j < own.size(); ++j) {
            get_same<int32_t>(io, own[j], format("layer %u: %s", layer.il, SHAPE[j]));
        }
    }
}

static void read_sums(llama_io_read_i & io, llama_kv_ragged_seq & seq) {
    for (size_t i = 0; i < seq.cells.size(); ++i) {
        auto & cur = seq.cells[i];

        cur.n_summed = get_within<uint32_t>(io, 0, seq.n_pos, "the end of the summed attention");

        const uint32_t n_heads = get_within<uint32_t>(io, 0, cur.kept.size(), "the number of heads with summed attention");
        if (n_heads != 0 && n_heads != cur.kept.size()) {
            refuse(format("%u heads of a layer have summed attention, expected all %zu or none", n_heads, cur.kept.size()));
        }
        for (uint32_t ih = 0; ih < n_heads; ++ih) {
            cur.sums.push_back(get<float>(io, get_within<uint32_t>(io, 0, seq.n_cells(i, ih), "the cells with summed attention")));
            for (const float sum : cur.sums.back()) {
                if (!(sum >= 0.0f && std::isfinite(sum))) {
                    refuse("summed attention is negative or not finite");
                }
            }
        }
    }
}

// which cells there are
// n_pos_max: positions that there can be
static void read_positions(llama_io_read_i & io, llama_kv_ragged_seq & seq, uint32_t n_pos_max) {
    const auto & layers = seq.get_layers();

    seq.boundary          = get_within<uint32_t>(io,  0, seq.n_pos, "the boundary of the last compaction");
    seq.prompt_begin      = get_within<int32_t> (io, -1, int64_t(seq.n_pos) - 1, "the begin of a prompt");
    seq.observed.n_prompt = get_within<uint32_t>(io,  0, seq.n_pos, "the end of the last prompt");

    for (size_t i = 0; i < layers.size(); ++i) {
        auto & cur = seq.cells[i];

        cur.boundary = get_within<uint32_t>(io, 0, seq.boundary, "the boundary of a layer");
        for (auto & kept : cur.kept) {
            // none where all of them were given up in a shift
            kept = get<int32_t>(io, get_within<uint32_t>(io, 0, cur.boundary, "the number of kept cells"));
            check_ascending(kept, cur.boundary, "kept positions");
        }
        if (!cur.is_uniform()) {
            layers[i].check_ragged();
        }
    }

    read_sums(io, seq);

    // those of withdrawn positions are behind n_pos
    const uint32_t n_queries = get_within<uint32_t>(io, 0, seq.observed.n_rows(), "the number of queries");
    const auto     pos       = get<int32_t>(io, n_queries);
    check_ascending(pos, n_pos_max, "positions of queries");
    std::copy(pos.begin(), pos.end(), seq.observed.pos.begin());
}

static llama_kv_ragged_seq read_cells(llama_io_read_i & io, const llama_kv_cache_ragged & kv, uint32_t n_pos) {
    read_shapes(io, kv);

    auto seq = kv.get_seq().make_empty();
    seq.n_pos = n_pos;
    read_positions(io, seq, kv.get_size());
    seq.claim_sums();
    if (n_pos > 0) {
        seq.make_pools();
    }

    const auto & layers    = kv.get_layers();
    const size_t n_queries = seq.observed.find(0).size();
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & pool = seq.cells[i].pool;
        for (int64_t ih = 0; ih < layers[i].n_head_kv; ++ih) {
            if (const int64_t n = seq.n_cells(i, ih)) {
                io.read_tensor(pool.k, pool.first[ih]*pool.k->nb[1], n*pool.k->nb[1]);
                io.read_tensor(pool.v, pool.first[ih]*pool.v->nb[1], n*pool.v->nb[1]);
            }
        }
        ggml_tensor * queries = seq.observed.queries[i].tensor;
        for (int64_t ih = 0; ih < layers[i].n_head && n_queries > 0; ++ih) {
            io.read_tensor(queries, ih*queries->nb[2], n_queries*queries->nb[1]);
        }
    }
    return seq;
}

// the cell metadata of positions that follow each other from 0 on
static llama_kv_cells make_metadata(const llama_kv_cache & kv, uint32_t n_pos) {
    llama_kv_cells res;
    res.resize(kv.get_size());
    for (uint32_t i = 0; i < n_pos; ++i) {
        res.pos_set(i, i);
        res.seq_add(i, 0);
    }
    return res;
}

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

static llama_pos n_pos_of(const llama_kv_cache & swa)          { return swa.seq_pos_max(0) + 1; }
static llama_pos n_pos_of(const llama_memory_recurrent & recr) { return recr.seq_pos_max(0) + 1; }

static void write_windows(llama_io_write_i & io, const llama_kv_cache & swa) {
    const auto & cells   = swa.get_cells(0);
    const auto   tensors = access::tensors(swa);

    put<uint32_t>(io, cells.size());
    put<uint32_t>(io, access::head(swa));
    put<uint32_t>(io, access::rotation(swa));
    put<uint32_t>(io, tensors.size());
    for (const auto & [il, tensor] : tensors) {
        put<uint32_t>(io, il);
        put<int32_t> (io, tensor->type);
        put<uint64_t>(io, tensor->nb[1]);
    }

    std::vector<uint32_t> rows;
    std::vector<int32_t>  pos;
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i)) {
            rows.push_back(i);
            pos.push_back(cells.pos_get(i));
        }
    }
    put<uint32_t>(io, rows.size());
    put(io, rows);
    put(io, pos);
    for (const auto & [_, tensor] : tensors) {
        for_runs(rows, [&, tensor = tensor](size_t from, size_t to) {
            io.write_tensor(tensor, rows[from]*tensor->nb[1], (to - from)*tensor->nb[1]);
        });
    }
}

// the rows that they had; in a cache of another size the newest ones, from the first row on
static void place_window(read_window & res, const llama_kv_cache & swa, uint32_t n_rows, const std::vector<int32_t> & pos) {
    const uint32_t size = swa.get_size();

    std::vector<std::pair<int32_t, uint32_t>> order; // by position
    for (uint32_t i = 0; i < pos.size(); ++i) {
        order.emplace_back(pos[i], i);
    }
    std::sort(order.begin(), order.end());
    for (size_t i = 1; i < order.size(); ++i) {
        if (order[i].first == order[i - 1].first) {
            refuse(format("windows: position %d is there twice", order[i].first));
        }
    }

    if (size != n_rows) {
        const size_t n_dropped = order.size() > size ? order.size() - size : 0;

        std::fill(res.rows.begin(), res.rows.end(), UINT32_MAX);
        for (size_t i = n_dropped; i < order.size(); ++i) {
            res.rows[order[i].second] = i - n_dropped;
        }
        res.head = order.size() - n_dropped;
    }

    res.cells.resize(size);
    for (uint32_t i = 0; i < pos.size(); ++i) {
        if (res.rows[i] != UINT32_MAX) {
            res.cells.pos_set(res.rows[i], pos[i]);
            res.cells.seq_add(res.rows[i], 0);
        }
    }
}

static read_window read_windows(llama_io_read_i & io, const llama_kv_cache & swa, uint32_t n_pos) {
    const auto tensors = access::tensors(swa);

    read_window res;

    const uint32_t n_rows = get_within<uint32_t>(io, 1, INT32_MAX, "windows: the number of rows");
    res.head = get_within<uint32_t>(io, 0, n_rows, "windows: the place of the next cell");
    get_same<uint32_t>(io, access::rotation(swa), "windows: the rotation of cells");
    get_same<uint32_t>(io, tensors.size(), "windows: the number of tensors");
    for (const auto & [il, tensor] : tensors) {
        get_same<uint32_t>(io, il, "windows: the index of a layer");
        get_same<int32_t> (io, tensor->type, "windows: the type of cells");
        get_same<uint64_t>(io, tensor->nb[1], "windows: the bytes of a row");
    }

    const uint32_t n_min   = std::min<uint32_t>(1, n_pos);
    const uint32_t n_cells = get_within<uint32_t>(io, n_min, std::min(n_pos, n_rows), "windows: the number of cells");
    res.rows = get<uint32_t>(io, n_cells);
    const auto pos = get<int32_t>(io, n_cells);
    check_ascending(res.rows, n_rows, "windows: rows");
    for (const int32_t cur : pos) {
        if (cur < 0 || cur >= int64_t(n_pos)) {
            refuse(format("windows: a position is %d, expected 0 to %u", cur, n_pos - 1));
        }
    }
    place_window(res, swa, n_rows, pos);
    if (res.cells.seq_pos_max(0) + 1 != llama_pos(n_pos)) {
        refuse(format("windows: they end before position %d, expected %u", res.cells.seq_pos_max(0) + 1, n_pos));
    }

    for (const auto & [_, tensor] : tensors) {
        res.data.push_back({ tensor, get<uint8_t>(io, n_cells*tensor->nb[1]) });
    }
    return res;
}

static void commit(llama_kv_cache & swa, read_window && next) {
    access::set(swa, std::move(next.cells), next.head);
    for (const auto & [tensor, data] : next.data) {
        const size_t n_row = tensor->nb[1];
        for_runs(next.rows, [&, tensor = tensor, &data = data](size_t from, size_t to) {
            if (next.rows[from] != UINT32_MAX) {
                ggml_backend_tensor_set(tensor, data.data() + from*n_row, next.rows[from]*n_row, (to - from)*n_row);
            }
        });
    }
}

//
// recurrent states
//

struct read_recurrent {
    std::vector<llama_memory_recurrent::mem_cell> cells;
    std::vector<read_rows> data;
};

static std::vector<ggml_tensor *> tensors(const llama_memory_recurrent & recr) {
    std::vector<ggml_tensor *> res;
    for (const auto & list : { recr.r_l, recr.s_l, recr.p_l }) {
        std::copy_if(list.begin(), list.end(), std::back_inserter(res), [](const ggml_tensor * cur) { return cur != nullptr; });
    }
    return res;
}

static void write_recurrent(llama_io_write_i & io, const llama_memory_recurrent & recr) {
    const auto own = tensors(recr);

    put<uint32_t>(io, own.size());
    for (const ggml_tensor * tensor : own) {
        put<int32_t> (io, tensor->type);
        put<uint64_t>(io, tensor->nb[1]);
    }
    for (ggml_tensor * tensor : own) {
        // states that can be gone back to lie behind each other
        io.write_tensor(tensor, recr.rs_idx[0]*tensor->nb[1], tensor->nb[1]);
    }
}

static read_recurrent read_states(llama_io_read_i & io, const llama_memory_recurrent & recr, uint32_t n_pos) {
    const auto own = tensors(recr);

    get_same<uint32_t>(io, own.size(), "recurrent states: the number of tensors");
    for (const ggml_tensor * tensor : own) {
        get_same<int32_t> (io, tensor->type,  "recurrent states: the type");
        get_same<uint64_t>(io, tensor->nb[1], "recurrent states: the bytes of a row");
    }

    read_recurrent res;
    res.cells.resize(recr.size);
    if (n_pos > 0) {
        auto & cell = res.cells[0];
        cell.pos = n_pos - 1;
        cell.src = cell.src0 = cell.tail = 0;
        cell.seq_id.insert(0);
    }
    for (ggml_tensor * tensor : own) {
        res.data.push_back({ tensor, get<uint8_t>(io, tensor->nb[1]) });
    }
    return res;
}

static void commit(llama_memory_recurrent & recr, read_recurrent && next) {
    recr.used      = next.cells[0].is_empty() ? 0 : 1;
    recr.cells     = std::move(next.cells);
    recr.head      = 0;
    recr.rs_z      = -1;
    recr.rs_idx[0] = 0;
    for (const auto & [tensor, data] : next.data) {
        ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
    }
}

//
// the whole memory
//

// what a call of llama.h only writes to the log is the message of the last failure as well
template <typename F>
static void explained(F fn) {
    llama_kv_ragged_set_error("");
    try {
        fn();
    } catch (const std::exception & err) {
        if (llama_kv_ragged_get_error()[0] == '\0') {
            llama_kv_ragged_set_error(llama_kv_ragged_reason(err));
        }
        throw;
    }
}

static void check_aligned(const char * what, llama_pos n_pos, llama_pos expected) {
    if (n_pos != expected) {
        llama_kv_ragged_refuse(format("%s end before position %d and the cells of all positions before %d: remove what is behind before "
                    "the state is saved", what, n_pos, expected));
    }
}

bool llama_kv_ragged_state_write(
        const llama_kv_cache         * kv,
        const llama_kv_cache         * swa,
        const llama_memory_recurrent * recr,
              llama_io_write_i       & io,
              llama_seq_id             seq_id,
              llama_state_seq_flags    flags) {
    const auto * ragged = dynamic_cast<const llama_kv_cache_ragged *>(kv);
    if (!ragged) {
        return false;
    }
    explained([&] {
        check_idle(*ragged);
        check_call(*kv, recr, seq_id, flags);
        ragged->check_closed();
        if (swa && swa->get_has_shift()) {
            llama_kv_ragged_refuse("the positions of windows moved, and their keys follow with the next batch: evaluate a token before the "
                    "state is saved, or shift with wkv_shift()");
        }

        const uint32_t own = parts(swa, recr, flags);

        const llama_pos n_pos = own & PART_CELLS ? llama_pos(ragged->get_seq().n_pos) : swa ? n_pos_of(*swa) : n_pos_of(*recr);
        if (swa) {
            check_aligned("windows", n_pos_of(*swa), n_pos);
        }
        if (recr) {
            check_aligned("recurrent states", n_pos_of(*recr), n_pos);
        }

        put<uint32_t>(io, MAGIC);
        put<uint32_t>(io, VERSION);
        put<uint32_t>(io, own);
        put<uint32_t>(io, n_pos);
        if (own & PART_CELLS) {
            write_cells(io, *ragged);
        }
        if (swa) {
            write_windows(io, *swa);
        }
        if (recr) {
            write_recurrent(io, *recr);
        }
        put<uint32_t>(io, MAGIC);
    });
    return true;
}

// how many positions a state holds, if it is one that this memory can take
static uint32_t read_header(llama_io_read_i & io, const llama_kv_cache_ragged & kv, uint32_t own) {
    const auto & seq = kv.get_seq();

    if (get<uint32_t>(io) != MAGIC) {
        refuse("it was not saved by a context with a policy");
    }
    get_same<uint32_t>(io, VERSION, "the version of its format");

    const uint32_t got = get<uint32_t>(io);
    if (got != own) {
        refuse(format("its parts are %u, expected %u (1: cells of all positions, 2: windows, 4: recurrent states)", got, own));
    }
    if (own & PART_CELLS) {
        return get_within<uint32_t>(io, 0, kv.get_size(), "the number of positions (n_ctx)");
    }

    // the cells of all positions stay, and are to be removed from there on
    const uint32_t n_pos = get<uint32_t>(io);
    if (n_pos < seq.boundary || n_pos > seq.n_pos) {
        refuse(format("it holds windows or recurrent states behind position %u alone, and of the %u positions in the cache those below %u "
                    "were compacted and cannot be removed one by one", n_pos, seq.n_pos, seq.boundary));
    }
    return n_pos;
}

static void read_state(
        llama_kv_cache_ragged  & kv,
        llama_kv_cache         * swa,
        llama_memory_recurrent * recr,
        llama_io_read_i        & io,
        uint32_t                 own) {
    const uint32_t n_pos = read_header(io, kv, own);

    std::unique_ptr<llama_kv_ragged_seq> cells;
    llama_kv_cells                       metadata;
    if (own & PART_CELLS) {
        cells    = std::make_unique<llama_kv_ragged_seq>(read_cells(io, kv, n_pos));
        metadata = make_metadata(kv, n_pos);
    }

    // windows and recurrent states are read to the host: what the memory holds of them has no second place
    llama_kv_ragged_claim claim(kv.get_seq().get_meter());

    read_window window;
    if (swa) {
        window = read_windows(io, *swa, n_pos);
    }
    read_recurrent states;
    if (recr) {
        states = read_states(io, *recr, n_pos);
    }
    for (const auto * data : { &window.data, &states.data }) {
        for (const auto & rows : *data) {
            claim.add(rows.data.size());
        }
    }
    if (get<uint32_t>(io) != MAGIC) {
        refuse("its end is missing");
    }

    // nothing fails from here on
    if (cells) {
        access::set(kv, std::move(metadata), n_pos % kv.get_size());
        kv.replace(std::move(*cells));
    }
    if (swa) {
        commit(*swa, std::move(window));
    }
    if (recr) {
        commit(*recr, std::move(states));
    }
}

bool llama_kv_ragged_state_read(
              llama_kv_cache         * kv,
              llama_kv_cache         * swa,
              llama_memory_recurrent * recr,
              llama_io_read_i        & io,
              llama_seq_id             seq_id,
              llama_state_seq_flags    flags) {
    auto * ragged = dynamic_cast<llama_kv_cache_ragged *>(kv);
    if (!ragged) {
        return false;
    }
    explained([&] {
        check_idle(*ragged);
        if (ragged->is_busy()) {
            llama_kv_ragged_refuse("a selection is running, no state can be loaded until it has returned");
        }
        check_call(*kv, recr, seq_id, flags);
        read_state(*ragged, swa, recr, io, parts(swa, recr, flags));
    });
    return true;
}
