// GGML_OP_FLASH_ATTN_RAGGED for machines with groups of 32 lanes in step: rows of pools, schedule, combine.
//
// CUDA, Metal and the emulator of the tests compile this very text. Who includes it has defined the primitives simt_* and SIMT_*
// before; simt-cuda.cuh lists them.
//
// The query heads that share a kv head make n_gqa rows of every token. An item is a block of these rows with all cells that
// they see. The tiles of all items in a row are dealt out to the blocks of the grid in equal shares, so that heads of very
// different lengths keep a device busy: an item that a share boundary cuts is attended in parts, each with a maximum, a sum
// and a weighted sum of values of its own, which a second kernel combines.

#include "flash-attn-ragged-args.h"

// no infinities, compilers may take them for granted not to be there
#define FA_LOWEST (-5e29f) // where maxima start, below every logit
#define FA_MASKED (-1e30f) // the logit of what is not seen: so far below that its weight is 0

struct fa_dims {
    float x[FA_DIMS];
};

//
// rows of a head, which begin some bytes behind its first: eight dimensions from d on, d is a multiple of eight, without the scale that
// all have in common; the last argument is of use to fa_row_any alone
//

struct fa_row_f32 {
    struct raw {
        simt_u32x4 a, b;
    };

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int) {
        raw r;
        r.a = simt_load_u32x4(head + (row + 4*d));
        r.b = simt_load_u32x4(head + (row + 4*d) + 16);
        return r;
    }

    static SIMT_FUNC fa_dims unpack(raw r, int, int) {
        fa_dims res;
        for (int i = 0; i < 4; ++i) {
            res.x[i]     = simt_bits_to_f32(simt_get(r.a, i));
            res.x[i + 4] = simt_bits_to_f32(simt_get(r.b, i));
        }
        return res;
    }

    static SIMT_FUNC float scale(raw, int) {
        return 1.0f;
    }
};

struct fa_row_f16 {
    struct raw {
        simt_u32x4 a;
    };

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int) {
        raw r;
        r.a = simt_load_u32x4(head + (row + 2*d));
        return r;
    }

    static SIMT_FUNC fa_dims unpack(raw r, int, int) {
        fa_dims res;
        for (int i = 0; i < 4; ++i) {
            const simt_f32x2 x = simt_unpack_f16(simt_get(r.a, i));
            res.x[2*i]     = x.x;
            res.x[2*i + 1] = x.y;
        }
        return res;
    }

    static SIMT_FUNC float scale(raw, int) {
        return 1.0f;
    }
};

struct fa_row_bf16 {
    typedef fa_row_f16::raw raw;

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int) {
        return fa_row_f16::load(head, row, d, 0);
    }

    static SIMT_FUNC fa_dims unpack(raw r, int, int) {
        fa_dims res;
        for (int i = 0; i < 4; ++i) {
            const uint32_t x = simt_get(r.a, i);
            res.x[2*i]     = simt_bits_to_f32(x << 16);
            res.x[2*i + 1] = simt_bits_to_f32(x & 0xFFFF0000u);
        }
        return res;
    }

    static SIMT_FUNC float scale(raw, int) {
        return 1.0f;
    }
};

// four values of eight bits in steps of two bytes: blocks of quantised rows lie at even addresses, not more
static SIMT_FUNC uint32_t fa_load_u32(SIMT_GLOBAL(const char) p) {
    return (uint32_t) simt_load_u16(p) | (uint32_t) simt_load_u16(p + 2) << 16;
}

// block_q8_0: the scale in F16, 32 values of int8
struct fa_row_q8_0 {
    struct raw {
        uint32_t a, b;
        uint32_t scale;
    };

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int) {
        const uint32_t block = row + 34*(d/32);

        SIMT_GLOBAL(const char) values = head + (block + d%32);

        raw r;
        r.scale = simt_load_u16(head + block);
        r.a     = fa_load_u32(values + 2);
        r.b     = fa_load_u32(values + 6);
        return r;
    }

    static SIMT_FUNC fa_dims unpack(raw r, int, int) {
        fa_dims res;
        for (int i = 0; i < 4; ++i) {
            res.x[i]     = float((int8_t) (r.a >> 8*i));
            res.x[i + 4] = float((int8_t) (r.b >> 8*i));
        }
        return res;
    }

    static SIMT_FUNC float scale(raw r, int) {
        return simt_unpack_f16(r.scale).x;
    }
};

// block_q4_0: the scale in F16, 16 bytes with the values of dimensions i and i + 16, 8 stands for zero
struct fa_row_q4_0 {
    typedef fa_row_q8_0::raw raw;

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int) {
        const uint32_t block = row + 18*(d/32);

        SIMT_GLOBAL(const char) values = head + (block + d%16);

        raw r;
        r.scale = simt_load_u16(head + block);
        r.a     = fa_load_u32(values + 2);
        r.b     = fa_load_u32(values + 6);
        return r;
    }

    static SIMT_FUNC fa_dims unpack(raw r, int d, int) {
        const int shift = d%32 < 16 ? 0 : 4;

        fa_dims res;
        for (int i = 0; i < 4; ++i) {
            res.x[i]     = float((int32_t) (r.a >> (8*i + shift) & 0xF) - 8);
            res.x[i + 4] = float((int32_t) (r.b >> (8*i + shift) & 0xF) - 8);
        }
        return res;
    }

    static SIMT_FUNC float scale(raw r, int) {
        return simt_unpack_f16(r.scale).x;
    }
};

// a type that is known when the kernel runs: for pools of keys and values whose types differ
struct fa_row_any {
    struct raw {
        simt_u32x4 a, b;
    };

    static SIMT_FUNC raw load(SIMT_GLOBAL(const char) head, uint32_t row, int d, int type) {
        raw r;
        if (type == FA_F32) {
            const fa_row_f32::raw x = fa_row_f32::load(head, row, d, type);
            r.a = x.a;
            r.b = x.b;
        } else if (type == FA_F16 || type == FA_BF16) {
            r.a = fa_row_f16::load(head, row, d, type).a;
            r.b = r.a;
        } else {
            const fa_row_q8_0::raw x = type == FA_Q8_0 ? fa_row_q8_0::load(head, row, d, type) : fa_row_q4_0::load(head, row, d, type);
            r.a = simt_pack(x.a, x.b, x.scale, 0);
            r.b = r.a;
        }
        return r;
    }

    static SIMT_FUNC fa_dims unpack(raw r, int d, int type) {
        if (type == FA_F32) {
            fa_row_f32::raw x;
            x.a = r.a;
            x.b = r.b;
            return fa_row_f32::unpack(x, d, type);
        }
        if (type == FA_F16 || type == FA_BF16) {
            fa_row_f16::raw x;
            x.a = r.a;
            return type == FA_F16 ? fa_row_f16::unpack(x, d, type) : fa_row_bf16::unpack(x, d, type);
        }
        fa_row_q8_0::raw x;
        x.a     = simt_get(r.a, 0);
        x.b     = simt_get(r.a, 1);
        x.scale = simt_get(r.a, 2);
        return type == FA_Q8_0 ? fa_row_q8_0::unpack(x, d, type) : fa_row_q4_0::unpack(x, d, type);
    }

    static SIMT_FUNC float scale(raw r, int type) {
        return type == FA_Q8_0 || type == FA_Q4_0 ? simt_unpack_f16(simt_get(r.a, 2)).x : 1.0f;
    }
};

// by the exponential function: the fast tanh of some compilers is off by more than logits are allowed to be
static SIMT_FUNC float fa_tanh(float x) {
    const float e = simt_exp2(2.0f*FA_LOG2E*simt_max(-15.0f, simt_min(15.0f, x)));
    return (e - 1.0f)/(e + 1.0f);
}

//
// schedule
//

// cells that a row of a kv head sees
static SIMT_FUNC int32_t fa_visible(fa_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t ih, int32_t row) {
    const int32_t n_cells = ranges[2*ih + 1];
    return a.causal ? simt_max(0, n_cells - a.n_tokens + row/a.n_gqa + 1) : n_cells;
}

// an item is a kv head and a block of its rows
static SIMT_FUNC int32_t fa_n_tiles(fa_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t item, int32_t n_rows_block, int32_t n_cells_tile) {
    const int32_t ih   = item/a.n_row_blocks;
    const int32_t last = simt_min(a.n_rows, (item%a.n_row_blocks + 1)*n_rows_block) - 1;
    return (fa_visible(a, ranges, ih, last) + n_cells_tile - 1)/n_cells_tile;
}

static SIMT_FUNC int64_t fa_total(fa_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t n_rows_block, int32_t n_cells_tile) {
    int64_t res = 0;
    for (int32_t item = 0; item < a.n_head_kv*a.n_row_blocks; ++item) {
        res += fa_n_tiles(a, ranges, item, n_rows_block, n_cells_tile);
    }
    return res;
}

// first tile, of all, of a block's share
static SIMT_FUNC int64_t fa_begin(fa_args a, int64_t total, int32_t block) {
    return total*block/a.n_blocks;
}

// first tile of a part of an item
static SIMT_FUNC int64_t fa_split_begin(fa_args a, int64_t n_tiles, int32_t split) {
    return n_tiles*split/a.n_splits;
}

// the block whose share holds a tile: the last one that begins at it or before
static SIMT_FUNC int32_t fa_owner(fa_args a, int64_t total, int64_t tile) {
    return (int32_t) (((tile + 1)*a.n_blocks - 1)/total);
}

// A share can begin inside one item, which takes the first slot of its block, and end inside another, which takes the second:
// n_rows_block x {n_embd_v sums, maximum, sum of weights}
static SIMT_FUNC int64_t fa_part(fa_args a, int32_t block, int32_t slot, int32_t n_rows_block, int32_t row) {
    return (((int64_t) block*2 + slot)*n_rows_block + row)*(a.n_embd_v + 2);
}

//
// results
//

// weight of a row's sums: what the sink adds to the softmax has no value
static SIMT_FUNC float fa_row_weight(fa_args a, SIMT_GLOBAL(const float) sinks, int32_t head, float max, float sum) {
    float w = 1.0f;
    if (a.has_sinks) {
        const float sink    = sinks[head]*FA_LOG2E;
        const float max_new = simt_max(max, sink);

        w   = simt_exp2(max - max_new);
        sum = sum*w + simt_exp2(sink - max_new);
    }
    return sum > 0.0f ? w/sum : 0.0f;
}

static SIMT_FUNC int32_t fa_head_of(fa_args a, int32_t ih, int32_t row) {
    return ih*a.n_gqa + row%a.n_gqa;
}

// dst: [n_embd_v, n_head, n_tokens]
static SIMT_FUNC int64_t fa_dst(fa_args a, int32_t ih, int32_t row) {
    return ((int64_t) (row/a.n_gqa)*a.n_head + fa_head_of(a, ih, row))*a.n_embd_v;
}

// parts of an item: those of consecutive blocks, some of which may have got no tile
struct fa_parts {
    int32_t block0, block1; // the last one included
    int64_t first;          // tile of the item, of all
    int64_t total;
};

// shares of all tiles
static SIMT_FUNC fa_parts fa_parts_of_shares(fa_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t item, int32_t n_rows_block, int32_t n_cells_tile) {
    fa_parts res;
    res.first = 0;
    res.total = 0;
    for (int32_t i = 0; i < a.n_head_kv*a.n_row_blocks; ++i) {
        res.first  = i == item ? res.total : res.first;
        res.total += fa_n_tiles(a, ranges, i, n_rows_block, n_cells_tile);
    }
    const int32_t n_tiles = fa_n_tiles(a, ranges, item, n_rows_block, n_cells_tile);

    res.block0 = n_tiles == 0 ?  0 : fa_owner(a, res.total, res.first);
    res.block1 = n_tiles == 0 ? -1 : fa_owner(a, res.total, res.first + n_tiles - 1);
    return res;
}

static SIMT_FUNC bool fa_has_part(fa_args a, fa_parts parts, int32_t block) {
    return a.n_splits > 0 || fa_begin(a, parts.total, block) < fa_begin(a, parts.total, block + 1);
}

static SIMT_FUNC int32_t fa_slot(fa_args a, fa_parts parts, int32_t block) {
    return a.n_splits > 0 || fa_begin(a, parts.total, block) > parts.first ? 0 : 1;
}

// one block per row of an item: rows that were attended in parts, and rows that see nothing
template <int n_rows_block>
SIMT_FUNC void fa_combine(
        fa_args a,
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

    fa_parts parts;
    if (a.n_splits > 0) {
        parts.block0 = item*a.n_splits;
        parts.block1 = parts.block0 + a.n_splits - 1;
        parts.first  = 0;
        parts.total  = 0;
    } else {
        parts = fa_parts_of_shares(a, ranges, item, n_rows_block, n_cells_tile);
        if (parts.block0 == parts.block1) {
            return; // attended as a whole
        }
    }

    float max = FA_LOWEST;
    float sum = 0.0f;
    for (int32_t b = parts.block0; b <= parts.block1; ++b) {
        if (fa_has_part(a, parts, b)) {
            SIMT_GLOBAL(const float) p = part + fa_part(a, b, fa_slot(a, parts, b), n_rows_block, ir) + a.n_embd_v;

            const float max_part = p[0];
            const float max_new  = simt_max(max, max_part);
            sum = sum*simt_exp2(max - max_new) + p[1]*simt_exp2(max_part - max_new);
            max = max_new;
        }
    }
    const float w = fa_row_weight(a, sinks, fa_head_of(a, ih, row), max, sum);

    for (int32_t d = id.tid; d < a.n_embd_v; d += FA_N_THREADS) {
        float res = 0.0f;
        for (int32_t b = parts.block0; b <= parts.block1; ++b) {
            if (fa_has_part(a, parts, b)) {
                SIMT_GLOBAL(const float) p = part + fa_part(a, b, fa_slot(a, parts, b), n_rows_block, ir);

                res += p[d]*simt_exp2(p[a.n_embd_v] - max);
            }
        }
        dst[fa_dst(a, ih, row) + d] = res*w;
    }
}
