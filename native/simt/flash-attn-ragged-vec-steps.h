// The steps of the kernel for few rows, flash-attn-ragged-vec.h puts them together.

template <int n_lanes, int n_rows>
struct fattn_vec_shape {
    enum { N_CELLS_STEP = 32/n_lanes };         // cells of a warp at a time
    enum { N_STEPS      = n_rows > 4 ? 2 : 4 }; // and how many times in a row: what is in flight hides the latency of memory
    enum { N_CELLS_WARP = N_CELLS_STEP*N_STEPS };
    enum { N_CELLS_TILE = N_CELLS_WARP*FATTN_N_WARPS };
    enum { LD           = n_lanes*FATTN_DIMS + 2 }; // of shared memory: sums of values, maximum, sum of weights
    enum { N_SHARED     = LD*FATTN_N_WARPS };       // floats
};

// the steps of the kernel for one size of heads and one number of rows
template <typename row_t, int n_lanes, int n_rows>
struct fattn_vec_steps {
    typedef fattn_vec_shape<n_lanes, n_rows> shape;

    enum { N_STEPS = shape::N_STEPS };

    // score s*n_rows + r: of step s and row r
    typedef fattn_deal<N_STEPS*n_rows, n_lanes/2> deal;

    enum { N_OWN = deal::N }; // scores of a lane, of consecutive rows and one step

    // where a lane stands
    struct place {
        int32_t lane;    // of the group
        int32_t lane0;   // first lane of the group, of the warp
        int32_t group;   // of the warp: its cell of a step
        int32_t d0;      // first element of its part of a row
        bool    has_k;   // whether rows reach that far
        bool    has_v;
        int32_t own_row; // of its scores: first row, and the step
        int32_t own_s;
    };

    // [FATTN_DIMS, n_rows] F32: a lane's part of a row for every row of the item, queries or sums of values
    struct rows {
        fattn_dims x[n_rows];
    };

    // cells of N_STEPS steps, as they lie in memory: a lane's part of each
    struct cells {
        typename row_t::raw k[N_STEPS];
        typename row_t::raw v[N_STEPS];
    };

    // online softmax of the rows whose weights this lane computes
    struct softmax {
        float   max[N_OWN];       // the same in all lanes that share a row
        float   sum[N_OWN];       // of the weights of its own steps
        int32_t n_visible[N_OWN]; // cells that the row sees
    };

    static SIMT_FUNC place place_of(fattn_args a, simt_ids id) {
        place res;
        res.lane    = id.lane%n_lanes;
        res.lane0   = id.lane - res.lane;
        res.group   = id.lane/n_lanes;
        res.d0      = res.lane*FATTN_DIMS;
        res.has_k   = res.d0 < a.n_embd_k;
        res.has_v   = res.d0 < a.n_embd_v;
        res.own_row = deal::first(res.lane)%n_rows;
        res.own_s   = deal::first(res.lane)/n_rows;
        return res;
    }

    // x: queries, scaled once instead of all scores; zeros for rows that are not there and elements behind n_embd_k
    static SIMT_FUNC void load_queries(fattn_args a, SIMT_GLOBAL(const char) q, fattn_piece piece, place at, SIMT_THREAD(rows) x) {
        SIMT_UNROLL
        for (int r = 0; r < n_rows; ++r) {
            const int32_t row = piece.row0 + r;
            SIMT_UNROLL
            for (int i = 0; i < FATTN_DIMS; ++i) {
                x.x[r].x[i] = 0.0f;
            }
            if (row < a.n_rows && at.has_k) {
                SIMT_GLOBAL(const float) src = SIMT_CAST(const float,
                        q + row/a.n_gqa*a.nb_q1 + fattn_head_of(a, piece.ih, row)*a.nb_q2) + at.d0;
                SIMT_UNROLL
                for (int i = 0; i < FATTN_DIMS; ++i) {
                    x.x[r].x[i] = src[i]*a.scale;
                }
            }
        }
    }

    // sums of values and softmax before the first cell
    static SIMT_FUNC void start(
            fattn_args a, SIMT_GLOBAL(const int32_t) ranges, fattn_piece piece, place at, SIMT_THREAD(rows) o, SIMT_THREAD(softmax) own) {
        SIMT_UNROLL
        for (int r = 0; r < n_rows; ++r) {
            SIMT_UNROLL
            for (int i = 0; i < FATTN_DIMS; ++i) {
                o.x[r].x[i] = 0.0f;
            }
        }
        SIMT_UNROLL
        for (int i = 0; i < N_OWN; ++i) {
            const int32_t row = piece.row0 + at.own_row + i;

            own.max[i]       = FATTN_LOWEST;
            own.sum[i]       = 0.0f;
            own.n_visible[i] = row < a.n_rows ? fattn_n_visible(a, ranges, piece.ih, row) : 0;
        }
    }

    // c: the cells of this group from cell0 on, N_CELLS_STEP apart; k and v: [n_embd, cells] of the head. What lies behind the last
    // cell that a row sees is not there, and the last one in its place: its weight is 0
    static SIMT_FUNC void load_cells(
            fattn_args a, SIMT_GLOBAL(const char) k, SIMT_GLOBAL(const char) v,
            int32_t cell0, int32_t n_visible, place at, SIMT_THREAD(cells) c) {
        SIMT_UNROLL
        for (int s = 0; s < N_STEPS; ++s) {
            const uint32_t cell = simt_min(cell0 + s*shape::N_CELLS_STEP, n_visible - 1);

            c.k[s] = row_t::load(k, cell*a.nb_k, at.has_k ? at.d0 : 0, a.type_k);
            c.v[s] = row_t::load(v, cell*a.nb_v, at.has_v ? at.d0 : 0, a.type_v);
        }
    }

    // [N_OWN] scores of this lane: products of queries x and keys, summed over the lanes of the group
    static SIMT_FUNC fattn_values<N_OWN> scores(fattn_args a, place at, SIMT_THREAD(const rows) x, SIMT_THREAD(const cells) c) {
        fattn_values<N_STEPS*n_rows> dots; // over a lane's part of a row
        SIMT_UNROLL
        for (int s = 0; s < N_STEPS; ++s) {
            const fattn_dims y     = row_t::unpack(c.k[s], at.has_k ? at.d0 : 0, a.type_k);
            const float      scale = row_t::scale(c.k[s], a.type_k);
            SIMT_UNROLL
            for (int r = 0; r < n_rows; ++r) {
                float dot = 0.0f;
                SIMT_UNROLL
                for (int i = 0; i < FATTN_DIMS; ++i) {
                    dot += x.x[r].x[i]*y.x[i];
                }
                dots.x[s*n_rows + r] = dot*scale;
            }
        }
        return deal::sums(dots, at.lane);
    }

    // w: scores with the softcap, FATTN_MASKED for cells that a row does not see. masked: there may be such cells
    static SIMT_FUNC void mask(
            fattn_args a, int32_t cell0, bool masked, place at, SIMT_THREAD(const softmax) own, SIMT_THREAD(fattn_values<N_OWN>) w) {
        if (a.softcap != 0.0f) {
            SIMT_UNROLL
            for (int i = 0; i < N_OWN; ++i) {
                w.x[i] = a.softcap*fattn_tanh(w.x[i]);
            }
        }
        if (masked) {
            SIMT_UNROLL
            for (int i = 0; i < N_OWN; ++i) {
                w.x[i] = cell0 + at.own_s*shape::N_CELLS_STEP < own.n_visible[i] ? w.x[i] : FATTN_MASKED;
            }
        }
    }

    // One step of the online softmax: w, scores before, become weights. If a score is larger than all before, the sums o and own.sum
    // are scaled to the new maximum: rarely, after the first tiles
    static SIMT_FUNC void weigh(place at, SIMT_THREAD(softmax) own, SIMT_THREAD(rows) o, SIMT_THREAD(fattn_values<N_OWN>) w) {
        float max_new[N_OWN];
        bool  grows = false;
        SIMT_UNROLL
        for (int i = 0; i < N_OWN; ++i) {
            max_new[i] = simt_max(own.max[i], w.x[i]);
            SIMT_UNROLL
            for (int m = n_lanes/2; m > n_lanes/2/N_STEPS; m /= 2) {
                max_new[i] = simt_max(max_new[i], simt_shuffle_xor(max_new[i], m));
            }
            grows = grows || max_new[i] > own.max[i];
        }
        if (simt_any(grows)) {
            float w_old[N_OWN];
            SIMT_UNROLL
            for (int i = 0; i < N_OWN; ++i) {
                w_old[i]    = simt_exp2(own.max[i] - max_new[i]);
                own.max[i]  = max_new[i];
                own.sum[i] *= w_old[i];
            }
            SIMT_UNROLL
            for (int r = 0; r < n_rows; ++r) {
                const float w_row = simt_shuffle(w_old[r%N_OWN], deal::owner(r), n_lanes, at.lane0);
                SIMT_UNROLL
                for (int i = 0; i < FATTN_DIMS; ++i) {
                    o.x[r].x[i] *= w_row;
                }
            }
        }
        SIMT_UNROLL
        for (int i = 0; i < N_OWN; ++i) {
            w.x[i]      = simt_exp2(w.x[i] - own.max[i]);
            own.sum[i] += w.x[i];
        }
    }

    // o += weights*values, with the weights of all steps and rows from the lanes that have them
    static SIMT_FUNC void add_values(
            fattn_args a, place at, SIMT_THREAD(const fattn_values<N_OWN>) w, SIMT_THREAD(const cells) c, SIMT_THREAD(rows) o) {
        SIMT_UNROLL
        for (int s = 0; s < N_STEPS; ++s) {
            const fattn_dims y     = row_t::unpack(c.v[s], at.has_v ? at.d0 : 0, a.type_v);
            const float      scale = row_t::scale(c.v[s], a.type_v);
            SIMT_UNROLL
            for (int r = 0; r < n_rows; ++r) {
                const float w_row = simt_shuffle(w.x[r%N_OWN], deal::owner(s*n_rows + r), n_lanes, at.lane0)*scale;
                SIMT_UNROLL
                for (int i = 0; i < FATTN_DIMS; ++i) {
                    o.x[r].x[i] += w_row*y.x[i];
                }
            }
        }
    }

    // own.sum: over the steps, the same in all lanes of a group that share a row
    static SIMT_FUNC void sum_steps(SIMT_THREAD(softmax) own) {
        SIMT_UNROLL
        for (int i = 0; i < N_OWN; ++i) {
            SIMT_UNROLL
            for (int m = n_lanes/2; m > n_lanes/2/N_STEPS; m /= 2) {
                own.sum[i] += simt_shuffle_xor(own.sum[i], m);
            }
        }
    }

    // row r of the groups of a warp, relative to their maximum, into row `warp` of sh [LD, FATTN_N_WARPS]
    static SIMT_FUNC void store_warp(place at, int r, SIMT_THREAD(const softmax) own, SIMT_THREAD(rows) o, SIMT_SHARED(float) sh, simt_ids id) {
        const float max_own = simt_shuffle(own.max[r%N_OWN], deal::owner(r), n_lanes, at.lane0);

        float max_all = max_own;
        SIMT_UNROLL
        for (int m = n_lanes; m < 32; m *= 2) {
            max_all = simt_max(max_all, simt_shuffle_xor(max_all, m));
        }
        const float w_own = simt_exp2(max_own - max_all);

        float sum_all = simt_shuffle(own.sum[r%N_OWN], deal::owner(r), n_lanes, at.lane0)*w_own;
        SIMT_UNROLL
        for (int m = n_lanes; m < 32; m *= 2) {
            sum_all += simt_shuffle_xor(sum_all, m);
        }
        SIMT_UNROLL
        for (int i = 0; i < FATTN_DIMS; ++i) {
            float y = o.x[r].x[i]*w_own;
            SIMT_UNROLL
            for (int m = n_lanes; m < 32; m *= 2) {
                y += simt_shuffle_xor(y, m);
            }
            o.x[r].x[i] = y;
        }

        if (at.group == 0) {
            SIMT_UNROLL
            for (int i = 0; i < FATTN_DIMS; ++i) {
                sh[id.warp*shape::LD + at.d0 + i] = o.x[r].x[i];
            }
        }
        if (id.lane == 0) {
            sh[id.warp*shape::LD + shape::LD - 2] = max_all;
            sh[id.warp*shape::LD + shape::LD - 1] = sum_all;
        }
    }

    // row r from sh [LD, FATTN_N_WARPS], relative to the maximum of the warps: the result, or a part
    static SIMT_FUNC void write_row(fattn_args a, fattn_tensors t, fattn_piece piece, int r, SIMT_SHARED(float) sh, simt_ids id) {
        const int32_t row = piece.row0 + r;

        const fattn_warps warps = fattn_join_warps<shape::LD>(sh);

        const float w_row = piece.whole ? fattn_row_weight(a, t.sinks, fattn_head_of(a, piece.ih, row), warps.all.max, warps.all.sum) : 1.0f;

        SIMT_GLOBAL(float) y = piece.whole ? t.dst + fattn_dst(a, piece.ih, row) :
            t.part + fattn_part(a, id.block, piece.slot, n_rows, r);
        for (int32_t d = id.tid; d < a.n_embd_v; d += FATTN_N_THREADS) {
            y[d] = fattn_join_value<shape::LD>(sh, warps, d)*w_row;
        }
        if (!piece.whole && id.tid == 0) {
            y[a.n_embd_v]     = warps.all.max;
            y[a.n_embd_v + 1] = warps.all.sum;
        }
    }
};
