#pragma once

// Few rows, as in decoding: every cell is read from its pool once and converted in registers, where it meets all rows.

#include "flash-attn-ragged-rows.h"

// Scores of n_q rows with all cells: s[j, i] = sum_d q[d, i]*k_j[d]
//
// q: [ld_q, n_q]    F32, ld_q whole vectors
// k: [ld_q, n_cells]
// s: [ld_s, n_q]    F32; columns from n_cells to the next multiple of four repeat the last cell
//
// Four cells at a time, whose sums over a vector's lanes then make one vector.
template <typename row_t, int n_q>
static void fattn_stream_scores_rows(float * s, int64_t ld_s, const float * q, int64_t ld_q, const fattn_cells & k, int64_t n_cells) {
    for (int64_t j = 0; j < n_cells; j += 4) {
        const char * row[4];
        for (int c = 0; c < 4; ++c) {
            row[c] = k.data + std::min(j + c, n_cells - 1)*k.nb;
        }

        fattn_prefetch(k, j, 4);

        vf32 acc[n_q][4] = {};
        for (int64_t d = 0; d < ld_q; d += VL) {
            vf32 x[4];
            for (int c = 0; c < 4; ++c) {
                x[c] = row_t::load(row[c], d);
            }
            for (int i = 0; i < n_q; ++i) {
                const vf32 y = vf_load(q + i*ld_q + d);
                for (int c = 0; c < 4; ++c) {
                    acc[i][c] += x[c]*y;
                }
            }
        }

        for (int i = 0; i < n_q; ++i) {
            const vf32x4 sum = vf_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
            memcpy(s + i*ld_s + j, &sum, sizeof(sum));
        }
    }
}

// Weighted values of n_q rows, n_v vectors of each from element d on: o[d, i] += sum_j p[j, i]*v_j[d]
//
// p: [ld_p, n_q]    F32, weights
// v: [ld_o, n_cells]
// o: [ld_o, n_q]    F32
//
// The vectors stay in registers over all cells. Only the first ones of a row ask for cells ahead.
template <typename row_t, int n_q, int n_v>
static void fattn_stream_values_rows(float * o, int64_t ld_o, const float * p, int64_t ld_p, const fattn_cells & v, int64_t d, int64_t n_cells) {
    vf32 acc[n_q][n_v];
    for (int i = 0; i < n_q; ++i) {
        for (int c = 0; c < n_v; ++c) {
            acc[i][c] = vf_load(o + i*ld_o + d + c*VL);
        }
    }

    for (int64_t j = 0; j < n_cells; ++j) {
        if (d == 0) {
            fattn_prefetch(v, j, 1);
        }
        vf32 x[n_v];
        for (int c = 0; c < n_v; ++c) {
            x[c] = row_t::load(v.data + j*v.nb, d + c*VL);
        }
        for (int i = 0; i < n_q; ++i) {
            for (int c = 0; c < n_v; ++c) {
                acc[i][c] += p[i*ld_p + j]*x[c];
            }
        }
    }

    for (int i = 0; i < n_q; ++i) {
        for (int c = 0; c < n_v; ++c) {
            vf_store(o + i*ld_o + d + c*VL, acc[i][c]);
        }
    }
}

// Scores of n_rows rows, n_q at a time, then what is left; shapes as above with n_rows in place of n_q
template <typename row_t, int n_q = N_REG_DOTS>
static void fattn_stream_scores(float * s, int64_t ld_s, const float * q, int64_t ld_q, int64_t n_rows, const fattn_cells & k, int64_t n_cells) {
    for (; n_rows >= n_q; n_rows -= n_q, s += n_q*ld_s, q += n_q*ld_q) {
        fattn_stream_scores_rows<row_t, n_q>(s, ld_s, q, ld_q, k, n_cells);
    }
    if constexpr (n_q > 1) {
        fattn_stream_scores<row_t, n_q - 1>(s, ld_s, q, ld_q, n_rows, k, n_cells);
    }
}

// Weighted values of n_rows rows, likewise
template <typename row_t, int n_q = N_REG_DOTS>
static void fattn_stream_values(float * o, int64_t ld_o, const float * p, int64_t ld_p, int64_t n_rows, const fattn_cells & v, int64_t n_cells) {
    for (; n_rows >= n_q; n_rows -= n_q, o += n_q*ld_o, p += n_q*ld_p) {
        int64_t d = 0;
        for (; d + 4*VL <= ld_o; d += 4*VL) {
            fattn_stream_values_rows<row_t, n_q, 4>(o, ld_o, p, ld_p, v, d, n_cells);
        }
        for (; d < ld_o; d += VL) {
            fattn_stream_values_rows<row_t, n_q, 1>(o, ld_o, p, ld_p, v, d, n_cells);
        }
    }
    if constexpr (n_q > 1) {
        fattn_stream_values<row_t, n_q - 1>(o, ld_o, p, ld_p, n_rows, v, n_cells);
    }
}
