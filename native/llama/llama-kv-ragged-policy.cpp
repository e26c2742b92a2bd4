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

static std::vector<wkv::cell_positions> cell_positions(const llama_kv_ragged_seq & seq) {
    std::vector<wkv::cell_positions> res;
    for (const auto & cur : seq.cells) {
        for (const auto & kept : cur.kept) {
            res.push_back({ kept.data(), int32_t(kept.size()), int32_t(cur.boundary) });
        }
    }
    return res;
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

    request.scoring.by_query_head = policy.scoring.query_heads == WKV_QUERY_HEADS_EACH;
    request.scoring.window_sizes  = sizes;
    request.select = [&seq, &policy, n_cells](llama_kv_ragged_choice & choice) {
        const wkv_shapes shapes = llama_kv_ragged_shapes(seq, choice.cells);

        wkv::cache_view view(policy, shapes, cell_positions(seq));
        view.n_threads      = choice.n_threads();
        view.n_cells_thread = 65536; // selecting among fewer takes no longer than a thread does to start

        llama_kv_ragged_claim claim(seq.get_meter(), wkv::select_bytes(view));

        const auto        scores  = [&](int32_t il0, int32_t il1, int32_t plane) { return choice.score(il0, il1, plane); };
        const std::string refused = wkv::select_cells(view, n_cells, scores, choice.keep);
        if (!refused.empty()) {
            llama_kv_ragged_refuse_unsupported(refused);
        }
    };
    return true;
}
