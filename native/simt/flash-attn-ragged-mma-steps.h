// The steps of the kernel for some rows, flash-attn-ragged-mma.h puts them together.

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

    // Of a share. Its part is written and read once more, in F32: no more than what it reads of F16 cells. Longer shares would leave
    // multiprocessors idle
    enum { N_TILES_MIN = (2*n_rows + N_CELLS_TILE - 1)/N_CELLS_TILE };

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
