// Few rows: cells stream from memory into registers, every one is read once for all rows of an item.
//
// n_lanes lanes hold a row of the pool, eight dimensions each, so that a warp attends to 32/n_lanes cells at a time. Each of these
// groups of lanes keeps a softmax of its own; they meet once, after the last cell, and so do the warps.
//
// The logits of some cells and all rows are as many sums over the lanes of a group. They are dealt out: a lane ends up with one or
// a few of them, of one cell, computes these weights alone and tells the others.

// cells of a warp at a time, and how many times in a row: what is in flight hides the latency of memory
template <int n_lanes, int n_rows>
struct fa_vec_shape {
    enum { N_CELLS_STEP = 32/n_lanes };
    enum { N_STEPS      = n_rows > 4 ? 2 : 4 };
    enum { N_CELLS_WARP = N_CELLS_STEP*N_STEPS };
    enum { N_CELLS_TILE = N_CELLS_WARP*FA_N_WARPS };
    enum { N_SHARED     = FA_N_WARPS*(n_lanes*FA_DIMS + 2) }; // floats
};

template <int n>
struct fa_values {
    float x[n];
};

// n sums over m + m lanes: in every step a lane keeps one half of its values and gives the other half away
template <int n, int m>
struct fa_deal {
    enum { HALF = n > 1 ? n/2 : 1 };

    typedef fa_deal<HALF, m/2> next;

    enum { N = next::N }; // sums that a lane ends up with

    static SIMT_FUNC fa_values<N> sums(fa_values<n> x, int32_t lane) {
        const bool high = (lane & m) != 0;

        fa_values<HALF> res;
        SIMT_UNROLL
        for (int i = 0; i < HALF; ++i) {
            const float lo = x.x[i];
            const float hi = x.x[n - HALF + i];
            res.x[i] = n > 1 ? (high ? hi : lo) + simt_shuffle_xor(high ? lo : hi, m) : lo + simt_shuffle_xor(lo, m);
        }
        return next::sums(res, lane);
    }

    // the first one of a lane's sums, and the first lane that has a sum
    static SIMT_FUNC int32_t first(int32_t lane) { return (n > 1 && (lane & m) != 0 ? HALF : 0) + next::first(lane); }
    static SIMT_FUNC int32_t owner(int32_t i)    { return (n > 1 && i >= HALF ? m : 0) + next::owner(n > 1 ? i % HALF : i); }
};

template <int n>
struct fa_deal<n, 0> {
    enum { N = n };

    static SIMT_FUNC fa_values<n> sums(fa_values<n> x, int32_t) { return x; }

    static SIMT_FUNC int32_t first(int32_t) { return 0; }
    static SIMT_FUNC int32_t owner(int32_t) { return 0; }
};

template <typename row_t, int n_lanes, int n_rows>
SIMT_FUNC void fa_vec(
        fa_args a,
        SIMT_GLOBAL(const char)    q,
        SIMT_GLOBAL(const char)    k,
        SIMT_GLOBAL(const char)    v,
        SIMT_GLOBAL(const int32_t) ranges,
        SIMT_GLOBAL(const float)   sinks,
        SIMT_GLOBAL(float)         part,
        SIMT_GLOBAL(float)         dst,
        SIMT_SHARED(float)         sh,
        simt_ids                   id) {
    typedef fa_vec_shape<n_lanes, n_rows> shape;

    // logit s*n_rows + r: of a row and a step
    typedef fa_deal<shape::N_STEPS*n_rows, n_lanes/2> deal;

    const int32_t lane    = id.lane%n_lanes;
    const int32_t lane0   = id.lane - lane;
    const int32_t own_row = deal::first(lane)%n_rows;
    const int32_t own_s   = deal::first(lane)/n_rows;

    const int32_t group = id.lane/n_lanes;
    const int32_t d0    = lane*FA_DIMS;
    const bool    has_k = d0 < a.n_embd_k;
    const bool    has_v = d0 < a.n_embd_v;

    // a share of all tiles, or a part of one item
    const bool split = a.n_splits > 0;

    int32_t item0 = 0;
    int64_t begin;
    int64_t end;
    if (split) {
        item0 = id.block/a.n_splits;

        const int64_t n_tiles = fa_n_tiles(a, ranges, item0, n_rows, shape::N_CELLS_TILE);
        begin = fa_split_begin(a, n_tiles, id.block%a.n_splits);
        end   = fa_split_begin(a, n_tiles, id.block%a.n_splits + 1);
    } else {
        const int64_t total = fa_total(a, ranges, n_rows, shape::N_CELLS_TILE);
        begin = fa_begin(a, total, id.block);
        end   = fa_begin(a, total, id.block + 1);
    }

    int64_t work = 0;
    for (int32_t item = item0; split ? item == item0 : item < a.n_head_kv*a.n_row_blocks && work < end; ++item) {
        const int32_t n_tiles = fa_n_tiles(a, ranges, item, n_rows, shape::N_CELLS_TILE);
        const int32_t tile0   = (int32_t) simt_max((int64_t) 0, begin - work);
        const int32_t tile1   = (int32_t) simt_min((int64_t) n_tiles, end - work);
        work += n_tiles;
        if (!split && tile0 >= tile1) {
            continue; // a part without tiles is a part all the same
        }

        const int32_t ih    = item/a.n_row_blocks;
        const int32_t row0  = item%a.n_row_blocks*n_rows;
        const int64_t first = ranges[2*ih];

        SIMT_GLOBAL(const char) k_head = k + first*a.nb_k;
        SIMT_GLOBAL(const char) v_head = v + first*a.nb_v;

        fa_dims x[n_rows]; // queries, scaled
        fa_dims o[n_rows];
        int32_t n_visible = 0;          // by one row at least
        int32_t n_common  = 0x7FFFFFFF; // by all
        SIMT_UNROLL
        for (int r = 0; r < n_rows; ++r) {
            const int32_t row = row0 + r;
            const bool    is  = row < a.n_rows;
            if (is) {
                const int32_t visible = fa_visible(a, ranges, ih, row);
                n_visible = simt_max(n_visible, visible);
                n_common  = simt_min(n_common,  visible);
            }
            SIMT_UNROLL
            for (int i = 0; i < FA_DIMS; ++i) {
                o[r].x[i] = 0.0f;
                x[r].x[i] = 0.0f;
            }
            if (is && has_k) {
                SIMT_GLOBAL(const float) src = SIMT_CAST(const float,
                        q + row/a.n_gqa*a.nb_q1 + fa_head_of(a, ih, row)*a.nb_q2) + d0;
                SIMT_UNROLL
                for (int i = 0; i < FA_DIMS; ++i) {
                    x[r].x[i] = src[i]*a.scale;
                }
            }
        }

        // of the rows whose weights this lane computes
        float   max[deal::N];
        float   sum[deal::N]; // of the weights of its steps
        int32_t visible[deal::N];
        SIMT_UNROLL
        for (int i = 0; i < deal::N; ++i) {
            const int32_t row = row0 + own_row + i;

            max[i]     = FA_LOWEST;
            sum[i]     = 0.0f;
            visible[i] = row < a.n_rows ? fa_visible(a, ranges, ih, row) : 0;
        }

        for (int32_t tile = tile0; tile < tile1; ++tile) {
            const int32_t cell0 = tile*shape::N_CELLS_TILE + id.warp*shape::N_CELLS_WARP + group;

            typename row_t::raw k_raw[shape::N_STEPS];
            typename row_t::raw v_raw[shape::N_STEPS];
            SIMT_UNROLL
            for (int s = 0; s < shape::N_STEPS; ++s) {
                // what lies behind the last cell is not there, its weight is zero
                const uint32_t cell = simt_min(cell0 + s*shape::N_CELLS_STEP, n_visible - 1);

                k_raw[s] = row_t::load(k_head, cell*a.nb_k, has_k ? d0 : 0, a.type_k);
                v_raw[s] = row_t::load(v_head, cell*a.nb_v, has_v ? d0 : 0, a.type_v);
            }

            fa_values<shape::N_STEPS*n_rows> dots;
            SIMT_UNROLL
            for (int s = 0; s < shape::N_STEPS; ++s) {
                const fa_dims y     = row_t::unpack(k_raw[s], has_k ? d0 : 0, a.type_k);
                const float   scale = row_t::scale(k_raw[s], a.type_k);
                SIMT_UNROLL
                for (int r = 0; r < n_rows; ++r) {
                    float dot = 0.0f;
                    SIMT_UNROLL
                    for (int i = 0; i < FA_DIMS; ++i) {
                        dot += x[r].x[i]*y.x[i];
                    }
                    dots.x[s*n_rows + r] = dot*scale;
                }
            }
            fa_values<deal::N> w = deal::sums(dots, lane);

            if (a.softcap != 0.0f) {
                SIMT_UNROLL
                for (int i = 0; i < deal::N; ++i) {
                    w.x[i] = a.softcap*fa_tanh(w.x[i]);
                }
            }
            if ((tile + 1)*shape::N_CELLS_TILE > n_common) {
                SIMT_UNROLL
                for (int i = 0; i < deal::N; ++i) {
                    w.x[i] = cell0 + own_s*shape::N_CELLS_STEP < visible[i] ? w.x[i] : FA_MASKED;
                }
            }

            float max_new[deal::N];
            bool  grows = false;
            SIMT_UNROLL
            for (int i = 0; i < deal::N; ++i) {
                max_new[i] = simt_max(max[i], w.x[i]);
                SIMT_UNROLL
                for (int m = n_lanes/2; m > n_lanes/2/shape::N_STEPS; m /= 2) {
                    max_new[i] = simt_max(max_new[i], simt_shuffle_xor(max_new[i], m));
                }
                grows = grows || max_new[i] > max[i];
            }
            if (simt_any(grows)) { // rarely, after the first tiles
                float w_old[deal::N];
                SIMT_UNROLL
                for (int i = 0; i < deal::N; ++i) {
                    w_old[i] = simt_exp2(max[i] - max_new[i]);
                    max[i]   = max_new[i];
                    sum[i]  *= w_old[i];
                }
                SIMT_UNROLL
                for (int r = 0; r < n_rows; ++r) {
                    const float w_row = simt_shuffle(w_old[r%deal::N], deal::owner(r), n_lanes, lane0);
                    SIMT_UNROLL
                    for (int i = 0; i < FA_DIMS; ++i) {
                        o[r].x[i] *= w_row;
                    }
                }
            }
            SIMT_UNROLL
            for (int i = 0; i < deal::N; ++i) {
                w.x[i]  = simt_exp2(w.x[i] - max[i]);
                sum[i] += w.x[i];
            }

            SIMT_UNROLL
            for (int s = 0; s < shape::N_STEPS; ++s) {
                const fa_dims y     = row_t::unpack(v_raw[s], has_v ? d0 : 0, a.type_v);
                const float   scale = row_t::scale(v_raw[s], a.type_v);
                SIMT_UNROLL
                for (int r = 0; r < n_rows; ++r) {
                    const float w_row = simt_shuffle(w.x[r%deal::N], deal::owner(s*n_rows + r), n_lanes, lane0)*scale;
                    SIMT_UNROLL
                    for (int i = 0; i < FA_DIMS; ++i) {
                        o[r].x[i] += w_row*y.x[i];
                    }
                }
            }
        }

        SIMT_UNROLL
        for (int i = 0; i < deal::N; ++i) {
            SIMT_UNROLL
            for (int m = n_lanes/2; m > n_lanes/2/shape::N_STEPS; m /= 2) {
                sum[i] += simt_shuffle_xor(sum[i], m);
            }
        }

        // the groups of a warp, then the warps
        SIMT_UNROLL
        for (int r = 0; r < n_rows; ++r) {
            const float max_own = simt_shuffle(max[r%deal::N], deal::owner(r), n_lanes, lane0);

            float max_all = max_own;
            SIMT_UNROLL
            for (int m = n_lanes; m < 32; m *= 2) {
                max_all = simt_max(max_all, simt_shuffle_xor(max_all, m));
            }
            const float w_own = simt_exp2(max_own - max_all);

            float sum_all = simt_shuffle(sum[r%deal::N], deal::owner(r), n_lanes, lane0)*w_own;
            SIMT_UNROLL
            for (int m = n_lanes; m < 32; m *= 2) {
                sum_all += simt_shuffle_xor(sum_all, m);
            }
            SIMT_UNROLL
            for (int i = 0; i < FA_DIMS; ++i) {
                float y = o[r].x[i]*w_own;
                SIMT_UNROLL
                for (int m = n_lanes; m < 32; m *= 2) {
                    y += simt_shuffle_xor(y, m);
                }
                o[r].x[i] = y;
            }

            enum { LD = n_lanes*FA_DIMS + 2 };
            if (group == 0) {
                SIMT_UNROLL
                for (int i = 0; i < FA_DIMS; ++i) {
                    sh[id.warp*LD + d0 + i] = o[r].x[i];
                }
            }
            if (id.lane == 0) {
                sh[id.warp*LD + LD - 2] = max_all;
                sh[id.warp*LD + LD - 1] = sum_all;
            }
            simt_barrier();

            const int32_t row = row0 + r;
            if (row < a.n_rows) {
                float w_warp[FA_N_WARPS];
                float max_block = FA_LOWEST;
                float sum_block = 0.0f;
                SIMT_UNROLL
                for (int i = 0; i < FA_N_WARPS; ++i) {
                    w_warp[i] = sh[i*LD + LD - 2];
                    max_block = simt_max(max_block, w_warp[i]);
                }
                SIMT_UNROLL
                for (int i = 0; i < FA_N_WARPS; ++i) {
                    w_warp[i]  = simt_exp2(w_warp[i] - max_block);
                    sum_block += sh[i*LD + LD - 1]*w_warp[i];
                }

                const bool whole = split ? a.n_splits == 1 : tile0 == 0 && tile1 == n_tiles;

                const float w_row = whole ? fa_row_weight(a, sinks, fa_head_of(a, ih, row), max_block, sum_block) : 1.0f;

                SIMT_GLOBAL(float) y = whole ? dst + fa_dst(a, ih, row) :
                    part + fa_part(a, id.block, split || tile0 > 0 ? 0 : 1, n_rows, r);
                for (int32_t d = id.tid; d < a.n_embd_v; d += FA_N_THREADS) {
                    float res = 0.0f;
                    SIMT_UNROLL
                    for (int i = 0; i < FA_N_WARPS; ++i) {
                        res += sh[i*LD + d]*w_warp[i];
                    }
                    y[d] = res*w_row;
                }
                if (!whole && id.tid == 0) {
                    y[a.n_embd_v]     = max_block;
                    y[a.n_embd_v + 1] = sum_block;
                }
            }
            simt_barrier();
        }
    }
}
