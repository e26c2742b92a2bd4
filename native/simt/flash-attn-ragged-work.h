// How the work is divided among the blocks of the grid.
//
// The query heads that share a kv head make n_gqa rows of every token. An item is a block of these rows with all cells that they
// see, cut into tiles of cells; item = kv head*n_row_blocks + block of rows. There are two ways:
//
//   shares (n_splits = 0)  the tiles of all items, one item behind the other, are dealt out to the blocks in equal shares, so that
//                          heads of very different lengths keep a device busy
//   splits (n_splits > 0)  every item is cut into n_splits parts of equal length, block = item*n_splits + split
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

// tiles of all items
static SIMT_FUNC int64_t fattn_total(fattn_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t n_rows_block, int32_t n_cells_tile) {
    int64_t res = 0;
    for (int32_t item = 0; item < a.n_head_kv*a.n_row_blocks; ++item) {
        res += fattn_n_tiles(a, ranges, item, n_rows_block, n_cells_tile);
    }
    return res;
}

// first tile, of all, of a block's share
static SIMT_FUNC int64_t fattn_begin(fattn_args a, int64_t total, int32_t block) {
    return total*block/a.n_blocks;
}

// first tile of a split, of those of its item
static SIMT_FUNC int64_t fattn_split_begin(fattn_args a, int64_t n_tiles, int32_t split) {
    return n_tiles*split/a.n_splits;
}

// the block whose share holds a tile: the last one that begins at it or before
static SIMT_FUNC int32_t fattn_owner(fattn_args a, int64_t total, int64_t tile) {
    return (int32_t) (((tile + 1)*a.n_blocks - 1)/total);
}

// what a block attends to: tiles begin to end - 1, counted from the first one of item0
struct fattn_share {
    int32_t item0;
    int64_t begin, end;
};

static SIMT_FUNC fattn_share fattn_share_of(
        fattn_args a, SIMT_GLOBAL(const int32_t) ranges, int32_t block, int32_t n_rows_block, int32_t n_cells_tile) {
    fattn_share res;
    if (a.n_splits > 0) {
        res.item0 = block/a.n_splits;

        const int64_t n_tiles = fattn_n_tiles(a, ranges, res.item0, n_rows_block, n_cells_tile);
        res.begin = fattn_split_begin(a, n_tiles, block%a.n_splits);
        res.end   = fattn_split_begin(a, n_tiles, block%a.n_splits + 1);
    } else {
        const int64_t total = fattn_total(a, ranges, n_rows_block, n_cells_tile);
        res.item0 = 0;
        res.begin = fattn_begin(a, total, block);
        res.end   = fattn_begin(a, total, block + 1);
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

// Where the part of a row begins: n_embd_v sums of values, the maximum, the sum of weights. A share can begin inside one item,
// whose part takes slot 0 of the block, and end inside another, whose part takes slot 1. Splits take slot 0
static SIMT_FUNC int64_t fattn_part(fattn_args a, int32_t block, int32_t slot, int32_t n_rows_block, int32_t row) {
    return (((int64_t) block*2 + slot)*n_rows_block + row)*(a.n_embd_v + 2);
}
