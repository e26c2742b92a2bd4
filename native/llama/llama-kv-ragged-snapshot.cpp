#include "llama-kv-ragged-snapshot.h"

#include "llama-kv-cache-iswa.h"
#include "llama-kv-ragged-create.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"

// Copies of upstream's caches, to the bit: saved states would move cells to other rows, whose sums round differently.
struct llama_kv_ragged_copy {
    using restore_fn = std::function<void()>;

    static restore_fn of(llama_kv_cache & kv, int64_t & n_bytes) {
        std::vector<ggml_tensor *> tensors;
        for (const auto & [ctx, _] : kv.ctxs_bufs) {
            for (ggml_tensor * cur = ggml_get_first_tensor(ctx.get()); cur; cur = ggml_get_next_tensor(ctx.get(), cur)) {
                tensors.push_back(cur);
            }
        }
        return [&kv, cells = kv.v_cells, heads = kv.v_heads, restore = of(tensors, n_bytes)] {
            kv.v_cells = cells;
            kv.v_heads = heads;
            restore();
        };
    }

    static restore_fn of(llama_memory_recurrent & mem, int64_t & n_bytes) {
        std::vector<ggml_tensor *> tensors;
        for (const auto & list : { mem.r_l, mem.s_l, mem.p_l }) {
            tensors.insert(tensors.end(), list.begin(), list.end());
        }
        return [&mem, head = mem.head, used = mem.used, n = mem.n, rs_z = mem.rs_z, rs_idx = mem.rs_idx, cells = mem.cells,
                restore = of(tensors, n_bytes)] {
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
    static restore_fn of(const std::vector<ggml_tensor *> & tensors, int64_t & n_bytes) {
        std::vector<std::pair<ggml_tensor *, std::vector<uint8_t>>> data;
        for (ggml_tensor * cur : tensors) {
            if (cur && !cur->view_src) {
                data.emplace_back(cur, ggml_nbytes(cur));
                n_bytes += ggml_nbytes(cur);
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

llama_kv_ragged_others::llama_kv_ragged_others(llama_kv_cache & kv, llama_memory_i & mem) : mem(&mem) {
    fns.push_back(llama_kv_ragged_copy::of(kv, n_bytes));
    if (auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(&mem)) {
        fns.push_back(llama_kv_ragged_copy::of(*iswa->get_swa(), n_bytes));
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(&mem)) {
        fns.push_back(llama_kv_ragged_copy::of(*hybrid->get_mem_recr(), n_bytes));
    } else {
        GGML_ASSERT(&mem == &kv);
    }
}

void llama_kv_ragged_others::restore() const {
    try {
        for (const auto & fn : fns) {
            fn();
        }
    } catch (const std::exception &) {
        llama_memory_i * mem = this->mem; // clearing may give this copy up
        mem->clear(true); // some of its caches went back, and others did not
        llama_kv_ragged_refuse("memory ran out while a copy of the cache was restored, the cache was cleared and the copy given up");
    }
}
