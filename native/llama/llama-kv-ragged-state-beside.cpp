// What stands beside the cells of all positions: windows and recurrent states.

#include "llama-kv-ragged-state-parts.h"

#include <algorithm>

namespace llama_kv_ragged_state {

//
// windows
//

void write_windows(llama_io_write_i & io, const llama_kv_cache & swa) {
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

read_window read_windows(llama_io_read_i & io, const llama_kv_cache & swa, uint32_t n_pos) {
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

void commit(llama_kv_cache & swa, read_window && next) {
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

static std::vector<ggml_tensor *> tensors(const llama_memory_recurrent & recr) {
    std::vector<ggml_tensor *> res;
    for (const auto & list : { recr.r_l, recr.s_l, recr.p_l }) {
        std::copy_if(list.begin(), list.end(), std::back_inserter(res), [](const ggml_tensor * cur) { return cur != nullptr; });
    }
    return res;
}

void write_recurrent(llama_io_write_i & io, const llama_memory_recurrent & recr) {
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

read_recurrent read_states(llama_io_read_i & io, const llama_memory_recurrent & recr, uint32_t n_pos) {
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

void commit(llama_memory_recurrent & recr, read_recurrent && next) {
    recr.used      = next.cells[0].is_empty() ? 0 : 1;
    recr.cells     = std::move(next.cells);
    recr.head      = 0;
    recr.rs_z      = -1;
    recr.rs_idx[0] = 0;
    for (const auto & [tensor, data] : next.data) {
        ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
    }
}

}
