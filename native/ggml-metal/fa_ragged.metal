// Metal kernels of GGML_OP_FLASH_ATTN_RAGGED, see ggml-flash-attn-ragged.h. A library of its own, named as upstream's Metal libraries
// are (fa_f16, fa_vec_f16); flatten.cmake makes one text of it.

#include "simt/simt-metal.h"
#include "simt/flash-attn-ragged-simt.h"

// types of the pools, known when a pipeline is made
SIMT_FUNCTION_CONSTANT(int32_t, fattn_type_k, FC_TYPE_K)
SIMT_FUNCTION_CONSTANT(int32_t, fattn_type_v, FC_TYPE_V)

inline fattn_args fattn_typed(constant fattn_args & args) {
    fattn_args a = args;
    a.type_k = fattn_type_k;
    a.type_v = fattn_type_v;
    return a;
}

inline simt_ids fattn_ids(uint3 group, ushort thread_index, ushort simd, ushort lane) {
    simt_ids id;
    id.block = (int32_t) group.x;
    id.tid   = thread_index;
    id.warp  = simd;
    id.lane  = lane;
    return id;
}

template <int n_lanes, int n_rows>
kernel void kernel_flash_attn_ragged_vec(
        constant fattn_args  & args   [[buffer(0)]],
        device const char    * q      [[buffer(1)]],
        device const char    * k      [[buffer(2)]],
        device const char    * v      [[buffer(3)]],
        device const int32_t * ranges [[buffer(4)]],
        device const float   * sinks  [[buffer(5)]],
        device       float   * part   [[buffer(6)]],
        device       float   * dst    [[buffer(7)]],
        uint3  group        [[threadgroup_position_in_grid]],
        ushort thread_index [[thread_index_in_threadgroup]],
        ushort simd         [[simdgroup_index_in_threadgroup]],
        ushort lane         [[thread_index_in_simdgroup]]) {
    SIMT_SHARED_ARRAY(float, sh, (fattn_vec_shape<n_lanes, n_rows>::N_SHARED));

    const fattn_tensors t = { SIMT_ENTER(q), SIMT_ENTER(k), SIMT_ENTER(v), SIMT_ENTER(ranges), SIMT_ENTER(sinks), SIMT_ENTER(part), SIMT_ENTER(dst) };

    fattn_vec<fattn_row_any, n_lanes, n_rows>(fattn_typed(args), t, sh, fattn_ids(group, thread_index, simd, lane));
}

template <int n_rows, int n_cells, int n_embd>
kernel void kernel_flash_attn_ragged_tile(
        constant fattn_args  & args   [[buffer(0)]],
        device const char    * q      [[buffer(1)]],
        device const char    * k      [[buffer(2)]],
        device const char    * v      [[buffer(3)]],
        device const int32_t * ranges [[buffer(4)]],
        device const float   * sinks  [[buffer(5)]],
        device       float   * part   [[buffer(6)]],
        device       float   * dst    [[buffer(7)]],
        uint3  group        [[threadgroup_position_in_grid]],
        ushort thread_index [[thread_index_in_threadgroup]],
        ushort simd         [[simdgroup_index_in_threadgroup]],
        ushort lane         [[thread_index_in_simdgroup]]) {
    typedef fattn_tile_shape<n_rows, n_cells, n_embd> shape;

    SIMT_SHARED_ARRAY(simt_f16, q_sh,   shape::N_Q);
    SIMT_SHARED_ARRAY(simt_f16, kv_sh,  shape::N_KV);
    SIMT_SHARED_ARRAY(float,    s_sh,   shape::N_S);
    SIMT_SHARED_ARRAY(simt_f16, p_sh,   shape::N_P);
    SIMT_SHARED_ARRAY(float,    o_sh,   shape::N_O);
    SIMT_SHARED_ARRAY(float,    max_sh, n_rows);
    SIMT_SHARED_ARRAY(float,    sum_sh, n_rows);

    const fattn_tensors     t  = { SIMT_ENTER(q), SIMT_ENTER(k), SIMT_ENTER(v), SIMT_ENTER(ranges), SIMT_ENTER(sinks), SIMT_ENTER(part), SIMT_ENTER(dst) };
    const fattn_tile_shared sh = { q_sh, kv_sh, s_sh, p_sh, o_sh, max_sh, sum_sh };

    fattn_tile<fattn_row_any, n_rows, n_cells, n_embd>(fattn_typed(args), t, sh, fattn_ids(group, thread_index, simd, lane));
}

template <int n_rows>
kernel void kernel_flash_attn_ragged_combine(
        constant fattn_args  & args         [[buffer(0)]],
        device const int32_t * ranges       [[buffer(1)]],
        device const float   * sinks        [[buffer(2)]],
        device const float   * part         [[buffer(3)]],
        device       float   * dst          [[buffer(4)]],
        constant     int32_t & n_cells_tile [[buffer(5)]],
        uint3  group        [[threadgroup_position_in_grid]],
        ushort thread_index [[thread_index_in_threadgroup]],
        ushort simd         [[simdgroup_index_in_threadgroup]],
        ushort lane         [[thread_index_in_simdgroup]]) {
    SIMT_SHARED_ARRAY(float, sh, FATTN_N_COMBINE);

    fattn_combine<n_rows>(args, SIMT_ENTER(ranges), SIMT_ENTER(sinks), SIMT_ENTER(part), SIMT_ENTER(dst), n_cells_tile, sh,
            fattn_ids(group, thread_index, simd, lane));
}

// pipelines that the host asks for by name
#define FATTN_VEC(n_lanes, n_rows) \
    SIMT_KERNEL_NAME(kernel_flash_attn_ragged_vec_##n_lanes##_##n_rows, kernel_flash_attn_ragged_vec<n_lanes, n_rows>)

#define FATTN_VEC_ROWS(n_lanes) \
    FATTN_VEC(n_lanes, 1)       \
    FATTN_VEC(n_lanes, 2)       \
    FATTN_VEC(n_lanes, 4)       \
    FATTN_VEC(n_lanes, 8)

// n_lanes*FATTN_DIMS is the size of a head. 16 rows x 32 cells are what fits into 32 KiB of threadgroup memory
#define FATTN_TILE(n_lanes) \
    SIMT_KERNEL_NAME(kernel_flash_attn_ragged_tile_##n_lanes, kernel_flash_attn_ragged_tile<16, 32, n_lanes*FATTN_DIMS>)

FATTN_VEC_ROWS(8)
FATTN_VEC_ROWS(16)
FATTN_VEC_ROWS(32)

FATTN_TILE(8)
FATTN_TILE(16)

SIMT_KERNEL_NAME(kernel_flash_attn_ragged_combine_1,  kernel_flash_attn_ragged_combine<1>)
SIMT_KERNEL_NAME(kernel_flash_attn_ragged_combine_2,  kernel_flash_attn_ragged_combine<2>)
SIMT_KERNEL_NAME(kernel_flash_attn_ragged_combine_4,  kernel_flash_attn_ragged_combine<4>)
SIMT_KERNEL_NAME(kernel_flash_attn_ragged_combine_8,  kernel_flash_attn_ragged_combine<8>)
SIMT_KERNEL_NAME(kernel_flash_attn_ragged_combine_16, kernel_flash_attn_ragged_combine<16>)
