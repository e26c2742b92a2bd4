// Some rows, 4 to 64: cells through memory of the block into products of matrices, all else in registers.
//
// With cells down and rows across, scores are S^T = K*Q^T and sums of values O^T = V^T*P^T. Products make 16 x 8 at a time: cells, or
// elements of values, take the 16, rows the 8, so that few rows waste few products. Both results have the rows of a lane in the same
// place: it computes the weights of its own scores, and what it scales when a maximum grows are its own sums. P^T, made of S^T, is
// transposed 8 x 8 at a time on its way to be the second operand. Scores, weights, queries and sums never leave the registers.
//
// The warps of a block take different cells of a tile. For more than 8 rows some take different rows of the same cells instead, since a
// warp has no registers for more than 8 rows of 256 elements, or 16 of 128. For 8 rows of 256 elements a tile has cells for two warps:
// two others take the other half of the values' elements, and compute the scores once more.
//
// Keys and values of a tile take turns in slots of 16 KiB, or of 8 for 64 rows, whose scores would take too many registers. Behind each wait is one barrier: it says that the slot is full, and that the
// one before is free.
//   F16         three slots, copied into without registers: while one is worked on, two are on their way
//   quantised   two slots; while one is worked on, rows for the other are on their way into registers. They are unpacked to F16 once for
//               all rows of queries; as a scale of F16 times a whole number they lose what F16 loses, as in flash-attn-ragged-tile.h
// Other formats stay with the other kernels: F16 has not the range of BF16 and F32.
//
// A slot is [n_embd, cells] without padding; groups of eight elements, 16 bytes, are permuted in every row, so that eight rows of a
// group lie in different banks.

template <int n_embd, int n_rows>
struct fattn_mma_shape {
    enum { N_ROWS_WARP   = n_rows > 16 && n_embd <= 128 ? 16 : 8 };
    enum { N_WARPS_EMBD  = n_rows == 8 && n_embd > 128 ? 2 : 1 };
    enum { N_WARPS_ROWS  = n_rows/N_ROWS_WARP };
    enum { N_WARPS_CELLS = FATTN_N_WARPS/N_WARPS_ROWS/N_WARPS_EMBD };

    enum { N_SLOT       = n_rows > 32 ? 4096 : 8192 }; // elements of a slot
    enum { N_CELLS_TILE = N_SLOT/n_embd };
    enum { N_CELLS_WARP = N_CELLS_TILE/N_WARPS_CELLS };

    // products of a warp: along cells, rows, elements of keys, and elements of values
    enum { N_M = N_CELLS_WARP/16, N_N = N_ROWS_WARP/8, N_K = n_embd/16, N_D = n_embd/16/N_WARPS_EMBD };

    // The part of a share is written and read once more, in F32: that is half of what is read of F16 cells at most
    enum { N_TILES_MIN = (4*n_rows + N_CELLS_TILE - 1)/N_CELLS_TILE };

    enum { LD     = n_embd + 4 };                // of sums of values that warps join: maximum and sum of weights last
    enum { N_JOIN = LD*n_rows*N_WARPS_CELLS*2 }; // elements of F16 that take as much room
};

// memory of the block, in elements of F16: slots, later sums that warps join
template <typename row_t, int n_embd, int n_rows>
struct fattn_mma_shared {
    typedef fattn_mma_shape<n_embd, n_rows> shape;

    enum { N_SLOTS = row_t::IS_F16 ? 3 : 2 };
    enum { N = int(N_SLOTS*shape::N_SLOT) > int(shape::N_JOIN) ? int(N_SLOTS*shape::N_SLOT) : int(shape::N_JOIN) };
};

// where a thread stands
template <int n_embd, int n_rows>
struct fattn_mma_place {
    typedef fattn_mma_shape<n_embd, n_rows> shape;

    enum { N_PARTS = n_embd/FATTN_DIMS, N_STEP = FATTN_N_THREADS/N_PARTS }; // parts of a row, and cells that the block stores at a time

    int32_t g, t;          // lane/4 and lane%4, see simt_mma_c
    int32_t wc, wr, we;    // the warp among those of cells, rows and elements
    int32_t own_d;         // what the thread copies: elements own_d to own_d + 7 of every N_STEP-th cell
    int32_t own_cell;
    int32_t own_at;        // and where in a slot
    int32_t load_at;       // where in a slot its row of the first operand begins, see simt_mma_load_a

    static SIMT_FUNC fattn_mma_place of(simt_ids id) {
        fattn_mma_place res;
        res.g  = id.lane/4;
        res.t  = id.lane%4;
        res.wc = id.warp%shape::N_WARPS_CELLS;
        res.wr = id.warp/shape::N_WARPS_CELLS%shape::N_WARPS_ROWS;
        res.we = id.warp/shape::N_WARPS_CELLS/shape::N_WARPS_ROWS;

        res.own_d    = id.tid%N_PARTS*FATTN_DIMS;
        res.own_cell = id.tid/N_PARTS;
        res.own_at   = res.own_cell*n_embd + (res.own_d ^ res.own_cell%8*FATTN_DIMS);

        const int32_t cell = res.wc*shape::N_CELLS_WARP + id.lane%16;
        res.load_at = cell*n_embd + (id.lane/16 ^ cell%8)*FATTN_DIMS;
        return res;
    }

    // of the part of cell own_cell + i*N_STEP
    SIMT_FUNC int32_t store_at(int i) const {
        return (own_at ^ i*N_STEP%8*FATTN_DIMS) + i*N_STEP*n_embd;
    }

    // zeros, where rows of the pool do not reach
    SIMT_FUNC void store_zeros(SIMT_SHARED(simt_f16) slot) const {
        SIMT_UNROLL
        for (int i = 0; i < shape::N_CELLS_TILE/N_STEP; ++i) {
            simt_store_u32x4(slot + store_at(i), simt_pack(0, 0, 0, 0));
        }
    }

    // of 16 cells from 16*m on, elements 16*d on
    SIMT_FUNC int32_t operand_at(int m, int d) const {
        return (load_at ^ d%4*16) + d/4*64 + m*16*n_embd;
    }
};

// one pool, as a thread copies from it: cells that nobody sees are not there, the last one that is seen in their place; its weight is 0
template <typename row_t, int n_embd, int n_rows>
struct fattn_mma_pool {
    typedef fattn_mma_place<n_embd, n_rows> place;

    enum { N = fattn_mma_shape<n_embd, n_rows>::N_CELLS_TILE/place::N_STEP }; // parts of a tile

    typename row_t::place first;
    uint32_t              nb;
    bool                  has; // whether rows reach that far

    SIMT_FUNC void start(SIMT_GLOBAL(const char) head, uint32_t nb_row, int32_t n, SIMT_THREAD(const place) at) {
        has   = at.own_d < n;
        nb    = nb_row;
        first = row_t::place_of(simt_known(head), has ? at.own_d : 0, 0);
    }

    // bytes from the first cell to that of part i of the tile from cell0 on
    SIMT_FUNC uint64_t row_of(SIMT_THREAD(const place) at, int32_t n_visible, int32_t cell0, int i) const {
        return (uint64_t) (uint32_t) simt_min(cell0 + at.own_cell + i*place::N_STEP, n_visible - 1)*nb;
    }
};

// what a warp computes
template <typename row_t, int n_embd, int n_rows>
struct fattn_mma_warp {
    typedef fattn_mma_shape<n_embd, n_rows> shape;
    typedef fattn_mma_place<n_embd, n_rows> place;

    enum { N_M = shape::N_M, N_N = shape::N_N, N_K = shape::N_K, N_D = shape::N_D, LD = shape::LD };

    typedef simt_mma_c scores[N_M][N_N];

    simt_mma_b q[N_K][N_N]; // queries, scaled
    simt_mma_c o[N_D][N_N]; // sums of values
    simt_mma_b p[N_M][N_N]; // weights of a tile

    // softmax of the rows of this lane, 8*n + 2*t + i of the warp's
    float   max[N_N][2];       // the same in all lanes that share a row
    float   sum[N_N][2];       // of the weights of its own cells
    int32_t n_visible[N_N][2]; // cells that the row sees

    // x: zeros for rows that are not there and elements behind n_embd_k. Queries are F16, as stock's kernels have them. The order of the
    // elements is that of the keys' parts
    SIMT_FUNC void load_queries(fattn_args a, SIMT_GLOBAL(const char) src, fattn_piece piece, SIMT_THREAD(const place) at) {
        SIMT_UNROLL
        for (int n = 0; n < N_N; ++n) {
            const int32_t row = piece.row0 + at.wr*shape::N_ROWS_WARP + 8*n + at.g;

            SIMT_GLOBAL(const float) y = SIMT_CAST(const float,
                    src + (row < a.n_rows ? row/a.n_gqa*a.nb_q1 + fattn_head_of(a, piece.ih, row)*a.nb_q2 : 0));
            SIMT_UNROLL
            for (int k = 0; k < N_K; ++k) {
                SIMT_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int32_t d = 16*k + 8*i;

                    float lo = 0.0f;
                    float hi = 0.0f;
                    if (row < a.n_rows && d < a.n_embd_k) {
                        lo = y[row_t::element(d, 2*at.t,     0)]*a.scale;
                        hi = y[row_t::element(d, 2*at.t + 1, 0)]*a.scale;
                    }
                    q[k][n].x[i] = simt_pack_f16(lo, hi);
                }
            }
        }
    }

    SIMT_FUNC void start(fattn_args a, SIMT_GLOBAL(const int32_t) ranges, fattn_piece piece, SIMT_THREAD(const place) at) {
        SIMT_UNROLL
        for (int n = 0; n < N_N; ++n) {
            SIMT_UNROLL
            for (int d = 0; d < N_D; ++d) {
                SIMT_UNROLL
                for (int i = 0; i < 4; ++i) {
                    o[d][n].x[i] = 0.0f;
                }
            }
            SIMT_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int32_t row = piece.row0 + at.wr*shape::N_ROWS_WARP + 8*n + 2*at.t + i;

                max[n][i]       = FATTN_LOWEST;
                sum[n][i]       = 0.0f;
                n_visible[n][i] = row < a.n_rows ? fattn_n_visible(a, ranges, piece.ih, row) : 0;
            }
        }
    }

    // p = weights of the tile from cell0 on, keys being in the slot. masked: there may be cells that a row does not see
    SIMT_FUNC void weigh(fattn_args a, SIMT_SHARED(simt_f16) slot, int32_t cell0, bool masked, SIMT_THREAD(const place) at) {
        scores s;
        SIMT_UNROLL
        for (int m = 0; m < N_M; ++m) {
            SIMT_UNROLL
            for (int n = 0; n < N_N; ++n) {
                SIMT_UNROLL
                for (int i = 0; i < 4; ++i) {
                    s[m][n].x[i] = 0.0f;
                }
            }
            SIMT_UNROLL
            for (int k = 0; k < N_K; ++k) {
                simt_mma_a x;
                simt_mma_load_a(x, slot + at.operand_at(m, k));
                SIMT_UNROLL
                for (int n = 0; n < N_N; ++n) {
                    simt_mma(s[m][n], x, q[k][n]);
                }
            }
        }
        if (a.softcap != 0.0f) {
            SIMT_UNROLL
            for (int j = 0; j < N_M*N_N*4; ++j) {
                s[j/4/N_N][j/4%N_N].x[j%4] = a.softcap*fattn_tanh(s[j/4/N_N][j/4%N_N].x[j%4]);
            }
        }
        if (masked) {
            SIMT_UNROLL
            for (int j = 0; j < N_M*N_N*4; ++j) {
                const int m = j/4/N_N, n = j/4%N_N, i = j%4;

                const int32_t cell = cell0 + at.wc*shape::N_CELLS_WARP + 16*m + 8*(i/2) + at.g;
                s[m][n].x[i] = cell < n_visible[n][i%2] ? s[m][n].x[i] : FATTN_MASKED;
            }
        }
        grow(s);
        SIMT_UNROLL
        for (int m = 0; m < N_M; ++m) {
            SIMT_UNROLL
            for (int n = 0; n < N_N; ++n) {
                SIMT_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const float lo = simt_exp2(s[m][n].x[2*i]     - max[n][0]);
                    const float hi = simt_exp2(s[m][n].x[2*i + 1] - max[n][1]);

                    sum[n][0] += lo;
                    sum[n][1] += hi;
                    p[m][n].x[i] = simt_transpose_f16(simt_pack_f16(lo, hi));
                }
            }
        }
    }

    // If a score is larger than all before, sums are scaled to the new maximum: rarely, after the first tiles. Only then lanes that share
    // a row tell each other
    SIMT_FUNC void grow(SIMT_THREAD(const scores) s) {
        float max_new[N_N][2];
        bool  grows = false;
        SIMT_UNROLL
        for (int n = 0; n < N_N; ++n) {
            SIMT_UNROLL
            for (int i = 0; i < 2; ++i) {
                max_new[n][i] = max[n][i];
                SIMT_UNROLL
                for (int m = 0; m < N_M; ++m) {
                    max_new[n][i] = simt_max(max_new[n][i], simt_max(s[m][n].x[i], s[m][n].x[i + 2]));
                }
                grows = grows || max_new[n][i] > max[n][i];
            }
        }
        if (!simt_any(grows)) {
            return;
        }
        SIMT_UNROLL
        for (int n = 0; n < N_N; ++n) {
            float w_old[2];
            SIMT_UNROLL
            for (int i = 0; i < 2; ++i) {
                SIMT_UNROLL
                for (int m = 4; m < 32; m *= 2) {
                    max_new[n][i] = simt_max(max_new[n][i], simt_shuffle_xor(max_new[n][i], m));
                }
                w_old[i]   = simt_exp2(max[n][i] - max_new[n][i]);
                max[n][i]  = max_new[n][i];
                sum[n][i] *= w_old[i];
            }
            SIMT_UNROLL
            for (int d = 0; d < N_D; ++d) {
                SIMT_UNROLL
                for (int i = 0; i < 4; ++i) {
                    o[d][n].x[i] *= w_old[i%2];
                }
            }
        }
    }

    // o += p*values, which are in the slot
    SIMT_FUNC void add_values(SIMT_SHARED(simt_f16) slot, SIMT_THREAD(const place) at) {
        SIMT_UNROLL
        for (int m = 0; m < N_M; ++m) {
            SIMT_UNROLL
            for (int d = 0; d < N_D; ++d) {
                simt_mma_a x;
                simt_mma_load_a_t(x, slot + at.we*(N_D/4*64) + at.operand_at(m, d));
                SIMT_UNROLL
                for (int n = 0; n < N_N; ++n) {
                    simt_mma(o[d][n], x, p[m][n]);
                }
            }
        }
    }

    // into sh [LD, n_rows, N_WARPS_CELLS]
    SIMT_FUNC void store(SIMT_SHARED(float) sh, SIMT_THREAD(const place) at) {
        SIMT_UNROLL
        for (int n = 0; n < N_N; ++n) {
            SIMT_UNROLL
            for (int i = 0; i < 2; ++i) {
                SIMT_UNROLL
                for (int m = 4; m < 32; m *= 2) {
                    sum[n][i] += simt_shuffle_xor(sum[n][i], m);
                }
                const int32_t to = (at.wc*n_rows + at.wr*shape::N_ROWS_WARP + 8*n + 2*at.t + i)*LD;
                SIMT_UNROLL
                for (int d = 0; d < N_D; ++d) {
                    SIMT_UNROLL
                    for (int j = 0; j < 2; ++j) {
                        sh[to + (at.we*N_D + d)*16 + 8*j + at.g] = o[d][n].x[2*j + i];
                    }
                }
                if (at.we == 0 && at.g == 0) {
                    sh[to + LD - 2] = max[n][i];
                    sh[to + LD - 1] = sum[n][i];
                }
            }
        }
    }
};

// The rows of sh [LD, n_rows, N_WARPS_CELLS]: results, or parts. The order of the elements is that of the values' parts
template <typename row_t, int n_embd, int n_rows>
SIMT_FUNC void fattn_mma_write(fattn_args a, fattn_tensors t, fattn_piece piece, SIMT_SHARED(float) sh, simt_ids id) {
    typedef fattn_mma_shape<n_embd, n_rows> shape;

    for (int32_t r = 0; r < simt_min(a.n_rows - piece.row0, (int32_t) n_rows); ++r) {
        const int32_t row = piece.row0 + r;

        const fattn_warps warps = fattn_join_warps<shape::LD, shape::N_WARPS_CELLS, n_rows*shape::LD>(sh + r*shape::LD);

        const float w_row = piece.whole ? fattn_row_weight(a, t.sinks, fattn_head_of(a, piece.ih, row), warps.all.max, warps.all.sum) : 1.0f;

        SIMT_GLOBAL(float) y = piece.whole ? t.dst + fattn_dst(a, piece.ih, row) : t.part + fattn_part(a, id.block, piece.slot, n_rows, r);
        for (int32_t d = id.tid; d < a.n_embd_v; d += FATTN_N_THREADS) {
            y[row_t::element(d/FATTN_DIMS*FATTN_DIMS, d%FATTN_DIMS, 0)] =
                fattn_join_value<shape::LD, shape::N_WARPS_CELLS, n_rows*shape::LD>(sh + r*shape::LD, warps, d)*w_row;
        }
        if (!piece.whole && id.tid == 0) {
            y[a.n_embd_v]     = warps.all.max;
            y[a.n_embd_v + 1] = warps.all.sum;
        }
    }
}

// How tiles come and go: of quantised rows. Keys are in the first slot, values in the second
template <typename row_t, int n_embd, int n_rows, bool is_f16>
struct fattn_mma_loop {
    typedef fattn_mma_shape<n_embd, n_rows>       shape;
    typedef fattn_mma_place<n_embd, n_rows>       place;
    typedef fattn_mma_pool<row_t, n_embd, n_rows> pool;
    typedef fattn_mma_warp<row_t, n_embd, n_rows> warp;

    enum { N = pool::N };

    // keys or values on their way
    struct ahead {
        typename row_t::raw x[N];
    };

    static SIMT_FUNC void fetch(
            SIMT_THREAD(const pool) p, SIMT_THREAD(const place) at, int32_t n_visible, int32_t cell0, SIMT_THREAD(ahead) y) {
        SIMT_UNROLL
        for (int i = 0; i < N; ++i) {
            y.x[i] = row_t::load(p.first, p.row_of(at, n_visible, cell0, i), 0);
        }
    }

    static SIMT_FUNC void store(SIMT_THREAD(const pool) p, SIMT_THREAD(const place) at, SIMT_THREAD(const ahead) y, SIMT_SHARED(simt_f16) slot) {
        if (!p.has) {
            at.store_zeros(slot);
            return;
        }
        SIMT_UNROLL
        for (int i = 0; i < N; ++i) {
            simt_store_u32x4(slot + at.store_at(i), row_t::halves(y.x[i], at.own_d));
        }
    }

    static SIMT_FUNC void run(
            fattn_args a, fattn_piece piece, int32_t n_visible, int32_t n_common, SIMT_THREAD(const pool) k, SIMT_THREAD(const pool) v,
            SIMT_THREAD(warp) w, SIMT_THREAD(const place) at, SIMT_SHARED(simt_f16) sh) {
        ahead y;
        fetch(k, at, n_visible, piece.tile0*shape::N_CELLS_TILE, y);
        for (int32_t tile = piece.tile0; tile < piece.tile1; ++tile) {
            const int32_t cell0 = tile*shape::N_CELLS_TILE;
            const int32_t next  = cell0 + shape::N_CELLS_TILE;

            store(k, at, y, sh);
            fetch(v, at, n_visible, cell0, y);
            simt_barrier();
            w.weigh(a, sh, cell0, next > n_common, at);

            store(v, at, y, sh + shape::N_SLOT);
            if (tile + 1 < piece.tile1) {
                fetch(k, at, n_visible, next, y);
            }
            simt_barrier();
            w.add_values(sh + shape::N_SLOT, at);
        }
    }
};

// of F16: slot h%3 has keys or values h, in the order in which they are used
template <typename row_t, int n_embd, int n_rows>
struct fattn_mma_loop<row_t, n_embd, n_rows, true> {
    typedef fattn_mma_shape<n_embd, n_rows>       shape;
    typedef fattn_mma_place<n_embd, n_rows>       place;
    typedef fattn_mma_pool<row_t, n_embd, n_rows> pool;
    typedef fattn_mma_warp<row_t, n_embd, n_rows> warp;

    static SIMT_FUNC void fetch(
            SIMT_THREAD(const pool) p, SIMT_THREAD(const place) at, int32_t n_visible, int32_t cell0, SIMT_SHARED(simt_f16) slot) {
        if (!p.has) {
            at.store_zeros(slot);
            return;
        }
        SIMT_UNROLL
        for (int i = 0; i < pool::N; ++i) {
            simt_copy_async(slot + at.store_at(i), p.first + p.row_of(at, n_visible, cell0, i));
        }
    }

    static SIMT_FUNC void run(
            fattn_args a, fattn_piece piece, int32_t n_visible, int32_t n_common, SIMT_THREAD(const pool) k, SIMT_THREAD(const pool) v,
            SIMT_THREAD(warp) w, SIMT_THREAD(const place) at, SIMT_SHARED(simt_f16) sh) {
        fetch(k, at, n_visible, piece.tile0*shape::N_CELLS_TILE, sh);
        simt_copy_commit();
        fetch(v, at, n_visible, piece.tile0*shape::N_CELLS_TILE, sh + shape::N_SLOT);
        simt_copy_commit();

        int32_t slot0 = 0; // of the keys; values and the keys of the next tile are in the slots behind
        int32_t slot1 = shape::N_SLOT;
        int32_t slot2 = 2*shape::N_SLOT;
        for (int32_t tile = piece.tile0; tile < piece.tile1; ++tile) {
            const int32_t cell0 = tile*shape::N_CELLS_TILE;
            const int32_t next  = cell0 + shape::N_CELLS_TILE;
            const bool    more  = tile + 1 < piece.tile1;

            simt_copy_wait<1>();
            simt_barrier();
            if (more) {
                fetch(k, at, n_visible, next, sh + slot2);
            }
            simt_copy_commit();
            w.weigh(a, sh + slot0, cell0, next > n_common, at);

            simt_copy_wait<1>();
            simt_barrier();
            if (more) {
                fetch(v, at, n_visible, next, sh + slot0);
            }
            simt_copy_commit();
            w.add_values(sh + slot1, at);

            const int32_t slot = slot1;
            slot1 = slot0;
            slot0 = slot2;
            slot2 = slot;
        }
    }
};

// all rows of an item over the tiles of a piece
template <typename row_t, int n_embd, int n_rows>
SIMT_FUNC void fattn_mma_attend(fattn_args a, fattn_tensors t, fattn_piece piece, SIMT_SHARED(simt_f16) sh, simt_ids id) {
    typedef fattn_mma_place<n_embd, n_rows>                      place;
    typedef fattn_mma_loop<row_t, n_embd, n_rows, row_t::IS_F16> loop;

    // what follows from the thread takes few instructions, and would take registers from one piece to the next
    id.tid  = simt_fresh(id.tid);
    id.lane = id.tid%32;
    id.warp = id.tid/32;

    const place   at    = place::of(id);
    const int64_t first = t.ranges[2*piece.ih];

    // the first row of an item sees least, the last one most
    const int32_t n_common  = fattn_n_visible(a, t.ranges, piece.ih, piece.row0);
    const int32_t n_visible = fattn_n_visible(a, t.ranges, piece.ih, simt_min(a.n_rows, piece.row0 + n_rows) - 1);

    typename loop::pool k;
    typename loop::pool v;
    k.start(t.k + first*a.nb_k, a.nb_k, a.n_embd_k, at);
    v.start(t.v + first*a.nb_v, a.nb_v, a.n_embd_v, at);

    typename loop::warp w;
    w.load_queries(a, t.q, piece, at);
    w.start(a, t.ranges, piece, at);

    loop::run(a, piece, n_visible, n_common, k, v, w, at, sh);
    simt_barrier();

    SIMT_SHARED(float) joined = SIMT_SHARED_CAST(float, sh);
    w.store(joined, at);
    simt_barrier();
    fattn_mma_write<row_t, n_embd, n_rows>(a, t, piece, joined, id);
    simt_barrier();
}

// Kernel: a block of n_rows rows, for heads of up to n_embd elements. sh: [fattn_mma_shared::N]
template <typename row_t, int n_embd, int n_rows>
SIMT_FUNC void fattn_mma(fattn_args a, fattn_tensors t, SIMT_SHARED(simt_f16) sh, simt_ids id) {
    typedef fattn_mma_shape<n_embd, n_rows> shape;

    const fattn_share share = fattn_share_of(a, t.ranges, n_rows, shape::N_CELLS_TILE, id);

    fattn_walk walk = fattn_walk_of(share);
    while (fattn_walk_next(a, t.ranges, share, n_rows, shape::N_CELLS_TILE, id, walk)) {
        fattn_mma_attend<row_t, n_embd, n_rows>(a, t, walk.piece, sh, id);
    }
}
