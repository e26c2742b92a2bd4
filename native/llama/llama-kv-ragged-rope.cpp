#include "llama-kv-ragged-rope.h"

#include <algorithm>
#include <iterator>

// a product with a weight: what goes into it has no position yet
static bool is_projection(const ggml_tensor * cur) {
    return (cur->op == GGML_OP_MUL_MAT || cur->op == GGML_OP_MUL_MAT_ID) &&
        cur->src[0]->op == GGML_OP_NONE && !(cur->src[0]->flags & GGML_TENSOR_FLAG_INPUT);
}

static bool has_rope(const ggml_tensor * cur) {
    if (!cur || is_projection(cur)) {
        return false;
    }
    return cur->op == GGML_OP_ROPE || std::any_of(std::begin(cur->src), std::end(cur->src), has_rope);
}

// what a rotation may stand behind: of a head neither its values nor their order change, but for a common factor
static const ggml_tensor * through(const ggml_tensor * cur) {
    switch (cur->op) {
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
        case GGML_OP_SCALE:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
            return cur->src[0];
        case GGML_OP_MUL_MAT: // the Hadamard matrix of quantised cells
            return is_projection(cur) ? nullptr : cur->src[1];
        default:
            return nullptr;
    }
}

llama_kv_ragged_rope llama_kv_ragged_find_rope(const ggml_tensor * k_cur) {
    llama_kv_ragged_rope res;

    const ggml_tensor * cur = k_cur;
    while (cur && cur->op != GGML_OP_ROPE) {
        cur = through(cur);
    }
    if (!cur) {
        res.kind = has_rope(k_cur) ? llama_kv_ragged_rope::OTHER : llama_kv_ragged_rope::NONE;
        return res;
    }
    const int32_t * ints   = (const int32_t *) cur->op_params;
    const float   * floats = (const float   *) cur->op_params;

    res.n_rot      = ints[1];
    res.mode       = ints[2];
    res.n_ctx_orig = ints[4];
    res.freq_base  = floats[5];
    res.freq_scale = floats[6];
    res.ext_factor = floats[7];
    res.beta_fast  = floats[9];
    res.beta_slow  = floats[10];
    res.factors    = cur->src[2];

    // one position for all values, the first of which are rotated, by the model's own factors
    const bool is_plain   = res.mode == GGML_ROPE_TYPE_NORMAL || res.mode == GGML_ROPE_TYPE_NEOX;
    const bool has_offset = ints[15] != 0;
    const bool is_weight  = !res.factors || (res.factors->op == GGML_OP_NONE && res.factors->type == GGML_TYPE_F32 &&
            res.factors->ne[0] >= res.n_rot/2 && !(res.factors->flags & GGML_TENSOR_FLAG_INPUT));

    res.kind = is_plain && !has_offset && is_weight && cur->ne[0] == k_cur->ne[0] && !has_rope(cur->src[0]) ?
        llama_kv_ragged_rope::WHOLE : llama_kv_ragged_rope::OTHER;
    return res;
}
