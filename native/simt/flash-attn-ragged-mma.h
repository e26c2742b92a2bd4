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
// Keys and values of a tile take turns in slots of 16 KiB, or of 8 for 64 rows, whose scores would take too many registers. Behind each
// wait is one barrier: it says that the slot is full, and that the one before is free.
//   F16         three slots, copied into without registers: while one is worked on, two are on their way
//   quantised   two slots; while one is worked on, rows for the other are on their way into registers. They are unpacked to F16 once for
//               all rows of queries; as a scale of F16 times a whole number they lose what F16 loses, as in flash-attn-ragged-tile.h
// Other formats stay with the other kernels: F16 has not the range of BF16 and F32.
//
// A slot is [n_embd, cells] without padding; groups of eight elements, 16 bytes, are permuted in every row, so that eight rows of a
// group lie in different banks.

#include "flash-attn-ragged-mma-steps.h"

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
