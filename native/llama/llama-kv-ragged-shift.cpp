#include "llama-kv-ragged-shift.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <stdexcept>

// rows that a graph rotates: some MiB of F32, whatever the length of the cache
static constexpr int64_t N_CHUNK_MAX = 2048;

// rows that lie elsewhere on their way
static constexpr int64_t N_BETWEEN = 256;

//
// llama_kv_ragged_shift
//

llama_kv_ragged_shift::llama_kv_ragged_shift(
        llama_context & lctx, const llama_kv_cache_ragged & kv, llama_kv_ragged_seq & seq, const llama_kv_ragged_hole & hole) :
    lctx(lctx), hole(hole), of_cells(seq.get_meter()), of_queries(seq.get_meter()) {
    const auto & layers = seq.get_layers();

    for (const auto & rope : kv.get_ropes()) {
        ropes.push_back(make_rope(rope));
    }
    set_hadamard(kv);
    check(seq, hole);

    int64_t n_moved = 0;
    std::vector<int64_t> gaps; // [layers] cells that each head loses at least
    for (size_t i = 0; i < layers.size(); ++i) {
        gaps.push_back(INT64_MAX);
        for (int64_t ih = 0; ih < layers[i].n_head_kv; ++ih) {
            const int64_t i0 = seq.cells[i].find(ih, hole.p0);
            const int64_t i1 = seq.cells[i].find(ih, hole.p1);

            n_moved = std::max(n_moved, seq.n_cells(i, ih) - i1);
            gaps[i] = std::min(gaps[i], i1 - i0);

            seq.cells[i].kept[ih].reserve(1); // see llama_kv_ragged_seq::close()
        }
    }
    n_chunk = std::clamp<int64_t>(n_moved, 1, N_CHUNK_MAX);
    down.assign(n_chunk, -hole.n());

    for (size_t i = 0; i < layers.size(); ++i) {
        between.push_back(make_between(seq, i, gaps[i]));
    }

    const auto & observed = seq.observed;
    int64_t n_head = 0;
    for (const auto & layer : layers) {
        n_head = std::max(n_head, layer.n_head);
    }
    if (std::any_of(observed.pos.begin(), observed.pos.end(), [&](int32_t p) { return p >= hole.p1; })) {
        for (int64_t i = 0; i < n_head*observed.n_rows(); ++i) {
            moves.push_back(observed.pos[i%observed.n_rows()] >= hole.p1 ? -hole.n() : 0);
        }
    }

    // once ahead, with as many rows as there will ever be
    for (size_t i = 0; i < layers.size(); ++i) {
        if (!ropes[i].rotates) {
            continue;
        }
        const auto  & pool = seq.cells[i].pool;
        const int64_t n    = std::min(n_chunk, pool.n_rows());
        rotate(layers[i], ropes[i], of_cells, pool.k, 0, n, nullptr, 0, down.data());
        if (!moves.empty()) {
            const int64_t n_rows = observed.n_rows()*layers[i].n_head;
            rotate(layers[i], ropes[i], of_queries, observed.queries[i].tensor, 0, std::min(n_rows, N_CHUNK_MAX), nullptr, 0, moves.data());
        }
    }
}

llama_kv_ragged_shift::rope llama_kv_ragged_shift::make_rope(const llama_kv_ragged_rope & own) {
    rope res;
    res.own     = own;
    res.rotates = own.kind != llama_kv_ragged_rope::NONE;

    // Keys have the model's own scale of attention already (YaRN, LongRoPE): this rotation must not give it to them again. ggml's
    // rope_yarn() multiplies by what is divided by here
    res.attn_factor = own.ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/own.freq_scale)) : 1.0f;

    if (res.rotates && own.factors) {
        res.factors.resize(own.factors->ne[0]);
        ggml_backend_tensor_get(own.factors, res.factors.data(), 0, ggml_nbytes(own.factors));
    }
    return res;
}

void llama_kv_ragged_shift::set_hadamard(const llama_kv_cache & kv) {
    const ggml_init_params params = {
        /*.mem_size   =*/ 2*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };

    ggml_tensor * rot = kv.build_input_k_rot(ctx.get());
    if (!rot) {
        return;
    }
    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type()) };
    if (!buf) {
        llama_kv_ragged_refuse("no memory for the rotation of cells");
    }
    kv.set_input_k_rot(rot);

    n_hadamard = rot->ne[0];
    hadamard.resize(ggml_nelements(rot));
    ggml_backend_tensor_get(rot, hadamard.data(), 0, ggml_nbytes(rot));
}

void llama_kv_ragged_shift::rotate(
        const llama_kv_ragged_layer     & layer,
        const rope                      & own,
              llama_kv_ragged_workspace & workspace,
              ggml_tensor               * src,
              int64_t                     i0,
              int64_t                     n,
              ggml_tensor               * dst,
              int64_t                     j0,
        const int32_t                   * pos) const {
    llama_kv_ragged_compute graph(lctx, layer, workspace, 24);

    ggml_context * ctx = graph.get_ctx();

    ggml_tensor * shift   = graph.input(GGML_TYPE_I32, n);
    ggml_tensor * factors = own.factors.empty() ? nullptr : graph.input(GGML_TYPE_F32, own.factors.size());
    ggml_tensor * rot     = hadamard.empty()    ? nullptr : graph.input(GGML_TYPE_F32, n_hadamard, n_hadamard);

    // [n_embd_head, 1, n]: a row is one head at one position. A view: where a quantised tensor of its own begins, CUDA clears what is
    // behind its end
    ggml_tensor * rows = ggml_view_3d(ctx, src, src->ne[0], 1, n, src->nb[1], src->nb[1], i0*src->nb[1]);

    ggml_tensor * cur = rows->type == GGML_TYPE_F32 ? rows : ggml_cast(ctx, rows, GGML_TYPE_F32);
    if (rot) {
        cur = llama_mul_mat_hadamard(ctx, cur, rot); // its own inverse
    }
    cur = ggml_rope_ext(ctx, cur, shift, factors, own.own.n_rot, own.own.mode, own.own.n_ctx_orig, own.own.freq_base, own.own.freq_scale,
            own.own.ext_factor, own.attn_factor, own.own.beta_fast, own.own.beta_slow);
    if (rot) {
        cur = llama_mul_mat_hadamard(ctx, cur, rot);
    }
    if (rows->type != GGML_TYPE_F32) {
        cur = ggml_cast(ctx, cur, rows->type);
    }
    ggml_set_output(cur);
    graph.expand(cur);

    graph.alloc();
    ggml_backend_tensor_set(shift, pos, 0, ggml_nbytes(shift));
    if (factors) {
        ggml_backend_tensor_set(factors, own.factors.data(), 0, ggml_nbytes(factors));
    }
    if (rot) {
        ggml_backend_tensor_set(rot, hadamard.data(), 0, ggml_nbytes(rot));
    }
    graph.compute();

    // the rows were read as a whole: they may be written over
    if (dst) {
        llama_kv_ragged_copy_rows(ggml_reshape_2d(ctx, cur, cur->ne[0], n), dst, 0, j0, n);
    }
}

void llama_kv_ragged_shift::check(const llama_kv_ragged_seq & seq, const llama_kv_ragged_hole & hole) {
    const auto & layers = seq.get_layers();

    for (size_t i = 0; i < layers.size(); ++i) {
        std::vector<int64_t> left;
        for (int64_t ih = 0; ih < layers[i].n_head_kv; ++ih) {
            left.push_back(seq.n_cells(i, ih) - int64_t(seq.cells[i].find(ih, hole.p1) - seq.cells[i].find(ih, hole.p0)));
        }
        if (std::any_of(left.begin(), left.end(), [&](int64_t n) { return n != left[0]; })) {
            layers[i].check_ragged();
        }
    }
}

ggml_tensor * llama_kv_ragged_shift::make_between(const llama_kv_ragged_seq & seq, size_t i, int64_t n_gap) {
    const auto & layer = seq.get_layers()[i];
    const auto * v     = seq.cells[i].pool.v;

    const int64_t n = std::min(n_chunk, N_BETWEEN);
    if (layer.on_cpu() || n_gap >= n) {
        return nullptr;
    }
    for (const auto & own : buffers) {
        if (own.tensor->type == v->type && own.tensor->ne[0] == v->ne[0] && ggml_backend_buffer_get_type(own.tensor->buffer) == layer.buft) {
            return own.tensor;
        }
    }
    buffers.push_back(llama_kv_ragged_tensor::make(layer.buft, v->type, { v->ne[0], n, 1 }, "moved rows", seq.get_meter()));
    if (!buffers.back().tensor) {
        llama_kv_ragged_refuse("no memory for the rows that move");
    }
    return buffers.back().tensor;
}

// Rows that move down, by less than their number perhaps. between: where a part of them can lie meanwhile, on devices
static void move_rows(ggml_tensor * tensor, ggml_tensor * between, int64_t i_src, int64_t i_dst, int64_t n) {
    if (n == 0 || i_src == i_dst) {
        return;
    }
    if (ggml_backend_buffer_is_host(tensor->buffer)) {
        char * data = (char *) tensor->data;
        memmove(data + i_dst*tensor->nb[1], data + i_src*tensor->nb[1], n*tensor->nb[1]);
        return;
    }
    // as many at once as do not overlap, or as lie elsewhere meanwhile
    const int64_t n_gap  = i_src - i_dst;
    const bool    direct = !between || n_gap >= between->ne[1];
    const int64_t n_part = direct ? n_gap : between->ne[1];
    for (int64_t i = 0; i < n; i += n_part) {
        const int64_t n_own = std::min(n_part, n - i);
        if (direct) {
            llama_kv_ragged_copy_rows(tensor, tensor, i_src + i, i_dst + i, n_own);
        } else {
            llama_kv_ragged_copy_rows(tensor, between, i_src + i, 0, n_own);
            llama_kv_ragged_copy_rows(between, tensor, 0, i_dst + i, n_own);
        }
    }
}

void llama_kv_ragged_shift::apply_cells(llama_kv_ragged_seq & seq, size_t i) {
    const auto & layer = seq.get_layers()[i];
    const auto & cells = seq.cells[i];
    const auto & pool  = cells.pool;

    for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
        const int64_t n_cells = seq.n_cells(i, ih);
        const int64_t i_dst   = pool.first[ih] + cells.find(ih, hole.p0);
        const int64_t i_src   = pool.first[ih] + cells.find(ih, hole.p1);
        const int64_t n       = pool.first[ih] + n_cells - i_src;

        for (int64_t ir = 0; ir < n && ropes[i].rotates; ir += n_chunk) {
            rotate(layer, ropes[i], of_cells, pool.k, i_src + ir, std::min(n_chunk, n - ir), pool.k,
                    i_dst + ir, down.data());
        }
        if (!ropes[i].rotates) {
            const bool is_alike = pool.k->type == pool.v->type && pool.k->ne[0] == pool.v->ne[0];
            move_rows(pool.k, is_alike ? between[i] : nullptr, i_src, i_dst, n);
        }
        move_rows(pool.v, between[i], i_src, i_dst, n);
    }
}

void llama_kv_ragged_shift::apply_queries(llama_kv_ragged_seq & seq, size_t i) {
    const auto  & layer   = seq.get_layers()[i];
    ggml_tensor * queries = seq.observed.queries[i].tensor;

    const int64_t n_rows = moves.empty() || !ropes[i].rotates ? 0 : seq.observed.n_rows()*layer.n_head;
    for (int64_t ir = 0; ir < n_rows; ir += N_CHUNK_MAX) {
        rotate(layer, ropes[i], of_queries, queries, ir, std::min(N_CHUNK_MAX, n_rows - ir), queries,
                ir, moves.data() + ir);
    }
}

void llama_kv_ragged_shift::apply(llama_kv_ragged_seq & seq) {
    for (size_t i = 0; i < ropes.size(); ++i) {
        apply_cells  (seq, i);
        apply_queries(seq, i);
    }
    seq.close(hole);
}

//
// llama_kv_cache_ragged
//

bool llama_kv_cache_ragged::get_can_shift() const {
    return llama_kv_cache::get_can_shift() && std::all_of(ropes.begin(), ropes.end(), [](const auto & rope) {
        return rope.kind == llama_kv_ragged_rope::NONE || rope.kind == llama_kv_ragged_rope::WHOLE;
    });
}

bool llama_kv_cache_ragged::can_open(llama_pos p0, llama_pos p1, const llama_kv_cache * swa) const {
    if (!get_can_shift() || (swa && !llama_kv_ragged_windows_shift(this, swa))) {
        LLAMA_LOG_DEBUG("%s: [%d, %d) is not a tail of the %u positions, and those behind it cannot be moved\n", __func__, p0, p1, seq.n_pos);
        return false;
    }
    if (visit) {
        LLAMA_LOG_DEBUG("%s: tokens are only observed, [%d, %d) stays until they are gone\n", __func__, p0, p1);
        return false;
    }
    if (!hole.empty()) {
        LLAMA_LOG_DEBUG("%s: the positions [%d, %d) were removed and are not closed, [%d, %d) stays\n", __func__, hole.p0, hole.p1, p0, p1);
        return false;
    }
    // what seq_add() could not close
    if (!lctx) {
        LLAMA_LOG_DEBUG("%s: nothing was evaluated on this context yet, [%d, %d) stays: shift with wkv_shift()\n", __func__, p0, p1);
        return false;
    }
    try {
        if (!planned) {
            llama_kv_ragged_shift::check(seq, { p0, p1 });
        }
    } catch (const std::exception & err) {
        LLAMA_LOG_DEBUG("%s: [%d, %d) stays: %s\n", __func__, p0, p1, err.what());
        return false;
    }
    return true;
}

void llama_kv_cache_ragged::check_closed() const {
    if (!hole.empty()) {
        throw std::invalid_argument(format("the positions %d to %d were removed and the ones behind them did not move: call "
                    "llama_memory_seq_add(mem, 0, %d, -1, %d) first", hole.p0, hole.p1 - 1, hole.p1, -hole.n()));
    }
}

void llama_kv_cache_ragged::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    stayed = false;
    if (seq_id > 0 || shift == 0 || p0 >= (llama_pos) seq.n_pos || (p1 >= 0 && p1 <= std::max(p0, 0))) {
        return; // there is nothing to move
    }
    stayed = true;

    if (is_busy()) {
        llama_kv_ragged_refuse_batch("a selection is running, no position can be moved until it has returned");
        return;
    }
    const bool is_tail = p1 < 0 || p1 >= (llama_pos) seq.n_pos;
    if (hole.empty() || p0 < hole.p0 || p0 > hole.p1 || !is_tail || shift != -hole.n()) {
        llama_kv_ragged_refuse_batch(format("positions from %d on cannot be moved by %d: remove as many before them first, and move all that "
                    "follow (llama_memory_seq_rm(mem, 0, p0, p0 + n), then llama_memory_seq_add(mem, 0, p0 + n, -1, -n))", p0, shift));
        return;
    }
    if (!lctx) {
        llama_kv_ragged_refuse_batch("nothing was evaluated on this context yet: shift with wkv_shift(), or evaluate a token first");
        return;
    }
    try {
        close(*lctx);
        stayed = false;
    } catch (const std::exception & err) {
        llama_kv_ragged_refuse_batch(llama_kv_ragged_reason(err));
    }
}

void llama_kv_cache_ragged::close(llama_context & lctx) {
    synchronize();

    const auto own = planned ? std::move(planned) : std::make_unique<llama_kv_ragged_shift>(lctx, *this, seq, hole);
    try {
        own->apply(seq);
    } catch (const std::exception & err) {
        const std::string reason = llama_kv_ragged_reason(err);
        lctx.get_memory()->clear(true); // some cells moved, and others did not
        llama_kv_ragged_refuse(reason + " while cells moved, and what moved cannot go back: the cache was cleared");
    }
    llama_kv_cache::seq_rm(0, seq.n_pos, -1); // positions are all that it holds: the last ones are as good as those in the hole
    hole = {};
    epoch++;
}

void llama_kv_cache_ragged::shift(llama_context & lctx, int32_t p0, int32_t n) {
    check_not_observing();
    check_closed();

    llama_memory_i & mem = *lctx.get_memory();
    if (!mem.get_can_shift()) {
        llama_kv_ragged_refuse_unsupported("the positions of this model cannot be shifted: its RoPE is not one rotation for a whole head "
                "(positions of several components, or dimensions that differ from layer to layer)");
    }
    if (p0 < 0 || n < 1 || int64_t(p0) + n >= seq.n_pos) {
        throw std::invalid_argument(format("positions %d to %" PRId64 " of %u are to be given up, expected some of them, and some behind them",
                    p0, int64_t(p0) + n - 1, seq.n_pos));
    }
    this->lctx = &lctx;
    synchronize();

    planned = std::make_unique<llama_kv_ragged_shift>(lctx, *this, seq, llama_kv_ragged_hole { p0, p0 + n });
    if (!mem.seq_rm(0, p0, p0 + n)) {
        planned.reset();
        llama_kv_ragged_refuse("what lies beside the cells cannot give these positions up");
    }
    mem.seq_add(0, p0 + n, -1, -n);
    planned.reset();
    if (stayed) {
        throw std::runtime_error(llama_kv_ragged_get_error());
    }
}

bool llama_kv_ragged_stayed(const llama_kv_cache * kv) {
    const auto * ragged = dynamic_cast<const llama_kv_cache_ragged *>(kv);
    return ragged && ragged->has_stayed();
}

bool llama_kv_ragged_windows_shift(const llama_kv_cache * kv, const llama_kv_cache * swa) {
    const auto * ragged = dynamic_cast<const llama_kv_cache_ragged *>(kv);
    return ragged && ragged->can_shift_beside(*swa);
}

bool llama_kv_cache_ragged::can_shift_beside(const llama_kv_cache & swa) const {
    // upstream rotates keys of these types, in every layer of the windows
    const bool has_type = swa.type_k() == GGML_TYPE_F16 || swa.type_k() == GGML_TYPE_F32;
    const bool has_rope = arch != LLM_ARCH_LLAMA4 && arch != LLM_ARCH_SMALLTHINKER && arch != LLM_ARCH_AFMOE;
    return has_type && has_rope;
}
