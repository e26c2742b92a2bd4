// Few rows: cells stream from memory into registers, every one is read once for all rows of an item.
//
// n_lanes lanes hold a row of the pool, eight dimensions each, so that a warp attends to 32/n_lanes cells at a time. Each of these
// groups of lanes keeps a softmax of its own; they meet once, after the last cell, and so do the warps.

// cells of a warp at a time, and how many times in a row: what is in flight hides the latency of memory
template <int n_lanes, int n_rows>
struct fa_vec_shape {
    enum { N_CELLS_STEP = 32/n_lanes };
    enum { N_STEPS      = n_rows > 4 ? 2 : 4 };
    enum { N_CELLS_WARP = N_CELLS_STEP*N_STEPS };
    enum { N_CELLS_TILE = N_CELLS_WARP*FA_N_WARPS };
    enum { N_SHARED     = FA_N_WARPS*(n_lanes*FA_DIMS + 2) }; // floats
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

    const int32_t group = id.lane/n_lanes;
    const int32_t d0    = id.lane%n_lanes*FA_DIMS;
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
        const int32_t first = ranges[2*ih];

        fa_dims x[n_rows]; // queries, scaled
        fa_dims o[n_rows];
        float   max[n_rows];
        float   sum[n_rows];
        int32_t visible[n_rows];
        int32_t n_visible = 0;
        SIMT_UNROLL
        for (int r = 0; r < n_rows; ++r) {
            const int32_t row = row0 + r;
            const bool    is  = row < a.n_rows;

            visible[r] = is ? fa_visible(a, ranges, ih, row) : 0;
            n_visible  = simt_max(n_visible, visible[r]);
            max[r]     = FA_MASKED;
            sum[r]     = 0.0f;
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

        for (int32_t tile = tile0; tile < tile1; ++tile) {
            const int32_t cell0 = tile*shape::N_CELLS_TILE + id.warp*shape::N_CELLS_WARP + group;

            typename row_t::raw k_raw[shape::N_STEPS];
            typename row_t::raw v_raw[shape::N_STEPS];
            SIMT_UNROLL
            for (int s = 0; s < shape::N_STEPS; ++s) {
                // what lies behind the last cell is not there, its weight is zero
                const int64_t cell = first + simt_min(cell0 + s*shape::N_CELLS_STEP, n_visible - 1);

                k_raw[s] = row_t::load(k + cell*a.nb_k, has_k ? d0 : 0, a.type_k);
                v_raw[s] = row_t::load(v + cell*a.nb_v, has_v ? d0 : 0, a.type_v);
            }

            float w[shape::N_STEPS][n_rows];
            SIMT_UNROLL
            for (int s = 0; s < shape::N_STEPS; ++s) {
                const fa_dims y = row_t::unpack(k_raw[s], has_k ? d0 : 0, a.type_k);
                SIMT_UNROLL
                for (int r = 0; r < n_rows; ++r) {
                    float dot = 0.0f;
                    SIMT_UNROLL
                    for (int i = 0; i < FA_DIMS; ++i) {
                        dot += x[r].x[i]*y.x[i];
                    }
                    SIMT_UNROLL
                    for (int m = 1; m < n_lanes; m *= 2) {
                        dot += simt_shuffle_xor(dot, m);
                    }
                    dot = a.softcap != 0.0f ? a.softcap*fa_tanh(dot) : dot;
                    w[s][r] = cell0 + s*shape::N_CELLS_STEP < visible[r] ? dot : FA_MASKED;
                }
            }

            SIMT_UNROLL
            for (int r = 0; r < n_rows; ++r) {
                float max_new = max[r];
                SIMT_UNROLL
                for (int s = 0; s < shape::N_STEPS; ++s) {
                    max_new = simt_max(max_new, w[s][r]);
                }
                const float w_old = simt_exp(max[r] - max_new);

                max[r]  = max_new;
                sum[r] *= w_old;
                SIMT_UNROLL
                for (int i = 0; i < FA_DIMS; ++i) {
                    o[r].x[i] *= w_old;
                }
                SIMT_UNROLL
                for (int s = 0; s < shape::N_STEPS; ++s) {
                    w[s][r] = w[s][r] <= FA_MASKED ? 0.0f : simt_exp(w[s][r] - max_new); // what is not a number stays that
                    sum[r] += w[s][r];
                }
            }

            SIMT_UNROLL
            for (int s = 0; s < shape::N_STEPS; ++s) {
                const fa_dims y = row_t::unpack(v_raw[s], has_v ? d0 : 0, a.type_v);
                SIMT_UNROLL
                for (int r = 0; r < n_rows; ++r) {
                    SIMT_UNROLL
                    for (int i = 0; i < FA_DIMS; ++i) {
                        o[r].x[i] += w[s][r]*y.x[i];
                    }
                }
            }
        }

        // the groups of a warp, then the warps
        SIMT_UNROLL
        for (int r = 0; r < n_rows; ++r) {
            float max_all = max[r];
            SIMT_UNROLL
            for (int m = n_lanes; m < 32; m *= 2) {
                max_all = simt_max(max_all, simt_shuffle_xor(max_all, m));
            }
            const float w_own = simt_exp(max[r] - max_all);

            float sum_all = sum[r]*w_own;
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
                float max_block = FA_MASKED;
                float sum_block = 0.0f;
                SIMT_UNROLL
                for (int i = 0; i < FA_N_WARPS; ++i) {
                    w_warp[i] = sh[i*LD + LD - 2];
                    max_block = simt_max(max_block, w_warp[i]);
                }
                SIMT_UNROLL
                for (int i = 0; i < FA_N_WARPS; ++i) {
                    w_warp[i]  = simt_exp(w_warp[i] - max_block);
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
