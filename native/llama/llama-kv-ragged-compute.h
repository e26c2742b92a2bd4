#pragma once

// Graphs beside the scheduler, on one backend of a context: it would have to be reserved again for them and would keep their peak.

#include "llama-kv-ragged-layer.h"

#include <vector>

struct llama_context;

// backend of a device in a context, nullptr if it has none
ggml_backend_t llama_kv_ragged_backend(llama_context & lctx, ggml_backend_dev_t dev);

// Memory of graphs that run one after another: that of the largest one, on each backend. It counts as live while it exists.
class llama_kv_ragged_workspace {
public:
    llama_kv_ragged_workspace(llama_kv_ragged_meter & meter) : claim(meter) {}

    // memory for the tensors of a graph, in place of those of the graph before; false if it runs out
    bool alloc(ggml_backend_t backend, ggml_cgraph * gf);

private:
    struct part {
        ggml_backend_t       backend;
        ggml_gallocr_ptr     galloc;
        std::vector<ggml_op> ops; // of the last graph
    };

    llama_kv_ragged_claim claim;
    std::vector<part>     parts;
};

// everything throws std::runtime_error
class llama_kv_ragged_compute {
public:
    // the workspace has to outlive it
    llama_kv_ragged_compute(
            llama_context & lctx, const llama_kv_ragged_layer & layer, llama_kv_ragged_workspace & workspace, size_t n_tensors);

    ggml_context * get_ctx() const { return ctx.get(); }

    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1 = 1);

    void expand(ggml_tensor * cur);

    // after this inputs can be set
    void alloc();

    void compute();

private:
    llama_kv_ragged_workspace & workspace;

    ggml_backend_t   backend = nullptr;
    ggml_context_ptr ctx;
    ggml_cgraph    * gf = nullptr;
};
