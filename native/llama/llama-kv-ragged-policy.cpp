#include "llama-kv-ragged-policy.h"

#include "llama-impl.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-seq.h"

#include <algorithm>
#include <cinttypes>
#include <stdexcept>

void llama_kv_ragged_check_request(const llama_kv_ragged_seq & seq, int32_t window_size, int64_t n_cells) {
    if (n_cells < 1) {
        throw std::invalid_argument(format("budget is %" PRId64 " cells per head, expected at least 1", n_cells));
    }
    if (!seq.observes(window_size)) {
        throw std::invalid_argument(format("the policy observes %d tokens but %u queries are held, call wkv_set_observed first",
                    window_size, seq.observed.n_observed));
    }
}

wkv_shapes llama_kv_ragged_shapes(const llama_kv_ragged_seq & seq, const std::vector<int32_t> & cells) {
    const auto & layer = seq.get_layers()[0];
    return { (int32_t) seq.get_layers().size(), (int32_t) layer.n_head_kv, (int32_t) layer.n_gqa(), (int32_t) seq.n_pos, cells.data() };
}

bool llama_kv_ragged_policy_request(
        const llama_kv_ragged_seq & seq, const wkv_policy & policy, int64_t n_cells, llama_kv_ragged_request & request) {
    const std::string error = wkv::policy_error(policy);
    if (!error.empty()) {
        throw std::invalid_argument("policy: " + error);
    }

    const auto sizes = wkv::window_sizes(policy);
    llama_kv_ragged_check_request(seq, sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end()), n_cells);
    n_cells = std::min<int64_t>(n_cells, INT32_MAX); // no head holds more

    const auto cells  = seq.n_cells();
    const auto shapes = llama_kv_ragged_shapes(seq, cells);

    const std::string misfit = wkv::shapes_error(policy, shapes);
    if (!misfit.empty()) {
        throw std::invalid_argument("policy: " + misfit);
    }

    // heads that compete need scores, unless everything fits; for the others the budgets tell before anything is computed
    if (wkv::needs_scores_for_budgets(policy)) {
        if (wkv::fits(shapes, n_cells)) {
            return false;
        }
    } else {
        wkv::head_budgets budgets;
        wkv::budgets(wkv::cache_view(policy, shapes, nullptr, nullptr), n_cells, budgets);
        if (budgets.n_cells == cells) {
            return false;
        }
    }

    request.n_bytes_cell = wkv::budgets_bytes_per_cell(policy);

    request.scoring.by_query_head = policy.scoring.query_heads == WKV_QUERY_HEADS_EACH;
    request.scoring.window_sizes  = sizes;
    request.select = [&seq, &policy, n_cells](const llama_kv_ragged_choice & choice) {
        const wkv_shapes      shapes = llama_kv_ragged_shapes(seq, choice.cells);
        const wkv::cache_view view(policy, shapes, choice.positions, choice.scores);

        wkv::head_budgets budgets;
        std::string refused = wkv::budgets(view, n_cells, budgets);
        if (refused.empty()) {
            refused = wkv::select(view, budgets, choice.keep);
        }
        if (!refused.empty()) {
            llama_kv_ragged_refuse_unsupported(refused);
        }
    };
    return true;
}
