// Scores of cells, see ragged-scores.h. Matrices are F32 and in ggml's order.

#include "ragged-scores.h"
#include "flash-attn-ragged-gemm.h"
#include "flash-attn-ragged-work.h"

#include <algorithm>
#include <cmath>

// A piece is what one thread does at a time: no fewer cells than the queries are worth loading for, and no more pieces of a head than
// this, whose maxima and sums are kept
static constexpr int64_t N_CELLS_PIECE = 1024;
static constexpr int64_t N_PIECES_HEAD = 64;

// A logit may exceed the reference of a sum by this much until the reference follows: exp() of it is no large number, and a tile
// rarely has to be looked at twice
static constexpr float MAX_OVER = 8.0f;

static int64_t n_cells_piece(const ggml_ragged_scores & p, int64_t n_cells) {
    return std::max(p.n_piece > 0 ? p.n_piece : N_CELLS_PIECE, fattn_pad((n_cells + N_PIECES_HEAD - 1)/N_PIECES_HEAD, N_CELLS_TILE));
}

static int64_t n_pieces(const ggml_ragged_scores & p, int64_t n_cells) {
    const int64_t n = n_cells_piece(p, n_cells);
    return (n_cells + n - 1)/n;
}

namespace {

// Sizes of a layer and its work memory. The columns of a kv head's attention are its query heads, each with all queries; columns up
// to the next whole vector have logits of 0 and no weight.
struct score_shape {
    explicit score_shape(const ggml_ragged_scores & p) :
        n_embd(p.k->ne[0]), ld_k(fattn_pad(n_embd, VL)), n_cols(p.n_queries*p.n_gqa), ld_c(fattn_pad(n_cols, VL)),
        n_block(std::min(ld_c, N_ROWS_TILE)), n_res(p.by_query_head ? p.n_gqa : 1) {
        for (int64_t ih = 0; ih < p.n_head_kv; ++ih) {
            n_pieces_all += n_pieces(p, p.n_cells[ih]);
        }
    }

    int64_t n_embd;
    int64_t ld_k;    // whole vectors
    int64_t n_cols;
    int64_t ld_c;    // whole vectors
    int64_t n_block; // columns at a time
    int64_t n_res;   // sums for every cell

    int64_t n_pieces_all = 0;

    // of a piece or a head: reference and sum of every column
    int64_t n_stats() const { return fattn_pad(2*ld_c, WORK_ALIGN/sizeof(float)); }

    int64_t n_thread() const { return fattn_pad(ld_c*(n_embd + n_res) + N_CELLS_TILE*(ld_k + n_block + n_res), WORK_ALIGN/sizeof(float)); }
};

struct score_stats {
    float * max; // [ld_c] reference: no logit exceeds it by more than MAX_OVER; -FLT_MAX if none is known
    float * sum; // [ld_c] of exp(logit - max); of a head: what exp() is multiplied by to be a weight, 0 behind the columns
};

// some cells of one kv head
struct score_piece {
    int64_t i; // among all
    int64_t ih;
    int64_t cell0;
    int64_t cell1;
};

// one thread
class score_worker {
public:
    score_worker(ggml_ragged_scores & p, float * work, int ith);

    void scan();
    void combine();
    void weigh();

private:
    bool next(int step, score_piece & cur); // a piece that nobody has taken

    void load_queries(int64_t ih); // unless they are there
    void load_scales(const float * scale);
    void load_tile(int64_t ih, int64_t cell0, int64_t n_cells);

    // s = logits of n columns with the tile; -inf where a query does not see the cell
    void multiply(int64_t ih, int64_t cell0, int64_t n_cells, int64_t col0, int64_t n);

    void scan_block (int64_t n_cells, int64_t n, float * max, float * sum) const;
    void weigh_block(int64_t n_cells, int64_t col0, int64_t j0, int64_t j1, const float * max, int64_t i_res) const;
    void largest_block(int64_t n_cells, int64_t col0, int64_t j0, int64_t j1, const float * max, int64_t i_res) const;

    int64_t n_seen_by_all(int64_t ih) const; // cells at the begin of a head
    int64_t n_seen(int64_t ih, int64_t ic) const { return p.n_cells[ih] - p.n_hidden[ih*p.n_queries + ic%p.n_queries]; } // of a column

    score_stats of_piece(int64_t i)  const { return stats(i); }
    score_stats of_head (int64_t ih) const { return stats(sh.n_pieces_all + ih); }

    score_stats stats(int64_t i) const {
        float * max = all + i*sh.n_stats();
        return { max, max + sh.ld_c };
    }

    ggml_ragged_scores & p;
    const score_shape    sh;

    float * all; // stats of pieces, then of heads

    int64_t ih_loaded = -1; // whose queries these are
    float * q_t;            // [ld_c, n_embd] scaled
    float * scales; // [ld_c, n_res] of the columns that a result sums, 0 for the others
    float * k;      // [ld_k, N_CELLS_TILE]
    float * s;      // [n_block, N_CELLS_TILE]
    float * res;    // [N_CELLS_TILE, n_res]
};

} // namespace

score_worker::score_worker(ggml_ragged_scores & p, float * work, int ith) : p(p), sh(p) {
    all    = (float *) GGML_PAD((uintptr_t) work, WORK_ALIGN);
    q_t    = all    + (sh.n_pieces_all + p.n_head_kv)*sh.n_stats() + ith*sh.n_thread();
    scales = q_t    + sh.ld_c*sh.n_embd;
    k      = scales + sh.ld_c*sh.n_res;
    s      = k      + sh.ld_k*N_CELLS_TILE;
    res    = s      + sh.n_block*N_CELLS_TILE;
}

bool score_worker::next(int step, score_piece & cur) {
    cur.i = p.next[step]++;

    int64_t i0 = 0;
    for (int64_t ih = 0; ih < p.n_head_kv; ++ih) {
        const int64_t i1 = i0 + n_pieces(p, p.n_cells[ih]);
        if (cur.i < i1) {
            const int64_t n = n_cells_piece(p, p.n_cells[ih]);

            cur.ih    = ih;
            cur.cell0 = (cur.i - i0)*n;
            cur.cell1 = std::min(p.n_cells[ih], cur.cell0 + n);
            return true;
        }
        i0 = i1;
    }
    return false;
}

int64_t score_worker::n_seen_by_all(int64_t ih) const {
    return p.n_cells[ih] - *std::max_element(p.n_hidden + ih*p.n_queries, p.n_hidden + (ih + 1)*p.n_queries);
}

void score_worker::load_queries(int64_t ih) {
    if (ih == ih_loaded) {
        return;
    }
    ih_loaded = ih;

    const float scale = p.softcap != 0.0f ? p.kq_scale/p.softcap : p.kq_scale;

    std::fill(q_t, q_t + sh.ld_c*sh.n_embd, 0.0f);
    for (int64_t ic = 0; ic < sh.n_cols; ++ic) {
        const auto * x = (const ggml_fp16_t *)
            ((const char *) p.q->data + (ih*p.n_gqa + ic/p.n_queries)*p.q->nb[2] + p.rows[ic%p.n_queries]*p.q->nb[1]);
        for (int64_t d = 0; d < sh.n_embd; ++d) {
            q_t[d*sh.ld_c + ic] = GGML_CPU_FP16_TO_FP32(x[d])*scale;
        }
    }
}

void score_worker::load_scales(const float * scale) {
    const int64_t n = sh.n_cols/sh.n_res;

    std::fill(scales, scales + sh.ld_c*sh.n_res, 0.0f);
    for (int64_t ir = 0; ir < sh.n_res; ++ir) {
        std::copy_n(scale + ir*n, n, scales + ir*sh.ld_c + ir*n);
    }
}

void score_worker::load_tile(int64_t ih, int64_t cell0, int64_t n_cells) {
    const fattn_cells cells = { (const char *) p.k->data + (p.first[ih] + cell0)*p.k->nb[1], p.k->nb[1] };

    // the next tile comes from memory while this one is multiplied; addresses behind the pool do no harm
    const char * ahead = cells.data + N_CELLS_TILE*cells.nb;
    for (size_t i = 0; i < N_CELLS_TILE*cells.nb; i += 64) {
        __builtin_prefetch(ahead + i, 0, 2);
    }

    if (sh.n_embd != sh.ld_k) {
        fattn_convert_padded(p.k->type, k, sh.ld_k, cells, sh.n_embd, n_cells);
        return;
    }
    fattn_with_row_type(p.k->type, [&](auto row_t) { fattn_convert<decltype(row_t)>(k, sh.ld_k, cells, n_cells); });
}

void score_worker::multiply(int64_t ih, int64_t cell0, int64_t n_cells, int64_t col0, int64_t n) {
    fattn_gemm(s, sh.n_block, k, sh.ld_k, q_t + col0, sh.ld_c, n_cells, n, sh.n_embd, false);

    if (p.softcap != 0.0f) {
        for (int64_t ic = 0; ic < n_cells; ++ic) {
            for (int64_t j = 0; j < n; j += VL) {
                vf_store(s + ic*sh.n_block + j, p.softcap*vf_tanh(vf_load(s + ic*sh.n_block + j)));
            }
        }
    }
    if (cell0 + n_cells <= n_seen_by_all(ih)) {
        return;
    }
    for (int64_t j = 0; j < std::min(n, sh.n_cols - col0); ++j) {
        for (int64_t ic = std::max<int64_t>(0, n_seen(ih, col0 + j) - cell0); ic < n_cells; ++ic) {
            s[ic*sh.n_block + j] = -INFINITY;
        }
    }
}

// max, sum: [n]
void score_worker::scan_block(int64_t n_cells, int64_t n, float * max, float * sum) const {
    for (int64_t j = 0; j < n; j += VL) {
        const float * x = s + j;

        vf32 best = vf_load(x);
        for (int64_t ic = 1; ic < n_cells; ++ic) {
            const vf32 cur = vf_load(x + ic*sh.n_block);
            best = cur > best ? cur : best;
        }
        vf32 ref = vf_load(max + j);
        vf32 own = vf_load(sum + j);
        if (vf_any_greater(best, ref + MAX_OVER)) {
            const vf32 ref_new = best > ref ? best : ref;
            own *= vf_exp(ref - ref_new);
            ref  = ref_new;
            vf_store(max + j, ref);
        }
        vf32 more = {};
        for (int64_t ic = 0; ic < n_cells; ++ic) {
            more += vf_exp(vf_load(x + ic*sh.n_block) - ref);
        }
        vf_store(sum + j, own + more);
    }
}

void score_worker::scan() {
    for (score_piece cur; next(0, cur);) {
        const score_stats st = of_piece(cur.i);

        std::fill(st.max, st.max + sh.ld_c, -FLT_MAX);
        std::fill(st.sum, st.sum + sh.ld_c, 0.0f);
        load_queries(cur.ih);
        for (int64_t cell0 = cur.cell0; cell0 < cur.cell1; cell0 += N_CELLS_TILE) {
            const int64_t n_cells = std::min(N_CELLS_TILE, cur.cell1 - cell0);

            load_tile(cur.ih, cell0, n_cells);
            for (int64_t col0 = 0; col0 < sh.ld_c; col0 += sh.n_block) {
                const int64_t n = std::min(sh.n_block, sh.ld_c - col0);

                multiply(cur.ih, cell0, n_cells, col0, n);
                scan_block(n_cells, n, st.max + col0, st.sum + col0);
            }
        }
    }
}

void score_worker::combine() {
    for (int64_t ih = p.next[1]++; ih < p.n_head_kv; ih = p.next[1]++) {
        int64_t i0 = 0;
        for (int64_t jh = 0; jh < ih; ++jh) {
            i0 += n_pieces(p, p.n_cells[jh]);
        }
        const int64_t     i1 = i0 + n_pieces(p, p.n_cells[ih]);
        const score_stats st = of_head(ih);

        // a learned sink takes its share of a query's attention
        for (int64_t ic = 0; ic < sh.ld_c; ++ic) {
            st.max[ic] = p.sinks && ic < sh.n_cols ? std::max(-FLT_MAX, p.sinks[ih*p.n_gqa + ic/p.n_queries]) : -FLT_MAX;
        }
        for (int64_t i = i0; i < i1; ++i) {
            const float * max = of_piece(i).max;
            for (int64_t ic = 0; ic < sh.ld_c; ++ic) {
                st.max[ic] = std::max(st.max[ic], max[ic]);
            }
        }
        for (int64_t j = 0; j < sh.ld_c; j += VL) {
            const vf32 max = vf_load(st.max + j);

            double sum[VL];
            for (int l = 0; l < VL; ++l) {
                sum[l] = p.sinks && j + l < sh.n_cols ? exp(double(p.sinks[ih*p.n_gqa + (j + l)/p.n_queries]) - max[l]) : 0.0;
            }
            for (int64_t i = i0; i < i1; ++i) {
                const vf32 own = vf_load(of_piece(i).sum + j)*vf_exp(vf_load(of_piece(i).max + j) - max);
                for (int l = 0; l < VL; ++l) {
                    sum[l] += own[l];
                }
            }
            for (int l = 0; l < VL; ++l) {
                const double weight = !p.largest ? p.weight : j + l >= sh.n_cols ? 0 : p.weight != 0.0f ? p.weight : n_seen(ih, j + l);
                st.sum[j + l] = float(weight/sum[l]);
            }
        }
        std::fill(st.max + sh.n_cols, st.max + sh.ld_c, 0.0f);
        std::fill(st.sum + sh.n_cols, st.sum + sh.ld_c, 0.0f);
    }
}

// adds to result i_res of every cell its weights in the columns j0 to j1 - 1 of s; cells up to the next multiple of four are of no meaning
void score_worker::weigh_block(int64_t n_cells, int64_t col0, int64_t j0, int64_t j1, const float * max, int64_t i_res) const {
    const float * scale = scales + i_res*sh.ld_c + col0;

    for (int64_t ic = 0; ic < n_cells; ic += 4) {
        vf32 sum[4] = {};
        for (int64_t j = j0; j < j1; j += VL) {
            for (int c = 0; c < 4; ++c) {
                sum[c] += vf_exp(vf_load(s + (ic + c)*sh.n_block + j) - vf_load(max + j))*vf_load(scale + j);
            }
        }
        float * dst = res + i_res*N_CELLS_TILE + ic;
        vf32x4  all;
        memcpy(&all, dst, sizeof(all));
        all += vf_sum4(sum[0], sum[1], sum[2], sum[3]);
        memcpy(dst, &all, sizeof(all));
    }
}

// the same for the largest
void score_worker::largest_block(int64_t n_cells, int64_t col0, int64_t j0, int64_t j1, const float * max, int64_t i_res) const {
    const float * scale = scales + i_res*sh.ld_c + col0;

    for (int64_t ic = 0; ic < n_cells; ++ic) {
        vf32 best = {};
        vf32 rest = {}; // no number where one was not finite, which comparing does not tell
        for (int64_t j = j0; j < j1; j += VL) {
            const vf32 cur = vf_exp(vf_load(s + ic*sh.n_block + j) - vf_load(max + j))*vf_load(scale + j);
            best  = cur > best ? cur : best;
            rest += cur - cur;
        }
        float & dst = res[i_res*N_CELLS_TILE + ic];
        for (int l = 0; l < VL; ++l) {
            dst = std::max(dst, best[l]) + (dst - dst) + rest[l];
        }
    }
}

void score_worker::weigh() {
    const int64_t n_cols_res = sh.n_cols/sh.n_res;

    for (score_piece cur; next(2, cur);) {
        const score_stats st    = of_head(cur.ih);
        const int64_t     cell1 = p.n_scored > 0 ? std::min(p.n_scored, cur.cell1) : cur.cell1;
        if (cur.cell0 >= cell1) {
            continue;
        }

        load_queries(cur.ih);
        load_scales(st.sum);
        for (int64_t cell0 = cur.cell0; cell0 < cell1; cell0 += N_CELLS_TILE) {
            const int64_t n_cells = std::min(N_CELLS_TILE, cell1 - cell0);

            load_tile(cur.ih, cell0, n_cells);
            std::fill(res, res + sh.n_res*N_CELLS_TILE, 0.0f);
            for (int64_t col0 = 0; col0 < sh.ld_c; col0 += sh.n_block) {
                const int64_t n = std::min(sh.n_block, sh.ld_c - col0);

                multiply(cur.ih, cell0, n_cells, col0, n);
                for (int64_t ir = 0; ir < sh.n_res; ++ir) {
                    // whole vectors around the columns that it sums
                    const int64_t j0 = std::max(ir*n_cols_res - col0, int64_t(0))/VL*VL;
                    const int64_t j1 = std::min(fattn_pad((ir + 1)*n_cols_res, VL) - col0, n);
                    if (j0 < j1) {
                        (this->*(p.largest ? &score_worker::largest_block : &score_worker::weigh_block))(
                                n_cells, col0, j0, j1, st.max + col0, ir);
                    }
                }
            }
            for (int64_t ir = 0; ir < sh.n_res; ++ir) {
                float * dst = p.dst[cur.ih*sh.n_res + ir] + cell0;
                const float * own = res + ir*N_CELLS_TILE;
                for (int64_t j = 0; j < n_cells; ++j) {
                    dst[j] = p.keep == 0.0f ? own[j] : p.largest ? std::max(dst[j], own[j]) + (own[j] - own[j]) : p.keep*dst[j] + own[j];
                }
            }
        }
    }
}

static bool supports(const ggml_ragged_scores * p) {
    switch (p->k->type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
            return true;
        default:
            return false;
    }
}

static int64_t n_work(const ggml_ragged_scores * p) {
    const score_shape sh(*p);
    return (sh.n_pieces_all + p->n_head_kv)*sh.n_stats() + p->n_threads*sh.n_thread() + WORK_ALIGN/sizeof(float);
}

template <void (score_worker::*step)()>
static void run(ggml_tensor * dst, int ith, int /*nth*/, void * userdata) {
    const ggml_tensor * work = step == &score_worker::scan ? dst : dst->src[0];

    auto & p = *(ggml_ragged_scores *) userdata;
    if (ith < p.n_threads) {
        (score_worker(p, (float *) work->data, ith).*step)();
    }
}

const ggml_ragged_scores_steps * ggml_cpu_ragged_scores() {
    static const ggml_ragged_scores_steps steps = {
        supports, n_work, run<&score_worker::scan>, run<&score_worker::combine>, run<&score_worker::weigh>,
    };
    return &steps;
}
