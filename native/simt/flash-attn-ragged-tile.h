// Many rows: tiles of cells in memory of the block, products of matrices.
//
// A block attends with n_rows rows of a kv head to n_cells cells at a time. Queries, keys, values and weights are F16, sums are
// F32; sums of values lie in memory of the block between tiles, where rows are rescaled as their maximum grows.

template <int n_rows, int n_cells, int n_embd> // n_embd: the larger one of keys and values, rounded up
struct fattn_tile_shape {
    enum { LD_Q = n_embd + 8 };  // rows of queries, keys and values; the padding, 16 bytes, spreads them over banks
    enum { LD_S = n_cells + 4 };
    enum { LD_P = n_cells + 8 };
    enum { LD_O = n_embd + 4 };

    enum { N_Q  = n_rows*LD_Q  };
    enum { N_KV = n_cells*LD_Q };
    enum { N_S  = n_rows*LD_S  };
    enum { N_P  = n_rows*LD_P  };
    enum { N_O  = n_rows*LD_O  };

    enum { N_LANES_ROW = FATTN_N_THREADS/n_rows }; // consecutive threads that have a row in the softmax
};

struct fattn_tile_shared {
    SIMT_SHARED(simt_f16) q;   // [LD_Q, n_rows]  queries, scaled
    SIMT_SHARED(simt_f16) kv;  // [LD_Q, n_cells] keys, then values
    SIMT_SHARED(float)    s;   // [LD_S, n_rows]  scores
    SIMT_SHARED(simt_f16) p;   // [LD_P, n_rows]  weights
    SIMT_SHARED(float)    o;   // [LD_O, n_rows]  sums of values
    SIMT_SHARED(float)    max; // [n_rows]
    SIMT_SHARED(float)    sum; // [n_rows]        of the weights
};

// matrices are made of fragments of 16 x 16
static SIMT_FUNC int32_t fattn_pad16(int32_t n) {
    return (n + 15)/16*16;
}

// sh.q from q [n_embd_k, n_tokens, n_head], scaled once instead of all scores; zeros up to n_pad elements and for rows that are not
// there
template <int n_rows, int ld>
SIMT_FUNC void fattn_tile_load_queries(
        fattn_args a, SIMT_GLOBAL(const char) q, int32_t ih, int32_t row0, int32_t n_pad, SIMT_SHARED(simt_f16) dst, simt_ids id) {
    for (int32_t i = id.tid; i < n_rows*n_pad; i += FATTN_N_THREADS) {
        const int32_t ir  = i/n_pad;
        const int32_t d   = i%n_pad;
        const int32_t row = row0 + ir;

        float x = 0.0f;
        if (row < a.n_rows && d < a.n_embd_k) {
            x = SIMT_CAST(const float, q + row/a.n_gqa*a.nb_q1 + fattn_head_of(a, ih, row)*a.nb_q2)[d]*a.scale;
        }
        dst[ir*ld + d] = simt_to_f16(x);
    }
}

// sh.kv [ld, n_cells] from rows of a pool [n_embd, cells of the head] from cell0 on, n_left of which are seen; zeros from n_embd to
// n_pad
template <typename row_t, int n_cells, int ld>
SIMT_FUNC void fattn_tile_load_cells(
        SIMT_SHARED(simt_f16) dst, SIMT_GLOBAL(const char) head, int type, uint32_t nb, int32_t cell0, int32_t n_left,
        int32_t n_embd, int32_t n_pad, simt_ids id) {
    const int32_t n_parts = n_pad/FATTN_DIMS;
    for (int32_t i = id.tid; i < n_cells*n_parts; i += FATTN_N_THREADS) {
        const int32_t j = i/n_parts;
        const int32_t d = i%n_parts*FATTN_DIMS;

        fattn_dims x;
        float      scale = 0.0f;
        if (d < n_embd) {
            // what lies behind the last cell is not there, its weight is zero
            const typename row_t::raw r = row_t::load(row_t::place_of(head, d, type), (cell0 + simt_min(j, n_left - 1))*nb, type);
            x     = row_t::unpack(r, d, type);
            scale = row_t::scale(r, d, type);
        } else {
            for (int c = 0; c < FATTN_DIMS; ++c) {
                x.x[c] = 0.0f;
            }
        }
        SIMT_UNROLL
        for (int c = 0; c < FATTN_DIMS; ++c) {
            dst[j*ld + row_t::element(d, c, type)] = simt_to_f16(x.x[c]*scale);
        }
    }
}

// sh.s [n_cells, n_rows] = sh.q*sh.kv^T over n_pad elements; a warp makes every fourth fragment
template <int n_rows, int n_cells, int n_embd>
SIMT_FUNC void fattn_tile_scores(fattn_tile_shared sh, int32_t n_pad, simt_ids id) {
    typedef fattn_tile_shape<n_rows, n_cells, n_embd> shape;

    enum { N_FRAGS = n_rows/16*(n_cells/16) };
    for (int32_t i = id.warp; i < N_FRAGS; i += FATTN_N_WARPS) {
        const int32_t r = i/(n_cells/16)*16;
        const int32_t c = i%(n_cells/16)*16;

        simt_frag s;
        simt_frag_zero(s);
        for (int32_t d = 0; d < n_pad; d += 16) {
            simt_frag_mma_t(s, sh.q + r*shape::LD_Q + d, shape::LD_Q, sh.kv + c*shape::LD_Q + d, shape::LD_Q);
        }
        simt_frag_store(sh.s + r*shape::LD_S + c, s, shape::LD_S);
    }
}

// One step of the online softmax for row ir, by N_LANES_ROW lanes: sh.p = weights of the scores sh.s, and sh.o scaled to the new
// maximum. n_visible: cells from the first one of the tile on that the row sees. own: the maximum, and the sum of this lane's weights
template <int n_rows, int n_cells, int n_embd>
SIMT_FUNC void fattn_tile_weigh(
        fattn_args a, fattn_tile_shared sh, int32_t ir, int32_t lane, int32_t n_visible, int32_t n_pad, SIMT_THREAD(fattn_softmax) own) {
    typedef fattn_tile_shape<n_rows, n_cells, n_embd> shape;

    enum { N_LANES_ROW = shape::N_LANES_ROW, N_OWN = n_cells/shape::N_LANES_ROW };

    float w[N_OWN];
    float max_new = own.max;
    SIMT_UNROLL
    for (int j = 0; j < N_OWN; ++j) {
        const int32_t c = j*N_LANES_ROW + lane;

        float x = sh.s[ir*shape::LD_S + c];
        x = a.softcap != 0.0f ? a.softcap*fattn_tanh(x) : x;
        w[j]    = c < n_visible ? x : FATTN_MASKED;
        max_new = simt_max(max_new, w[j]);
    }
    SIMT_UNROLL
    for (int m = 1; m < N_LANES_ROW; m *= 2) {
        max_new = simt_max(max_new, simt_shuffle_xor(max_new, m));
    }
    const float w_old = simt_exp2(own.max - max_new);

    own.max  = max_new;
    own.sum *= w_old;
    SIMT_UNROLL
    for (int j = 0; j < N_OWN; ++j) {
        w[j] = simt_exp2(w[j] - max_new);
        own.sum += w[j];
        sh.p[ir*shape::LD_P + j*N_LANES_ROW + lane] = simt_to_f16(w[j]);
    }
    if (w_old < 1.0f) {
        for (int32_t d = lane; d < n_pad; d += N_LANES_ROW) {
            sh.o[ir*shape::LD_O + d] = sh.o[ir*shape::LD_O + d]*w_old;
        }
    }
}

// sh.o [n_pad, n_rows] += sh.p*sh.kv
template <int n_rows, int n_cells, int n_embd>
SIMT_FUNC void fattn_tile_add_values(fattn_tile_shared sh, int32_t n_pad, simt_ids id) {
    typedef fattn_tile_shape<n_rows, n_cells, n_embd> shape;

    const int32_t n_frags = n_rows/16*(n_pad/16);
    for (int32_t i = id.warp; i < n_frags; i += FATTN_N_WARPS) {
        const int32_t r = i/(n_pad/16)*16;
        const int32_t c = i%(n_pad/16)*16;

        simt_frag o;
        simt_frag_load(o, sh.o + r*shape::LD_O + c, shape::LD_O);
        for (int32_t j = 0; j < n_cells; j += 16) {
            simt_frag_mma(o, sh.p + r*shape::LD_P + j, shape::LD_P, sh.kv + j*shape::LD_Q + c, shape::LD_Q);
        }
        simt_frag_store(sh.o + r*shape::LD_O + c, o, shape::LD_O);
    }
}

// sh.max and sh.sum from the lanes of every row
template <int n_lanes_row>
SIMT_FUNC void fattn_tile_store_softmax(fattn_tile_shared sh, int32_t ir, int32_t lane, fattn_softmax own) {
    SIMT_UNROLL
    for (int m = 1; m < n_lanes_row; m *= 2) {
        own.sum += simt_shuffle_xor(own.sum, m);
    }
    if (lane == 0) {
        sh.max[ir] = own.max;
        sh.sum[ir] = own.sum;
    }
}

// The rows of sh.o: results where a piece is all of an item, otherwise parts. A thread has the elements that it clears for the next
// piece, so that no barrier is between
template <int n_rows, int ld>
SIMT_FUNC void fattn_tile_write(fattn_args a, fattn_tensors t, fattn_tile_shared sh, fattn_piece piece, int32_t n_pad, simt_ids id) {
    for (int32_t i = id.tid; i < n_rows*n_pad; i += FATTN_N_THREADS) {
        const int32_t r   = i/n_pad;
        const int32_t d   = i%n_pad;
        const int32_t row = piece.row0 + r;
        if (row >= a.n_rows || d >= a.n_embd_v) {
            continue;
        }
        const float o = sh.o[r*ld + d];
        if (piece.whole) {
            t.dst[fattn_dst(a, piece.ih, row) + d] =
                o*fattn_row_weight(a, t.sinks, fattn_head_of(a, piece.ih, row), sh.max[r], sh.sum[r]);
        } else {
            SIMT_GLOBAL(float) y = t.part + fattn_part(a, id.block, piece.slot, n_rows, r);
            y[d] = o;
            if (d == 0) {
                y[a.n_embd_v]     = sh.max[r];
                y[a.n_embd_v + 1] = sh.sum[r];
            }
        }
    }
}

// all rows of an item over the tiles of a piece
template <typename row_t, int n_rows, int n_cells, int n_embd>
SIMT_FUNC void fattn_tile_attend(fattn_args a, fattn_tensors t, fattn_piece piece, fattn_tile_shared sh, simt_ids id) {
    typedef fattn_tile_shape<n_rows, n_cells, n_embd> shape;

    const int64_t first = t.ranges[2*piece.ih];

    SIMT_GLOBAL(const char) k = t.k + first*a.nb_k; // [n_embd_k, cells] of the head
    SIMT_GLOBAL(const char) v = t.v + first*a.nb_v; // [n_embd_v, cells]

    const int32_t n_visible = fattn_n_visible(a, t.ranges, piece.ih, simt_min(a.n_rows, piece.row0 + n_rows) - 1); // by one row at least

    const int32_t n_pad_k = fattn_pad16(a.n_embd_k);
    const int32_t n_pad_v = fattn_pad16(a.n_embd_v);

    fattn_tile_load_queries<n_rows, shape::LD_Q>(a, t.q, piece.ih, piece.row0, n_pad_k, sh.q, id);
    for (int32_t i = id.tid; i < n_rows*n_pad_v; i += FATTN_N_THREADS) {
        sh.o[i/n_pad_v*shape::LD_O + i%n_pad_v] = 0.0f;
    }

    // the row of this thread in the softmax, with the lanes beside it
    const int32_t ir      = id.tid/shape::N_LANES_ROW;
    const int32_t lane    = id.tid%shape::N_LANES_ROW;
    const int32_t visible = piece.row0 + ir < a.n_rows ? fattn_n_visible(a, t.ranges, piece.ih, piece.row0 + ir) : 0;

    fattn_softmax own;
    own.max = FATTN_LOWEST;
    own.sum = 0.0f;

    for (int32_t tile = piece.tile0; tile < piece.tile1; ++tile) {
        const int32_t cell0 = tile*n_cells;

        fattn_tile_load_cells<row_t, n_cells, shape::LD_Q>(sh.kv, k, a.type_k, a.nb_k, cell0, n_visible - cell0, a.n_embd_k, n_pad_k, id);
        simt_barrier();

        fattn_tile_scores<n_rows, n_cells, n_embd>(sh, n_pad_k, id);
        simt_barrier();

        // values take the place of the keys, while the weights are computed
        fattn_tile_load_cells<row_t, n_cells, shape::LD_Q>(sh.kv, v, a.type_v, a.nb_v, cell0, n_visible - cell0, a.n_embd_v, n_pad_v, id);
        fattn_tile_weigh<n_rows, n_cells, n_embd>(a, sh, ir, lane, visible - cell0, n_pad_v, own);
        simt_barrier();

        fattn_tile_add_values<n_rows, n_cells, n_embd>(sh, n_pad_v, id);
        simt_barrier();
    }

    fattn_tile_store_softmax<shape::N_LANES_ROW>(sh, ir, lane, own);
    simt_barrier();

    fattn_tile_write<n_rows, shape::LD_O>(a, t, sh, piece, n_pad_v, id);
}

// Kernel: a block of n_rows rows, for heads of up to n_embd elements
template <typename row_t, int n_rows, int n_cells, int n_embd>
SIMT_FUNC void fattn_tile(fattn_args a, fattn_tensors t, fattn_tile_shared sh, simt_ids id) {
    const fattn_share share = fattn_share_of(a, t.ranges, n_rows, n_cells, id);

    fattn_walk walk = fattn_walk_of(share);
    while (fattn_walk_next(a, t.ranges, share, n_rows, n_cells, id, walk)) {
        fattn_tile_attend<row_t, n_rows, n_cells, n_embd>(a, t, walk.piece, sh, id);
    }
}
