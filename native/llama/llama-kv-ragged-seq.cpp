#include "llama-kv-ragged-seq.h"

#include "llama-impl.h"
#include "llama-kv-ragged-create.h"

#include <algorithm>
#include <numeric>

//
// llama_kv_ragged_cells
//

int64_t llama_kv_ragged_carried::n_bytes() const {
    int64_t res = 0;
    for (const auto & own : heads) {
        res += own.size()*sizeof(float);
    }
    return res;
}

void llama_kv_ragged_carried::copy(size_t ih, size_t n, float fill, float * dst) const {
    const size_t n_own = heads.empty() ? 0 : std::min(n, heads[ih].size());
    if (n_own > 0) {
        std::copy_n(heads[ih].begin(), n_own, dst);
    }
    std::fill(dst + n_own, dst + n, fill);
}

int64_t llama_kv_ragged_cells::n_bytes_carried() const {
    return sums.n_bytes() + replayed.n_bytes();
}

bool llama_kv_ragged_cells::is_uniform() const {
    for (size_t ih = 1; ih < kept.size(); ++ih) {
        if (kept[ih].size() != kept[0].size() || pool.cap(ih) != pool.cap(0)) {
            return false;
        }
    }
    return true;
}

//
// llama_kv_ragged_observed
//

std::vector<int64_t> llama_kv_ragged_observed::observe(int32_t p0, uint32_t n_tokens) {
    const int32_t n = n_observed;

    std::vector<int64_t> res;
    res.reserve(std::min<int64_t>(n, n_tokens)); // may throw, before anything changes
    for (int32_t p = p0 + std::max<int32_t>(0, int32_t(n_tokens) - n); p < p0 + int32_t(n_tokens); ++p) {
        // the oldest row that neither ends the prompt nor is one of the n - 1 before this query
        int64_t row = -1;
        for (int64_t i = 0; i < n_rows(); ++i) {
            const bool of_prompt = pos[i] >= int32_t(n_prompt) - n && pos[i] < int32_t(n_prompt);
            const bool is_recent = pos[i] > p - n;
            if (pos[i] < 0 || (!of_prompt && !is_recent)) {
                row = row < 0 || pos[i] < pos[row] ? i : row;
            }
        }
        GGML_ASSERT(row >= 0);
        pos[row] = p;
        res.push_back(row);
    }
    return res;
}

void llama_kv_ragged_observed::trim(int32_t p0) {
    for (auto & cur : pos) {
        cur = cur < p0 ? cur : -1;
    }
    n_prompt = std::min<uint32_t>(n_prompt, p0);
}

std::vector<int32_t> llama_kv_ragged_observed::find(int32_t p0) const {
    std::vector<int32_t> res;
    for (int32_t i = 0; i < n_rows(); ++i) {
        if (pos[i] >= std::max(0, p0)) {
            res.push_back(i);
        }
    }
    std::sort(res.begin(), res.end(), [&](int32_t a, int32_t b) { return pos[a] < pos[b]; });
    return res;
}

//
// llama_kv_ragged_seq
//

llama_kv_ragged_seq::llama_kv_ragged_seq(
        const std::vector<llama_kv_ragged_layer> & layers,
              uint32_t                             n_pos_max,
              uint32_t                             n_observed,
              llama_kv_ragged_meter              & meter) :
    layers(&layers), n_pos_max(n_pos_max), meter(&meter), claim(std::make_unique<llama_kv_ragged_claim>(meter)) {
    for (const auto & layer : layers) {
        cells.emplace_back();
        cells.back().kept.resize(layer.n_head_kv);
    }
    set_observed(n_observed);
}

int64_t llama_kv_ragged_seq::n_cells(size_t i, int64_t ih) const {
    return cells[i].kept[ih].size() + (n_pos - cells[i].boundary);
}

std::vector<int64_t> llama_kv_ragged_seq::n_cells(size_t i) const {
    std::vector<int64_t> res(cells[i].kept.size());
    for (size_t ih = 0; ih < res.size(); ++ih) {
        res[ih] = n_cells(i, ih);
    }
    return res;
}

std::vector<int32_t> llama_kv_ragged_seq::n_cells() const {
    std::vector<int32_t> res;
    for (size_t i = 0; i < cells.size(); ++i) {
        const auto own = n_cells(i);
        res.insert(res.end(), own.begin(), own.end());
    }
    return res;
}

std::vector<int32_t> llama_kv_ragged_seq::positions(size_t i, int64_t ih) const {
    std::vector<int32_t> res = cells[i].kept[ih];
    res.resize(n_cells(i, ih));
    std::iota(res.begin() + cells[i].kept[ih].size(), res.end(), cells[i].boundary);
    return res;
}

int64_t llama_kv_ragged_seq::n_read(size_t i, int64_t n) const {
    // before the first compaction the stock length, so that the results are those of the stock cache bit for bit
    return boundary == 0 ? std::max<int64_t>(256, GGML_PAD(n, 256)) : GGML_PAD(n, (*layers)[i].n_pad);
}

int64_t llama_kv_ragged_seq::n_read_by_head(size_t i, int64_t ih) const {
    const auto  & cur   = cells[i];
    const int64_t n_pad = (*layers)[i].n_pad;
    const int64_t n_new = n_pos - cur.boundary;

    const int64_t res = std::min<int64_t>(GGML_PAD(cur.kept[ih].size() + GGML_PAD(n_new, n_pad), n_pad), GGML_PAD(cur.pool.cap(ih), n_pad));
    GGML_ASSERT(cur.pool.first[ih] + res <= cur.pool.n_rows());
    return res;
}

bool llama_kv_ragged_seq::has_room(size_t i, int64_t n_tokens) const {
    for (size_t ih = 0; ih < cells[i].kept.size(); ++ih) {
        if (n_cells(i, ih) + n_tokens > cells[i].pool.cap(ih)) {
            return false;
        }
    }
    return true;
}

bool llama_kv_ragged_seq::has_room(int64_t n_tokens) const {
    for (size_t i = 0; i < cells.size(); ++i) {
        if (!has_room(i, n_tokens)) {
            return false;
        }
    }
    return true;
}

int64_t llama_kv_ragged_seq::n_mean() const {
    int64_t n       = 0;
    int64_t n_heads = 0;
    for (size_t i = 0; i < cells.size(); ++i) {
        const auto len = n_cells(i);
        n       += std::accumulate(len.begin(), len.end(), int64_t(0));
        n_heads += len.size();
    }
    return n/std::max<int64_t>(1, n_heads);
}

int64_t llama_kv_ragged_seq::n_slack_compacted(bool uniform, int64_t n_mean) {
    return std::max<int64_t>(uniform ? 0 : 16, n_mean/64);
}

int64_t llama_kv_ragged_seq::n_slack(size_t i, int64_t n_mean) const {
    // a prompt that arrives in pieces doubles its pool in six steps
    return boundary == 0 ? n_mean/8 : n_slack_compacted(cells[i].is_uniform(), n_mean);
}

void llama_kv_ragged_seq::reserve(int64_t n_tokens, bool exact) {
    const int64_t n_more = int64_t(n_pos_max) - n_pos - n_tokens; // that could come behind these
    const int64_t n_held = n_mean() + n_tokens;

    for (size_t i = 0; i < cells.size(); ++i) {
        if (has_room(i, n_tokens)) {
            continue;
        }
        const auto & layer = (*layers)[i];
        const auto   len   = n_cells(i);

        const int64_t slack = exact ? 0 : std::min(n_slack(i, n_held), std::max<int64_t>(0, n_more));

        cells[i].pool = layer.copy_pool(cells[i].pool, layer.capacity(len, n_tokens + slack, boundary > 0), len, *meter);
    }
}

std::vector<int64_t> llama_kv_ragged_seq::append(uint32_t n_tokens, bool may_be_prompt) {
    observed.trim(n_pos); // those of withdrawn positions

    const auto rows = observed.observe(n_pos, n_tokens);

    if (may_be_prompt && !in_prompt() && n_tokens > 1) {
        prompt_begin = n_pos;
    }
    n_pos += n_tokens;
    return rows;
}

void llama_kv_ragged_seq::trim(uint32_t p0) {
    withdraw(p0);
    observed.trim(p0);
}

void llama_kv_ragged_seq::withdraw(uint32_t p0) {
    n_pos             = p0;
    for (size_t i = 0; i < cells.size(); ++i) {
        for (auto * cur : cells[i].carried()) {
            cur->n_pos = std::min(cur->n_pos, p0);
            for (size_t ih = 0; ih < cur->heads.size(); ++ih) {
                cur->heads[ih].resize(std::min<size_t>(cur->heads[ih].size(), n_cells(i, ih)));
            }
        }
    }
    claim_carried();
    prompt_begin      = prompt_begin < int32_t(p0) ? prompt_begin : -1;
    observed.n_prompt = std::min(observed.n_prompt, p0);
}

void llama_kv_ragged_seq::close(const llama_kv_ragged_hole & hole) {
    for (auto & cur : cells) {
        for (auto * carried : cur.carried()) {
            for (size_t ih = 0; ih < carried->heads.size(); ++ih) {
                auto & own = carried->heads[ih];
                own.erase(own.begin() + std::min(own.size(), cur.find(ih, hole.p0)), own.begin() + std::min(own.size(), cur.find(ih, hole.p1)));
            }
            carried->n_pos = hole.close(carried->n_pos);
        }

        const uint32_t next = hole.close(cur.boundary);
        for (auto & kept : cur.kept) {
            kept.erase(std::lower_bound(kept.begin(), kept.end(), hole.p0), std::lower_bound(kept.begin(), kept.end(), hole.p1));
            for (auto & p : kept) {
                p = hole.close(p);
            }
            // a boundary of 0 says that nothing was ever compacted, and pools have stock's padding
            if (next == 0 && cur.boundary > 0) {
                kept.push_back(0);
            }
        }
        cur.boundary = next == 0 && cur.boundary > 0 ? 1 : next;
    }
    boundary = std::max<uint32_t>(hole.close(boundary), boundary > 0 ? 1 : 0);
    n_pos    = hole.close(n_pos);
    if (prompt_begin >= 0) {
        prompt_begin = hole.close(prompt_begin);
    }

    for (auto & p : observed.pos) {
        p = p < hole.p0 ? p : p < hole.p1 ? -1 : p - hole.n();
    }
    observed.n_prompt = hole.close(observed.n_prompt);
    claim_carried();
}

int32_t llama_kv_ragged_seq::observed_end() const {
    return std::max<int32_t>(n_pos, observed.pos.empty() ? 0 : *std::max_element(observed.pos.begin(), observed.pos.end()) + 1);
}

void llama_kv_ragged_seq::end_prompt() {
    observed.n_prompt = n_pos;
    prompt_begin      = -1;
}

void llama_kv_ragged_seq::compact(size_t i, llama_kv_ragged_cells && left) {
    cells[i] = std::move(left);
    boundary = n_pos;
    claim_carried();
}

void llama_kv_ragged_seq::copy_sums(size_t i, float * dst) const {
    for (size_t ih = 0; ih < cells[i].kept.size(); ++ih) {
        const size_t n = n_cells(i, ih);
        cells[i].sums.copy(ih, n, 0.0f, dst);
        dst += n;
    }
}

void llama_kv_ragged_seq::set_sums(size_t i, const std::vector<float> & sums) {
    std::vector<std::vector<float>> next; // may throw, before anything changes

    const float * src = sums.data();
    for (size_t ih = 0; ih < cells[i].kept.size(); ++ih) {
        next.emplace_back(src, src + n_cells(i, ih));
        src += n_cells(i, ih);
    }
    cells[i].sums = { std::move(next), n_pos };
    claim_carried();
}

void llama_kv_ragged_seq::set_replayed(size_t i, int32_t p0, int32_t p1, const float * scores) {
    auto & cur = cells[i];

    auto next = cur.replayed.heads; // may throw, before anything changes
    next.resize(cur.kept.size());
    for (size_t ih = 0; ih < next.size(); ++ih) {
        auto & own = next[ih];
        own.resize(std::max(own.size(), cur.find(ih, p1)), 0.0f);
        for (size_t ic = cur.find(ih, p0); ic < cur.find(ih, p1); ++ic, ++scores) {
            own[ic] = std::max(own[ic], *scores) + (*scores - *scores); // no number where it is not finite
        }
    }
    cur.replayed = { std::move(next), std::max<uint32_t>(cur.replayed.n_pos, p1) };
    claim_carried();
}

void llama_kv_ragged_seq::copy_replayed(size_t i, float * dst) const {
    constexpr float MORE = 2.0f; // a weight is 1 at most

    for (size_t ih = 0; ih < cells[i].kept.size(); ++ih) {
        const size_t n = n_cells(i, ih);
        cells[i].replayed.copy(ih, n, MORE, dst);
        std::fill_n(dst, std::min(n, cells[i].find(ih, N_SINK)), MORE);
        dst += n;
    }
}

uint32_t llama_kv_ragged_seq::n_summed() const {
    uint32_t res = n_pos;
    for (const auto & cur : cells) {
        res = std::min(res, cur.sums.n_pos);
    }
    return res;
}

uint32_t llama_kv_ragged_seq::n_replayed() const {
    uint32_t res = n_pos;
    for (const auto & cur : cells) {
        res = std::min(res, cur.replayed.n_pos);
    }
    return res;
}

void llama_kv_ragged_seq::claim_carried() {
    int64_t n_bytes = 0;
    for (const auto & cur : cells) {
        n_bytes += cur.n_bytes_carried();
    }
    claim->set(n_bytes);
}

std::vector<llama_kv_ragged_tensor> llama_kv_ragged_seq::make_queries(uint32_t n_observed) const {
    std::vector<llama_kv_ragged_tensor> res;
    for (const auto & layer : *layers) {
        res.push_back(llama_kv_ragged_tensor::make(layer.buft, GGML_TYPE_F16, { layer.n_embd_head_k, 2*int64_t(n_observed), layer.n_head },
                    format("ragged_queries_l%u", layer.il).c_str(), *meter));
        if (res.back().empty()) {
            llama_kv_ragged_refuse(format("no memory for %u observed queries of layer %u", n_observed, layer.il));
        }
    }
    return res;
}

void llama_kv_ragged_seq::set_observed(uint32_t n_observed) {
    n_observed = std::min(n_observed, n_pos_max); // there are no more
    if (n_observed == observed.n_observed) {
        observed.trim(0);
    } else {
        observed = { n_observed, std::vector<int32_t>(2*n_observed, -1), 0, make_queries(n_observed) };
    }
}

void llama_kv_ragged_seq::clear() {
    for (auto & cur : cells) {
        cur.boundary = 0;
        cur.pool     = {};
        cur.sums     = {};
        cur.replayed = {};
        for (auto & kept : cur.kept) {
            kept.clear();
        }
    }
    boundary = 0;
    trim(0);
}

llama_kv_ragged_seq llama_kv_ragged_seq::make_empty() const {
    llama_kv_ragged_seq res(*layers, n_pos_max, observed.n_observed, *meter);
    res.n_room = n_room;
    return res;
}

void llama_kv_ragged_seq::make_pools() {
    const int64_t n_more = int64_t(n_pos_max) - n_pos;
    const int64_t n_held = n_mean();

    for (size_t i = 0; i < cells.size(); ++i) {
        const auto & layer = (*layers)[i];
        const auto   len   = n_cells(i);

        const int64_t slack = std::min(std::max<int64_t>(1, n_slack(i, n_held)), n_more);

        cells[i].pool = layer.make_pool(layer.capacity(len, slack, boundary > 0), *meter);
    }
}

llama_kv_ragged_seq llama_kv_ragged_seq::copy(bool exact) const {
    llama_kv_ragged_seq res = make_empty();
    res.n_pos        = n_pos;
    res.boundary     = boundary;
    res.prompt_begin = prompt_begin;

    for (size_t i = 0; i < cells.size(); ++i) {
        const auto & layer = (*layers)[i];

        res.cells[i].kept     = cells[i].kept;
        res.cells[i].boundary = cells[i].boundary;
        res.cells[i].sums     = cells[i].sums;
        res.cells[i].replayed = cells[i].replayed;
        if (n_pos > 0) {
            const auto len = n_cells(i);
            res.cells[i].pool = layer.copy_pool(cells[i].pool, exact ? len : layer.capacity(len, 32, boundary > 0), len, *meter);
        }
        ggml_backend_tensor_copy(observed.queries[i].tensor, res.observed.queries[i].tensor);
    }
    res.observed.pos      = observed.pos;
    res.observed.n_prompt = observed.n_prompt;
    res.claim_carried();
    return res;
}
