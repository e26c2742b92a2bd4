#include "llama-kv-ragged-policy.h"

#include "llama-impl.h"
#include "llama-kv-cache-ragged.h"
#include "llama-kv-ragged-create.h"

#include <algorithm>
#include <cinttypes>
#include <numeric>
#include <stdexcept>

void llama_kv_ragged_check_request(const llama_kv_cache_ragged & kv, int32_t window_size, int64_t n_cells) {
    const uint32_t n_observed = kv.get_seq().observed.n_observed;

    if (n_cells < 1) {
        throw std::invalid_argument(format("budget is %" PRId64 " cells per head, expected at least 1", n_cells));
    }
    if (window_size < 0 || window_size > (int64_t) n_observed) {
        throw std::invalid_argument(format("the policy observes %d tokens but %u queries are held, call wkv_set_observed first", window_size, n_observed));
    }
}

static wkv_shapes shapes_of(const llama_kv_cache_ragged & kv, const std::vector<int32_t> & cells) {
    const auto & layers = kv.get_layers();
    return { (int32_t) layers.size(), (int32_t) layers[0].n_head_kv, (int32_t) kv.get_seq().n_pos, cells.data() };
}

static std::vector<int32_t> window_sizes(const wkv_policy & policy) {
    std::vector<int32_t> res;
    // StreamingLLM looks at positions only
    if (policy.kind != WKV_KIND_STREAMINGLLM && policy.kind != WKV_KIND_FULL) {
        res.push_back(policy.alpha);
    }
    if (policy.kind == WKV_KIND_WINDOWKV && policy.tokens > 0.0) {
        res.push_back(policy.token_alpha);
    }
    return res;
}

// whether no layer holds more than n_cells per head
static bool fits(const wkv_shapes & shapes, int64_t n_cells) {
    for (int32_t i = 0; i < shapes.n_layer; ++i) {
        const int32_t * cells = shapes.cells + i*shapes.n_head_kv;
        if (std::accumulate(cells, cells + shapes.n_head_kv, int64_t(0)) > n_cells*shapes.n_head_kv) {
            return false;
        }
    }
    return true;
}

bool llama_kv_ragged_policy_request(
        const llama_kv_cache_ragged & kv, const wkv_policy & policy, int64_t n_cells, llama_kv_ragged_request & request) {
    const std::string error = wkv::policy_error(policy);
    if (!error.empty()) {
        throw std::invalid_argument("policy: " + error);
    }

    const auto sizes = window_sizes(policy);
    llama_kv_ragged_check_request(kv, sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end()), n_cells);
    n_cells = std::min<int64_t>(n_cells, INT32_MAX); // no head holds more

    const auto       cells  = kv.get_seq().n_cells();
    const wkv_shapes shapes = shapes_of(kv, cells);

    const std::string misfit = wkv::shapes_error(policy, shapes);
    if (!misfit.empty()) {
        throw std::invalid_argument("policy: " + misfit);
    }

    // heads that compete need scores, unless everything fits; for the others the budgets tell before anything is computed
    if (policy.kind == WKV_KIND_FULL || (policy.heads == WKV_HEADS_SCORE && fits(shapes, n_cells))) {
        return false;
    }
    if (policy.heads != WKV_HEADS_SCORE) {
        std::vector<int32_t> budgets;
        wkv::budgets(wkv::cache_view(policy, shapes, nullptr, nullptr), n_cells, budgets);
        if (budgets == cells) {
            return false;
        }
    }

    request.scoring.window_sizes = sizes;
    request.select = [&kv, &policy, n_cells](const llama_kv_ragged_choice & choice) {
        const wkv_shapes      shapes = shapes_of(kv, choice.cells);
        const wkv::cache_view view(policy, shapes, choice.positions, choice.scores);

        std::vector<int32_t> budgets;
        std::string refused = wkv::budgets(view, n_cells, budgets);
        if (refused.empty()) {
            refused = wkv::select(view, budgets.data(), choice.keep);
        }
        if (!refused.empty()) {
            llama_kv_ragged_refuse(refused);
        }
    };
    return true;
}
