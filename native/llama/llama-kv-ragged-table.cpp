#include "llama-kv-ragged-table.h"

#include "llama-impl.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-compute.h"

void llama_kv_ragged_tables::init(const std::vector<llama_kv_ragged_layer> & layers, llama_kv_ragged_meter & meter) {
    for (const auto & layer : layers) {
        if (layer.on_cpu() || (!layer.has_ragged && !layer.has_by_head()) || tables.count(layer.dev)) {
            continue;
        }
        const ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(layer.dev);

        const int64_t n = (2 + N_TOKENS_MAX)*layers[0].n_head_kv*layers.size();

        auto & cur = tables[layer.dev];
        cur.buf = llama_kv_ragged_tensor::make(buft, GGML_TYPE_I32, { n, 1, 1 }, format("ragged_table_%s", ggml_backend_dev_name(layer.dev)).c_str(), meter);
        if (cur.buf.empty()) {
            llama_kv_ragged_refuse(format("no memory for a table of %zu bytes on %s", n*sizeof(int32_t), ggml_backend_dev_name(layer.dev)));
        }
    }
}

ggml_tensor * llama_kv_ragged_tables::find(ggml_backend_dev_t dev) const {
    const auto it = tables.find(dev);
    return it == tables.end() ? nullptr : it->second.buf.tensor;
}

void llama_kv_ragged_tables::bind(llama_context & lctx) {
    for (auto & [dev, cur] : tables) {
        cur.backend = llama_kv_ragged_backend(lctx, dev);
    }
}

void llama_kv_ragged_tables::set(ggml_backend_dev_t dev, const std::vector<int32_t> & data) {
    auto & own  = tables.at(dev);
    auto & held = own.data[own.i_data++ % own.data.size()];
    held = data;

    GGML_ASSERT(own.backend);
    ggml_backend_tensor_set_async(own.backend, own.buf.tensor, held.data(), 0, held.size()*sizeof(held[0]));
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_ragged_tables::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & [_, cur] : tables) {
        res[ggml_backend_buffer_get_type(cur.buf.buf.get())] += cur.buf.bytes();
    }
    return res;
}
