#pragma once

// How the op is divided among threads, and the memory that each of them works in.
//
// The query heads that share a kv head make n_gqa rows of every token, rows of one matrix, so that every cell is read once for all
// of them. An item is a block of these rows with all cells that they see, cut into tiles of cells. The tiles of all items, one item
// behind the other, are dealt out to the threads in equal shares of rows x cells, so that heads of very different lengths keep all
// threads busy. An item that a share boundary cuts is attended in parts, which are combined after a barrier.
//
// Matrices are F32 and in ggml's order: the first size is that of a row in memory.

#include "flash-attn-ragged-simd.h"

#include "ggml.h"

#include <algorithm>

// Up to this many rows of a kv head the cells are used as they stream in. A transposed tile of keys costs more than that until its
// rows share the cost. Counted in instructions alone (callgrind, AVX2, F16 cells) 8 rows would do; but streamed cells are asked for ahead
static constexpr int64_t MAX_ROWS_STREAM = 16;

// Cells of a tile. As they stream in, only their scores are kept: 8 KiB for 16 rows. As matrices, with rows of 128 and heads of 128
// elements, queries, scores, keys, values and sums take 224 KiB, which a second-level cache of 256 KiB holds
static constexpr int64_t N_CELLS_STREAM = 128;
static constexpr int64_t N_CELLS_TILE   = 64;
static constexpr int64_t N_ROWS_TILE    = 128;

static constexpr size_t WORK_ALIGN = 64; // one vector, or one cache line

static int64_t fattn_pad(int64_t n, int64_t m) {
    return (n + m - 1)/m*m;
}

// sizes of the op, the same for every thread; the cells of the heads are not among them
struct fattn_shape {
    explicit fattn_shape(const ggml_tensor * dst);

    int64_t n_embd_k, n_embd_v; // elements of a key and of a value
    int64_t ld_k, ld_v;         // likewise in F32, whole vectors

    int64_t n_tokens, n_head, n_head_kv, n_gqa;

    bool    stream;       // few rows
    int64_t n_cells_tile;
    int64_t n_rows;       // of a kv head: row = token*n_gqa + query head of the kv head
    int64_t n_rows_item;  // of an item, the last one of a kv head may have less
    int64_t n_items;      // of all kv heads
    int64_t n_items_head; // of a kv head

    // floats of the work buffer: of a part, and of all that a thread has
    int64_t n_part()   const { return n_rows_item*(ld_v + 2); }
    int64_t n_thread() const {
        return fattn_pad(3*n_part() + n_rows_item*(ld_k + n_cells_tile + 1) + n_cells_tile*(2*ld_k + ld_v), WORK_ALIGN/sizeof(float));
    }
};

inline fattn_shape::fattn_shape(const ggml_tensor * dst) {
    const ggml_tensor * q      = dst->src[0];
    const ggml_tensor * v      = dst->src[2];
    const ggml_tensor * ranges = dst->src[3];

    n_embd_k = q->ne[0];
    n_embd_v = v->ne[0];
    ld_k     = fattn_pad(n_embd_k, VL);
    ld_v     = fattn_pad(n_embd_v, VL);

    n_tokens  = q->ne[1];
    n_head    = q->ne[2];
    n_head_kv = ranges->ne[1];
    n_gqa     = n_head/n_head_kv;

    n_rows       = n_tokens*n_gqa;
    stream       = n_rows <= MAX_ROWS_STREAM;
    n_cells_tile = stream ? N_CELLS_STREAM : N_CELLS_TILE;
    n_rows_item  = std::min(n_rows, N_ROWS_TILE);
    n_items_head = (n_rows + n_rows_item - 1)/n_rows_item;
    n_items      = n_items_head*n_head_kv;
}

//
// shares
//

// rows row0 to row0 + n_rows - 1 of kv head ih, and the tiles of cells that one of them at least sees
struct fattn_item {
    int64_t ih;
    int64_t row0, n_rows;
    int64_t n_tiles;

    int64_t work() const { return n_tiles*n_rows; }
};

class fattn_work {
public:
    fattn_work(const fattn_shape & sh, const ggml_tensor * dst, int nth);

    fattn_item item(int64_t i) const;

    // cells that a row of a kv head sees: the first ones of the head
    int64_t n_visible(int64_t ih, int64_t row) const {
        const int64_t n_cells = ranges[2*ih + 1];
        return causal ? std::max<int64_t>(0, n_cells - sh.n_tokens + row/sh.n_gqa + 1) : n_cells;
    }

    // row of the pools that is the first cell of a kv head
    int64_t first_row(int64_t ih) const { return ranges[2*ih]; }

    // Work is counted in rows x tiles from the first item on. These two ask by the work before an item, or before a tile of it:
    // the first tile of the item that belongs to thread ith or to one behind it, and the thread that a tile belongs to
    int64_t first_tile(const fattn_item & it, int64_t before, int ith) const {
        const int64_t begin = (total*ith + nth - 1)/nth;
        return std::clamp<int64_t>((begin - before + it.n_rows - 1)/it.n_rows, 0, it.n_tiles);
    }
    int owner(int64_t before) const { return before*nth/total; }

private:
    const fattn_shape sh;

    const int32_t * ranges; // [2, n_head_kv] I32 of the op's layer: first row, cells
    bool            causal;
    int             nth;
    int64_t         total = 0; // work of all items
};

inline fattn_work::fattn_work(const fattn_shape & sh, const ggml_tensor * dst, int nth) : sh(sh), nth(nth) {
    causal = ggml_get_op_params_i32(dst, 3) != 0;
    ranges = (const int32_t *) dst->src[3]->data + 2*sh.n_head_kv*ggml_get_op_params_i32(dst, 2);

    const int64_t n_rows_pool = dst->src[1]->ne[1];
    for (int64_t ih = 0; ih < sh.n_head_kv; ++ih) {
        GGML_ASSERT(ranges[2*ih] >= 0 && ranges[2*ih + 1] >= 0 && (int64_t) ranges[2*ih] + ranges[2*ih + 1] <= n_rows_pool);
    }
    for (int64_t i = 0; i < sh.n_items; ++i) {
        total += item(i).work();
    }
}

inline fattn_item fattn_work::item(int64_t i) const {
    fattn_item it;
    it.ih      = i/sh.n_items_head;
    it.row0    = i%sh.n_items_head*sh.n_rows_item;
    it.n_rows  = std::min(sh.n_rows_item, sh.n_rows - it.row0);
    it.n_tiles = (n_visible(it.ih, it.row0 + it.n_rows - 1) + sh.n_cells_tile - 1)/sh.n_cells_tile;
    return it;
}

//
// memory
//

// state of the online softmax of an item's rows over some of its tiles
struct fattn_part {
    float * o;   // [ld_v, n_rows_item] sums of values, weighted with exp(score - max)
    float * max; // [n_rows_item]       largest score so far, -FLT_MAX before the first
    float * sum; // [n_rows_item]       sum of the weights
};

// The parts of a thread. Its share can begin inside one item, and end inside another: these two are combined with those of other
// threads. Items that it has for itself take turns in the third
enum fattn_slot { FATTN_SLOT_BEGUN_BEFORE, FATTN_SLOT_ENDED_BEHIND, FATTN_SLOT_WHOLE, FATTN_N_SLOTS };

static_assert(FATTN_N_SLOTS == 3, "fattn_shape::n_thread() counts three parts");

// what a thread works in, one item and one tile at a time
struct fattn_scratch {
    float   * q;         // [ld_k, n_rows_item]         queries, scaled
    float   * s;         // [n_cells_tile, n_rows_item] scores, then weights
    float   * k;         // [ld_k, n_cells_tile]        keys, where rows of the pool are not whole vectors
    float   * k_t;       // [n_cells_tile, ld_k]        keys, transposed
    float   * v;         // [ld_v, n_cells_tile]        values, where they are not whole vectors or not F32
    int32_t * n_visible; // [n_rows_item]               cells that a row sees, from the first one of its head
};

// the work buffer: n_thread() floats of every thread
class fattn_memory {
public:
    fattn_memory(const fattn_shape & sh, void * data, size_t size, int nth) : sh(sh) {
        base = (float *) GGML_PAD((uintptr_t) data, WORK_ALIGN);
        GGML_ASSERT((char *) (base + nth*sh.n_thread()) <= (char *) data + size);
    }

    fattn_part part(int ith, fattn_slot slot) const {
        fattn_part res;
        res.o   = base + ith*sh.n_thread() + slot*sh.n_part();
        res.max = res.o   + sh.n_rows_item*sh.ld_v;
        res.sum = res.max + sh.n_rows_item;
        return res;
    }

    fattn_scratch scratch(int ith) const {
        fattn_scratch res;
        res.q         = base + ith*sh.n_thread() + FATTN_N_SLOTS*sh.n_part();
        res.s         = res.q   + sh.n_rows_item*sh.ld_k;
        res.k         = res.s   + sh.n_rows_item*sh.n_cells_tile;
        res.k_t       = res.k   + sh.n_cells_tile*sh.ld_k;
        res.v         = res.k_t + sh.n_cells_tile*sh.ld_k;
        res.n_visible = (int32_t *) (res.v + sh.n_cells_tile*sh.ld_v);
        return res;
    }

private:
    const fattn_shape sh;

    float * base;
};
