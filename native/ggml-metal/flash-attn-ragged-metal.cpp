#include "flash-attn-ragged-metal.h"

#include "simt/flash-attn-ragged-host.h"

#include "ggml-backend-impl.h"

#include <string>

// threadgroups that keep the largest GPU busy, two for each of the 80 cores of an M3 Ultra; the API does not tell their number
static constexpr int N_BUSY = 160;

// of kernel_flash_attn_ragged_tile_*
static constexpr int N_ROWS_TILE  = 16;
static constexpr int N_CELLS_TILE = 32;

// which kernel computes an op, and how
struct fattn_plan {
    explicit fattn_plan(const ggml_tensor * op);

    fattn_args     a;
    int         n_rows_block;
    int         n_cells_tile;
    std::string kernel;
};

fattn_plan::fattn_plan(const ggml_tensor * op) : a(fattn_args_of(op)) {
    const int n_lanes = fattn_n_lanes(a);

    if (a.n_rows > 8 && n_lanes < 32) {
        n_rows_block = N_ROWS_TILE;
        n_cells_tile = N_CELLS_TILE;
        kernel       = "kernel_flash_attn_ragged_tile_" + std::to_string(n_lanes);
        fattn_plan_shares(a, op, n_rows_block, n_cells_tile, N_BUSY, FATTN_TILE_N_TILES_MIN);
        return;
    }
    n_rows_block = fattn_vec_rows(a);
    n_cells_tile = FATTN_N_WARPS*32/n_lanes*(n_rows_block > 4 ? 2 : 4); // fattn_vec_shape
    kernel       = "kernel_flash_attn_ragged_vec_" + std::to_string(n_lanes) + "_" + std::to_string(n_rows_block);
    if (a.n_rows > 8) {
        // tiles of the largest heads do not fit into threadgroup memory
        fattn_plan_splits(a, op, n_rows_block, n_cells_tile, N_BUSY);
    } else {
        fattn_plan_shares(a, op, n_rows_block, n_cells_tile, N_BUSY);
    }
}

// a pipeline knows the types of the pools, those that combine parts need none
static ggml_metal_pipeline_with_params get_pipeline(ggml_metal_library_t lib, const std::string & kernel, const fattn_args * a = nullptr) {
    const std::string name = kernel + (a ? "_type_k=" + std::to_string(a->type_k) + "_type_v=" + std::to_string(a->type_v) : "");

    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name.c_str());
    if (!res.pipeline) {
        ggml_metal_cv_t cv = ggml_metal_cv_init();
        if (a) {
            ggml_metal_cv_set_int32(cv, a->type_k, FC_TYPE_K);
            ggml_metal_cv_set_int32(cv, a->type_v, FC_TYPE_V);
        }
        res = ggml_metal_library_compile_pipeline(lib, kernel.c_str(), name.c_str(), cv);
        ggml_metal_cv_free(cv);
    }
    return res;
}

static ggml_metal_buffer_id get_buffer_id(const ggml_tensor * t) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
}

int ggml_metal_op_flash_attn_ragged(ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * op) {
    fattn_plan plan(op);

    ggml_metal_buffer_id ranges = get_buffer_id(op->src[3]);
    ggml_metal_buffer_id dst    = get_buffer_id(op);
    ggml_metal_buffer_id part   = dst;
    ranges.offs += fattn_ranges_offset(op);
    part.offs   += plan.a.n_splits == 1 ? 0 : ggml_nbytes(op);

    const ggml_metal_buffer_id sinks = op->src[4] ? get_buffer_id(op->src[4]) : dst; // has_sinks tells which

    ggml_metal_encoder_set_pipeline(enc, get_pipeline(lib, plan.kernel, &plan.a));
    ggml_metal_encoder_set_bytes (enc, &plan.a, sizeof(plan.a), 0);
    ggml_metal_encoder_set_buffer(enc, get_buffer_id(op->src[0]), 1);
    ggml_metal_encoder_set_buffer(enc, get_buffer_id(op->src[1]), 2);
    ggml_metal_encoder_set_buffer(enc, get_buffer_id(op->src[2]), 3);
    ggml_metal_encoder_set_buffer(enc, ranges,                    4);
    ggml_metal_encoder_set_buffer(enc, sinks,                     5);
    ggml_metal_encoder_set_buffer(enc, part,                      6);
    ggml_metal_encoder_set_buffer(enc, dst,                       7);
    ggml_metal_encoder_dispatch_threadgroups(enc, plan.a.n_blocks, 1, 1, FATTN_N_THREADS, 1, 1);

    if (plan.a.n_splits == 1) {
        return 1;
    }
    ggml_metal_encoder_memory_barrier(enc);

    int32_t n_cells_tile = plan.n_cells_tile;

    ggml_metal_encoder_set_pipeline(enc, get_pipeline(lib, "kernel_flash_attn_ragged_combine_" + std::to_string(plan.n_rows_block)));
    ggml_metal_encoder_set_bytes (enc, &plan.a, sizeof(plan.a), 0);
    ggml_metal_encoder_set_buffer(enc, ranges,                  1);
    ggml_metal_encoder_set_buffer(enc, sinks,                   2);
    ggml_metal_encoder_set_buffer(enc, part,                    3);
    ggml_metal_encoder_set_buffer(enc, dst,                     4);
    ggml_metal_encoder_set_bytes (enc, &n_cells_tile, sizeof(n_cells_tile), 5);
    ggml_metal_encoder_dispatch_threadgroups(enc, plan.a.n_head_kv*plan.a.n_row_blocks*plan.n_rows_block, 1, 1, FATTN_N_THREADS, 1, 1);
    return 1;
}

bool ggml_metal_op_flash_attn_ragged_supported(const ggml_tensor * op) {
    return fattn_supported(op);
}

size_t ggml_metal_op_flash_attn_ragged_extra(const ggml_tensor * op) {
    const fattn_plan plan(op);
    return fattn_part_size(plan.a, plan.n_rows_block)*sizeof(float);
}
