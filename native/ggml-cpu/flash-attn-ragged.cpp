// Attention over ragged regions of a pool, see ggml-flash-attn-ragged.h.
//
// The queries of the query heads that share a kv head are the rows of one matrix, so that every cell is read once for all
// of them. An item is a block of rows of one kv head, its work is cut into tiles of cells. The tiles of all items in a row
// are dealt out to the threads in equal shares: an item that a share boundary cuts is attended in parts, each with a
// maximum, a sum and a weighted sum of values of its own, which are combined after a barrier.

#include "flash-attn-ragged.h"
#include "flash-attn-ragged-tiles.h"

#include <algorithm>
#include <cmath>

// up to this many rows per kv head the cells are used as they stream in, more pay for a transposed tile of keys
static constexpr int64_t MAX_ROWS_STREAM = 16;

static constexpr int64_t N_CELLS_STREAM = 128;
static constexpr int64_t N_CELLS_TILE   = 64;
static constexpr int64_t N_ROWS_TILE    = 128;

static constexpr size_t WORK_ALIGN = 64; // one vector, or one cache line

static int64_t fa_pad(int64_t n, int64_t m) {
    return (n + m - 1)/m*m;
}

// shape of the work, the same for every thread
struct fa_shape {
    explicit fa_shape(const ggml_tensor * dst);

    int64_t n_embd_k, n_embd_v;
    int64_t ld_k, ld_v; // of rows in F32, whole vectors

    int64_t n_tokens, n_head, n_head_kv, n_gqa;

    bool    stream;
    int64_t n_cells_tile;
    int64_t n_rows;       // of one kv head
    int64_t n_rows_item;
    int64_t n_items;      // of all kv heads
    int64_t n_items_head;

    // floats of the work buffer
    int64_t n_part()   const { return n_rows_item*(ld_v + 2); }
    int64_t n_thread() const {
        return fa_pad(3*n_part() + n_rows_item*(ld_k + n_cells_tile + 1) + n_cells_tile*(2*ld_k + ld_v), 16);
    }
};

fa_shape::fa_shape(const ggml_tensor * dst) {
    const ggml_tensor * q      = dst->src[0];
    const ggml_tensor * v      = dst->src[2];
    const ggml_tensor * ranges = dst->src[3];

    n_embd_k = q->ne[0];
    n_embd_v = v->ne[0];
    ld_k     = fa_pad(n_embd_k, VL);
    ld_v     = fa_pad(n_embd_v, VL);

    n_tokens  = q->ne[1];
    n_head    = q->ne[2];
    n_head_kv = ranges->ne[1];
    n_gqa     = n_head/n_head_kv;

    n_rows       = n_tokens*n_gqa;
    stream       = n_rows <= MAX_ROWS_STREAM;
    n_cells_tile = stream ? N_CELLS_STREAM : N_CELLS_TILE;
    n_rows_item  = std::min(n_rows, N_ROWS_TILE);
    n_items_head = (n_rows + n_rows_item - 1)/n_rows_item;
    n_items      = n_items_head*n_head_kv;
}

//
// one thread
//

// state of the online softmax of an item, or of a part of its cells
struct fa_part {
    float * o;   // [n_rows_item, ld_v], not normalised
    float * max; // [n_rows_item]
    float * sum; // [n_rows_item]
};

class fa_worker {
public:
    fa_worker(const ggml_compute_params * params, ggml_tensor * dst);

    void attend();  // this thread's share of the tiles
    void combine(); // after all threads have attended

private:
    struct item {
        int64_t ih; // kv head
        int64_t row0, n_rows;
        int64_t n_tiles;
    };

    item    get_item(int64_t i) const;
    int64_t get_visible(int64_t ih, int64_t row) const;
    fa_part get_part(int ith, int slot) const;

    // first tile, of those of an item whose work begins at `work`, that belongs to a thread
    int64_t first_tile(const item & it, int64_t work, int ith) const;

    void attend_item(const item & it, int64_t tile0, int64_t tile1, const fa_part & part);
    void softmax_row(float * s, int64_t n_visible, int64_t n_cells, float * o, float & max, float & sum) const;

    fa_cells read(const ggml_tensor * pool, float * tmp, int64_t ld, int64_t row, int64_t n_cells, ggml_type & type) const;

    void write_row(const item & it, int64_t row, const float * o, float max, float sum) const;

    const fa_shape sh;

    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * sinks;
          ggml_tensor * dst;

    const int32_t * ranges; // [2, n_head_kv]

    float scale, softcap;
    bool  causal;

    int     ith, nth;
    float * wdata;
    int64_t work_total = 0;

    // scratch of this thread
    float   * q_rows; // [n_rows_item,  ld_k], scaled
    float   * s;      // [n_rows_item,  n_cells_tile]
    float   * k_f32;  // [n_cells_tile, ld_k]
    float   * k_t;    // [ld_k,         n_cells_tile]
    float   * v_f32;  // [n_cells_tile, ld_v]
    int32_t * visible; // [n_rows_item]
};

fa_worker::fa_worker(const ggml_compute_params * params, ggml_tensor * dst) :
        sh(dst), q(dst->src[0]), k(dst->src[1]), v(dst->src[2]), sinks(dst->src[4]), dst(dst), ith(params->ith), nth(params->nth) {
    scale   = ggml_get_op_params_f32(dst, 0);
    softcap = ggml_get_op_params_f32(dst, 1);
    causal  = ggml_get_op_params_i32(dst, 3) != 0;

    ranges = (const int32_t *) dst->src[3]->data + 2*sh.n_head_kv*ggml_get_op_params_i32(dst, 2);
    for (int64_t ih = 0; ih < sh.n_head_kv; ++ih) {
        GGML_ASSERT(ranges[2*ih] >= 0 && ranges[2*ih + 1] >= 0 && (int64_t) ranges[2*ih] + ranges[2*ih + 1] <= k->ne[1]);
    }

    for (int64_t i = 0; i < sh.n_items; ++i) {
        const item it = get_item(i);
        work_total += it.n_tiles*it.n_rows;
    }

    wdata = (float *) GGML_PAD((uintptr_t) params->wdata, WORK_ALIGN);
    GGML_ASSERT((char *) (wdata + nth*sh.n_thread()) <= (char *) params->wdata + params->wsize);

    q_rows  = wdata + ith*sh.n_thread() + 3*sh.n_part();
    s       = q_rows + sh.n_rows_item*sh.ld_k;
    k_f32   = s      + sh.n_rows_item*sh.n_cells_tile;
    k_t     = k_f32  + sh.n_cells_tile*sh.ld_k;
    v_f32   = k_t    + sh.n_cells_tile*sh.ld_k;
    visible = (int32_t *) (v_f32 + sh.n_cells_tile*sh.ld_v);
}

int64_t fa_worker::get_visible(int64_t ih, int64_t row) const {
    const int64_t n_cells = ranges[2*ih + 1];
    return causal ? std::max<int64_t>(0, n_cells - sh.n_tokens + row/sh.n_gqa + 1) : n_cells;
}

fa_worker::item fa_worker::get_item(int64_t i) const {
    item it;
    it.ih      = i/sh.n_items_head;
    it.row0    = i%sh.n_items_head*sh.n_rows_item;
    it.n_rows  = std::min(sh.n_rows_item, sh.n_rows - it.row0);
    it.n_tiles = (get_visible(it.ih, it.row0 + it.n_rows - 1) + sh.n_cells_tile - 1)/sh.n_cells_tile;
    return it;
}

// slots 0 and 1: parts that combine() reads. A share can begin inside one item and end inside another. Slot 2: whole items
fa_part fa_worker::get_part(int ith, int slot) const {
    fa_part part;
    part.o   = wdata + ith*sh.n_thread() + slot*sh.n_part();
    part.max = part.o   + sh.n_rows_item*sh.ld_v;
    part.sum = part.max + sh.n_rows_item;
    return part;
}

int64_t fa_worker::first_tile(const item & it, int64_t work, int ith) const {
    const int64_t begin = (work_total*ith + nth - 1)/nth;
    return std::clamp<int64_t>((begin - work + it.n_rows - 1)/it.n_rows, 0, it.n_tiles);
}

void fa_worker::attend() {
    int64_t work = 0;
    for (int64_t i = 0; i < sh.n_items; ++i) {
        const item it = get_item(i);

        const int64_t tile0 = first_tile(it, work, ith);
        const int64_t tile1 = first_tile(it, work, ith + 1);
        work += it.n_tiles*it.n_rows;

        if (tile0 == tile1) {
            continue;
        }

        const bool    whole = tile0 == 0 && tile1 == it.n_tiles;
        const fa_part part  = get_part(ith, whole ? 2 : tile0 > 0 ? 0 : 1);

        attend_item(it, tile0, tile1, part);

        for (int64_t ir = 0; whole && ir < it.n_rows; ++ir) {
            write_row(it, ir, part.o + ir*sh.ld_v, part.max[ir], part.sum[ir]);
        }
    }
}

void fa_worker::combine() {
    float * o = get_part(ith, 2).o;

    int64_t work = 0;
    for (int64_t i = 0; i < sh.n_items; ++i) {
        const item it = get_item(i);

        const int64_t work_item = it.n_tiles*it.n_rows;
        const int jth0 = it.n_tiles == 0 ? 0 : work*nth/work_total;
        const int jth1 = it.n_tiles == 0 ? 0 : (work + work_item - it.n_rows)*nth/work_total;

        // an item without cells is nobody's, its rows are zeros
        const bool whole = it.n_tiles > 0 && jth0 == jth1;

        for (int64_t ir = ith; !whole && ir < it.n_rows; ir += nth) {
            float max = -FLT_MAX;
            float sum = 0.0f;
            std::fill(o, o + sh.ld_v, 0.0f);

            for (int jth = jth0; jth <= jth1; ++jth) {
                const int64_t tile0 = first_tile(it, work, jth);
                if (tile0 == first_tile(it, work, jth + 1)) {
                    continue;
                }

                const fa_part part = get_part(jth, tile0 > 0 ? 0 : 1);

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

        work += work_item;
    }
}

// tile of a pool in rows of whole vectors
fa_cells fa_worker::read(const ggml_tensor * pool, float * tmp, int64_t ld, int64_t row, int64_t n_cells, ggml_type & type) const {
    const fa_cells cells = { (const char *) pool->data + row*pool->nb[1], pool->nb[1] };

    type = pool->type;
    if (pool->ne[0] == ld) {
        return cells;
    }

    fa_convert_padded(type, tmp, ld, cells, pool->ne[0], n_cells);
    type = GGML_TYPE_F32;
    return { (const char *) tmp, ld*sizeof(float) };
}

void fa_worker::attend_item(const item & it, int64_t tile0, int64_t tile1, const fa_part & part) {
    const float q_scale = softcap != 0.0f ? scale/softcap : scale;

    for (int64_t ir = 0; ir < it.n_rows; ++ir) {
        const int64_t row = it.row0 + ir;
        const float * src = (const float *) ((const char *) q->data +
                row/sh.n_gqa*q->nb[1] + (it.ih*sh.n_gqa + row%sh.n_gqa)*q->nb[2]);

        float * x = q_rows + ir*sh.ld_k;
        for (int64_t d = 0; d < sh.n_embd_k; ++d) {
            x[d] = src[d]*q_scale;
        }
        std::fill(x + sh.n_embd_k, x + sh.ld_k, 0.0f);

        visible[ir]  = get_visible(it.ih, row);
        part.max[ir] = -FLT_MAX;
        part.sum[ir] = 0.0f;
    }
    std::fill(part.o, part.o + it.n_rows*sh.ld_v, 0.0f);

    const int64_t ld_s = sh.n_cells_tile;

    for (int64_t tile = tile0; tile < tile1; ++tile) {
        const int64_t cell0   = tile*sh.n_cells_tile;
        const int64_t n_cells = std::min<int64_t>(sh.n_cells_tile, visible[it.n_rows - 1] - cell0);
        const int64_t n_pad   = fa_pad(n_cells, VL);

        ggml_type type_k;
        ggml_type type_v;
        const fa_cells k_tile = read(k, k_f32, sh.ld_k, ranges[2*it.ih] + cell0, n_cells, type_k);
        const fa_cells v_tile = read(v, v_f32, sh.ld_v, ranges[2*it.ih] + cell0, n_cells, type_v);

        fa_with_row_type(type_k, [&](auto row_t) {
            if (sh.stream) {
                fa_stream_k<decltype(row_t)>(s, ld_s, q_rows, sh.ld_k, it.n_rows, k_tile, n_cells);
            } else {
                fa_transpose<decltype(row_t)>(k_t, ld_s, k_tile, sh.ld_k, n_cells);
                fa_gemm(s, ld_s, q_rows, sh.ld_k, k_t, ld_s, it.n_rows, n_pad, sh.n_embd_k, false);
            }
        });

        for (int64_t ir = 0; ir < it.n_rows; ++ir) {
            softmax_row(s + ir*ld_s, visible[ir] - cell0, n_cells, part.o + ir*sh.ld_v, part.max[ir], part.sum[ir]);
        }

        if (sh.stream) {
            fa_with_row_type(type_v, [&](auto row_t) {
                fa_stream_v<decltype(row_t)>(part.o, sh.ld_v, s, ld_s, it.n_rows, v_tile, n_cells);
            });
        } else {
            fa_cells v_rows = v_tile;
            if (type_v != GGML_TYPE_F32) {
                fa_with_row_type(type_v, [&](auto row_t) { fa_convert<decltype(row_t)>(v_f32, sh.ld_v, v_tile, n_cells); });
                v_rows = { (const char *) v_f32, sh.ld_v*sizeof(float) };
            }
            fa_gemm(part.o, sh.ld_v, s, ld_s, (const float *) v_rows.data, v_rows.nb/sizeof(float), it.n_rows, sh.ld_v, n_cells, true);
        }
    }
}

// logits to weights, in place; o and sum follow the maximum
void fa_worker::softmax_row(float * s, int64_t n_visible, int64_t n_cells, float * o, float & max, float & sum) const {
    const int64_t n_pad = fa_pad(n_cells, VL);

    n_visible = std::clamp<int64_t>(n_visible, 0, n_cells);
    std::fill(s + n_visible, s + n_pad, -INFINITY);
    if (n_visible == 0) {
        std::fill(s, s + n_pad, 0.0f);
        return;
    }

    const int64_t n_read = fa_pad(n_visible, VL);

    vf32 tile_max = vf_set1(-FLT_MAX);
    for (int64_t j = 0; j < n_read; j += VL) {
        vf32 x = vf_load(s + j);
        if (softcap != 0.0f) {
            x = x < -FLT_MAX ? x : softcap*vf_tanh(x);
            vf_store(s + j, x);
        }
        tile_max = x > tile_max ? x : tile_max;
    }

    const float max_new = std::max(max, vf_max(tile_max));

    vf32 tile_sum = {};
    for (int64_t j = 0; j < n_pad; j += VL) {
        const vf32 p = vf_exp(vf_load(s + j) - max_new);
        vf_store(s + j, p);
        tile_sum += p;
    }

    if (max_new > max) {
        const float w_old = expf(max - max_new);
        for (int64_t d = 0; d < sh.ld_v; d += VL) {
            vf_store(o + d, w_old*vf_load(o + d));
        }
        sum *= w_old;
        max  = max_new;
    }
    sum += vf_sum(tile_sum);
}

void fa_worker::write_row(const item & it, int64_t ir, const float * o, float max, float sum) const {
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
    fa_worker worker(params, dst);

    worker.attend();
    if (params->nth > 1) {
        ggml_barrier(params->threadpool);
    }
    worker.combine();
}

size_t ggml_flash_attn_ragged_work_size(const ggml_tensor * dst, int n_threads) {
    return n_threads*fa_shape(dst).n_thread()*sizeof(float) + WORK_ALIGN;
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
