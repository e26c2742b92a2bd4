#include "flash-attn-ragged.cuh"

#include "simt/flash-attn-ragged-host.h"
#include "simt/simt-cuda.cuh"
#include "simt/flash-attn-ragged-simt.h"
#include "simt/flash-attn-ragged-mma.h"

#include <type_traits>

// Blocks of a multiprocessor that are in flight at the same time: as many as its 65,536 registers are enough for. 4, 3 and 2 blocks
// of 128 threads leave 128, 168 and 255 registers to a thread
template <typename row_t>
static constexpr int n_blocks_sm_vec(int n_rows) {
    if (std::is_same_v<row_t, fattn_row_any>) {
        return n_rows == 1 ? 3 : 2; // two rows in 168 registers spill on sm_75
    }
    return n_rows <= 2 ? 4 : n_rows <= 4 ? 3 : 2;
}

static constexpr int N_BLOCKS_SM_TILE = 2;

// Queries and sums of values of a warp take up to 96 registers, quantised cells on their way 16 to 24 and their addresses as many
template <typename row_t>
static constexpr int n_blocks_sm_mma(int n_embd, int n_rows) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < GGML_CUDA_CC_AMPERE
    return 2; // copies go through registers too, and a multiprocessor has no memory for more blocks
#else
    return n_embd > 128 || n_rows > 16 ? 2 : row_t::IS_F16 && n_rows == 8 ? 4 : 3;
#endif
}

template <typename row_t, int n_lanes, int n_rows>
SIMT_KERNEL(FATTN_N_THREADS, n_blocks_sm_vec<row_t>(n_rows)) flash_attn_ragged_vec(
        const fattn_args a, const char * q, const char * k, const char * v, const int32_t * ranges, const float * sinks, float * part, float * dst) {
    SIMT_SHARED_ARRAY(float, sh, (fattn_vec_shape<n_lanes, n_rows>::N_SHARED));

    const fattn_tensors t = { SIMT_ENTER(q), SIMT_ENTER(k), SIMT_ENTER(v), SIMT_ENTER(ranges), SIMT_ENTER(sinks), SIMT_ENTER(part), SIMT_ENTER(dst) };

    fattn_vec<row_t, n_lanes, n_rows>(a, t, sh, simt_get_ids());
}

template <typename row_t, int n_embd, int n_rows>
SIMT_KERNEL(FATTN_N_THREADS, n_blocks_sm_mma<row_t>(n_embd, n_rows)) flash_attn_ragged_mma(
        const fattn_args a, const char * q, const char * k, const char * v, const int32_t * ranges, const float * sinks, float * part, float * dst) {
    SIMT_SHARED_ARRAY(simt_f16, sh, (fattn_mma_shared<row_t, n_embd, n_rows>::N));

    const fattn_tensors t = { SIMT_ENTER(q), SIMT_ENTER(k), SIMT_ENTER(v), SIMT_ENTER(ranges), SIMT_ENTER(sinks), SIMT_ENTER(part), SIMT_ENTER(dst) };

    fattn_mma<row_t, n_embd, n_rows>(a, t, sh, simt_get_ids());
}

template <typename row_t, int n_rows, int n_cells, int n_embd>
SIMT_KERNEL(FATTN_N_THREADS, N_BLOCKS_SM_TILE) flash_attn_ragged_tile(
        const fattn_args a, const char * q, const char * k, const char * v, const int32_t * ranges, const float * sinks, float * part, float * dst) {
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

    fattn_tile<row_t, n_rows, n_cells, n_embd>(a, t, sh, simt_get_ids());
}

template <int n_rows>
SIMT_KERNEL(FATTN_N_THREADS, 1) flash_attn_ragged_combine(
        const fattn_args a, const int32_t * ranges, const float * sinks, const float * part, float * dst, const int32_t n_cells_tile) {
    SIMT_SHARED_ARRAY(float, sh, FATTN_N_COMBINE);

    fattn_combine<n_rows>(a, SIMT_ENTER(ranges), SIMT_ENTER(sinks), SIMT_ENTER(part), SIMT_ENTER(dst), n_cells_tile, sh, simt_get_ids());
}

// tensors of the op on the device, shapes as in fattn_tensors
struct fattn_pointers {
    explicit fattn_pointers(const ggml_tensor * op) :
        q((const char *) op->src[0]->data), k((const char *) op->src[1]->data), v((const char *) op->src[2]->data),
        ranges((const int32_t *) ((const char *) op->src[3]->data + fattn_ranges_offset(op))),
        sinks(op->src[4] ? (const float *) op->src[4]->data : nullptr), dst((float *) op->data) {}

    const char    * q;
    const char    * k;
    const char    * v;
    const int32_t * ranges; // of the op's layer
    const float   * sinks;
    float         * dst;
};

// blocks that keep a device busy
static int n_busy(const ggml_backend_cuda_context & ctx, int n_blocks_sm) {
    return n_blocks_sm*ggml_cuda_info().devices[ctx.device].nsm;
}

template <int n_rows>
static void launch_combine(ggml_backend_cuda_context & ctx, const fattn_pointers & t, const fattn_args & a, const float * part, int32_t n_cells_tile) {
    simt_launch(flash_attn_ragged_combine<n_rows>, a.n_head_kv*a.n_row_blocks*n_rows, FATTN_N_THREADS, ctx.stream(),
            a, t.ranges, t.sinks, part, t.dst, n_cells_tile);
}

template <typename row_t, int n_lanes, int n_rows>
static void launch_vec(ggml_backend_cuda_context & ctx, ggml_tensor * dst, fattn_args a) {
    typedef fattn_vec_shape<n_lanes, n_rows> shape;

    const fattn_pointers t(dst);

    fattn_plan_shares(a, dst, n_rows, shape::N_CELLS_TILE, n_busy(ctx, n_blocks_sm_vec<row_t>(n_rows)));
    ggml_cuda_pool_alloc<float> part(ctx.pool(), fattn_part_size(a, n_rows));

    simt_launch(flash_attn_ragged_vec<row_t, n_lanes, n_rows>, a.n_blocks, FATTN_N_THREADS, ctx.stream(),
            a, t.q, t.k, t.v, t.ranges, t.sinks, part.get(), t.dst);
    launch_combine<n_rows>(ctx, t, a, part.get(), shape::N_CELLS_TILE);
}

// blocks of so much memory that a multiprocessor has room for. What a block can ask for is all that there is, less 1 KiB of it that every
// block takes for the system from sm_80 on
static int n_blocks_memory(const ggml_backend_cuda_context & ctx, size_t size) {
    const auto & device = ggml_cuda_info().devices[ctx.device];
    const size_t own    = device.cc >= GGML_CUDA_CC_AMPERE ? 1024 : 0;
    return std::max<size_t>(1, (device.smpbo + own)/(size + own));
}

template <typename row_t, int n_embd, int n_rows>
static void launch_mma(ggml_backend_cuda_context & ctx, ggml_tensor * dst, fattn_args a) {
    typedef fattn_mma_shape<n_embd, n_rows> shape;

    const fattn_pointers t(dst);

    const int n_blocks_sm = std::min(n_blocks_sm_mma<row_t>(n_embd, n_rows),
            n_blocks_memory(ctx, fattn_mma_shared<row_t, n_embd, n_rows>::N*sizeof(simt_f16)));

    fattn_plan_shares(a, dst, n_rows, shape::N_CELLS_TILE, n_busy(ctx, n_blocks_sm), shape::N_TILES_MIN);
    ggml_cuda_pool_alloc<float> part(ctx.pool(), fattn_part_size(a, n_rows));

    simt_launch(flash_attn_ragged_mma<row_t, n_embd, n_rows>, a.n_blocks, FATTN_N_THREADS, ctx.stream(),
            a, t.q, t.k, t.v, t.ranges, t.sinks, part.get(), t.dst);
    launch_combine<n_rows>(ctx, t, a, part.get(), shape::N_CELLS_TILE);
}

template <typename row_t, int n_rows, int n_cells, int n_embd>
static void launch_tile(ggml_backend_cuda_context & ctx, ggml_tensor * dst, fattn_args a) {
    const fattn_pointers t(dst);

    fattn_plan_shares(a, dst, n_rows, n_cells, n_busy(ctx, N_BLOCKS_SM_TILE), FATTN_TILE_N_TILES_MIN);
    ggml_cuda_pool_alloc<float> part(ctx.pool(), fattn_part_size(a, n_rows));

    simt_launch(flash_attn_ragged_tile<row_t, n_rows, n_cells, n_embd>, a.n_blocks, FATTN_N_THREADS, ctx.stream(),
            a, t.q, t.k, t.v, t.ranges, t.sinks, part.get(), t.dst);
    launch_combine<n_rows>(ctx, t, a, part.get(), n_cells);
}

template <typename row_t, int n_lanes>
static void launch_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fattn_args & a) {
    if (a.n_rows > 8) {
        // rows x cells that fit into 48 KiB of shared memory, which a block has without asking for more
        launch_tile<row_t, n_lanes < 32 ? 32 : 16, 32, n_lanes*FATTN_DIMS>(ctx, dst, a);
        return;
    }
    switch (fattn_vec_rows(a)) {
        case 1:  launch_vec<row_t, n_lanes, 1>(ctx, dst, a); break;
        case 2:  launch_vec<row_t, n_lanes, 2>(ctx, dst, a); break;
        case 4:  launch_vec<row_t, n_lanes, 4>(ctx, dst, a); break;
        default: launch_vec<row_t, n_lanes, 8>(ctx, dst, a); break;
    }
}

template <typename row_t, int n_embd>
static void launch_mma_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fattn_args & a) {
    switch (fattn_mma_rows(a)) {
        case 8:  launch_mma<row_t, n_embd, 8> (ctx, dst, a); break;
        case 16: launch_mma<row_t, n_embd, 16>(ctx, dst, a); break;
        case 32: launch_mma<row_t, n_embd, 32>(ctx, dst, a); break;
        default: launch_mma<row_t, n_embd, n_embd <= 128 ? 64 : 32>(ctx, dst, a); break;
    }
}

template <typename row_t>
static void launch_mma_embd(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fattn_args & a) {
    switch (fattn_n_lanes(a)) {
        case 8:  launch_mma_rows<row_t, 64> (ctx, dst, a); break;
        case 16: launch_mma_rows<row_t, 128>(ctx, dst, a); break;
        default: launch_mma_rows<row_t, 256>(ctx, dst, a); break;
    }
}

// Whether flash-attn-ragged-mma.h serves it:
//   - products of sm_75 and later
//   - both pools of a format that F16 has room for and that is unpacked by words; F32 and BF16 have a wider range, and keep it with few
//     rows
//   - 4 rows and more: every row costs the kernel for few rows 10 to 15 instructions a cell and warp, products of 8 rows cost as much as
//     those of one. With 1 to 3 rows that kernel reads as fast, without the way through memory of the block
static bool has_mma(const fattn_args & a, int cc) {
    return GGML_CUDA_CC_IS_NVIDIA(cc) && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_TURING && a.n_rows >= 4 &&
        a.type_k == a.type_v && (a.type_k == FATTN_F16 || a.type_k == FATTN_Q8_0 || a.type_k == FATTN_Q4_0);
}

template <typename row_t>
static void launch_lanes(ggml_backend_cuda_context & ctx, ggml_tensor * dst, const fattn_args & a) {
    switch (fattn_n_lanes(a)) {
        case 8:  launch_rows<row_t, 8> (ctx, dst, a); break;
        case 16: launch_rows<row_t, 16>(ctx, dst, a); break;
        default: launch_rows<row_t, 32>(ctx, dst, a); break;
    }
}

void ggml_cuda_flash_attn_ragged(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const fattn_args a = fattn_args_of(dst);

    if (has_mma(a, ggml_cuda_info().devices[ctx.device].cc)) {
        switch (a.type_k) {
            case FATTN_F16:  launch_mma_embd<fattn_row_f16> (ctx, dst, a); break;
            case FATTN_Q8_0: launch_mma_embd<fattn_row_q8_0>(ctx, dst, a); break;
            default:         launch_mma_embd<fattn_row_q4_0>(ctx, dst, a); break;
        }
        return;
    }
    if (a.type_k != a.type_v) {
        launch_lanes<fattn_row_any>(ctx, dst, a);
        return;
    }
    switch (a.type_k) {
        case FATTN_F32:  launch_lanes<fattn_row_f32> (ctx, dst, a); break;
        case FATTN_F16:  launch_lanes<fattn_row_f16> (ctx, dst, a); break;
        case FATTN_BF16: launch_lanes<fattn_row_bf16>(ctx, dst, a); break;
        case FATTN_Q8_0: launch_lanes<fattn_row_q8_0>(ctx, dst, a); break;
        case FATTN_Q4_0: launch_lanes<fattn_row_q4_0>(ctx, dst, a); break;
        default:         launch_lanes<fattn_row_any> (ctx, dst, a); break;
    }
}

bool ggml_cuda_flash_attn_ragged_supported(int device, const ggml_tensor * dst) {
    const int cc        = ggml_cuda_info().devices[device].cc;
    const int warp_size = ggml_cuda_info().devices[device].warp_size;

    // the kernels' shuffles are those of 32 lanes: some devices of HIP have waves of 64
    return warp_size == 32 && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_VOLTA && fattn_supported(dst);
}
