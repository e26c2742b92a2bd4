#include "llama-kv-ragged-compute.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-ragged-create.h"

#include <algorithm>

ggml_backend_t llama_kv_ragged_backend(llama_context & lctx, ggml_backend_dev_t dev) {
    ggml_backend_sched_t sched = lctx.get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t cur = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(cur) == dev) {
            return cur;
        }
    }
    return nullptr;
}

//
// llama_kv_ragged_workspace
//

bool llama_kv_ragged_workspace::alloc(ggml_backend_t backend, ggml_cgraph * gf) {
    auto it = std::find_if(parts.begin(), parts.end(), [&](const part & cur) { return cur.backend == backend; });
    if (it == parts.end()) {
        it = parts.insert(it, { backend, nullptr, {} });
    }

    // the places of tensors are those of the last graph if that was built alike; an allocator cannot tell by itself
    std::vector<ggml_op> ops;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ops.push_back(ggml_graph_node(gf, i)->op);
    }
    const auto n_bytes = [&] { return it->galloc ? int64_t(ggml_gallocr_get_buffer_size(it->galloc.get(), 0)) : 0; };

    const int64_t n_before = n_bytes();
    if (it->ops != ops) {
        it->galloc.reset();
        it->galloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
        it->ops = std::move(ops);
    }
    const bool ok = ggml_gallocr_alloc_graph(it->galloc.get(), gf);
    if (!ok) {
        it->galloc.reset(); // it takes the places for found
        it->ops.clear();
    }
    claim.add(n_bytes() - n_before);
    return ok;
}

//
// llama_kv_ragged_compute
//

llama_kv_ragged_compute::llama_kv_ragged_compute(
        llama_context & lctx, const llama_kv_ragged_layer & layer, llama_kv_ragged_workspace & workspace, size_t n_tensors) :
    workspace(workspace), backend(llama_kv_ragged_backend(lctx, layer.dev)) {
    if (!backend) {
        llama_kv_ragged_refuse(format("the context has no backend for the device of layer %u", layer.il));
    }

    const ggml_init_params params = {
        /*.mem_size   =*/ n_tensors*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ctx.reset(ggml_init(params));
    gf = ggml_new_graph_custom(ctx.get(), n_tensors, false);
}

ggml_tensor * llama_kv_ragged_compute::input(ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor * cur = ggml_new_tensor_2d(ctx.get(), type, ne0, ne1);
    ggml_set_input(cur);
    return cur;
}

void llama_kv_ragged_compute::expand(ggml_tensor * cur) {
    ggml_build_forward_expand(gf, cur);
}

void llama_kv_ragged_compute::alloc() {
    // there is no scheduler to fall back to another backend
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
            llama_kv_ragged_refuse_unsupported(format("%s cannot compute %s, load the model with n_gpu_layers=0 or without a policy",
                        ggml_backend_name(backend), ggml_op_name(ggml_graph_node(gf, i)->op)));
        }
    }
    if (!workspace.alloc(backend, gf)) {
        llama_kv_ragged_refuse("no memory for a graph over the cells");
    }
}

void llama_kv_ragged_compute::compute() {
    const ggml_status status = ggml_backend_graph_compute(backend, gf);
    if (status != GGML_STATUS_SUCCESS) {
        llama_kv_ragged_refuse(format("a graph over the cells failed (%s)", ggml_status_to_string(status)));
    }
}
