#include "ggml-flash-attn-ragged.h"

#include "ggml-impl.h"

struct ggml_tensor * ggml_flash_attn_ragged(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * k,
        struct ggml_tensor  * v,
        struct ggml_tensor  * ranges,
        struct ggml_tensor  * sinks,
        int                   layer,
        float                 scale,
        float                 logit_softcap,
        bool                  causal) {
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float));
    GGML_ASSERT(q->ne[3] == 1);

    GGML_ASSERT(k->ne[0] == q->ne[0]);
    GGML_ASSERT(k->ne[1] == v->ne[1]);
    GGML_ASSERT(k->nb[0] == ggml_type_size(k->type) && ggml_is_matrix(k));
    GGML_ASSERT(v->nb[0] == ggml_type_size(v->type) && ggml_is_matrix(v));

    GGML_ASSERT(ranges->type == GGML_TYPE_I32 && ggml_is_contiguous(ranges));
    GGML_ASSERT(ranges->ne[0] == 2 && ranges->ne[3] == 1);
    GGML_ASSERT(q->ne[2] % ranges->ne[1] == 0);
    GGML_ASSERT(0 <= layer && layer < ranges->ne[2]);

    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32 && ggml_is_contiguous(sinks));
        GGML_ASSERT(sinks->ne[0] == q->ne[2] && ggml_is_vector(sinks));
    }

    struct ggml_tensor * result = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1]);

    ggml_set_op_params_f32(result, 0, scale);
    ggml_set_op_params_f32(result, 1, logit_softcap);
    ggml_set_op_params_i32(result, 2, layer);
    ggml_set_op_params_i32(result, 3, causal);

    result->op     = GGML_OP_FLASH_ATTN_RAGGED;
    result->src[0] = q;
    result->src[1] = k;
    result->src[2] = v;
    result->src[3] = ranges;
    result->src[4] = sinks;

    return result;
}
