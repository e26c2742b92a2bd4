#include "llama-kv-ragged-select.h"

#include "ggml-ragged-select.h"
#include "llama-impl.h"

#include <algorithm>
#include <cstring>

llama_kv_ragged_device_keys::llama_kv_ragged_device_keys(llama_kv_ragged_choice & choice, const wkv::cache_view & view) :
    choice(choice), view(view), count_space(choice.get_seq().get_meter()), mark_space(choice.get_seq().get_meter()),
    claim(choice.get_seq().get_meter()) {
}

static ggml_ragged_selection selection_of(const wkv_policy & policy, wkv::places kind) {
    switch (kind) {
        case wkv::places::tokens:  return { GGML_RAGGED_PLACES_TOKENS, 0, 0, 0 };
        case wkv::places::rest:    return { GGML_RAGGED_PLACES_REST,   0, 0, 0 };
        case wkv::places::windows: return { GGML_RAGGED_PLACES_WINDOWS, policy.selection.omega, policy.selection.top_p,
                                            policy.selection.protect_first };
    }
    GGML_ABORT("unknown places");
}

// cells with a key
static int32_t n_keys_of(const wkv_policy & policy, wkv::places kind, int32_t n_cells) {
    return kind == wkv::places::rest ? n_cells : std::max(0, n_cells - policy.scoring.window_size);
}

static size_t plane_of(wkv::places kind) {
    return kind == wkv::places::rest ? 1 : 0;
}

bool llama_kv_ragged_device_keys::has_op(const llama_kv_ragged_layer & layer) {
    const auto it = supported.find(layer.dev);
    if (it != supported.end()) {
        return it->second;
    }

    const ggml_init_params params = { 16*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
    const ggml_context_ptr ctx_ptr(ggml_init(params));
    ggml_context * ctx = ctx_ptr.get();

    ggml_tensor * scores = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 256, 1);
    ggml_tensor * keys   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 257);
    ggml_tensor * marks  = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 8);
    ggml_tensor * heads  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, GGML_RAGGED_N_HEAD, 1);

    const ggml_ragged_selection windows = { GGML_RAGGED_PLACES_WINDOWS, 4, 4, 0 };

    // RPC devices say yes to every op, their servers need not know ours
    bool res = !layer.on_cpu() && strncmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(layer.dev)), "RPC", 3) != 0;
    for (ggml_tensor * op : {
            ggml_ragged_keys (ctx, scores, keys, 256, 0, 0),
            ggml_ragged_count(ctx, keys, heads, nullptr, windows, 0, 8, 256),
            ggml_ragged_mark (ctx, keys, heads, nullptr, marks, windows) }) {
        res = res && ggml_backend_dev_supports_op(layer.dev, op);
    }
    return supported[layer.dev] = res;
}

bool llama_kv_ragged_device_keys::alloc(std::vector<part> & next) {
    const auto & seq = choice.get_seq();

    for (auto & cur : next) {
        // the memory of the layers before is used again if it is large enough
        const auto it = std::find_if(parts.begin(), parts.end(), [&](const part & old) { return old.layer->dev == cur.layer->dev; });
        if (it != parts.end() && it->keys.tensor && it->keys.tensor->ne[0] >= cur.n_keys && it->n_words == cur.n_words) {
            cur.keys  = std::move(it->keys);
            cur.marks = std::move(it->marks);
        }
    }
    parts.clear();

    const auto make = [&](const part & cur, int64_t n, const char * name, llama_kv_ragged_tensor & dst) {
        if (dst.empty()) {
            dst = llama_kv_ragged_tensor::make(ggml_backend_dev_buffer_type(cur.layer->dev), GGML_TYPE_I32, { n, 1, 1 }, name, seq.get_meter());
        }
        return !dst.empty();
    };
    for (auto & cur : next) {
        bool ok = make(cur, cur.n_keys, "ragged_keys", cur.keys);
        for (size_t i = 0; i < n_planes(); ++i) {
            ok = ok && make(cur, cur.n_words, "ragged_marks", cur.marks[i]);
        }
        if (!ok) {
            LLAMA_LOG_WARN("%s: no memory for %.2f MiB of keys on %s, cells are selected on the host\n", __func__,
                    cur.n_keys*sizeof(int32_t)/1024.0/1024.0, ggml_backend_dev_name(cur.layer->dev));
            return false;
        }
    }
    parts = std::move(next);
    return true;
}

bool llama_kv_ragged_device_keys::hold(int32_t il0, int32_t il1) {
    const auto   & seq       = choice.get_seq();
    const auto   & layers    = seq.get_layers();
    const int64_t  n_head_kv = layers[0].n_head_kv;

    std::vector<part> next;
    for (int32_t il = il0; il < il1; ++il) {
        if (!has_op(layers[il])) {
            parts.clear();
            return false;
        }
        auto it = std::find_if(next.begin(), next.end(), [&](const part & cur) { return cur.layer->dev == layers[il].dev; });
        if (it == next.end()) {
            it = next.insert(it, part());
            it->layer = &layers[il];
        }
        for (int64_t ih = 0; ih < n_head_kv; ++ih) {
            const int32_t n_cells = view.n_cells(il, ih);
            it->heads.push_back({ size_t(il - il0)*n_head_kv + ih, n_cells, int32_t(it->n_words), {}, {} });
            it->n_words += (n_cells + int64_t(63))/64*2;
            it->n_keys  += (n_cells + int64_t(1))*n_planes();
        }
        if (it->n_keys >= INT32_MAX/2) { // numbers of keys have 32 bits
            parts.clear();
            return false;
        }
    }
    if (!alloc(next)) {
        return false;
    }
    const int64_t n_host = wkv::select_on_devices_bytes(view, il0, il1);
    claim.add(n_host - n_claimed);
    n_claimed = n_host;

    std::map<ggml_backend_dev_t, size_t> n_scored;
    for (auto & cur : parts) {
        cur.n_keys = 0;
    }
    for (int32_t il = il0; il < il1; ++il) {
        auto & cur = *std::find_if(parts.begin(), parts.end(), [&](const part & own) { return own.layer->dev == layers[il].dev; });
        auto & n   = n_scored[layers[il].dev];
        score(il, cur, n);
        n += n_head_kv;
    }
    return true;
}

void llama_kv_ragged_device_keys::score(int32_t il, part & cur, size_t i_head) {
    const wkv_scoring & scoring = view.policy.scoring;
    const bool          carries = scoring.pooling == WKV_POOLING_CARRY;

    choice.score(il, [&](llama_kv_ragged_compute & graph, ggml_tensor * sum, int64_t ih) {
        ggml_context * ctx = graph.get_ctx();

        const int64_t n_cells = sum->ne[0];
        const int64_t n       = sum->ne[2];
        for (size_t i = 0; i < n_planes(); ++i) {
            ggml_tensor * scores = ggml_view_2d(ctx, sum, n_cells, n, sum->nb[2], i*sum->nb[1]);
            ggml_tensor * keys   = ggml_view_1d(ctx, cur.keys.tensor, (n_cells + 1)*n, cur.n_keys*sizeof(int32_t));

            // the second plane is for single tokens, which are not pooled
            graph.expand(i > 0 ? ggml_ragged_keys(ctx, scores, keys, 0, 0, 0) :
                ggml_ragged_keys(ctx, scores, keys, n_keys_of(view.policy, wkv::places::tokens, n_cells),
                    carries ? scoring.kernel_size - 1 : scoring.kernel_size/2, carries ? 0 : scoring.kernel_size/2));

            for (int64_t j = 0; j < n; ++j) {
                head & own = cur.heads[i_head + ih + j];
                own.i_key       [i] = cur.n_keys + j*n_cells;
                own.i_not_finite[i] = cur.n_keys + n*n_cells + j;
            }
            cur.n_keys += (n_cells + 1)*n;
        }
    });
}

int64_t llama_kv_ragged_device_keys::not_finite() {
    int64_t res = -1;
    for (const auto & cur : parts) {
        for (const auto & own : cur.heads) {
            for (size_t i = 0; i < n_planes(); ++i) {
                int32_t n = 0;
                ggml_backend_tensor_get(cur.keys.tensor, &n, own.i_not_finite[i]*sizeof(n), sizeof(n));
                if (n > 0 && (res < 0 || int64_t(own.j) < res)) {
                    res = own.j;
                }
            }
        }
    }
    return res;
}

std::vector<int32_t> llama_kv_ragged_device_keys::table(const part & cur, wkv::places kind) const {
    std::vector<int32_t> res(GGML_RAGGED_N_HEAD*cur.heads.size(), 0);
    for (size_t i = 0; i < cur.heads.size(); ++i) {
        const head & own = cur.heads[i];
        int32_t    * row = res.data() + i*GGML_RAGGED_N_HEAD;
        row[GGML_RAGGED_HEAD_KEYS]    = own.i_key[plane_of(kind)];
        row[GGML_RAGGED_HEAD_N_KEYS]  = n_keys_of(view.policy, kind, own.n_cells);
        row[GGML_RAGGED_HEAD_WORDS]   = own.i_word;
        row[GGML_RAGGED_HEAD_N_CELLS] = own.n_cells;
    }
    return res;
}

void llama_kv_ragged_device_keys::count(wkv::places kind, const wkv::key_digit & digit, int32_t * counts) {
    for (const auto & cur : parts) {
        auto    data   = table(cur, kind);
        int32_t n_most = 0;
        for (size_t i = 0; i < cur.heads.size(); ++i) {
            int32_t    * row = data.data() + i*GGML_RAGGED_N_HEAD;
            const size_t ig  = cur.heads[i].j/digit.n_group;

            row[GGML_RAGGED_HEAD_N_KEYS]  *= digit.open[ig];
            row[GGML_RAGGED_HEAD_KNOWN]     = uint32_t(digit.known[ig]);
            row[GGML_RAGGED_HEAD_KNOWN + 1] = uint32_t(digit.known[ig] >> 32);
            n_most = std::max(n_most, row[GGML_RAGGED_HEAD_N_KEYS]);
        }
        if (n_most == 0) {
            continue;
        }

        llama_kv_ragged_compute graph(choice.get_lctx(), *cur.layer, count_space, 16);
        ggml_tensor * heads = graph.input(GGML_TYPE_I32, GGML_RAGGED_N_HEAD, cur.heads.size());
        ggml_tensor * marks = kind == wkv::places::rest ? cur.marks[cur.i_marks].tensor : nullptr;
        ggml_tensor * res   = ggml_ragged_count(graph.get_ctx(), cur.keys.tensor, heads, marks, selection_of(view.policy, kind), digit.shift,
                digit.width, n_most);
        ggml_set_output(res);
        graph.expand(res);
        graph.alloc();
        ggml_backend_tensor_set(heads, data.data(), 0, ggml_nbytes(heads));
        graph.compute();

        const size_t n_digits = size_t(1) << digit.width;
        std::vector<int32_t> found(n_digits*cur.heads.size());
        ggml_backend_tensor_get(res, found.data(), 0, ggml_nbytes(res));
        for (size_t i = 0; i < cur.heads.size(); ++i) {
            std::copy_n(found.begin() + i*n_digits, n_digits, counts + cur.heads[i].j*n_digits);
        }
    }
}

void llama_kv_ragged_device_keys::mark(wkv::places kind, const std::vector<wkv::places_taken> & taken) {
    for (auto & cur : parts) {
        auto data = table(cur, kind);
        for (size_t i = 0; i < cur.heads.size(); ++i) {
            int32_t * row = data.data() + i*GGML_RAGGED_N_HEAD;
            row[GGML_RAGGED_HEAD_N_TAKE] = taken[cur.heads[i].j].n;
            row[GGML_RAGGED_HEAD_TAIL]   = taken[cur.heads[i].j].tail;
        }
        const bool beside = kind == wkv::places::rest;

        llama_kv_ragged_compute graph(choice.get_lctx(), *cur.layer, mark_space, 16);
        ggml_tensor * heads = graph.input(GGML_TYPE_I32, GGML_RAGGED_N_HEAD, cur.heads.size());
        graph.expand(ggml_ragged_mark(graph.get_ctx(), cur.keys.tensor, heads, beside ? cur.marks[0].tensor : nullptr,
                    cur.marks[beside].tensor, selection_of(view.policy, kind)));
        graph.alloc();
        ggml_backend_tensor_set(heads, data.data(), 0, ggml_nbytes(heads));
        graph.compute();
        cur.i_marks = beside;
    }
}

void llama_kv_ragged_device_keys::read(wkv::marks & keep, size_t i0) {
    for (const auto & cur : parts) {
        llama_kv_ragged_claim words_claim(choice.get_seq().get_meter(), cur.n_words*sizeof(uint32_t));

        std::vector<uint32_t> words(cur.n_words);
        ggml_backend_tensor_get(cur.marks[cur.i_marks].tensor, words.data(), 0, words.size()*sizeof(words[0]));
        for (const auto & own : cur.heads) {
            keep.load(i0 + own.j, words.data() + own.i_word);
        }
    }
}
