#include "llama-kv-ragged-state.h"

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

std::vector<std::function<void()>> llama_kv_ragged_copy_others(llama_memory_i & mem, llama_kv_cache & kv) {
    std::vector<std::function<void()>> res = { llama_kv_ragged_copy::of(kv) };
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(&mem)) {
        res.push_back(llama_kv_ragged_copy::of(*iswa->get_swa()));
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(&mem)) {
        res.push_back(llama_kv_ragged_copy::of(*hybrid->get_mem_recr()));
    } else {
        GGML_ASSERT(&mem == &kv);
    }
    return res;
}

//
// llama_kv_cache_ragged
//

llama_kv_ragged_buffer llama_kv_cache_ragged::copy_queries(size_t i, const ggml_tensor * src) {
    const auto & layer = layers[i];

    auto res = llama_kv_ragged_buffer::make(layer.buft, src->type, { src->ne[0], src->ne[1], src->ne[2] }, src->name, &meter);
    if (!res.empty()) {
        ggml_backend_tensor_copy(const_cast<ggml_tensor *>(src), res.tensor);
    }
    return res;
}

bool llama_kv_cache_ragged::snapshot_save(llama_memory_i & mem) {
    synchronize();

    auto res = std::make_unique<llama_kv_ragged_snapshot>();
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto len = seq.n_cells(i);

        auto cap = len;
        for (auto & n : cap) {
            n = std::max<int64_t>(1, n);
        }

        res->state.pools  .push_back(layers[i].copy_pool(pools[i], cap, len, &meter));
        res->state.queries.push_back(copy_queries(i, queries[i].tensor));
        if (res->state.pools.back().empty() || res->state.queries.back().empty()) {
            return false;
        }
    }
    res->state.seq = seq;
    res->others    = llama_kv_ragged_copy_others(mem, *this);

    snapshot = std::move(res);
    return true;
}

bool llama_kv_cache_ragged::snapshot_restore() {
    if (!snapshot || snapshot->state.seq.observed.n_observed != seq.observed.n_observed) {
        return false;
    }
    const auto & state = snapshot->state;

    synchronize();

    // nothing of this cache changes until all copies exist
    llama_kv_ragged_state next;
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto len = state.seq.n_cells(i);
        const auto cap = layers[i].capacity(len, 32, state.seq.boundary > 0);

        next.pools  .push_back(layers[i].copy_pool(state.pools[i], cap, len, &meter));
        next.queries.push_back(copy_queries(i, state.queries[i].tensor));
        if (next.pools.back().empty() || next.queries.back().empty()) {
            return false;
        }
    }
    next.seq = state.seq;

    for (const auto & back : snapshot->others) {
        back();
    }
    pools   = std::move(next.pools);
    queries = std::move(next.queries);
    seq     = std::move(next.seq);
    epoch++;
    return true;
}

void llama_kv_cache_ragged::snapshot_drop() {
    snapshot.reset();
}
