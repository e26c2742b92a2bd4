#pragma once

// Where the heads of all layers stand and which rows the new cells take, for the layers whose heads differ. On every device that
// is not a CPU it lies in a buffer of that device: an input of the graph would be copied, and waited for, once for every layer.

#include "llama-kv-ragged-layer.h"

#include <array>
#include <cstdint>
#include <map>
#include <vector>

struct llama_context;

class llama_kv_ragged_tables {
public:
    // tokens of the largest batch whose table a device holds: what decodes, with drafts
    static constexpr int64_t N_TOKENS_MAX = 8;

    // throws std::runtime_error if memory runs out
    void init(const std::vector<llama_kv_ragged_layer> & layers, llama_kv_ragged_meter & meter);

    // the table of a device, I32 [(2 + N_TOKENS_MAX)*n_head_kv*n_layer]; nullptr if it has none
    ggml_tensor * find(ggml_backend_dev_t dev) const;

    // the context that computes; called before set()
    void bind(llama_context & lctx);

    // write a device's table in the order of its work: graphs before this one may still read it
    void set(ggml_backend_dev_t dev, const std::vector<int32_t> & data);

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

private:
    struct table {
        llama_kv_ragged_tensor buf;
        ggml_backend_t         backend = nullptr;

        // what was written last, which the device may read later: as many as there are graphs in flight
        std::array<std::vector<int32_t>, 4> data;
        size_t                              i_data = 0;
    };

    std::map<ggml_backend_dev_t, table> tables;
};
