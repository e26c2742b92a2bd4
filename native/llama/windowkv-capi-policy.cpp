// The C interface of policies: the pure functions.

#include "windowkv-capi.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>

// throws std::invalid_argument if policy and shapes do not go together
static void check(const struct wkv_policy * policy, const struct wkv_shapes * shapes) {
    if (!policy || !shapes) {
        throw std::invalid_argument("policy or shapes is null");
    }
    std::string error = wkv::policy_error(*policy);
    if (error.empty()) {
        error = wkv::shapes_error(*policy, *shapes);
    }
    if (error.empty() && policy->replay_share > 0.0) {
        error = "replay_share is for the cells of a context, expected 0 here";
    }
    if (!error.empty()) {
        throw std::invalid_argument("policy: " + error);
    }
}

int wkv_budgets(const struct wkv_policy * policy, const struct wkv_shapes * shapes, int64_t n_cells,
                const int32_t * positions, const float * scores, int32_t * budgets) {
    return wkv_guard([&] {
        check(policy, shapes);
        if (n_cells < 1) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("n_cells is %" PRId64 ", expected at least 1", n_cells));
        }
        if (!budgets) {
            return wkv_fail(WKV_ERR_ARGUMENT, "budgets is null");
        }
        if (wkv::needs_scores_for_budgets(*policy) && (!positions || !scores)) {
            return wkv_fail(WKV_ERR_ARGUMENT, "positions or scores is null, heads that compete need both");
        }

        wkv::head_budgets res;
        const std::string refused = wkv::budgets(wkv::cache_view(*policy, *shapes, positions, scores), n_cells, res);
        if (!refused.empty()) {
            return wkv_fail(WKV_ERR_UNSUPPORTED, refused);
        }
        std::copy(res.n_cells.begin(), res.n_cells.end(), budgets);
        return int(WKV_OK);
    });
}

int wkv_select(const struct wkv_policy * policy, const struct wkv_shapes * shapes, const int32_t * budgets,
               const int32_t * positions, const float * scores, uint8_t * keep) {
    return wkv_guard([&] {
        check(policy, shapes);
        if (!budgets || !positions || !keep || (!scores && !wkv::window_sizes(*policy).empty())) {
            return wkv_fail(WKV_ERR_ARGUMENT, "budgets, positions, scores or keep is null");
        }

        const wkv::cache_view view(*policy, *shapes, positions, scores);

        wkv::head_budgets own;
        const std::string wrong = wkv::given_budgets(view, budgets, own);
        if (!wrong.empty()) {
            return wkv_fail(WKV_ERR_ARGUMENT, wrong);
        }
        wkv::marks marks(shapes->cells, view.offsets.size() - 1);
        const std::string refused = wkv::select(view, own, marks);
        if (!refused.empty()) {
            return wkv_fail(WKV_ERR_UNSUPPORTED, refused);
        }
        for (size_t i = 0; i + 1 < view.offsets.size(); ++i) {
            marks.write(i, keep + view.offsets[i]);
        }
        return int(WKV_OK);
    });
}
