#pragma once

// Many rows, as in a prompt: products of matrices of F32, and tiles of keys transposed for them.

#include "flash-attn-ragged-rows.h"

// C = A*B, or C += A*B with add, for n_r rows of A and C and n_v vectors of the columns of B and C
//
// a: [ld_a, n_r]      F32, n_k elements of each row are used
// b: [ld_b, n_k]      F32
// c: [ld_c, n_r]      F32
//
// n_r*n_v sums stay in registers over all of n_k, so that a vector of B serves n_r rows. The pragmas are for GCC, which unrolls these
// loops late otherwise and moves the sums through memory: a fifth of the time with 64 elements.
template <int n_r, int n_v>
static void fattn_gemm_block(float * c, int64_t ld_c, const float * a, int64_t ld_a, const float * b, int64_t ld_b, int64_t n_k, bool add) {
    vf32 acc[n_r][n_v];
#pragma GCC unroll 8
    for (int i = 0; i < n_r; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < n_v; ++j) {
            acc[i][j] = add ? vf_load(c + i*ld_c + j*VL) : vf32{};
        }
    }

    for (int64_t k = 0; k < n_k; ++k) {
        vf32 x[n_v];
#pragma GCC unroll 8
        for (int j = 0; j < n_v; ++j) {
            x[j] = vf_load(b + k*ld_b + j*VL);
        }
#pragma GCC unroll 8
        for (int i = 0; i < n_r; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < n_v; ++j) {
                acc[i][j] += a[i*ld_a + k]*x[j];
            }
        }
    }

#pragma GCC unroll 8
    for (int i = 0; i < n_r; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < n_v; ++j) {
            vf_store(c + i*ld_c + j*VL, acc[i][j]);
        }
    }
}

// likewise for n_m rows: n_r at a time, then half as many
template <int n_v, int n_r = N_REG_ROWS>
static void fattn_gemm_rows(
        float * c, int64_t ld_c, const float * a, int64_t ld_a, const float * b, int64_t ld_b, int64_t n_m, int64_t n_k, bool add) {
    for (; n_m >= n_r; n_m -= n_r, c += n_r*ld_c, a += n_r*ld_a) {
        fattn_gemm_block<n_r, n_v>(c, ld_c, a, ld_a, b, ld_b, n_k, add);
    }
    if constexpr (n_r > 1) {
        fattn_gemm_rows<n_v, n_r/2>(c, ld_c, a, ld_a, b, ld_b, n_m, n_k, add);
    }
}

// likewise for n_n columns of B and C, a multiple of VL
static void fattn_gemm(
        float * c, int64_t ld_c, const float * a, int64_t ld_a, const float * b, int64_t ld_b, int64_t n_m, int64_t n_n, int64_t n_k, bool add) {
    int64_t n = 0;
    for (; n + 2*VL <= n_n; n += 2*VL) {
        fattn_gemm_rows<2>(c + n, ld_c, a, ld_a, b + n, ld_b, n_m, n_k, add);
    }
    if (n < n_n) {
        fattn_gemm_rows<1>(c + n, ld_c, a, ld_a, b + n, ld_b, n_m, n_k, add);
    }
}

// kt[d*ld_kt + j] = k_j[d], which makes cells the columns of a product
//
// k:  [ld_k, n_cells]  ld_k whole vectors
// kt: [ld_kt, ld_k]    F32; columns from n_cells to the next multiple of four repeat the last cell
template <typename row_t>
static void fattn_transpose(float * kt, int64_t ld_kt, const fattn_cells & k, int64_t ld_k, int64_t n_cells) {
    for (int64_t j = 0; j < n_cells; j += 4) {
        const char * row[4];
        for (int c = 0; c < 4; ++c) {
            row[c] = k.data + std::min(j + c, n_cells - 1)*k.nb;
        }
        for (int64_t d = 0; d < ld_k; d += VL) {
            vf_store_transposed(kt + d*ld_kt + j, ld_kt,
                    row_t::load(row[0], d), row_t::load(row[1], d), row_t::load(row[2], d), row_t::load(row[3], d));
        }
    }
}
