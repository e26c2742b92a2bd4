#include "ggml-ragged-select.h"

#include "ggml-impl.h"

#include "../simt/ragged-select-args.h"

static void check_keys(const struct ggml_tensor * keys, const struct ggml_tensor * heads, const struct ggml_tensor * marks) {
    GGML_ASSERT(keys->type == GGML_TYPE_I32 && ggml_is_contiguous(keys));
    GGML_ASSERT(heads->type == GGML_TYPE_I32 && ggml_is_contiguous(heads) && ggml_is_matrix(heads));
    GGML_ASSERT(heads->ne[0] == GGML_RAGGED_N_HEAD);
    GGML_ASSERT(!marks || (marks->type == GGML_TYPE_I32 && ggml_is_contiguous(marks)));
}

static void set_selection(struct ggml_tensor * op, const struct ggml_tensor * marks, struct ggml_ragged_selection selection) {
    GGML_ASSERT((selection.places == GGML_RAGGED_PLACES_REST) == (marks != NULL));
    if (selection.places == GGML_RAGGED_PLACES_WINDOWS) {
        GGML_ASSERT(selection.omega >= 1 && 1 <= selection.top_p && selection.top_p <= selection.omega);
        GGML_ASSERT(selection.first == 0 || selection.first == 1);
    }
    ggml_set_op_params_i32(op, RSEL_PARAM_PLACES, selection.places);
    ggml_set_op_params_i32(op, RSEL_PARAM_OMEGA,  selection.omega);
    ggml_set_op_params_i32(op, RSEL_PARAM_TOP_P,  selection.top_p);
    ggml_set_op_params_i32(op, RSEL_PARAM_FIRST,  selection.first);
}

struct ggml_tensor * ggml_ragged_keys(
        struct ggml_context * ctx,
        struct ggml_tensor  * scores,
        struct ggml_tensor  * keys,
        int                   n_review,
        int                   before,
        int                   after) {
    GGML_ASSERT(scores->type == GGML_TYPE_F32 && scores->nb[0] == sizeof(float) && ggml_is_matrix(scores));
    GGML_ASSERT(keys->type == GGML_TYPE_I32 && ggml_is_contiguous(keys));
    GGML_ASSERT(ggml_nelements(keys) == (scores->ne[0] + 1)*scores->ne[1]);
    GGML_ASSERT(0 <= n_review && n_review <= scores->ne[0] && before >= 0 && after >= 0);

    struct ggml_tensor * result = ggml_view_tensor(ctx, keys);

    ggml_set_op_params_i32(result, RSEL_PARAM_STEP,     RSEL_STEP_KEYS);
    ggml_set_op_params_i32(result, RSEL_PARAM_N_REVIEW, n_review);
    ggml_set_op_params_i32(result, RSEL_PARAM_BEFORE,   before);
    ggml_set_op_params_i32(result, RSEL_PARAM_AFTER,    after);

    result->op     = GGML_OP_RAGGED_SELECT;
    result->src[0] = scores;
    result->src[1] = keys;

    return result;
}

struct ggml_tensor * ggml_ragged_count(
        struct ggml_context         * ctx,
        struct ggml_tensor          * keys,
        struct ggml_tensor          * heads,
        struct ggml_tensor          * marks,
        struct ggml_ragged_selection  selection,
        int                           shift,
        int                           width,
        int                           n_most) {
    check_keys(keys, heads, marks);
    GGML_ASSERT(shift >= 0 && 1 <= width && width <= RSEL_WIDTH_MAX && shift + width <= 64 && n_most >= 0);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, (int64_t) 1 << width, heads->ne[1]);

    set_selection(result, marks, selection);
    ggml_set_op_params_i32(result, RSEL_PARAM_STEP,   RSEL_STEP_COUNT);
    ggml_set_op_params_i32(result, RSEL_PARAM_SHIFT,  shift);
    ggml_set_op_params_i32(result, RSEL_PARAM_WIDTH,  width);
    ggml_set_op_params_i32(result, RSEL_PARAM_N_MOST, n_most);

    result->op     = GGML_OP_RAGGED_SELECT;
    result->src[0] = keys;
    result->src[1] = heads;
    result->src[2] = marks;

    return result;
}

struct ggml_tensor * ggml_ragged_mark(
        struct ggml_context         * ctx,
        struct ggml_tensor          * keys,
        struct ggml_tensor          * heads,
        struct ggml_tensor          * marks,
        struct ggml_tensor          * dst,
        struct ggml_ragged_selection  selection) {
    check_keys(keys, heads, marks);
    GGML_ASSERT(dst->type == GGML_TYPE_I32 && ggml_is_contiguous(dst));
    GGML_ASSERT(!marks || ggml_nelements(marks) == ggml_nelements(dst));

    struct ggml_tensor * result = ggml_view_tensor(ctx, dst);

    set_selection(result, marks, selection);
    ggml_set_op_params_i32(result, RSEL_PARAM_STEP, RSEL_STEP_MARK);

    result->op     = GGML_OP_RAGGED_SELECT;
    result->src[0] = keys;
    result->src[1] = heads;
    result->src[2] = marks;
    result->src[3] = dst;

    return result;
}
