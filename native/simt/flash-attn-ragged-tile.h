// Many rows: tiles of cells in memory of the block, products of matrices.
//
// A block attends with n_rows rows of a kv head to n_cells cells at a time. Queries, keys, values and weights are F16, sums are
// F32; sums of values lie in memory of the block between tiles, where rows are rescaled as their maximum grows.

template <int n_rows, int n_cells, int n_embd> // n_embd: the larger one of keys and values, rounded up
struct fa_tile_shape {
    enum { LD_Q = n_embd + 8 };  // rows of queries, keys and values; the padding spreads them over banks
    enum { LD_S = n_cells + 4 };
    enum { LD_P = n_cells + 8 };
    enum { LD_O = n_embd + 4 };

    enum { N_Q  = n_rows*LD_Q  };
    enum { N_KV = n_cells*LD_Q };
    enum { N_S  = n_rows*LD_S  };
    enum { N_P  = n_rows*LD_P  };
    enum { N_O  = n_rows*LD_O  };
};

struct fa_tile_shared {
    SIMT_SHARED(simt_f16) q;   // [n_rows,  LD_Q]
    SIMT_SHARED(simt_f16) kv;  // [n_cells, LD_Q] keys, then values
    SIMT_SHARED(float)    s;   // [n_rows,  LD_S] logits
    SIMT_SHARED(simt_f16) p;   // [n_rows,  LD_P] weights
    SIMT_SHARED(float)    o;   // [n_rows,  LD_O] sums of values
    SIMT_SHARED(float)    max; // [n_rows]
    SIMT_SHARED(float)    sum; // [n_rows]
};

// rows of a head from one of its cells on, zeros from n_embd to n_pad
template <typename row_t, int n_cells, int ld>
SIMT_FUNC void fa_tile_read(
        SIMT_SHARED(simt_f16) dst, SIMT_GLOBAL(const char) head, int type, uint32_t nb, int32_t cell0, int32_t n_left, int32_t n_embd, int32_t n_pad, simt_ids id) {
    const int32_t n_parts = n_pad/FA_DIMS;
    for (int32_t i = id.tid; i < n_cells*n_parts; i += FA_N_THREADS) {
        const int32_t j = i/n_parts;
        const int32_t d = i%n_parts*FA_DIMS;

        fa_dims x;
        float   scale = 0.0f;
        if (d < n_embd) {
            // what lies behind the last cell is not there, its weight is zero
            const typename row_t::raw r = row_t::load(head, (cell0 + simt_min(j, n_left - 1))*nb, d, type);
            x     = row_t::unpack(r, d, type);
            scale = row_t::scale(r, type);
        } else {
            for (int c = 0; c < FA_DIMS; ++c) {
                x.x[c] = 0.0f;
            }
        }
        SIMT_UNROLL
        for (int c = 0; c < FA_DIMS; ++c) {
            dst[j*ld + d + c] = simt_to_f16(x.x[c]*scale);
        }
    }
}

static SIMT_FUNC int32_t fa_pad16(int32_t n) {
    return (n + 15)/16*16;
}

// block: item*n_splits + split
template <typename row_t, int n_rows, int n_cells, int n_embd>
SIMT_FUNC void fa_tile(
        fa_args a,
        SIMT_GLOBAL(const char)    q,
        SIMT_GLOBAL(const char)    k,
        SIMT_GLOBAL(const char)    v,
        SIMT_GLOBAL(const int32_t) ranges,
        SIMT_GLOBAL(const float)   sinks,
        SIMT_GLOBAL(float)         part,
        SIMT_GLOBAL(float)         dst,
        fa_tile_shared             sh,
        simt_ids                   id) {
    typedef fa_tile_shape<n_rows, n_cells, n_embd> shape;

    enum { N_LANES_ROW = FA_N_THREADS/n_rows }; // of the softmax

    const int32_t item  = id.block/a.n_splits;
    const int32_t split = id.block%a.n_splits;
    const int32_t ih    = item/a.n_row_blocks;
    const int32_t row0  = item%a.n_row_blocks*n_rows;
    const int64_t first = ranges[2*ih];

    SIMT_GLOBAL(const char) k_head = k + first*a.nb_k;
    SIMT_GLOBAL(const char) v_head = v + first*a.nb_v;

    const int32_t n_visible = fa_visible(a, ranges, ih, simt_min(a.n_rows, row0 + n_rows) - 1);
    const int64_t n_tiles   = (n_visible + n_cells - 1)/n_cells;
    const int32_t tile0     = (int32_t) fa_split_begin(a, n_tiles, split);
    const int32_t tile1     = (int32_t) fa_split_begin(a, n_tiles, split + 1);

    const int32_t n_pad_k = fa_pad16(a.n_embd_k);
    const int32_t n_pad_v = fa_pad16(a.n_embd_v);

    for (int32_t i = id.tid; i < n_rows*n_pad_k; i += FA_N_THREADS) {
        const int32_t ir  = i/n_pad_k;
        const int32_t d   = i%n_pad_k;
        const int32_t row = row0 + ir;

        float x = 0.0f;
        if (row < a.n_rows && d < a.n_embd_k) {
            x = SIMT_CAST(const float, q + row/a.n_gqa*a.nb_q1 + fa_head_of(a, ih, row)*a.nb_q2)[d]*a.scale;
        }
        sh.q[ir*shape::LD_Q + d] = simt_to_f16(x);
    }
    for (int32_t i = id.tid; i < n_rows*n_pad_v; i += FA_N_THREADS) {
        sh.o[i/n_pad_v*shape::LD_O + i%n_pad_v] = 0.0f;
    }

    // the row of this thread in the softmax, with the lanes beside it
    const int32_t ir      = id.tid/N_LANES_ROW;
    const int32_t lane    = id.tid%N_LANES_ROW;
    const int32_t visible = row0 + ir < a.n_rows ? fa_visible(a, ranges, ih, row0 + ir) : 0;

    float max = FA_LOWEST;
    float sum = 0.0f;

    for (int32_t tile = tile0; tile < tile1; ++tile) {
        const int32_t cell0 = tile*n_cells;

        fa_tile_read<row_t, n_cells, shape::LD_Q>(sh.kv, k_head, a.type_k, a.nb_k, cell0, n_visible - cell0, a.n_embd_k, n_pad_k, id);
        simt_barrier();

        enum { N_FRAGS_S = n_rows/16*(n_cells/16) };
        for (int32_t i = id.warp; i < N_FRAGS_S; i += FA_N_WARPS) {
            const int32_t r = i/(n_cells/16)*16;
            const int32_t c = i%(n_cells/16)*16;

            simt_frag s;
            simt_frag_zero(s);
            for (int32_t d = 0; d < n_pad_k; d += 16) {
                simt_frag_mma_t(s, sh.q + r*shape::LD_Q + d, shape::LD_Q, sh.kv + c*shape::LD_Q + d, shape::LD_Q);
            }
            simt_frag_store(sh.s + r*shape::LD_S + c, s, shape::LD_S);
        }
        simt_barrier();

        fa_tile_read<row_t, n_cells, shape::LD_Q>(sh.kv, v_head, a.type_v, a.nb_v, cell0, n_visible - cell0, a.n_embd_v, n_pad_v, id);

        float w[n_cells/N_LANES_ROW];
        float max_new = max;
        SIMT_UNROLL
        for (int j = 0; j < n_cells/N_LANES_ROW; ++j) {
            const int32_t c = j*N_LANES_ROW + lane;

            float x = sh.s[ir*shape::LD_S + c];
            x = a.softcap != 0.0f ? a.softcap*fa_tanh(x) : x;
            w[j]    = cell0 + c < visible ? x : FA_MASKED;
            max_new = simt_max(max_new, w[j]);
        }
        SIMT_UNROLL
        for (int m = 1; m < N_LANES_ROW; m *= 2) {
            max_new = simt_max(max_new, simt_shuffle_xor(max_new, m));
        }
        const float w_old = simt_exp2(max - max_new);

        max  = max_new;
        sum *= w_old;
        SIMT_UNROLL
        for (int j = 0; j < n_cells/N_LANES_ROW; ++j) {
            w[j] = simt_exp2(w[j] - max_new);
            sum += w[j];
            sh.p[ir*shape::LD_P + j*N_LANES_ROW + lane] = simt_to_f16(w[j]);
        }
        if (w_old < 1.0f) {
            for (int32_t d = lane; d < n_pad_v; d += N_LANES_ROW) {
                sh.o[ir*shape::LD_O + d] = sh.o[ir*shape::LD_O + d]*w_old;
            }
        }
        simt_barrier();

        const int32_t n_frags_o = n_rows/16*(n_pad_v/16);
        for (int32_t i = id.warp; i < n_frags_o; i += FA_N_WARPS) {
            const int32_t r = i/(n_pad_v/16)*16;
            const int32_t c = i%(n_pad_v/16)*16;

            simt_frag o;
            simt_frag_load(o, sh.o + r*shape::LD_O + c, shape::LD_O);
            for (int32_t j = 0; j < n_cells; j += 16) {
                simt_frag_mma(o, sh.p + r*shape::LD_P + j, shape::LD_P, sh.kv + j*shape::LD_Q + c, shape::LD_Q);
            }
            simt_frag_store(sh.o + r*shape::LD_O + c, o, shape::LD_O);
        }
        simt_barrier();
    }

    SIMT_UNROLL
    for (int m = 1; m < N_LANES_ROW; m *= 2) {
        sum += simt_shuffle_xor(sum, m);
    }
    if (lane == 0) {
        sh.max[ir] = max;
        sh.sum[ir] = sum;
    }
    simt_barrier();

    for (int32_t i = id.tid; i < n_rows*a.n_embd_v; i += FA_N_THREADS) {
        const int32_t r   = i/a.n_embd_v;
        const int32_t d   = i%a.n_embd_v;
        const int32_t row = row0 + r;
        if (row >= a.n_rows) {
            continue;
        }
        const float o = sh.o[r*shape::LD_O + d];
        if (a.n_splits == 1) {
            dst[fa_dst(a, ih, row) + d] = o*fa_row_weight(a, sinks, fa_head_of(a, ih, row), sh.max[r], sh.sum[r]);
        } else {
            SIMT_GLOBAL(float) y = part + fa_part(a, id.block, 0, n_rows, r);
            y[d] = o;
            if (d == 0) {
                y[a.n_embd_v]     = sh.max[r];
                y[a.n_embd_v + 1] = sh.sum[r];
            }
        }
    }
}
