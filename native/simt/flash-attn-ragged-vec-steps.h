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
    typedef fattn_vec_shape<n_lanes, n_rows>        shape;
    typedef typename fattn_products_of<row_t>::type products;

    enum { N_STEPS = shape::N_STEPS };

    // Score s*n_rows + r: of step s and row r. The lanes of a block of quantised keys, which have one scale, come first: afterwards a
    // lane has sums of one step alone
    enum { N_LANES_BLOCK = 32/FATTN_DIMS };

    typedef fattn_deal<typename products::sum, N_STEPS*n_rows, 1, N_LANES_BLOCK> deal_block;
    typedef fattn_deal<float, deal_block::N, N_LANES_BLOCK, n_lanes>             deal_blocks;

    enum { N_OWN = deal_blocks::N }; // scores of a lane, of consecutive rows and one step

    typedef fattn_values<float, N_OWN> weights;

    static SIMT_FUNC int32_t first_of(int32_t lane) { return deal_block::first(lane) + deal_blocks::first(lane); }
    static SIMT_FUNC int32_t owner_of(int32_t i)    { return deal_block::owner(i) + deal_blocks::owner(i % deal_block::N); }

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

    // [FATTN_DIMS, n_rows] F32: a lane's part of a row for every row of the item, sums of values
    struct rows {
        fattn_dims x[n_rows];
    };

    // the same of queries, and the units of the rows whose weights this lane computes
    struct queries {
        typename products::query x[n_rows];

        float unit[N_OWN];
    };

    // a lane's part of the first cell of the head
    struct pools {
        typename row_t::place k;
        typename row_t::place v;
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
        res.own_row = first_of(res.lane)%n_rows;
        res.own_s   = first_of(res.lane)/n_rows;
        return res;
    }

    // x: queries, scaled once instead of all scores; zeros for rows that are not there and elements behind n_embd_k
    static SIMT_FUNC void load_queries(fattn_args a, SIMT_GLOBAL(const char) q, fattn_piece piece, place at, SIMT_THREAD(queries) x) {
        rows y;
        SIMT_UNROLL
        for (int r = 0; r < n_rows; ++r) {
            const int32_t row = piece.row0 + r;
            SIMT_UNROLL
            for (int i = 0; i < FATTN_DIMS; ++i) {
                y.x[r].x[i] = 0.0f;
            }
            if (row < a.n_rows && at.has_k) {
                SIMT_GLOBAL(const float) src = SIMT_CAST(const float,
                        q + row/a.n_gqa*a.nb_q1 + fattn_head_of(a, piece.ih, row)*a.nb_q2);
                SIMT_UNROLL
                for (int i = 0; i < FATTN_DIMS; ++i) {
                    y.x[r].x[i] = src[row_t::element(at.d0, i, a.type_k)]*a.scale;
                }
            }
        }
        SIMT_UNROLL
        for (int r = 0; r < n_rows; ++r) {
            const float unit = products::UNITS ? unit_of(y.x[r]) : 1.0f;

            x.x[r] = products::to_query(y.x[r], unit > 0.0f ? 1.0f/unit : 0.0f);
            SIMT_UNROLL
            for (int i = 0; i < N_OWN; ++i) {
                x.unit[i] = r == 0 || r == at.own_row + i ? unit : x.unit[i];
            }
        }
    }

    // Of a query, a lane's part of which is x. The bits of numbers without a sign are in the order of the numbers, and NaN is above all
    // of them, while the maximum of floats drops it
    static SIMT_FUNC float unit_of(fattn_dims x) {
        uint32_t max = 0;
        SIMT_UNROLL
        for (int i = 0; i < FATTN_DIMS; ++i) {
            max = simt_max(max, simt_f32_to_bits(x.x[i]) & 0x7FFFFFFFu);
        }
        SIMT_UNROLL
        for (int m = 1; m < n_lanes; m *= 2) {
            max = simt_max(max, simt_shuffle_xor(max, m));
        }
        return fattn_query_unit(max);
    }

    static SIMT_FUNC pools pools_of(fattn_args a, fattn_tensors t, fattn_piece piece, place at) {
        const int64_t first = t.ranges[2*piece.ih];

        pools res;
        res.k = row_t::place_of(simt_known(t.k + first*a.nb_k), at.has_k ? at.d0 : 0, a.type_k);
        res.v = row_t::place_of(simt_known(t.v + first*a.nb_v), at.has_v ? at.d0 : 0, a.type_v);
        return res;
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

    // c: the cells of this group from cell0 on, N_CELLS_STEP apart. What lies behind the last cell that a row sees is not there, and
    // the last one in its place: its weight is 0
    static SIMT_FUNC void load_cells(fattn_args a, pools p, int32_t cell0, int32_t n_visible, SIMT_THREAD(cells) c) {
        SIMT_UNROLL
        for (int s = 0; s < N_STEPS; ++s) {
            const uint32_t cell = simt_min(cell0 + s*shape::N_CELLS_STEP, n_visible - 1);

            c.k[s] = row_t::load(p.k, cell*a.nb_k, a.type_k);
            c.v[s] = row_t::load(p.v, cell*a.nb_v, a.type_v);
        }
    }

    // [N_OWN] scores of this lane: products of queries x and keys, summed over the lanes of the group
    static SIMT_FUNC weights scores(fattn_args a, place at, SIMT_THREAD(const queries) x, SIMT_THREAD(const cells) c) {
        const int32_t d = at.has_k ? at.d0 : 0;

        fattn_values<typename products::sum, N_STEPS*n_rows> dots; // over a lane's part of a row
        SIMT_UNROLL
        for (int s = 0; s < N_STEPS; ++s) {
            const typename products::key y = products::to_key(c.k[s], d, a.type_k);
            SIMT_UNROLL
            for (int r = 0; r < n_rows; ++r) {
                dots.x[s*n_rows + r] = products::dot(x.x[r], y);
            }
        }
        const fattn_values<typename products::sum, deal_block::N> sums = deal_block::sums(dots, at.lane);

        typename row_t::raw own = c.k[0];
        SIMT_UNROLL
        for (int s = 1; s < N_STEPS; ++s) {
            own = s == at.own_s ? c.k[s] : own;
        }
        const float scale = row_t::scale(own, d, a.type_k);

        fattn_values<float, deal_block::N> scaled;
        SIMT_UNROLL
        for (int i = 0; i < deal_block::N; ++i) {
            scaled.x[i] = (float) sums.x[i]*scale;
        }
        weights res = deal_blocks::sums(scaled, at.lane);
        if (products::UNITS) {
            SIMT_UNROLL
            for (int i = 0; i < N_OWN; ++i) {
                res.x[i] *= x.unit[i];
            }
        }
        return res;
    }

    // w: scores with the softcap, FATTN_MASKED for cells that a row does not see. masked: there may be such cells
    static SIMT_FUNC void mask(
            fattn_args a, int32_t cell0, bool masked, place at, SIMT_THREAD(const softmax) own, SIMT_THREAD(weights) w) {
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
    static SIMT_FUNC void weigh(place at, SIMT_THREAD(softmax) own, SIMT_THREAD(rows) o, SIMT_THREAD(weights) w) {
        float max_new[N_OWN];
        bool  grows = false;
        SIMT_UNROLL
        for (int i = 0; i < N_OWN; ++i) {
            max_new[i] = simt_max(own.max[i], w.x[i]);
            SIMT_UNROLL
            for (int m = 1; m < N_STEPS; m *= 2) {
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
                const float w_row = simt_shuffle(w_old[r%N_OWN], owner_of(r), n_lanes, at.lane0);
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
            fattn_args a, place at, SIMT_THREAD(const weights) w, SIMT_THREAD(const cells) c, SIMT_THREAD(rows) o) {
        SIMT_UNROLL
        for (int s = 0; s < N_STEPS; ++s) {
            const int32_t    d     = at.has_v ? at.d0 : 0;
            const fattn_dims y     = row_t::unpack(c.v[s], d, a.type_v);
            const float      scale = row_t::scale (c.v[s], d, a.type_v);
            SIMT_UNROLL
            for (int r = 0; r < n_rows; ++r) {
                const float w_row = simt_shuffle(w.x[r%N_OWN], owner_of(s*n_rows + r), n_lanes, at.lane0)*scale;
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
            for (int m = 1; m < N_STEPS; m *= 2) {
                own.sum[i] += simt_shuffle_xor(own.sum[i], m);
            }
        }
    }

    // row r of the groups of a warp, relative to their maximum, into row `warp` of sh [LD, FATTN_N_WARPS]
    static SIMT_FUNC void store_warp(fattn_args a, place at, int r, SIMT_THREAD(const softmax) own, SIMT_THREAD(rows) o, SIMT_SHARED(float) sh, simt_ids id) {
        const float max_own = simt_shuffle(own.max[r%N_OWN], owner_of(r), n_lanes, at.lane0);

        float max_all = max_own;
        SIMT_UNROLL
        for (int m = n_lanes; m < 32; m *= 2) {
            max_all = simt_max(max_all, simt_shuffle_xor(max_all, m));
        }
        const float w_own = simt_exp2(max_own - max_all);

        float sum_all = simt_shuffle(own.sum[r%N_OWN], owner_of(r), n_lanes, at.lane0)*w_own;
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
                sh[id.warp*shape::LD + row_t::element(at.d0, i, a.type_v)] = o.x[r].x[i];
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
