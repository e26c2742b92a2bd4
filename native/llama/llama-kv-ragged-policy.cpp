#include "llama-kv-ragged-policy.h"

#include "llama-impl.h"
#include "llama-kv-ragged-create.h"
#include "llama-kv-ragged-select.h"
#include "llama-kv-ragged-seq.h"

#include <algorithm>
#include <cinttypes>
#include <numeric>
#include <stdexcept>

static_assert(int(LLAMA_KV_RAGGED_REDUCE_MAX) == WKV_REDUCE_MAX && int(LLAMA_KV_RAGGED_REDUCE_SUM) == WKV_REDUCE_SUM &&
        int(LLAMA_KV_RAGGED_REDUCE_REPLAY) == WKV_REDUCE_REPLAY, "the same choices");

void llama_kv_ragged_check_request(const llama_kv_ragged_seq & seq, int32_t window_size, int64_t n_cells) {
    if (n_cells < 1) {
        throw std::invalid_argument(format("budget is %" PRId64 " cells per head, expected at least 1", n_cells));
    }
    if (!seq.observes(window_size)) {
        throw std::invalid_argument(format("the policy observes %d tokens but %u queries are held, call wkv_set_observed first",
                    window_size, seq.observed.n_observed));
    }
}

wkv_shapes llama_kv_ragged_shapes(
        const llama_kv_ragged_seq & seq, const std::vector<int32_t> & cells, const llama_kv_ragged_rest * rest) {
    const auto  & layer  = seq.get_layers()[0];
    const int64_t n_past = int64_t(seq.n_pos) - (rest ? rest->cells.n_pinned() : 0);
    return { (int32_t) seq.get_layers().size(), (int32_t) layer.n_head_kv, (int32_t) layer.n_gqa(), (int32_t) n_past, cells.data() };
}

std::vector<wkv::cell_positions> llama_kv_ragged_positions(const llama_kv_ragged_seq & seq) {
    std::vector<wkv::cell_positions> res;
    for (const auto & cur : seq.cells) {
        for (const auto & kept : cur.kept) {
            res.push_back({ kept.data(), int32_t(kept.size()), int32_t(cur.boundary) });
        }
    }
    return res;
}

llama_kv_ragged_rest::llama_kv_ragged_rest(
        const llama_kv_ragged_seq & seq, const std::vector<wkv::position_range> & pinned, const std::vector<int32_t> & n_cells) :
    claim(seq.get_meter(), wkv::rest_cells::n_bytes(n_cells)), cells(pinned, llama_kv_ragged_positions(seq), n_cells) {
}

std::shared_ptr<const llama_kv_ragged_rest> llama_kv_ragged_without(
        const llama_kv_ragged_seq & seq, const std::vector<wkv::position_range> & pinned, int64_t & n_cells) {
    if (pinned.empty()) {
        return nullptr;
    }
    const auto cells = seq.n_cells();

    const auto res   = std::make_shared<llama_kv_ragged_rest>(seq, pinned, cells);

    const int64_t n_pinned = res->cells.n_pinned();
    if (n_pinned == 0) {
        return nullptr;
    }
    if (n_cells <= n_pinned && !wkv::fits(llama_kv_ragged_shapes(seq, cells), n_cells)) {
        throw std::invalid_argument(format("%" PRId64 " positions are pinned and the budget is %" PRId64 " cells per head, which leaves nothing "
                    "for the others: pin fewer, or give it more", n_pinned, n_cells));
    }
    n_cells = std::max<int64_t>(0, n_cells - n_pinned);
    return res;
}

// the rest of n_cells cells per head by what replays have found, beside those that are marked
static std::string add_replayed(
        const llama_kv_ragged_seq & seq, const llama_kv_ragged_rest * rest, const wkv::cache_view & view, int64_t n_cells, wkv::marks & keep) {
    const auto   cells = seq.n_cells(); // pinned ones too
    const size_t n     = std::accumulate(cells.begin(), cells.end(), size_t(0));

    const llama_kv_ragged_claim claim(seq.get_meter(), n*sizeof(float));

    std::vector<float> scores(n);
    float * dst = scores.data();
    for (size_t i = 0; i < seq.cells.size(); ++i) {
        seq.copy_replayed(i, dst);
        for (size_t ih = 0; ih < seq.cells[i].kept.size(); ++ih) {
            dst += seq.n_cells(i, ih);
        }
    }
    if (rest) {
        rest->cells.take(scores.data(), 0, cells.size(), 1);
    }
    return wkv::add_replayed(view, n_cells, scores.data(), keep);
}

bool llama_kv_ragged_policy_request(
        const llama_kv_ragged_seq & seq, const wkv_policy & policy, const std::vector<wkv::position_range> & pinned, int64_t n_cells,
        llama_kv_ragged_request & request) {
    const std::string error = wkv::policy_error(policy);
    if (!error.empty()) {
        throw std::invalid_argument("policy: " + error);
    }

    const auto sizes = wkv::window_sizes(policy);
    llama_kv_ragged_check_request(seq, sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end()), n_cells);
    n_cells = std::min<int64_t>(n_cells, INT32_MAX); // no head holds more

    const int64_t n_asked = n_cells;

    const auto rest   = llama_kv_ragged_without(seq, pinned, n_cells);
    const auto cells  = rest ? rest->cells.cells() : seq.n_cells();
    const auto shapes = llama_kv_ragged_shapes(seq, cells, rest.get());

    const std::string misfit = wkv::shapes_error(policy, shapes);
    if (!misfit.empty()) {
        throw std::invalid_argument("policy: " + misfit);
    }
    if (n_cells == 0) {
        return false;
    }
    const bool    replays = policy.scoring.reduce == WKV_REDUCE_REPLAY || policy.replay_share > 0.0;
    const int64_t n_left  = replays ? int64_t(seq.n_pos) - seq.n_replayed() : 0;
    if (n_left > n_asked) {
        throw std::invalid_argument(format("the policy goes by what a replay scores, and %" PRId64 " of the %u positions were not replayed, more than "
                    "the %" PRId64 " cells per head that may stay: replay more of them first", n_left, seq.n_pos, n_asked));
    }

    // heads that compete need scores, unless everything fits; for the others the budgets tell before anything is computed
    if (wkv::needs_scores_for_budgets(policy) || policy.replay_share > 0.0) {
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
    request.scoring.reduce        = llama_kv_ragged_reduce(policy.scoring.reduce);
    request.select = [&seq, &policy, rest, n_cells](llama_kv_ragged_choice & choice) {
        const auto     & cells  = rest ? rest->cells.cells() : choice.cells;
        const wkv_shapes shapes = llama_kv_ragged_shapes(seq, cells, rest.get());

        wkv::cache_view view(policy, shapes, rest ? rest->cells.positions() : llama_kv_ragged_positions(seq));
        view.n_threads      = choice.n_threads();
        view.n_cells_thread = 65536; // selecting among fewer takes no longer than a thread does to start

        llama_kv_ragged_claim claim(seq.get_meter());
        bool                  claimed = false;

        // by the first window, those of pinned cells too: what the scores by the second are made from
        std::vector<float>    first;
        llama_kv_ragged_claim claim_first(seq.get_meter());

        const auto scores = [&](int32_t il0, int32_t il1, int32_t plane) {
            claim.add(claimed ? 0 : wkv::select_bytes(view));
            claimed = true;
            if (rest && plane == 1) {
                choice.set_scores(first);
            }
            float * res = choice.score(il0, il1, plane);
            if (rest && plane == 0 && choice.get_scoring().window_sizes.size() > 1) {
                first = choice.get_scores();
                claim_first.set(first.size()*sizeof(float));
            }
            if (rest) {
                rest->cells.take(res, view.index(il0, 0), view.index(il1, 0), view.n_rows());
            }
            return res;
        };

        // devices know of no pinned cells
        llama_kv_ragged_device_keys devices(choice, view);
        wkv::marks                  own     = rest ? wkv::marks(cells.data(), cells.size()) : wkv::marks();
        wkv::marks                & keep    = rest ? own : choice.keep;
        const int64_t               n_other = policy.replay_share > 0.0 ? std::min(n_cells - 1, int64_t(n_cells*policy.replay_share)) : 0;

        std::string refused = wkv::select_cells(view, n_cells - n_other, scores, keep, rest ? nullptr : &devices);
        if (refused.empty() && n_other > 0) {
            choice.drop_scores();
            refused = add_replayed(seq, rest.get(), view, n_cells, keep);
        }
        if (!refused.empty()) {
            llama_kv_ragged_refuse_unsupported(refused);
        }
        if (rest) {
            rest->cells.give(own, choice.keep);
        }
    };
    return true;
}
