// Results: the last step of the kernels, and the kernel that combines parts.

// query head of a row
static SIMT_FUNC int32_t fattn_head_of(fattn_args a, int32_t ih, int32_t row) {
    return ih*a.n_gqa + row%a.n_gqa;
}

// where the result of a row begins in dst [n_embd_v, n_head, n_tokens]
static SIMT_FUNC int64_t fattn_dst(fattn_args a, int32_t ih, int32_t row) {
    return ((int64_t) (row/a.n_gqa)*a.n_head + fattn_head_of(a, ih, row))*a.n_embd_v;
}

// What the sums of values of a row are multiplied with: 1/sum of weights, to which the sink of the query head adds without a value.
// 0 for a row that saw nothing
static SIMT_FUNC float fattn_row_weight(fattn_args a, SIMT_GLOBAL(const float) sinks, int32_t head, float max, float sum) {
    float w = 1.0f;
    if (a.has_sinks) {
        const float sink    = sinks[head]*FATTN_LOG2E;
        const float max_new = simt_max(max, sink);

        w   = simt_exp2(max - max_new);
        sum = sum*w + simt_exp2(sink - max_new);
    }
    return sum > 0.0f ? w/sum : 0.0f;
}

// a softmax over some cells
struct fattn_softmax {
    float max; // largest score
    float sum; // of the weights, relative to it
};

//
// sums of n_warps warps of a block, in memory of the block: sh [ld, n_warps] with `stride` floats between warps, a row = sums of values,
// maximum, sum of weights
//

struct fattn_warps {
    float w[FATTN_N_WARPS]; // what the sums of a warp are multiplied with, to be relative to the maximum of all

    fattn_softmax all;
};

template <int ld, int n_warps = FATTN_N_WARPS, int stride = ld>
SIMT_FUNC fattn_warps fattn_join_warps(SIMT_SHARED(float) sh) {
    fattn_warps res;
    res.all.max = FATTN_LOWEST;
    res.all.sum = 0.0f;
    SIMT_UNROLL
    for (int i = 0; i < n_warps; ++i) {
        res.w[i]    = sh[i*stride + ld - 2];
        res.all.max = simt_max(res.all.max, res.w[i]);
    }
    SIMT_UNROLL
    for (int i = 0; i < n_warps; ++i) {
        res.w[i]     = simt_exp2(res.w[i] - res.all.max);
        res.all.sum += sh[i*stride + ld - 1]*res.w[i];
    }
    return res;
}

// element d of the sum of values
template <int ld, int n_warps = FATTN_N_WARPS, int stride = ld>
SIMT_FUNC float fattn_join_value(SIMT_SHARED(float) sh, fattn_warps warps, int32_t d) {
    float res = 0.0f;
    SIMT_UNROLL
    for (int i = 0; i < n_warps; ++i) {
        res += sh[i*stride + d]*warps.w[i];
    }
    return res;
}

//
// parts
//

// the parts of an item: of n_parts blocks from block0 on, the first one in slot0 and the others in slot 0
struct fattn_parts {
    int32_t block0;
    int32_t n_parts;
    int32_t slot0;
};

static SIMT_FUNC fattn_parts fattn_parts_of(
        fattn_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t item, int32_t n_rows_block, int32_t n_cells_tile, simt_ids id) {
    fattn_parts res;
    if (a.n_splits > 0) {
        res.block0  = item*a.n_splits;
        res.n_parts = a.n_splits;
        res.slot0   = 0;
        return res;
    }
    const fattn_tiles tiles = fattn_count_tiles(a, ranges, item, n_rows_block, n_cells_tile, id);
    const uint32_t    size  = fattn_share_size(a, tiles.total);

    res.block0  = (uint32_t) tiles.before/size;
    res.n_parts = tiles.own == 0 ? 0 : (uint32_t) (tiles.before + tiles.own - 1)/size - res.block0 + 1;
    res.slot0   = 1;
    return res;
}

// where part p of an item begins for row ir
static SIMT_FUNC int64_t fattn_part_of(fattn_args a, fattn_parts parts, int32_t p, int32_t n_rows_block, int32_t ir) {
    return fattn_part(a, parts.block0 + p, p == 0 ? parts.slot0 : 0, n_rows_block, ir);
}

// element lane + 32*i of a row: heads of up to 32*FATTN_DIMS elements
struct fattn_lane_values {
    float x[FATTN_DIMS];
};

enum { FATTN_N_PARTS_STEP = 8 }; // parts that a warp loads at a time, so that their latencies overlap

// y += weights*sums of values of the n parts from p0 on, FATTN_N_WARPS apart. w: of lane j for the j-th of them, 0 for what is not
// there
static SIMT_FUNC void fattn_add_parts(
        fattn_args a, fattn_parts parts, SIMT_GLOBAL(const float) part, int32_t p0, int32_t n, float w, int32_t n_rows_block, int32_t ir,
        simt_ids id, SIMT_THREAD(fattn_lane_values) y) {
    for (int32_t j0 = 0; j0 < n; j0 += FATTN_N_PARTS_STEP) {
        fattn_lane_values x[FATTN_N_PARTS_STEP];
        SIMT_UNROLL
        for (int j = 0; j < FATTN_N_PARTS_STEP; ++j) {
            const int32_t p = simt_min(p0 + (j0 + j)*FATTN_N_WARPS, parts.n_parts - 1);

            SIMT_GLOBAL(const float) src = part + fattn_part_of(a, parts, p, n_rows_block, ir);
            SIMT_UNROLL
            for (int i = 0; i < FATTN_DIMS; ++i) {
                x[j].x[i] = id.lane + 32*i < a.n_embd_v ? src[id.lane + 32*i] : 0.0f;
            }
        }
        SIMT_UNROLL
        for (int j = 0; j < FATTN_N_PARTS_STEP; ++j) {
            const float w_part = simt_shuffle(w, j0 + j, 32, 0);
            SIMT_UNROLL
            for (int i = 0; i < FATTN_DIMS; ++i) {
                y.x[i] += x[j].x[i]*w_part;
            }
        }
    }
}

// row ir over the parts of this warp, every FATTN_N_WARPS-th one: a lane looks at the maximum and the sum of one part, of 32 at a
// time, and all lanes at the values of one part after the other
static SIMT_FUNC void fattn_combine_warp(
        fattn_args a, fattn_parts parts, SIMT_GLOBAL(const float) part, int32_t n_rows_block, int32_t ir, simt_ids id,
        SIMT_THREAD(fattn_softmax) own, SIMT_THREAD(fattn_lane_values) y) {
    own.max = FATTN_LOWEST;
    own.sum = 0.0f;
    SIMT_UNROLL
    for (int i = 0; i < FATTN_DIMS; ++i) {
        y.x[i] = 0.0f;
    }

    for (int32_t p0 = id.warp; p0 < parts.n_parts; p0 += 32*FATTN_N_WARPS) {
        const int32_t p = p0 + id.lane*FATTN_N_WARPS;
        const bool  has = p < parts.n_parts;

        SIMT_GLOBAL(const float) src = part + fattn_part_of(a, parts, has ? p : 0, n_rows_block, ir) + a.n_embd_v;

        const float max_part = has ? src[0] : FATTN_LOWEST;
        const float sum_part = has ? src[1] : 0.0f;

        float max_new = simt_max(own.max, max_part);
        SIMT_UNROLL
        for (int m = 1; m < 32; m *= 2) {
            max_new = simt_max(max_new, simt_shuffle_xor(max_new, m));
        }
        const float w     = has ? simt_exp2(max_part - max_new) : 0.0f;
        const float w_old = simt_exp2(own.max - max_new);

        float sum = w*sum_part;
        SIMT_UNROLL
        for (int m = 1; m < 32; m *= 2) {
            sum += simt_shuffle_xor(sum, m);
        }
        own.max = max_new;
        own.sum = own.sum*w_old + sum;
        SIMT_UNROLL
        for (int i = 0; i < FATTN_DIMS; ++i) {
            y.x[i] *= w_old;
        }
        fattn_add_parts(a, parts, part, p0, simt_min(32, (parts.n_parts - p0 + FATTN_N_WARPS - 1)/FATTN_N_WARPS), w, n_rows_block, ir, id, y);
    }
}

enum { FATTN_LD_COMBINE = 32*FATTN_DIMS + 2, FATTN_N_COMBINE = FATTN_LD_COMBINE*FATTN_N_WARPS }; // floats of a warp, and of the block

// Kernel: rows that were attended in parts, and rows that see nothing. block = item*n_rows_block + row of the item; n_cells_tile is
// that of the kernel that wrote the parts. sh: [FATTN_LD_COMBINE, FATTN_N_WARPS], other shapes as in fattn_tensors
template <int n_rows_block>
SIMT_FUNC void fattn_combine(
        fattn_args a,
        SIMT_GLOBAL(const int32_t) ranges,
        SIMT_GLOBAL(const float)   sinks,
        SIMT_GLOBAL(const float)   part,
        SIMT_GLOBAL(float)         dst,
        int32_t                    n_cells_tile,
        SIMT_SHARED(float)         sh,
        simt_ids                   id) {
    const int32_t item = id.block/n_rows_block;
    const int32_t ih   = item/a.n_row_blocks;
    const int32_t ir   = id.block%n_rows_block;
    const int32_t row  = item%a.n_row_blocks*n_rows_block + ir;
    if (row >= a.n_rows) {
        return;
    }
    const fattn_parts parts = fattn_parts_of(a, ranges, item, n_rows_block, n_cells_tile, id);
    if (a.n_splits == 0 && parts.n_parts == 1) {
        return; // attended as a whole
    }

    fattn_softmax     own;
    fattn_lane_values y;
    fattn_combine_warp(a, parts, part, n_rows_block, ir, id, own, y);

    SIMT_UNROLL
    for (int i = 0; i < FATTN_DIMS; ++i) {
        sh[id.warp*FATTN_LD_COMBINE + id.lane + 32*i] = y.x[i];
    }
    if (id.lane == 0) {
        sh[id.warp*FATTN_LD_COMBINE + FATTN_LD_COMBINE - 2] = own.max;
        sh[id.warp*FATTN_LD_COMBINE + FATTN_LD_COMBINE - 1] = own.sum;
    }
    simt_barrier();

    const fattn_warps warps = fattn_join_warps<FATTN_LD_COMBINE>(sh);
    const float       w_row = fattn_row_weight(a, sinks, fattn_head_of(a, ih, row), warps.all.max, warps.all.sum);

    for (int32_t d = id.tid; d < a.n_embd_v; d += FATTN_N_THREADS) {
        dst[fattn_dst(a, ih, row) + d] = fattn_join_value<FATTN_LD_COMBINE>(sh, warps, d)*w_row;
    }
}
