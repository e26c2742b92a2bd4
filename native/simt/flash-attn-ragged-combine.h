// Results: the last step of both kernels, and the kernel that combines parts.

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

// the parts of an item: those of blocks block0 to block1, some of which may have got no tile
struct fattn_parts {
    int32_t block0, block1;
    int64_t first; // shares: first tile of the item, of all
    int64_t total; // shares: tiles of all items
};

static SIMT_FUNC fattn_parts fattn_parts_of_splits(fattn_args a, int32_t item) {
    fattn_parts res;
    res.block0 = item*a.n_splits;
    res.block1 = res.block0 + a.n_splits - 1;
    res.first  = 0;
    res.total  = 0;
    return res;
}

// an item without tiles has no parts: block1 < block0
static SIMT_FUNC fattn_parts fattn_parts_of_shares(
        fattn_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t item, int32_t n_rows_block, int32_t n_cells_tile) {
    fattn_parts res;
    res.first = 0;
    res.total = 0;
    for (int32_t i = 0; i < a.n_head_kv*a.n_row_blocks; ++i) {
        res.first  = i == item ? res.total : res.first;
        res.total += fattn_n_tiles(a, ranges, i, n_rows_block, n_cells_tile);
    }
    const int32_t n_tiles = fattn_n_tiles(a, ranges, item, n_rows_block, n_cells_tile);

    res.block0 = n_tiles == 0 ?  0 : fattn_owner(a, res.total, res.first);
    res.block1 = n_tiles == 0 ? -1 : fattn_owner(a, res.total, res.first + n_tiles - 1);
    return res;
}

static SIMT_FUNC bool fattn_has_part(fattn_args a, fattn_parts parts, int32_t block) {
    return a.n_splits > 0 || fattn_begin(a, parts.total, block) < fattn_begin(a, parts.total, block + 1);
}

static SIMT_FUNC int32_t fattn_slot(fattn_args a, fattn_parts parts, int32_t block) {
    return a.n_splits > 0 || fattn_begin(a, parts.total, block) > parts.first ? 0 : 1;
}

struct fattn_softmax {
    float max; // largest score
    float sum; // of the weights, relative to it
};

// of a row (ir of its item) over all of its parts
static SIMT_FUNC fattn_softmax fattn_combine_softmax(
        fattn_args a, fattn_parts parts, SIMT_GLOBAL(const float) part, int32_t n_rows_block, int32_t ir) {
    float max = FATTN_LOWEST;
    float sum = 0.0f;
    for (int32_t b = parts.block0; b <= parts.block1; ++b) {
        if (fattn_has_part(a, parts, b)) {
            SIMT_GLOBAL(const float) p = part + fattn_part(a, b, fattn_slot(a, parts, b), n_rows_block, ir) + a.n_embd_v;

            const float max_part = p[0];
            const float max_new  = simt_max(max, max_part);
            sum = sum*simt_exp2(max - max_new) + p[1]*simt_exp2(max_part - max_new);
            max = max_new;
        }
    }
    fattn_softmax res;
    res.max = max;
    res.sum = sum;
    return res;
}

// element d of its sum of values, relative to the maximum
static SIMT_FUNC float fattn_combine_value(
        fattn_args a, fattn_parts parts, SIMT_GLOBAL(const float) part, int32_t n_rows_block, int32_t ir, int32_t d, float max) {
    float res = 0.0f;
    for (int32_t b = parts.block0; b <= parts.block1; ++b) {
        if (fattn_has_part(a, parts, b)) {
            SIMT_GLOBAL(const float) p = part + fattn_part(a, b, fattn_slot(a, parts, b), n_rows_block, ir);

            res += p[d]*simt_exp2(p[a.n_embd_v] - max);
        }
    }
    return res;
}

// Kernel: rows that were attended in parts, and rows that see nothing. block = item*n_rows_block + row of the item; n_cells_tile is
// that of the kernel that wrote the parts. Shapes as in fattn_tensors
template <int n_rows_block>
SIMT_FUNC void fattn_combine(
        fattn_args a,
        SIMT_GLOBAL(const int32_t) ranges,
        SIMT_GLOBAL(const float)   sinks,
        SIMT_GLOBAL(const float)   part,
        SIMT_GLOBAL(float)         dst,
        int32_t                    n_cells_tile,
        simt_ids                   id) {
    const int32_t item = id.block/n_rows_block;
    const int32_t ih   = item/a.n_row_blocks;
    const int32_t ir   = id.block%n_rows_block;
    const int32_t row  = item%a.n_row_blocks*n_rows_block + ir;
    if (row >= a.n_rows) {
        return;
    }

    fattn_parts parts;
    if (a.n_splits > 0) {
        parts = fattn_parts_of_splits(a, item);
    } else {
        parts = fattn_parts_of_shares(a, ranges, item, n_rows_block, n_cells_tile);
        if (parts.block0 == parts.block1) {
            return; // attended as a whole
        }
    }

    const fattn_softmax all = fattn_combine_softmax(a, parts, part, n_rows_block, ir);
    const float         w   = fattn_row_weight(a, sinks, fattn_head_of(a, ih, row), all.max, all.sum);

    for (int32_t d = id.tid; d < a.n_embd_v; d += FATTN_N_THREADS) {
        dst[fattn_dst(a, ih, row) + d] = fattn_combine_value(a, parts, part, n_rows_block, ir, d, all.max)*w;
    }
}
