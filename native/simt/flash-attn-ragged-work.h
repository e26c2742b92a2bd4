// How the work is divided among the blocks of the grid.
//
// The query heads that share a kv head make n_gqa rows of every token. An item is a block of these rows with all cells that they
// see, cut into tiles of cells; item = kv head*n_row_blocks + block of rows. There are two ways:
//
//   shares (n_splits = 0)  the tiles of all items, one item behind the other, are dealt out to the blocks in equal shares, so that
//                          heads of very different lengths keep a device busy
//   splits (n_splits > 0)  every item is cut into n_splits parts of equal length, block = item*n_splits + split: for rows of heads that
//                          only the kernel for few rows has room for
//
// An item that more than one block attends to is attended in parts, each with a maximum, a sum of weights and a weighted sum of
// values of its own, which flash-attn-ragged-combine.h combines.

// cells that a row of a kv head sees: the first ones of the head
static SIMT_FUNC int32_t fattn_n_visible(fattn_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t ih, int32_t row) {
    const int32_t n_cells = ranges[2*ih + 1];
    return a.causal ? simt_max(0, n_cells - a.n_tokens + row/a.n_gqa + 1) : n_cells;
}

// tiles of an item: those that its last row sees, which sees most
static SIMT_FUNC int32_t fattn_n_tiles(
        fattn_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t item, int32_t n_rows_block, int32_t n_cells_tile) {
    const int32_t ih   = item/a.n_row_blocks;
    const int32_t last = simt_min(a.n_rows, (item%a.n_row_blocks + 1)*n_rows_block) - 1;
    return (fattn_n_visible(a, ranges, ih, last) + n_cells_tile - 1)/n_cells_tile;
}

// tiles of an item: of it, of the items before it, of all items
struct fattn_tiles {
    int32_t own, before, total;
};

// The last row of a head sees all of its cells: where an item has all rows
static SIMT_FUNC int32_t fattn_head_tiles(SIMT_GLOBAL(const int32_t) ranges, int32_t ih, int32_t n_cells_tile) {
    return (ranges[2*ih + 1] + n_cells_tile - 1)/n_cells_tile;
}

static SIMT_FUNC int32_t fattn_item_tiles(
        fattn_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t item, int32_t n_rows_block, int32_t n_cells_tile) {
    return a.n_row_blocks == 1 ? fattn_head_tiles(ranges, item, n_cells_tile) : fattn_n_tiles(a, ranges, item, n_rows_block, n_cells_tile);
}

// The same for all lanes of a warp, which count the tiles of a few items each: a loop over all items in every thread would wait for
// memory again and again
static SIMT_FUNC fattn_tiles fattn_count_tiles(
        fattn_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t item, int32_t n_rows_block, int32_t n_cells_tile, simt_ids id) {
    fattn_tiles res;
    res.own    = 0;
    res.before = 0;
    res.total  = 0;
    for (int32_t i = id.lane; i < a.n_head_kv*a.n_row_blocks; i += 32) {
        const int32_t n = fattn_item_tiles(a, ranges, i, n_rows_block, n_cells_tile);
        res.own    += i == item ? n : 0;
        res.before += i <  item ? n : 0;
        res.total  += n;
    }
    SIMT_UNROLL
    for (int m = 1; m < 32; m *= 2) {
        res.own    += simt_shuffle_xor(res.own,    m);
        res.before += simt_shuffle_xor(res.before, m);
        res.total  += simt_shuffle_xor(res.total,  m);
    }
    return res;
}

// Tiles of a block's share: the same for all, the last blocks may get fewer, or none. A share is never less than a few tiles, so that
// few cells make few parts
static SIMT_FUNC int32_t fattn_share_size(fattn_args a, int32_t total) {
    return simt_max(a.n_tiles_min, (int32_t) ((uint32_t) (total + a.n_blocks - 1)/(uint32_t) a.n_blocks));
}

// first tile of a split, of those of its item
static SIMT_FUNC int32_t fattn_split_begin(fattn_args a, int32_t n_tiles, int32_t split) {
    return simt_min(n_tiles, split*((n_tiles + a.n_splits - 1)/a.n_splits));
}

// what a block attends to: tiles begin to end - 1, counted from the first one of item0
struct fattn_share {
    int32_t item0;
    int32_t begin, end;
};

static SIMT_FUNC fattn_share fattn_share_of(
        fattn_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t n_rows_block, int32_t n_cells_tile, simt_ids id) {
    fattn_share res;
    if (a.n_splits > 0) {
        res.item0 = id.block/a.n_splits;

        const int32_t n_tiles = fattn_n_tiles(a, ranges, res.item0, n_rows_block, n_cells_tile);
        res.begin = fattn_split_begin(a, n_tiles, id.block%a.n_splits);
        res.end   = fattn_split_begin(a, n_tiles, id.block%a.n_splits + 1);
    } else {
        const int32_t total = fattn_count_tiles(a, ranges, 0, n_rows_block, n_cells_tile, id).total;
        const int32_t size  = fattn_share_size(a, total);
        res.item0 = 0;
        res.begin = simt_min(total, id.block*size);
        res.end   = simt_min(total, res.begin + size);
    }
    return res;
}

// what a block attends to of one item
struct fattn_piece {
    int32_t ih;           // kv head
    int32_t row0;         // first row
    int32_t tile0, tile1; // tiles tile0 to tile1 - 1
    bool    whole;        // all of them: the result, otherwise a part
    int32_t slot;         // of the part, see fattn_part()
};

static SIMT_FUNC fattn_piece fattn_piece_of(fattn_args a, int32_t item, int32_t n_rows_block, int32_t tile0, int32_t tile1, int32_t n_tiles) {
    fattn_piece res;
    res.ih    = item/a.n_row_blocks;
    res.row0  = item%a.n_row_blocks*n_rows_block;
    res.tile0 = tile0;
    res.tile1 = tile1;
    res.whole = a.n_splits > 0 ? a.n_splits == 1 : tile0 == 0 && tile1 == n_tiles;
    res.slot  = a.n_splits > 0 || tile0 > 0 ? 0 : 1;
    return res;
}

// The pieces of a share, one after the other; all lanes of a warp come along
struct fattn_walk {
    int32_t item;   // the next one
    int32_t before; // tiles of the items before it
    int32_t n_own;  // tiles of one of 32 items, a lane has one

    fattn_piece piece;
};

static SIMT_FUNC fattn_walk fattn_walk_of(fattn_share share) {
    fattn_walk res;
    res.item   = share.item0;
    res.before = 0;
    res.n_own  = 0;
    return res;
}

// whether there is another piece
static SIMT_FUNC bool fattn_walk_next(
        fattn_args a, SIMT_GLOBAL(const int32_t) ranges, fattn_share share, int32_t n_rows_block, int32_t n_cells_tile, simt_ids id,
        SIMT_THREAD(fattn_walk) walk) {
    const int32_t n_items = a.n_head_kv*a.n_row_blocks;
    while (walk.item < n_items && walk.before < share.end) {
        const int32_t item = walk.item++;
        if (item % 32 == 0) {
            walk.n_own = item + id.lane < n_items ? fattn_item_tiles(a, ranges, item + id.lane, n_rows_block, n_cells_tile) : 0;
        }
        const int32_t n_tiles = simt_shuffle(walk.n_own, item % 32, 32, 0);
        const int32_t tile0   = simt_max(0, share.begin - walk.before);
        const int32_t tile1   = simt_min(n_tiles, share.end - walk.before);
        walk.before += n_tiles;
        if (tile0 < tile1) {
            walk.piece = fattn_piece_of(a, item, n_rows_block, tile0, tile1, n_tiles);
            return true;
        }
    }
    return false;
}

// Where the part of a row begins: n_embd_v sums of values, the maximum, the sum of weights. A share can begin inside one item,
// whose part takes slot 0 of the block, and end inside another, whose part takes slot 1. Splits take slot 0
static SIMT_FUNC int64_t fattn_part(fattn_args a, int32_t block, int32_t slot, int32_t n_rows_block, int32_t row) {
    return (((int64_t) block*2 + slot)*n_rows_block + row)*(a.n_embd_v + 2);
}
