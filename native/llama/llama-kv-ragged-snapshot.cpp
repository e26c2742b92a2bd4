// Snapshots: a copy of everything that a context's memory holds, to go back to any number of times.

#include "llama-kv-cache-ragged.h"

#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"

#include <algorithm>

// Copies of upstream's caches, to the bit: saved states would move cells to other rows, whose sums round differently.
struct llama_kv_ragged_copy {
    using restore_fn = std::function<void()>;

    static restore_fn of(llama_kv_cache & kv) {
        std::vector<ggml_tensor *> tensors;
        for (const auto & [ctx, _] : kv.ctxs_bufs) {
            for (ggml_tensor * cur = ggml_get_first_tensor(ctx.get()); cur; cur = ggml_get_next_tensor(ctx.get(), cur)) {
                tensors.push_back(cur);
            }
        }
        return [&kv, cells = kv.v_cells, heads = kv.v_heads, restore = of(tensors)] {
            kv.v_cells = cells;
            kv.v_heads = heads;
            restore();
        };
    }

    static restore_fn of(llama_memory_recurrent & mem) {
        std::vector<ggml_tensor *> tensors;
        for (const auto & list : { mem.r_l, mem.s_l, mem.p_l }) {
            tensors.insert(tensors.end(), list.begin(), list.end());
        }
        return [&mem, head = mem.head, used = mem.used, n = mem.n, rs_z = mem.rs_z, rs_idx = mem.rs_idx, cells = mem.cells,
                restore = of(tensors)] {
            mem.head   = head;
            mem.used   = used;
            mem.n      = n;
            mem.rs_z   = rs_z;
            mem.rs_idx = rs_idx;
            mem.cells  = cells;
            restore();
        };
    }

private:
    // views and layers without a tensor are left out
    static restore_fn of(const std::vector<ggml_tensor *> & tensors) {
        std::vector<std::pair<ggml_tensor *, std::vector<uint8_t>>> data;
        for (ggml_tensor * cur : tensors) {
            if (cur && !cur->view_src) {
                data.emplace_back(cur, ggml_nbytes(cur));
                ggml_backend_tensor_get(cur, data.back().second.data(), 0, data.back().second.size());
            }
        }
        return [data = std::move(data)] {
            for (const auto & [tensor, bytes] : data) {
                ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
            }
        };
    }
};

bool llama_kv_cache_ragged::snapshot_save(llama_memory_i * mem) {
    synchronize();

    auto res = std::make_unique<snapshot_t>();
    for (const auto & layer : layers) {
        const auto len = n_cells(layer);

        auto cap = len;
        for (auto & n : cap) {
            n = std::max<int64_t>(1, n);
        }

        res->pools.push_back(layer.copy_pool(layer.pool, cap, len, &meter));
        if (res->pools.back().empty()) {
            return false;
        }
        res->kept.push_back(layer.kept);
        res->bounds.push_back(layer.boundary);
        res->rings.emplace_back(ggml_nbytes(layer.ring));
        ggml_backend_tensor_get(layer.ring, res->rings.back().data(), 0, res->rings.back().size());
    }
    res->ring_pos = ring_pos;
    res->n_pos    = n_pos;
    res->boundary = boundary;

    res->others.push_back(llama_kv_ragged_copy::of(static_cast<llama_kv_cache &>(*this))); // the ledger
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
        res->others.push_back(llama_kv_ragged_copy::of(*iswa->get_swa()));
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem)) {
        res->others.push_back(llama_kv_ragged_copy::of(*hybrid->get_mem_recr()));
    } else {
        GGML_ASSERT(mem == this);
    }

    snapshot = std::move(res);
    return true;
}

bool llama_kv_cache_ragged::snapshot_restore() {
    if (!snapshot || snapshot->ring_pos.size() != n_window) {
        return false;
    }
    synchronize();

    // nothing changes until all copies exist
    std::vector<llama_kv_ragged_pool> pools;
    for (size_t i = 0; i < layers.size(); ++i) {
        std::vector<int64_t> len;
        for (const auto & kept : snapshot->kept[i]) {
            len.push_back(kept.size() + (snapshot->n_pos - snapshot->bounds[i]));
        }

        const auto cap = layers[i].capacity(len, 32, snapshot->boundary > 0);

        pools.push_back(layers[i].copy_pool(snapshot->pools[i], cap, len, &meter));
        if (pools.back().empty()) {
            return false;
        }
    }

    auto kept = snapshot->kept;

    for (size_t i = 0; i < layers.size(); ++i) {
        auto & layer = layers[i];

        layer.pool     = std::move(pools[i]);
        layer.kept     = std::move(kept[i]);
        layer.boundary = snapshot->bounds[i];
        ggml_backend_tensor_set(layer.ring, snapshot->rings[i].data(), 0, snapshot->rings[i].size());
    }
    for (const auto & restore : snapshot->others) {
        restore();
    }
    ring_pos = snapshot->ring_pos;
    n_pos    = snapshot->n_pos;
    boundary = snapshot->boundary;
    epoch++;
    return true;
}

void llama_kv_cache_ragged::snapshot_drop() {
    snapshot.reset();
}
