// Compaction of the ragged cache: score on the layer's backend, select on the host, gather out of place.
//
// It runs in graphs of its own on the backends of the context, one layer at a time: the scheduler would have to be
// reserved again for them and would keep their peak.

#include "llama-kv-cache-ragged.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "policy/wkv-policy.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <numeric>
#include <stdexcept>

static double elapsed_ms(int64_t t_start_us) {
    return (ggml_time_us() - t_start_us)/1000.0;
}

[[noreturn]] static void fail(const std::string & msg) {
    llama_kv_ragged_set_error(msg);
    throw std::runtime_error(msg);
}

std::string llama_kv_cache_ragged::no_ragged_attention(const llama_kv_ragged_layer & layer) {
    return format("kv_policy: %s has no attention over heads of different lengths (layer %u, head size %" PRId64 "): choose a policy "
            "that gives all heads of a layer the same number of cells, or keep the cells in host memory, where the CPU attends to them, "
            "with offload_kqv=False (slower), or load the model with n_gpu_layers=0",
            ggml_backend_dev_name(layer.dev), layer.il, layer.n_embd_head_k);
}

// a graph on one backend; its compute buffer counts as live while it exists
class ragged_graph {
public:
    ragged_graph(llama_context * lctx, const llama_kv_ragged_layer & layer, llama_kv_ragged_meter & meter, size_t n_tensors) : meter(meter) {
        backend = llama_kv_ragged_backend(*lctx, layer.dev);
        if (!backend) {
            fail(format("kv_policy: the context has no backend for the device of layer %u", layer.il));
        }

        const ggml_init_params params = {
            /*.mem_size   =*/ n_tensors*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false),
            /*.mem_buffer =*/ nullptr,
            /*.no_alloc   =*/ true,
        };
        ctx.reset(ggml_init(params));
        gf = ggml_new_graph_custom(ctx.get(), n_tensors, false);
        galloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
    }

    ~ragged_graph() {
        meter.add(-size);
    }

    ggml_context * get_ctx() const { return ctx.get(); }

    void expand(ggml_tensor * cur) { ggml_build_forward_expand(gf, cur); }

    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1 = 1) {
        ggml_tensor * cur = ggml_new_tensor_2d(ctx.get(), type, ne0, ne1);
        ggml_set_input(cur);
        return cur;
    }

    void alloc() {
        // there is no scheduler to fall back to another backend
        for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
            if (!ggml_backend_supports_op(backend, ggml_graph_node(gf, i))) {
                fail(format("kv_policy: %s cannot compute %s, load the model with n_gpu_layers=0 or without a policy",
                            ggml_backend_name(backend), ggml_op_name(ggml_graph_node(gf, i)->op)));
            }
        }
        if (!ggml_gallocr_alloc_graph(galloc.get(), gf)) {
            fail("kv_policy: no memory for the compaction graph");
        }
        size = ggml_gallocr_get_buffer_size(galloc.get(), 0);
        meter.add(size);
    }

    void compute() {
        const ggml_status status = ggml_backend_graph_compute(backend, gf);
        if (status != GGML_STATUS_SUCCESS) {
            fail(format("kv_policy: the compaction graph failed (%s)", ggml_status_to_string(status)));
        }
    }

private:
    llama_kv_ragged_meter & meter;

    ggml_backend_t   backend = nullptr;
    ggml_context_ptr ctx;
    ggml_gallocr_ptr galloc;
    ggml_cgraph    * gf   = nullptr;
    int64_t          size = 0;
};

std::vector<float> llama_kv_cache_ragged::score(
        llama_context * lctx, const llama_kv_ragged_layer & layer, const std::vector<int32_t> & alphas) {
    return score(lctx, layer, alphas, true);
}

std::vector<float> llama_kv_cache_ragged::score_heads(llama_context * lctx, const llama_kv_ragged_layer & layer) {
    return score(lctx, layer, { 1 }, false);
}

std::vector<float> llama_kv_cache_ragged::score(
        llama_context * lctx, const llama_kv_ragged_layer & layer, const std::vector<int32_t> & alphas, bool mean) {
    const auto    len       = n_cells(layer);
    const int64_t n_gqa     = layer.n_head/layer.n_head_kv;
    const int64_t n_head_kv = layer.n_head_kv;

    // Ring rows of the positions that were observed, in the order of these: sums then do not depend on the size of the ring.
    const int32_t alpha_max = *std::max_element(alphas.begin(), alphas.end());

    std::vector<int32_t> rows;
    for (uint32_t i = 0; i < n_window; ++i) {
        if (ring_pos[i] >= 0 && ring_pos[i] >= (int32_t) n_pos - alpha_max) {
            rows.push_back(i);
        }
    }
    std::sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) { return ring_pos[a] < ring_pos[b]; });

    const int64_t n_rows = rows.size();

    const auto is_observed = [&](int64_t i, int32_t alpha) { return ring_pos[rows[i]] >= (int32_t) n_pos - alpha; };

    std::vector<int64_t> n_observed;
    for (const int32_t alpha : alphas) {
        n_observed.push_back(0);
        for (int64_t i = 0; i < n_rows; ++i) {
            n_observed.back() += is_observed(i, alpha);
        }
    }

    if (n_pos == 0 || *std::min_element(n_observed.begin(), n_observed.end()) == 0) {
        fail("kv_policy: nothing to score, evaluate a prompt first");
    }

    // ggml_acc() keeps distances in 32 bits
    const int64_t n_max = *std::max_element(len.begin(), len.end());
    if (n_max*n_rows*n_gqa*(int64_t) sizeof(float) > INT32_MAX) {
        fail(format("kv_policy: the scores of %" PRId64 " cells by %" PRId64 " tokens of %" PRId64 " heads take over 2 GiB, observe fewer tokens (alpha)",
                    n_max, n_rows, n_gqa));
    }

    ragged_graph graph(lctx, layer, meter, 32*(n_head_kv + 1));
    ggml_context * ctx = graph.get_ctx();

    const float softcap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f;

    // A learned sink takes a share of every query's attention. Where this backend cannot read the model's tensor, the scores
    // do without: that scales all cells of a query alike.
    ggml_tensor * sinks = layer.sinks && layer.sinks->buffer &&
        ggml_backend_dev_supports_buft(layer.dev, ggml_backend_buffer_get_type(layer.sinks->buffer)) ? layer.sinks : nullptr;

    // a column of weights for every result: one per alpha for the means, or one per query head
    const int64_t n_res = mean ? alphas.size() : n_gqa;

    ggml_tensor * weights = graph.input(GGML_TYPE_F32, n_rows*n_gqa, n_res);
    ggml_tensor * idxs    = graph.input(GGML_TYPE_I32, n_rows, n_gqa);

    // An observed query sees the cells up to its own position; one that is older than every cell that is left sees all of them,
    // which prefers none. What a query does not see are the last cells of a head, no more than the ring has rows: a mask for
    // these is all that crosses the bus.
    const auto n_unseen = [&](const std::vector<int32_t> & pos, int64_t i) -> int64_t {
        const int64_t n_older = std::upper_bound(pos.begin(), pos.end(), ring_pos[rows[i]]) - pos.begin();
        return n_older > 0 ? pos.size() - n_older : 0;
    };

    // before the first compaction all heads hold the same positions
    const int64_t n_masks = layer.boundary == 0 ? 1 : n_head_kv;

    std::vector<ggml_tensor *>      masks; // nullptr: every query sees all
    std::vector<std::vector<float>> masks_data;
    for (int64_t ih = 0; ih < n_masks; ++ih) {
        const auto pos = positions(layer, ih);

        int64_t n_tail = 0;
        for (int64_t i = 0; i < n_rows; ++i) {
            n_tail = std::max(n_tail, n_unseen(pos, i));
        }
        masks.push_back(n_tail > 0 ? graph.input(GGML_TYPE_F32, n_tail, n_rows*n_gqa) : nullptr);

        std::vector<float> data(n_tail*n_rows*n_gqa, 0.0f);
        for (int64_t i = 0; i < n_rows*n_gqa; ++i) {
            const auto end = data.begin() + (i + 1)*n_tail;
            std::fill(end - n_unseen(pos, i % n_rows), end, -INFINITY);
        }
        masks_data.push_back(std::move(data));
    }

    std::vector<ggml_tensor *> sums;
    for (int64_t ih = 0; ih < n_head_kv; ++ih) {
        const int64_t n = len[ih];

        ggml_tensor * k = ggml_view_2d(ctx, layer.pool.k, layer.n_embd_head_k, n, layer.pool.k->nb[1], layer.pool.first[ih]*layer.pool.k->nb[1]);
        ggml_tensor * q = ggml_view_3d(ctx, layer.ring, layer.n_embd_head_k, n_window, n_gqa, layer.ring->nb[1], layer.ring->nb[2],
                ih*n_gqa*layer.ring->nb[2]);

        q = ggml_reshape_2d(ctx, ggml_get_rows(ctx, q, idxs), layer.n_embd_head_k, n_rows*n_gqa); // F32

        ggml_tensor * kq = ggml_mul_mat(ctx, k, q); // [n, n_rows*n_gqa]
        ggml_prec_set_acc(kq, GGML_PREC_F32);
        if (softcap > 0.0f) {
            kq = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, layer.kq_scale/softcap)), softcap);
        }

        if (ggml_tensor * mask = masks[std::min(ih, n_masks - 1)]) {
            kq = ggml_acc_inplace(ctx, kq, mask, kq->nb[1], kq->nb[2], kq->nb[3], (n - mask->ne[0])*kq->nb[0]);
        }

        kq = ggml_reshape_3d(ctx, kq, n, n_rows, n_gqa);
        kq = ggml_soft_max_ext(ctx, kq, nullptr, softcap > 0.0f ? 1.0f : layer.kq_scale, 0.0f);
        if (sinks) {
            ggml_soft_max_add_sinks(kq, ggml_view_1d(ctx, sinks, n_gqa, ih*n_gqa*sinks->nb[0]));
        }
        kq = ggml_reshape_2d(ctx, kq, n, n_rows*n_gqa);

        ggml_tensor * sum = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, kq)), weights); // [n, n_res]
        ggml_set_output(sum);
        graph.expand(sum);
        sums.push_back(sum);
    }

    graph.alloc();

    std::vector<float> data(n_rows*n_gqa*n_res, 0.0f);
    for (int64_t ir = 0; ir < n_res; ++ir) {
        const size_t ia = mean ? ir : 0;
        for (int64_t ig = 0; ig < n_gqa; ++ig) {
            for (int64_t i = 0; i < n_rows; ++i) {
                if (is_observed(i, alphas[ia]) && (mean || ig == ir)) {
                    data[ir*n_rows*n_gqa + ig*n_rows + i] = 1.0f/float(n_observed[ia]*(mean ? n_gqa : 1));
                }
            }
        }
    }
    ggml_backend_tensor_set(weights, data.data(), 0, ggml_nbytes(weights));

    for (int64_t ig = 0; ig < n_gqa; ++ig) {
        ggml_backend_tensor_set(idxs, rows.data(), ig*idxs->nb[1], idxs->nb[1]);
    }

    for (int64_t ih = 0; ih < n_masks; ++ih) {
        if (masks[ih]) {
            ggml_backend_tensor_set(masks[ih], masks_data[ih].data(), 0, ggml_nbytes(masks[ih]));
        }
    }

    graph.compute();

    // the results of one alpha follow each other, those of query heads head by head
    const size_t n_plane = std::accumulate(len.begin(), len.end(), size_t(0));

    std::vector<float> res(n_plane*n_res);
    size_t i0 = 0;
    for (int64_t ih = 0; ih < n_head_kv; ++ih) {
        for (int64_t ir = 0; ir < n_res; ++ir) {
            float * dst = res.data() + (mean ? ir*n_plane + i0 : i0*n_res + ir*len[ih]);
            ggml_backend_tensor_get(sums[ih], dst, ir*sums[ih]->nb[1], len[ih]*sizeof(float));
        }
        i0 += len[ih];
    }
    return res;
}

// the I32 alias of a pool: get_rows then copies the bytes of any cell type
static ggml_tensor * alias_i32(ggml_context * ctx, ggml_tensor * pool) {
    ggml_tensor * res = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, pool->nb[1]/sizeof(int32_t), pool->ne[1]);
    ggml_backend_tensor_alloc(pool->buffer, res, pool->data);
    return res;
}

void llama_kv_cache_ragged::gather(llama_context * lctx, llama_kv_ragged_layer & layer, const uint8_t * keep, const int32_t * n_keep) {
    const auto len = n_cells(layer);

    const std::vector<int64_t> len_next(n_keep, n_keep + layer.n_head_kv);

    // heads that fill at different rows are given the same room
    const int64_t n_mean  = std::accumulate(len_next.begin(), len_next.end(), int64_t(0))/layer.n_head_kv;
    const bool    uniform = std::all_of(len_next.begin(), len_next.end(), [&](int64_t n) { return n == n_mean; });

    const int64_t slack   = std::max<int64_t>(uniform ? 1 : 16, n_mean/64);

    llama_kv_ragged_pool next = layer.make_pool(layer.capacity(len_next, slack, true), &meter);
    if (next.empty()) {
        fail(format("kv_policy: no memory for %" PRId64 " cells per head in layer %u", n_mean, layer.il));
    }

    std::vector<std::vector<int32_t>> kept(layer.n_head_kv);

    // unused rows repeat a valid one, they have to be finite
    std::vector<int32_t> rows(next.n_rows(), 0);
    for (int64_t ih = 0; ih < layer.n_head_kv; ++ih) {
        const auto pos = positions(layer, ih);
        for (int64_t i = 0; i < len[ih]; ++i) {
            if (keep[i]) {
                rows[next.first[ih] + kept[ih].size()] = layer.pool.first[ih] + i;
                kept[ih].push_back(pos[i]);
            }
        }
        keep += len[ih];
        GGML_ASSERT((int64_t) kept[ih].size() == len_next[ih]);
    }

    const auto pairs = { std::make_pair(layer.pool.k, next.k), std::make_pair(layer.pool.v, next.v) };

    bool aligned = true;
    for (const auto & [src, dst] : pairs) {
        aligned = aligned && src->nb[1] % sizeof(int32_t) == 0;
    }

    if (aligned) {
        ragged_graph graph(lctx, layer, meter, 8);
        ggml_context * ctx = graph.get_ctx();

        ggml_tensor * idxs = graph.input(GGML_TYPE_I32, next.n_rows());
        for (const auto & [src, dst] : pairs) {
            ggml_tensor * cur = ggml_get_rows(ctx, alias_i32(ctx, src), idxs);
            ggml_backend_tensor_alloc(dst->buffer, cur, dst->data);
            graph.expand(cur);
        }

        graph.alloc();
        ggml_backend_tensor_set(idxs, rows.data(), 0, ggml_nbytes(idxs));
        graph.compute();
    } else {
        // quantised rows of some head sizes do not end on four bytes
        for (const auto & [src, dst] : pairs) {
            const size_t n_row = src->nb[1];

            std::vector<uint8_t> from(ggml_nbytes(src));
            std::vector<uint8_t> to(ggml_nbytes(dst));
            ggml_backend_tensor_get(src, from.data(), 0, from.size());
            for (size_t i = 0; i < rows.size(); ++i) {
                std::copy_n(from.begin() + rows[i]*n_row, n_row, to.begin() + i*n_row);
            }
            ggml_backend_tensor_set(dst, to.data(), 0, to.size());
        }
    }

    layer.pool     = std::move(next);
    layer.kept     = std::move(kept);
    layer.boundary = n_pos;
}

void llama_kv_cache_ragged::check_compaction(int32_t alpha, int64_t n_cells_mean) const {
    if (n_cells_mean < 1) {
        throw std::invalid_argument(format("budget is %" PRId64 " cells per head, expected at least 1", n_cells_mean));
    }
    if (alpha < 0 || alpha > (int32_t) n_window) {
        throw std::invalid_argument(format("the policy observes %d tokens but the ring holds %u, call wkv_set_window first", alpha, n_window));
    }
}

std::vector<int32_t> llama_kv_cache_ragged::all_cells() const {
    std::vector<int32_t> res;
    for (const auto & layer : layers) {
        const auto own = n_cells(layer);
        res.insert(res.end(), own.begin(), own.end());
    }
    return res;
}

wkv::shapes llama_kv_cache_ragged::shapes_of(const std::vector<int32_t> & cells) const {
    const auto & layer = layers[0];
    return { (int32_t) layers.size(), (int32_t) layer.n_head_kv, (int32_t) (layer.n_head/layer.n_head_kv), (int32_t) n_pos, cells.data() };
}

int64_t llama_kv_cache_ragged::compact(llama_context * lctx, const wkv::policy & policy, int64_t n_cells_mean) {
    const std::string error = wkv::policy_error(policy);
    if (!error.empty()) {
        throw std::invalid_argument("policy: " + error);
    }
    const auto sizes = wkv::window_sizes(policy);

    check_compaction(sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end()), n_cells_mean);

    const auto        cells  = all_cells();
    const wkv::shapes shapes = shapes_of(cells);

    const std::string misfit = wkv::shapes_error(policy, shapes);
    if (!misfit.empty()) {
        throw std::invalid_argument("policy: " + misfit);
    }

    // heads that compete need scores, unless everything fits; for the others the budgets tell before anything is computed
    std::vector<int32_t> budgets;
    if (wkv::needs_scores_for_budgets(policy)) {
        if (wkv::fits(shapes, n_cells_mean)) {
            return 0;
        }
    } else {
        wkv::budgets(wkv::cache_view(policy, shapes, nullptr, nullptr), n_cells_mean, budgets);
        if (budgets == cells) {
            return 0;
        }
    }

    const bool each = policy.scoring.query_heads == wkv::query_heads::each;

    return compact(lctx, sizes, shapes, each, [&](const int32_t * pos, const float * scores, uint8_t * keep) {
        const wkv::cache_view view(policy, shapes, pos, scores);

        std::string refused = wkv::budgets(view, n_cells_mean, budgets);
        if (refused.empty()) {
            refused = wkv::select(view, budgets.data(), keep);
        }
        if (!refused.empty()) {
            fail("kv_policy: " + refused);
        }
    });
}

int64_t llama_kv_cache_ragged::compact(
        llama_context * lctx, int32_t alpha, int64_t n_cells_mean, wkv_select_fn fn, void * user) {
    check_compaction(alpha, n_cells_mean);

    const auto        cells  = all_cells();
    const wkv::shapes shapes = shapes_of(cells);
    const wkv_shapes  given  = { shapes.n_layer, shapes.n_head_kv, shapes.n_gqa, shapes.n_past, shapes.cells };

    const std::vector<int32_t> alphas(alpha > 0 ? 1 : 0, alpha);

    return compact(lctx, alphas, shapes, false, [&](const int32_t * pos, const float * scores, uint8_t * keep) {
        if (fn(user, &given, n_cells_mean, pos, scores, keep) != 0) {
            throw std::invalid_argument("the selection was given up, nothing was evicted");
        }

        const std::string error = wkv::selection_error(shapes, n_cells_mean, keep);
        if (!error.empty()) {
            throw std::invalid_argument(error);
        }
    });
}

int64_t llama_kv_cache_ragged::compact(
        llama_context * lctx, const std::vector<int32_t> & alphas, const wkv::shapes & shapes, bool each, const keep_fn & fn) {
    const int32_t n_head_kv = shapes.n_head_kv;

    lctx->synchronize();

    // score

    const int64_t t_start_us = ggml_time_us();

    std::vector<int32_t>            pos;
    std::vector<std::vector<float>> planes(std::max<size_t>(1, alphas.size()));
    for (const auto & layer : layers) {
        const size_t i0 = pos.size();
        for (int64_t ih = 0; ih < n_head_kv; ++ih) {
            const auto cur = positions(layer, ih);
            pos.insert(pos.end(), cur.begin(), cur.end());
        }

        const auto   cur = alphas.empty() ? std::vector<float>(pos.size() - i0, 0.0f) : score(lctx, layer, alphas, !each);
        const size_t n   = cur.size()/planes.size();
        for (size_t i = 0; i < planes.size(); ++i) {
            planes[i].insert(planes[i].end(), cur.begin() + i*n, cur.begin() + (i + 1)*n);
        }
    }

    std::vector<float> scores = std::move(planes[0]);
    for (size_t i = 1; i < planes.size(); ++i) {
        scores.insert(scores.end(), planes[i].begin(), planes[i].end());
    }

    const int64_t t_select_us = ggml_time_us();

    // select

    std::vector<uint8_t> keep(pos.size());

    fn(pos.data(), scores.data(), keep.data());

    // cells that stay of every head, and where its part of keep begins
    std::vector<int32_t> budgets;
    std::vector<size_t>  offsets = { 0 };
    for (int32_t i = 0; i < shapes.n_layer*n_head_kv; ++i) {
        const auto it = keep.begin() + offsets.back();
        budgets.push_back(shapes.cells[i] - std::count(it, it + shapes.cells[i], 0));
        offsets.push_back(offsets.back() + shapes.cells[i]);
    }
    if (std::equal(budgets.begin(), budgets.end(), shapes.cells)) {
        return 0;
    }

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto * first = budgets.data() + i*n_head_kv;
        if (!layers[i].has_ragged && std::any_of(first, first + n_head_kv, [&](int32_t n) { return n != *first; })) {
            fail(no_ragged_attention(layers[i]));
        }
    }

    const int64_t t_gather_us = ggml_time_us();

    // gather: from here on every finished layer is compacted, whatever happens to the next ones

    const int64_t bytes_before = meter.live;
    int64_t n_released = 0;

    boundary = n_pos;
    epoch++;

    for (size_t i = 0; i < layers.size(); ++i) {
        const size_t i0 = i*n_head_kv;

        gather(lctx, layers[i], keep.data() + offsets[i0], budgets.data() + i0);
        for (size_t j = i0; j < i0 + n_head_kv; ++j) {
            n_released += shapes.cells[j] - budgets[j];
        }
    }

    llama_kv_ragged_trim();

    n_compactions++;
    bytes_released = bytes_before - meter.live;
    t_score_ms     = (t_select_us - t_start_us)/1000.0;
    t_select_ms    = (t_gather_us - t_select_us)/1000.0;
    t_gather_ms    = elapsed_ms(t_gather_us);

    return n_released;
}
