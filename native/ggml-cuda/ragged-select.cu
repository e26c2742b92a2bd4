#include "ragged-select.cuh"

#include "simt/simt-cuda.cuh"
#include "simt/ragged-select-simt.h"

SIMT_KERNEL(RSEL_N_THREADS, 1) ragged_select_zero(uint32_t * dst, const int32_t n) {
    rsel_zero(SIMT_ENTER(dst), n, simt_get_ids());
}

SIMT_KERNEL(RSEL_N_THREADS, 1) ragged_select_keys(const rsel_args a, const char * scores, uint32_t * dst) {
    rsel_keys(a, SIMT_ENTER(scores), SIMT_ENTER(dst), simt_get_ids());
}

SIMT_KERNEL(RSEL_N_THREADS, 1) ragged_select_count(
        const rsel_args a, const uint32_t * keys, const int32_t * heads, const uint32_t * marks, int32_t * dst) {
    SIMT_SHARED_ARRAY(int32_t, counts, RSEL_N_DIGITS);
    SIMT_SHARED_ARRAY(int32_t, sums,   RSEL_N_WARPS);
    SIMT_SHARED_ARRAY(int32_t, found,  2);

    const rsel_shared sh = { counts, sums, found };

    rsel_count(a, SIMT_ENTER(keys), SIMT_ENTER(heads), SIMT_ENTER(marks), SIMT_ENTER(dst), sh, simt_get_ids());
}

SIMT_KERNEL(RSEL_N_THREADS, 1) ragged_select_mark_tokens(
        const rsel_args a, const uint32_t * keys, const int32_t * heads, const uint32_t * marks, uint32_t * dst) {
    SIMT_SHARED_ARRAY(int32_t, counts, RSEL_N_DIGITS);
    SIMT_SHARED_ARRAY(int32_t, sums,   RSEL_N_WARPS);
    SIMT_SHARED_ARRAY(int32_t, found,  2);

    const rsel_shared sh = { counts, sums, found };

    rsel_mark_tokens(a, SIMT_ENTER(keys), SIMT_ENTER(heads), SIMT_ENTER(marks), SIMT_ENTER(dst), sh, simt_get_ids());
}

SIMT_KERNEL(RSEL_N_THREADS, 1) ragged_select_mark_windows(const rsel_args a, const uint32_t * keys, const int32_t * heads, uint32_t * dst) {
    SIMT_SHARED_ARRAY(int32_t, counts, RSEL_N_DIGITS);
    SIMT_SHARED_ARRAY(int32_t, sums,   RSEL_N_WARPS);
    SIMT_SHARED_ARRAY(int32_t, found,  2);

    const rsel_shared sh = { counts, sums, found };

    rsel_mark_windows(a, SIMT_ENTER(keys), SIMT_ENTER(heads), SIMT_ENTER(dst), sh, simt_get_ids());
}

static int n_blocks(int64_t n, int n_block) {
    return std::max<int64_t>(1, (n + n_block - 1)/n_block);
}

static void launch_zero(ggml_backend_cuda_context & ctx, uint32_t * dst, int64_t n) {
    simt_launch(ragged_select_zero, n_blocks(n, RSEL_N_THREADS), RSEL_N_THREADS, ctx.stream(), dst, int32_t(n));
}

static void launch_keys(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * scores = dst->src[0];

    rsel_args a = {};
    a.n_cells   = scores->ne[0];
    a.n_heads   = scores->ne[1];
    a.n_review  = ggml_get_op_params_i32(dst, RSEL_PARAM_N_REVIEW);
    a.before    = ggml_get_op_params_i32(dst, RSEL_PARAM_BEFORE);
    a.after     = ggml_get_op_params_i32(dst, RSEL_PARAM_AFTER);
    a.nb_scores = scores->nb[1];
    a.n_blocks  = n_blocks(a.n_cells, RSEL_N_THREADS);

    uint32_t * keys = (uint32_t *) dst->data;
    launch_zero(ctx, keys + (int64_t) a.n_cells*a.n_heads, a.n_heads);
    simt_launch(ragged_select_keys, a.n_blocks*a.n_heads, RSEL_N_THREADS, ctx.stream(), a, (const char *) scores->data, keys);
}

void ggml_cuda_ragged_select(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const int step = ggml_get_op_params_i32(dst, RSEL_PARAM_STEP);
    if (step == RSEL_STEP_KEYS) {
        launch_keys(ctx, dst);
        return;
    }

    rsel_args a = {};
    a.places = ggml_get_op_params_i32(dst, RSEL_PARAM_PLACES);
    a.omega  = ggml_get_op_params_i32(dst, RSEL_PARAM_OMEGA);
    a.top_p  = ggml_get_op_params_i32(dst, RSEL_PARAM_TOP_P);
    a.first  = a.places == RSEL_WINDOWS ? ggml_get_op_params_i32(dst, RSEL_PARAM_FIRST) : 0;

    const uint32_t * keys  = (const uint32_t *) dst->src[0]->data;
    const int32_t  * heads = (const int32_t  *) dst->src[1]->data;
    const uint32_t * marks = dst->src[2] ? (const uint32_t *) dst->src[2]->data : nullptr;

    const int n_heads = dst->src[1]->ne[1];

    if (step == RSEL_STEP_COUNT) {
        a.shift    = ggml_get_op_params_i32(dst, RSEL_PARAM_SHIFT);
        a.width    = ggml_get_op_params_i32(dst, RSEL_PARAM_WIDTH);
        a.n_chunks = n_blocks(ggml_get_op_params_i32(dst, RSEL_PARAM_N_MOST)/(a.places == RSEL_WINDOWS ? a.omega : 1) + 1, RSEL_N_CHUNK);

        launch_zero(ctx, (uint32_t *) dst->data, ggml_nelements(dst));
        simt_launch(ragged_select_count, n_heads*a.n_chunks, RSEL_N_THREADS, ctx.stream(), a, keys, heads, marks, (int32_t *) dst->data);
    } else if (a.places == RSEL_WINDOWS) {
        launch_zero(ctx, (uint32_t *) dst->data, ggml_nelements(dst));
        simt_launch(ragged_select_mark_windows, n_heads, RSEL_N_THREADS, ctx.stream(), a, keys, heads, (uint32_t *) dst->data);
    } else {
        simt_launch(ragged_select_mark_tokens, n_heads, RSEL_N_THREADS, ctx.stream(), a, keys, heads, marks, (uint32_t *) dst->data);
    }
}

bool ggml_cuda_ragged_select_supported(int device, const ggml_tensor * dst) {
    const int cc        = ggml_cuda_info().devices[device].cc;
    const int warp_size = ggml_cuda_info().devices[device].warp_size;

    // sums over a warp are those of 32 lanes; numbers of words and of threads have 32 bits
    return warp_size == 32 && ggml_cuda_highest_compiled_arch(cc) >= GGML_CUDA_CC_VOLTA && ggml_nelements(dst->src[0]) < INT32_MAX/2;
}
