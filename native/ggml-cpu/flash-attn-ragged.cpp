// Attention over ragged regions of a pool, see ggml-flash-attn-ragged.h: online softmax over tiles of cells, as in FlashAttention
// (Dao et al. 2022, algorithm 1). flash-attn-ragged-work.h says how it is divided among threads.

#include "flash-attn-ragged.h"
#include "flash-attn-ragged-gemm.h"
#include "flash-attn-ragged-stream.h"
#include "flash-attn-ragged-work.h"

#include <algorithm>
#include <cmath>

// one thread
class fattn_worker {
public:
    fattn_worker(const ggml_compute_params * params, ggml_tensor * dst);

    void attend();  // this thread's share of the tiles
    void combine(); // after all threads have attended: rows that were attended in parts

private:
    // steps of attend()
    void attend_item(const fattn_item & it, int64_t tile0, int64_t tile1, const fattn_part & part);
    void load_queries(const fattn_item & it);
    void score_tile  (const fattn_item & it, int64_t cell0, int64_t n_cells);
    void weigh_row   (int64_t ir, int64_t cell0, int64_t n_cells, const fattn_part & part);
    void add_values  (const fattn_item & it, int64_t cell0, int64_t n_cells, const fattn_part & part);

    float mask_row(float * s, int64_t n_visible, int64_t n_cells) const;

    fattn_cells read_tile(const ggml_tensor * pool, float * tmp, int64_t ld, int64_t row, int64_t n_cells, ggml_type & type) const;

    // steps of combine()
    void combine_row(const fattn_item & it, int64_t before, int jth0, int jth1, int64_t ir, float * o) const;

    void write_row(const fattn_item & it, int64_t ir, const float * o, float max, float sum) const;

    const fattn_shape sh;

    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * sinks;
          ggml_tensor * dst;

    float scale, softcap;

    int ith, nth;

    const fattn_work    work;
    const fattn_memory  memory;
    const fattn_scratch own;
};

fattn_worker::fattn_worker(const ggml_compute_params * params, ggml_tensor * dst) :
        sh(dst), q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), sinks(dst->src[4]), dst(dst), ith(params->ith), nth(params->nth),
        work(sh, dst, nth), memory(sh, params->wdata, params->wsize, nth), own(memory.scratch(ith)) {
    scale   = ggml_get_op_params_f32(dst, 0);
    softcap = ggml_get_op_params_f32(dst, 1);
}

void fattn_worker::attend() {
    int64_t before = 0;
    for (int64_t i = 0; i < sh.n_items; ++i) {
        const fattn_item it = work.item(i);

        const int64_t tile0 = work.first_tile(it, before, ith);
        const int64_t tile1 = work.first_tile(it, before, ith + 1);
        before += it.work();

        if (tile0 == tile1) {
            continue;
        }

        const bool       whole = tile0 == 0 && tile1 == it.n_tiles;
        const fattn_part part  = memory.part(ith, whole ? FATTN_SLOT_WHOLE : tile0 > 0 ? FATTN_SLOT_BEGUN_BEFORE : FATTN_SLOT_ENDED_BEHIND);

        attend_item(it, tile0, tile1, part);

        for (int64_t ir = 0; whole && ir < it.n_rows; ++ir) {
            write_row(it, ir, part.o + ir*sh.ld_v, part.max[ir], part.sum[ir]);
        }
    }
}

// rows of an item over tiles tile0 to tile1 - 1 of its cells; writes the part
void fattn_worker::attend_item(const fattn_item & it, int64_t tile0, int64_t tile1, const fattn_part & part) {
    load_queries(it);

    std::fill(part.o,   part.o   + it.n_rows*sh.ld_v, 0.0f);
    std::fill(part.max, part.max + it.n_rows, -FLT_MAX);
    std::fill(part.sum, part.sum + it.n_rows, 0.0f);

    for (int64_t tile = tile0; tile < tile1; ++tile) {
        const int64_t cell0   = tile*sh.n_cells_tile;
        const int64_t n_cells = std::min<int64_t>(sh.n_cells_tile, own.n_visible[it.n_rows - 1] - cell0); // the last row sees most

        score_tile(it, cell0, n_cells);
        for (int64_t ir = 0; ir < it.n_rows; ++ir) {
            weigh_row(ir, cell0, n_cells, part);
        }
        add_values(it, cell0, n_cells, part);
    }
}

// own.q [ld_k, n_rows] and own.n_visible [n_rows] from q [n_embd_k, n_tokens, n_head] F32. Queries are scaled once, instead of all
// scores; with a softcap that is the scale inside of its tanh
void fattn_worker::load_queries(const fattn_item & it) {
    const float q_scale = softcap != 0.0f ? scale/softcap : scale;

    for (int64_t ir = 0; ir < it.n_rows; ++ir) {
        const int64_t row = it.row0 + ir;
        const float * src = (const float *) ((const char *) q->data +
                row/sh.n_gqa*q->nb[1] + (it.ih*sh.n_gqa + row%sh.n_gqa)*q->nb[2]);

        float * x = own.q + ir*sh.ld_k;
        for (int64_t d = 0; d < sh.n_embd_k; ++d) {
            x[d] = src[d]*q_scale;
        }
        std::fill(x + sh.n_embd_k, x + sh.ld_k, 0.0f);

        own.n_visible[ir] = work.n_visible(it.ih, row);
    }
}

// n_cells rows of a pool from `row` on as cells of ld elements, and their type: the pool's own rows where these are whole vectors,
// otherwise copies in F32 with zeros behind them in tmp [ld, n_cells]
fattn_cells fattn_worker::read_tile(const ggml_tensor * pool, float * tmp, int64_t ld, int64_t row, int64_t n_cells, ggml_type & type) const {
    const fattn_cells cells = { (const char *) pool->data + row*pool->nb[1], pool->nb[1] };

    type = pool->type;
    if (pool->ne[0] == ld) {
        return cells;
    }

    fattn_convert_padded(type, tmp, ld, cells, pool->ne[0], n_cells);
    type = GGML_TYPE_F32;
    return { (const char *) tmp, ld*sizeof(float) };
}

// own.s [n_cells_tile, n_rows] = own.q*K^T over n_cells cells of the head from cell0 on. Columns behind them are of no meaning
void fattn_worker::score_tile(const fattn_item & it, int64_t cell0, int64_t n_cells) {
    const int64_t ld_s = sh.n_cells_tile;

    ggml_type type;
    const fattn_cells tile = read_tile(k, own.k, sh.ld_k, work.first_row(it.ih) + cell0, n_cells, type);

    fattn_with_row_type(type, [&](auto row_t) {
        if (sh.stream) {
            fattn_stream_scores<decltype(row_t)>(own.s, ld_s, own.q, sh.ld_k, it.n_rows, tile, n_cells);
        } else {
            fattn_transpose<decltype(row_t)>(own.k_t, ld_s, tile, sh.ld_k, n_cells);
            fattn_gemm(own.s, ld_s, own.q, sh.ld_k, own.k_t, ld_s, it.n_rows, fattn_pad(n_cells, VL), sh.n_embd_k, false);
        }
    });
}

// One row of own.s, in place: -inf from n_visible > 0 to the end of the last vector, the softcap before; the largest score
float fattn_worker::mask_row(float * s, int64_t n_visible, int64_t n_cells) const {
    std::fill(s + n_visible, s + fattn_pad(n_cells, VL), -INFINITY);

    const int64_t n_read = fattn_pad(n_visible, VL);

    vf32 res = vf_set1(-FLT_MAX);
    for (int64_t j = 0; j < n_read; j += VL) {
        vf32 x = vf_load(s + j);
        if (softcap != 0.0f) {
            x = x < -FLT_MAX ? x : softcap*vf_tanh(x);
            vf_store(s + j, x);
        }
        res = x > res ? x : res;
    }
    return vf_max(res);
}

// One step of the online softmax: the scores of row ir in own.s become weights, those of cells that it does not see 0. If a score
// is larger than all before, the sums of the row so far are scaled to the new maximum
void fattn_worker::weigh_row(int64_t ir, int64_t cell0, int64_t n_cells, const fattn_part & part) {
    const int64_t n_pad     = fattn_pad(n_cells, VL);
    const int64_t n_visible = std::clamp<int64_t>(own.n_visible[ir] - cell0, 0, n_cells);

    float * s = own.s  + ir*sh.n_cells_tile;
    float * o = part.o + ir*sh.ld_v;

    if (n_visible == 0) {
        std::fill(s, s + n_pad, 0.0f);
        return;
    }

    const float max_old = part.max[ir];
    const float max_new = std::max(max_old, mask_row(s, n_visible, n_cells));

    vf32 tile_sum = {};
    for (int64_t j = 0; j < n_pad; j += VL) {
        const vf32 p = vf_exp(vf_load(s + j) - max_new);
        vf_store(s + j, p);
        tile_sum += p;
    }

    if (max_new > max_old) {
        const float w_old = expf(max_old - max_new);
        for (int64_t d = 0; d < sh.ld_v; d += VL) {
            vf_store(o + d, w_old*vf_load(o + d));
        }
        part.sum[ir] *= w_old;
        part.max[ir]  = max_new;
    }
    part.sum[ir] += vf_sum(tile_sum);
}

// part.o [ld_v, n_rows] += own.s*V, with the weights of own.s [n_cells_tile, n_rows]
void fattn_worker::add_values(const fattn_item & it, int64_t cell0, int64_t n_cells, const fattn_part & part) {
    const int64_t ld_s = sh.n_cells_tile;

    ggml_type type;
    fattn_cells tile = read_tile(v, own.v, sh.ld_v, work.first_row(it.ih) + cell0, n_cells, type);

    if (sh.stream) {
        fattn_with_row_type(type, [&](auto row_t) {
            fattn_stream_values<decltype(row_t)>(part.o, sh.ld_v, own.s, ld_s, it.n_rows, tile, n_cells);
        });
        return;
    }
    if (type != GGML_TYPE_F32) {
        fattn_with_row_type(type, [&](auto row_t) { fattn_convert<decltype(row_t)>(own.v, sh.ld_v, tile, n_cells); });
        tile = { (const char *) own.v, sh.ld_v*sizeof(float) };
    }
    fattn_gemm(part.o, sh.ld_v, own.s, ld_s, (const float *) tile.data, tile.nb/sizeof(float), it.n_rows, sh.ld_v, n_cells, true);
}

void fattn_worker::combine() {
    float * o = memory.part(ith, FATTN_SLOT_WHOLE).o; // of no use any more

    int64_t before = 0;
    for (int64_t i = 0; i < sh.n_items; ++i) {
        const fattn_item it = work.item(i);

        // the threads that have its first and its last tile
        const int jth0 = it.n_tiles == 0 ? 0 : work.owner(before);
        const int jth1 = it.n_tiles == 0 ? 0 : work.owner(before + it.work() - it.n_rows);

        // an item without cells is nobody's, its rows are zeros
        const bool whole = it.n_tiles > 0 && jth0 == jth1;

        for (int64_t ir = ith; !whole && ir < it.n_rows; ir += nth) {
            combine_row(it, before, jth0, jth1, ir, o);
        }

        before += it.work();
    }
}

// A row from the parts of threads jth0 to jth1, some of which may have got no tile of the item; o: [ld_v], overwritten
void fattn_worker::combine_row(const fattn_item & it, int64_t before, int jth0, int jth1, int64_t ir, float * o) const {
    float max = -FLT_MAX;
    float sum = 0.0f;
    std::fill(o, o + sh.ld_v, 0.0f);

    for (int jth = jth0; jth <= jth1; ++jth) {
        const int64_t tile0 = work.first_tile(it, before, jth);
        if (tile0 == work.first_tile(it, before, jth + 1)) {
            continue;
        }

        const fattn_part part = memory.part(jth, tile0 > 0 ? FATTN_SLOT_BEGUN_BEFORE : FATTN_SLOT_ENDED_BEHIND);

        const float max_new = std::max(max, part.max[ir]);
        const float w_old   = expf(max          - max_new);
        const float w_part  = expf(part.max[ir] - max_new);
        for (int64_t d = 0; d < sh.ld_v; ++d) {
            o[d] = o[d]*w_old + part.o[ir*sh.ld_v + d]*w_part;
        }
        sum = sum*w_old + part.sum[ir]*w_part;
        max = max_new;
    }

    write_row(it, ir, o, max, sum);
}

// dst [n_embd_v, n_head, n_tokens] F32 from the sums of a row: o [ld_v] divided by the sum of its weights, to which the sink of its
// query head adds without a value. Zeros for a row that saw nothing
void fattn_worker::write_row(const fattn_item & it, int64_t ir, const float * o, float max, float sum) const {
    const int64_t row = it.row0 + ir;
    const int64_t ih  = it.ih*sh.n_gqa + row%sh.n_gqa;

    float w = 1.0f;
    if (sinks) {
        const float sink    = ((const float *) sinks->data)[ih];
        const float max_new = std::max(max, sink);

        w   = expf(max - max_new);
        sum = sum*w + expf(sink - max_new);
    }
    w = sum == 0.0f ? 0.0f : w/sum;

    float * y = (float *) ((char *) dst->data + ih*dst->nb[1] + row/sh.n_gqa*dst->nb[2]);
    for (int64_t d = 0; d < sh.n_embd_v; ++d) {
        y[d] = o[d]*w;
    }
}

void ggml_compute_forward_flash_attn_ragged(const ggml_compute_params * params, ggml_tensor * dst) {
    fattn_worker worker(params, dst);

    worker.attend();
    if (params->nth > 1) {
        ggml_barrier(params->threadpool);
    }
    worker.combine();
}

size_t ggml_flash_attn_ragged_work_size(const ggml_tensor * dst, int n_threads) {
    return n_threads*fattn_shape(dst).n_thread()*sizeof(float) + WORK_ALIGN;
}

bool ggml_flash_attn_ragged_supported(const ggml_tensor * dst) {
    for (const ggml_tensor * pool : { dst->src[1], dst->src[2] }) {
        switch (pool->type) {
            case GGML_TYPE_F32:
            case GGML_TYPE_F16:
            case GGML_TYPE_BF16:
            case GGML_TYPE_Q8_0:
            case GGML_TYPE_Q4_0:
                break;
            default:
                return false;
        }
    }
    return true;
}
