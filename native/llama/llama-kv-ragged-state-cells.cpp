#include "llama-kv-ragged-state-parts.h"

#include <algorithm>
#include <cmath>

namespace llama_kv_ragged_state {

static std::vector<int32_t> shape(const llama_kv_ragged_layer & layer) {
    return { int32_t(layer.il), int32_t(layer.n_head), int32_t(layer.n_head_kv), int32_t(layer.n_embd_head_k), int32_t(layer.n_embd_head_v),
        layer.type_k, layer.type_v };
}

static const char * const SHAPE[] = { "index", "n_head", "n_head_kv", "head size of K", "head size of V", "type of K", "type of V" };

// Where the queries begin that something can ask for. Positions below the boundary stay, and so does what was observed of them; sums
// are taken on from where they end.
static int32_t oldest_query(const llama_kv_ragged_seq & seq) {
    int32_t res = int32_t(seq.boundary) - int32_t(seq.observed.n_observed);
    for (const auto & cur : seq.cells) {
        if (!cur.sums.heads.empty()) {
            res = std::min(res, int32_t(cur.sums.n_pos));
        }
    }
    return res;
}

void write_cells(llama_io_write_i & io, const llama_kv_cache_ragged & kv) {
    const auto & seq    = kv.get_seq();
    const auto & layers = kv.get_layers();

    put<uint32_t>(io, layers.size());
    put<uint32_t>(io, seq.observed.n_observed);
    put<uint32_t>(io, access::rotation(kv));
    for (const auto & layer : layers) {
        put(io, shape(layer));
    }

    put<uint32_t>(io, seq.boundary);
    put<int32_t> (io, seq.prompt_begin);
    put<uint32_t>(io, seq.observed.n_prompt);
    for (const auto & cur : seq.cells) {
        put<uint32_t>(io, cur.boundary);
        for (const auto & kept : cur.kept) {
            put<uint32_t>(io, kept.size());
            put(io, kept);
        }
    }

    for (const auto & cur : seq.cells) {
        for (const auto * carried : cur.carried()) {
            put<uint32_t>(io, carried->n_pos);
            put<uint32_t>(io, carried->heads.size());
            for (const auto & own : carried->heads) {
                put<uint32_t>(io, own.size());
                put(io, own);
            }
        }
    }

    const auto rows = seq.observed.find(oldest_query(seq));
    put<uint32_t>(io, rows.size());
    for (const int32_t row : rows) {
        put<int32_t>(io, seq.observed.pos[row]);
    }

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & pool = seq.cells[i].pool;
        for (int64_t ih = 0; ih < layers[i].n_head_kv; ++ih) {
            if (const int64_t n = seq.n_cells(i, ih)) {
                io.write_tensor(pool.k, pool.first[ih]*pool.k->nb[1], n*pool.k->nb[1]);
                io.write_tensor(pool.v, pool.first[ih]*pool.v->nb[1], n*pool.v->nb[1]);
            }
        }
        ggml_tensor * queries = seq.observed.queries[i].tensor;
        for (int64_t ih = 0; ih < layers[i].n_head; ++ih) {
            for_runs(rows, [&](size_t from, size_t to) {
                io.write_tensor(queries, ih*queries->nb[2] + rows[from]*queries->nb[1], (to - from)*queries->nb[1]);
            });
        }
    }
}

static void read_shapes(llama_io_read_i & io, const llama_kv_cache_ragged & kv) {
    const auto & layers = kv.get_layers();

    get_same<uint32_t>(io, layers.size(), "the number of layers");
    get_same<uint32_t>(io, kv.get_seq().observed.n_observed, "the number of observed queries (of the policy)");
    get_same<uint32_t>(io, access::rotation(kv), "the rotation of cells");
    for (const auto & layer : layers) {
        const auto own = shape(layer);
        for (size_t j = 0; j < own.size(); ++j) {
            get_same<int32_t>(io, own[j], format("layer %u: %s", layer.il, SHAPE[j]));
        }
    }
}

static llama_kv_ragged_carried read_carried(llama_io_read_i & io, const llama_kv_ragged_seq & seq, size_t i, const char * what) {
    const auto of = [what](const char * part) { return format("%s %s attention", part, what); };

    llama_kv_ragged_carried res;
    res.n_pos = get_within<uint32_t>(io, 0, seq.n_pos, of("the end of the").c_str());

    const size_t   n_head_kv = seq.cells[i].kept.size();
    const uint32_t n_heads   = get_within<uint32_t>(io, 0, n_head_kv, of("the number of heads with").c_str());
    if (n_heads != 0 && n_heads != n_head_kv) {
        refuse(format("%u heads of a layer have %s attention, expected all %zu or none", n_heads, what, n_head_kv));
    }
    for (uint32_t ih = 0; ih < n_heads; ++ih) {
        res.heads.push_back(get<float>(io, get_within<uint32_t>(io, 0, seq.n_cells(i, ih), of("the cells with").c_str())));
        for (const float cur : res.heads.back()) {
            if (!(cur >= 0.0f && std::isfinite(cur))) {
                refuse(format("%s attention is negative or not finite", what));
            }
        }
    }
    return res;
}

// which cells there are
// n_pos_max: positions that there can be
static void read_positions(llama_io_read_i & io, llama_kv_ragged_seq & seq, uint32_t n_pos_max) {
    const auto & layers = seq.get_layers();

    seq.boundary          = get_within<uint32_t>(io,  0, seq.n_pos, "the boundary of the last compaction");
    seq.prompt_begin      = get_within<int32_t> (io, -1, int64_t(seq.n_pos) - 1, "the begin of a prompt");
    seq.observed.n_prompt = get_within<uint32_t>(io,  0, seq.n_pos, "the end of the last prompt");

    for (size_t i = 0; i < layers.size(); ++i) {
        auto & cur = seq.cells[i];

        cur.boundary = get_within<uint32_t>(io, 0, seq.boundary, "the boundary of a layer");
        for (auto & kept : cur.kept) {
            // none where all of them were given up in a shift
            kept = get<int32_t>(io, get_within<uint32_t>(io, 0, cur.boundary, "the number of kept cells"));
            check_ascending(kept, cur.boundary, "kept positions");
        }
        if (!cur.is_uniform()) {
            layers[i].check_ragged();
        }
    }

    for (size_t i = 0; i < layers.size(); ++i) {
        seq.cells[i].sums     = read_carried(io, seq, i, "summed");
        seq.cells[i].replayed = read_carried(io, seq, i, "replayed");
    }

    // those of withdrawn positions are behind n_pos
    const uint32_t n_queries = get_within<uint32_t>(io, 0, seq.observed.n_rows(), "the number of queries");
    const auto     pos       = get<int32_t>(io, n_queries);
    check_ascending(pos, n_pos_max, "positions of queries");
    std::copy(pos.begin(), pos.end(), seq.observed.pos.begin());
}

llama_kv_ragged_seq read_cells(llama_io_read_i & io, const llama_kv_cache_ragged & kv, uint32_t n_pos) {
    read_shapes(io, kv);

    auto seq = kv.get_seq().make_empty();
    seq.n_pos = n_pos;
    read_positions(io, seq, kv.get_size());
    seq.claim_carried();
    if (n_pos > 0) {
        seq.make_pools();
    }

    const auto & layers    = kv.get_layers();
    const size_t n_queries = seq.observed.find(0).size();
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & pool = seq.cells[i].pool;
        for (int64_t ih = 0; ih < layers[i].n_head_kv; ++ih) {
            if (const int64_t n = seq.n_cells(i, ih)) {
                io.read_tensor(pool.k, pool.first[ih]*pool.k->nb[1], n*pool.k->nb[1]);
                io.read_tensor(pool.v, pool.first[ih]*pool.v->nb[1], n*pool.v->nb[1]);
            }
        }
        ggml_tensor * queries = seq.observed.queries[i].tensor;
        for (int64_t ih = 0; ih < layers[i].n_head && n_queries > 0; ++ih) {
            io.read_tensor(queries, ih*queries->nb[2], n_queries*queries->nb[1]);
        }
    }
    return seq;
}

}
