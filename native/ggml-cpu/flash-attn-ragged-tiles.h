#pragma once

// Products of rows of queries or weights with tiles of cells of any type.

#include "flash-attn-ragged-simd.h"

#include "ggml-cpu.h"

#include <algorithm>

// ahead of the one in use
static constexpr int64_t N_CELLS_PREFETCH = 32;

// rows of a pool
struct fa_cells {
    const char * data;
    size_t       nb;
};

// Cells stream from memory in regions too short for the hardware to predict well. They are asked for in the second-level
// cache: with 131,072 cells of 128 F16 and one thread that is 1.4 times faster than the first, which the tile in use fills
static inline void fa_prefetch(const fa_cells & cells, int64_t j, int64_t n) {
    const char * row = cells.data + (j + N_CELLS_PREFETCH)*cells.nb;
    for (size_t i = 0; i < n*cells.nb; i += 64) {
        __builtin_prefetch(row + i, 0, 2);
    }
}

//
// few rows: cells are converted in registers
//

// s[i*ld_s + j] = q_i * k_j, for blocks of four cells, n_q rows of q
template <typename row_t, int n_q>
static void fa_dots(float * s, int64_t ld_s, const float * q, int64_t ld_q, const fa_cells & k, int64_t n_cells) {
    for (int64_t j = 0; j < n_cells; j += 4) {
        const char * row[4];
        for (int c = 0; c < 4; ++c) {
            row[c] = k.data + std::min(j + c, n_cells - 1)*k.nb;
        }

        fa_prefetch(k, j, 4);

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

// o[i] += sum_j p[i*ld_p + j] * v_j, for n_v vectors of each row
template <typename row_t, int n_q, int n_v>
static void fa_mads(float * o, int64_t ld_o, const float * p, int64_t ld_p, const fa_cells & v, int64_t d, int64_t n_cells) {
    vf32 acc[n_q][n_v];
    for (int i = 0; i < n_q; ++i) {
        for (int c = 0; c < n_v; ++c) {
            acc[i][c] = vf_load(o + i*ld_o + d + c*VL);
        }
    }

    for (int64_t j = 0; j < n_cells; ++j) {
        if (d == 0) {
            fa_prefetch(v, j, 1);
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

template <typename row_t, int n_q = N_REG_DOTS>
static void fa_stream_k(float * s, int64_t ld_s, const float * q, int64_t ld_q, int64_t n_rows, const fa_cells & k, int64_t n_cells) {
    for (; n_rows >= n_q; n_rows -= n_q, s += n_q*ld_s, q += n_q*ld_q) {
        fa_dots<row_t, n_q>(s, ld_s, q, ld_q, k, n_cells);
    }
    if constexpr (n_q > 1) {
        fa_stream_k<row_t, n_q - 1>(s, ld_s, q, ld_q, n_rows, k, n_cells);
    }
}

template <typename row_t, int n_q = N_REG_DOTS>
static void fa_stream_v(float * o, int64_t ld_o, const float * p, int64_t ld_p, int64_t n_rows, const fa_cells & v, int64_t n_cells) {
    for (; n_rows >= n_q; n_rows -= n_q, o += n_q*ld_o, p += n_q*ld_p) {
        int64_t d = 0;
        for (; d + 4*VL <= ld_o; d += 4*VL) {
            fa_mads<row_t, n_q, 4>(o, ld_o, p, ld_p, v, d, n_cells);
        }
        for (; d < ld_o; d += VL) {
            fa_mads<row_t, n_q, 1>(o, ld_o, p, ld_p, v, d, n_cells);
        }
    }
    if constexpr (n_q > 1) {
        fa_stream_v<row_t, n_q - 1>(o, ld_o, p, ld_p, n_rows, v, n_cells);
    }
}

//
// many rows: matrix products over tiles
//

// c[m][n] = (add ? c : 0) + a[m][k] * b[k][n], for n_r rows of a and n_v vectors of b
template <int n_r, int n_v>
static void fa_gemm_block(float * c, int64_t ld_c, const float * a, int64_t ld_a, const float * b, int64_t ld_b, int64_t n_k, bool add) {
    vf32 acc[n_r][n_v] = {};
    if (add) {
        for (int i = 0; i < n_r; ++i) {
            for (int j = 0; j < n_v; ++j) {
                acc[i][j] = vf_load(c + i*ld_c + j*VL);
            }
        }
    }

    for (int64_t k = 0; k < n_k; ++k) {
        vf32 x[n_v];
        for (int j = 0; j < n_v; ++j) {
            x[j] = vf_load(b + k*ld_b + j*VL);
        }
        for (int i = 0; i < n_r; ++i) {
            for (int j = 0; j < n_v; ++j) {
                acc[i][j] += a[i*ld_a + k]*x[j];
            }
        }
    }

    for (int i = 0; i < n_r; ++i) {
        for (int j = 0; j < n_v; ++j) {
            vf_store(c + i*ld_c + j*VL, acc[i][j]);
        }
    }
}

template <int n_v, int n_r = N_REG_ROWS>
static void fa_gemm_rows(float * c, int64_t ld_c, const float * a, int64_t ld_a, const float * b, int64_t ld_b, int64_t n_m, int64_t n_k, bool add) {
    for (; n_m >= n_r; n_m -= n_r, c += n_r*ld_c, a += n_r*ld_a) {
        fa_gemm_block<n_r, n_v>(c, ld_c, a, ld_a, b, ld_b, n_k, add);
    }
    if constexpr (n_r > 1) {
        fa_gemm_rows<n_v, n_r/2>(c, ld_c, a, ld_a, b, ld_b, n_m, n_k, add);
    }
}

// n_n is a multiple of VL
static void fa_gemm(float * c, int64_t ld_c, const float * a, int64_t ld_a, const float * b, int64_t ld_b, int64_t n_m, int64_t n_n, int64_t n_k, bool add) {
    int64_t n = 0;
    for (; n + 2*VL <= n_n; n += 2*VL) {
        fa_gemm_rows<2>(c + n, ld_c, a, ld_a, b + n, ld_b, n_m, n_k, add);
    }
    if (n < n_n) {
        fa_gemm_rows<1>(c + n, ld_c, a, ld_a, b + n, ld_b, n_m, n_k, add);
    }
}

// kt[d][j] = k_j[d]; columns beyond n_cells repeat the last cell
template <typename row_t>
static void fa_transpose(float * kt, int64_t ld_kt, const fa_cells & k, int64_t ld_k, int64_t n_cells) {
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

// dst[j][d] = v_j[d]
template <typename row_t>
static void fa_convert(float * dst, int64_t ld, const fa_cells & cells, int64_t n_cells) {
    for (int64_t j = 0; j < n_cells; ++j) {
        for (int64_t d = 0; d < ld; d += VL) {
            vf_store(dst + j*ld + d, row_t::load(cells.data + j*cells.nb, d));
        }
    }
}

// likewise for rows that are not whole vectors, which quantised rows always are
static void fa_convert_padded(ggml_type type, float * dst, int64_t ld, const fa_cells & cells, int64_t n_embd, int64_t n_cells) {
    for (int64_t j = 0; j < n_cells; ++j, dst += ld) {
        const char * row = cells.data + j*cells.nb;
        switch (type) {
            case GGML_TYPE_F32:  memcpy(dst, row, n_embd*sizeof(float));                        break;
            case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, dst, n_embd); break;
            case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) row, dst, n_embd); break;
            default: GGML_ABORT("fatal error");
        }
        std::fill(dst + n_embd, dst + ld, 0.0f);
    }
}

template <typename fn_t>
static void fa_with_row_type(ggml_type type, fn_t fn) {
    switch (type) {
        case GGML_TYPE_F32:  fn(fa_row_f32{});  break;
        case GGML_TYPE_F16:  fn(fa_row_f16{});  break;
        case GGML_TYPE_BF16: fn(fa_row_bf16{}); break;
        case GGML_TYPE_Q8_0: fn(fa_row_q8_0{}); break;
        case GGML_TYPE_Q4_0: fn(fa_row_q4_0{}); break;
        default: GGML_ABORT("fatal error");
    }
}
