// The C interface of policies: structs of numbers become types, and the pure functions.

#include "windowkv-capi.h"

#include "llama-impl.h"

#include <algorithm>
#include <cinttypes>

// C's enums are ints of any value; those of the inner code have the same order and nothing else
template <typename E>
static E convert(const char * name, int32_t value, E last) {
    if (value < 0 || value > int32_t(last)) {
        throw std::invalid_argument(format("policy: %s is %d, expected a value of enum wkv_%s", name, value, name));
    }
    return E(value);
}

static bool convert_flag(const char * name, int32_t value) {
    if (value != 0 && value != 1) {
        throw std::invalid_argument(format("policy: %s is %d, expected 0 or 1", name, value));
    }
    return value == 1;
}

// wkv_convert() counts on it
static_assert(int(wkv::pooling::carry) == WKV_POOLING_CARRY && int(wkv::query_heads::each) == WKV_QUERY_HEADS_EACH, "scoring");
static_assert(int(wkv::layers::pyramid) == WKV_LAYERS_PYRAMID && int(wkv::layers::arithmetic) == WKV_LAYERS_ARITHMETIC, "layers");
static_assert(int(wkv::heads::importance) == WKV_HEADS_IMPORTANCE && int(wkv::heads::score) == WKV_HEADS_SCORE, "heads");
static_assert(int(wkv::across::model) == WKV_ACROSS_MODEL && int(wkv::accounting::paper) == WKV_ACCOUNTING_PAPER, "allocation");
static_assert(int(wkv::kind::recent) == WKV_KIND_RECENT && int(wkv::kind::tokens) == WKV_KIND_TOKENS &&
              int(wkv::kind::windows) == WKV_KIND_WINDOWS, "kind");
static_assert(int(wkv::scope::head) == WKV_SCOPE_HEAD && int(wkv::share::mean) == WKV_SHARE_MEAN, "selection");

wkv::policy wkv_convert(const struct wkv_policy & policy) {
    const auto & sco = policy.scoring;
    const auto & all = policy.allocation;
    const auto & sel = policy.selection;

    wkv::policy res;

    res.scoring.window_size       = sco.window_size;
    res.scoring.token_window_size = sco.token_window_size;
    res.scoring.pooling           = convert("pooling", sco.pooling, wkv::pooling::carry);
    res.scoring.kernel_size       = sco.kernel_size;
    res.scoring.query_heads       = convert("query_heads", sco.query_heads, wkv::query_heads::each);

    res.allocation.layers           = convert("layers", all.layers, wkv::layers::arithmetic);
    res.allocation.heads            = convert("heads", all.heads, wkv::heads::score);
    res.allocation.across           = convert("across", all.across, wkv::across::model);
    res.allocation.accounting       = convert("accounting", all.accounting, wkv::accounting::paper);
    res.allocation.lam              = all.lam;
    res.allocation.beta             = all.beta;
    res.allocation.alpha_safeguard  = all.alpha_safeguard;
    res.allocation.importance_floor = all.importance_floor;
    res.allocation.importance       = all.importance;
    res.allocation.n_importance     = all.n_importance;

    res.selection.kind          = convert("kind", sel.kind, wkv::kind::windows);
    res.selection.n_sink        = sel.n_sink;
    res.selection.n_recent      = sel.n_recent;
    res.selection.omega         = sel.omega;
    res.selection.top_p         = sel.top_p;
    res.selection.gamma         = sel.gamma;
    res.selection.share         = convert("share", sel.share, wkv::share::mean);
    res.selection.scope         = convert("scope", sel.scope, wkv::scope::head);
    res.selection.protect_first = convert_flag("protect_first", sel.protect_first);
    res.selection.whole_windows = convert_flag("whole_windows", sel.whole_windows);
    res.selection.recent_share  = sel.recent_share;
    res.selection.token_share   = sel.token_share;
    res.selection.window_floor  = sel.window_floor;

    return res;
}

// policy and shapes of a pure function; throws std::invalid_argument if they do not go together
struct selection_inputs {
    wkv::policy policy;
    wkv::shapes shapes;

    selection_inputs(const struct wkv_policy * c_policy, const struct wkv_shapes * c_shapes) {
        if (!c_policy || !c_shapes) {
            throw std::invalid_argument("policy or shapes is null");
        }
        policy = wkv_convert(*c_policy);
        shapes = { c_shapes->n_layer, c_shapes->n_head_kv, c_shapes->n_gqa, c_shapes->n_past, c_shapes->cells };

        std::string error = wkv::policy_error(policy);
        if (error.empty()) {
            error = wkv::shapes_error(policy, shapes);
        }
        if (!error.empty()) {
            throw std::invalid_argument("policy: " + error);
        }
    }
};

int wkv_budgets(const struct wkv_policy * policy, const struct wkv_shapes * shapes, int64_t n_cells,
                const int32_t * positions, const float * scores, int32_t * budgets) {
    return wkv_guard([&] {
        const selection_inputs in(policy, shapes);
        if (n_cells < 1) {
            return wkv_fail(WKV_ERR_ARGUMENT, format("n_cells is %" PRId64 ", expected at least 1", n_cells));
        }
        if (!budgets) {
            return wkv_fail(WKV_ERR_ARGUMENT, "budgets is null");
        }
        if (wkv::needs_scores_for_budgets(in.policy) && (!positions || !scores)) {
            return wkv_fail(WKV_ERR_ARGUMENT, "positions or scores is null, heads that compete need both");
        }

        std::vector<int32_t> res;
        const std::string refused = wkv::budgets(wkv::cache_view(in.policy, in.shapes, positions, scores), n_cells, res);
        if (!refused.empty()) {
            return wkv_fail(WKV_ERR_UNSUPPORTED, refused);
        }
        std::copy(res.begin(), res.end(), budgets);
        return int(WKV_OK);
    });
}

int wkv_select(const struct wkv_policy * policy, const struct wkv_shapes * shapes, const int32_t * budgets,
               const int32_t * positions, const float * scores, uint8_t * keep) {
    return wkv_guard([&] {
        const selection_inputs in(policy, shapes);
        if (!budgets || !positions || !keep || (!scores && !wkv::window_sizes(in.policy).empty())) {
            return wkv_fail(WKV_ERR_ARGUMENT, "budgets, positions, scores or keep is null");
        }

        const std::string refused = wkv::select(wkv::cache_view(in.policy, in.shapes, positions, scores), budgets, keep);
        return refused.empty() ? int(WKV_OK) : wkv_fail(WKV_ERR_UNSUPPORTED, refused);
    });
}
