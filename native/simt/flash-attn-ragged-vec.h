// Few rows: cells stream from memory into registers, every one is read once for all rows of an item.
//
// n_lanes lanes, a group, hold a row of the pool, FATTN_DIMS elements each, so that a warp attends to 32/n_lanes cells at a time.
// Each group keeps a softmax of its own; they meet once, after the last cell, and so do the warps.
//
// The scores of a step, N_STEPS cells x n_rows rows, are as many sums over the lanes of a group. They are dealt out: a lane ends up
// with one or a few of them, of one cell, computes these weights alone and tells the others.

// all rows of an item over the tiles of a piece; sh: [LD, FATTN_N_WARPS]
template <typename row_t, int n_lanes, int n_rows>
SIMT_FUNC void fattn_vec_attend(fattn_args a, fattn_tensors t, fattn_piece piece, SIMT_SHARED(float) sh, simt_ids id) {
    typedef fattn_vec_shape<n_lanes, n_rows>        shape;
    typedef fattn_vec_steps<row_t, n_lanes, n_rows> steps;

    const typename steps::place at = steps::place_of(a, id);

    const typename steps::pools pools = steps::pools_of(a, t, piece, at);

    int32_t n_visible = 0;          // cells that one row at least sees
    int32_t n_common  = 0x7FFFFFFF; // that all see
    SIMT_UNROLL
    for (int r = 0; r < n_rows; ++r) {
        if (piece.row0 + r < a.n_rows) {
            const int32_t visible = fattn_n_visible(a, t.ranges, piece.ih, piece.row0 + r);
            n_visible = simt_max(n_visible, visible);
            n_common  = simt_min(n_common,  visible);
        }
    }

    typename steps::queries x;
    typename steps::rows    o;
    typename steps::softmax own;
    steps::load_queries(a, t.q, piece, at, x);
    steps::start(a, t.ranges, piece, at, o, own);

    for (int32_t tile = piece.tile0; tile < piece.tile1; ++tile) {
        const int32_t cell0 = tile*shape::N_CELLS_TILE + id.warp*shape::N_CELLS_WARP + at.group;

        typename steps::cells c;
        steps::load_cells(a, pools, cell0, n_visible, c);

        typename steps::weights w = steps::scores(a, at, x, c);
        steps::mask(a, cell0, (tile + 1)*shape::N_CELLS_TILE > n_common, at, own, w);
        steps::weigh(at, own, o, w);
        steps::add_values(a, at, w, c, o);
    }
    steps::sum_steps(own);

    SIMT_UNROLL
    for (int r = 0; r < n_rows; ++r) {
        steps::store_warp(a, at, r, own, o, sh, id);
        simt_barrier();
        if (piece.row0 + r < a.n_rows) {
            steps::write_row(a, t, piece, r, sh, id);
        }
        simt_barrier();
    }
}

// Kernel: a block of n_rows rows, of a type of cells and heads of up to n_lanes*FATTN_DIMS elements. sh: [LD, FATTN_N_WARPS]
template <typename row_t, int n_lanes, int n_rows>
SIMT_FUNC void fattn_vec(fattn_args a, fattn_tensors t, SIMT_SHARED(float) sh, simt_ids id) {
    typedef fattn_vec_shape<n_lanes, n_rows> shape;

    const fattn_share share = fattn_share_of(a, t.ranges, n_rows, shape::N_CELLS_TILE, id);

    // one loop for shares and splits: what it calls makes nearly all of the kernel
    const int32_t item_end = a.n_splits > 0 ? share.item0 + 1 : a.n_head_kv;

    int32_t n_own  = 0; // tiles of one of 32 heads, a lane has one
    int32_t before = 0; // of the items before
    for (int32_t item = share.item0; item < item_end && (before < share.end || a.n_splits > 0); ++item) {
        int32_t n_tiles;
        if (a.n_splits > 0) {
            n_tiles = fattn_n_tiles(a, t.ranges, item, n_rows, shape::N_CELLS_TILE);
        } else {
            if (item % 32 == 0) {
                n_own = item + id.lane < a.n_head_kv ? fattn_head_tiles(t.ranges, item + id.lane, shape::N_CELLS_TILE) : 0;
            }
            n_tiles = simt_shuffle(n_own, item % 32, 32, 0);
        }
        const int32_t tile0 = simt_max(0, share.begin - before);
        const int32_t tile1 = simt_min(n_tiles, share.end - before);
        before += n_tiles;
        // a split without tiles is a part too
        if (tile0 < tile1 || a.n_splits > 0) {
            fattn_vec_attend<row_t, n_lanes, n_rows>(a, t, fattn_piece_of(a, item, n_rows, tile0, tile1, n_tiles), sh, id);
        }
    }
}
