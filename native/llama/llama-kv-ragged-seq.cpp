#include "llama-kv-ragged-seq.h"

#include "ggml.h"

#include <algorithm>
#include <numeric>

//
// llama_kv_ragged_cells
//

bool llama_kv_ragged_cells::is_uniform() const {
    return std::all_of(kept.begin(), kept.end(), [&](const auto & cur) { return cur.size() == kept[0].size(); });
}

//
// llama_kv_ragged_observed
//

std::vector<int64_t> llama_kv_ragged_observed::observe(int32_t p0, uint32_t n_tokens) {
    const int32_t n = n_observed;

    std::vector<int64_t> res;
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

llama_kv_ragged_seq::llama_kv_ragged_seq(const std::vector<llama_kv_ragged_layer> & layers, uint32_t n_observed) : observed(n_observed) {
    for (const auto & layer : layers) {
        cells.emplace_back();
        cells.back().kept.resize(layer.n_head_kv);
    }
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

std::vector<int64_t> llama_kv_ragged_seq::append(uint32_t n_tokens, bool may_be_prompt) {
    const auto rows = observed.observe(n_pos, n_tokens);

    if (may_be_prompt && !in_prompt() && n_tokens > 1) {
        prompt_begin = n_pos;
    }
    n_pos += n_tokens;
    return rows;
}

void llama_kv_ragged_seq::trim(uint32_t p0) {
    n_pos        = p0;
    prompt_begin = prompt_begin < int32_t(p0) ? prompt_begin : -1;
    observed.trim(p0);
}

void llama_kv_ragged_seq::end_prompt() {
    observed.n_prompt = n_pos;
    prompt_begin      = -1;
}

void llama_kv_ragged_seq::clear() {
    for (auto & cur : cells) {
        cur.boundary = 0;
        for (auto & kept : cur.kept) {
            kept.clear();
        }
    }
    observed  = llama_kv_ragged_observed(observed.n_observed);
    n_pos        = 0;
    boundary     = 0;
    prompt_begin = -1;
}
