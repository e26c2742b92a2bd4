// Selection by counts and marks: the same budgets and the same order of cells as in the other files, for scores that nobody sees here.

#include "wkv-device.h"

#include "wkv-windows.h"

#include <algorithm>

namespace wkv {

bool fits_devices(const cache_view & view, int32_t il0, int32_t il1) {
    const wkv_policy    & policy = view.policy;
    const wkv_selection & p      = policy.selection;

    if ((p.kind != WKV_KIND_TOKENS && p.kind != WKV_KIND_WINDOWS) || policy.scoring.kernel_size > KERNEL_SIZE_MAX_DEVICE ||
            policy.scoring.reduce != WKV_REDUCE_MEAN) { // the scores of replays are here
        return false;
    }
    if (policy.allocation.accounting == WKV_ACCOUNTING_PAPER && needs_scores_for_budgets(policy)) {
        return false;
    }
    // what goes by positions
    const bool carries = policy.scoring.pooling == WKV_POOLING_CARRY && policy.scoring.kernel_size > 1;
    if (p.kind == WKV_KIND_TOKENS && !carries) {
        return true;
    }
    const bool is_gapless = view.positions.empty() || std::all_of(view.positions.begin() + view.index(il0, 0), view.positions.begin() + view.index(il1, 0),
            [](const cell_positions & pos) { return pos.n_listed == 0 && pos.next == 0; });
    if (p.kind == WKV_KIND_TOKENS) {
        return is_gapless;
    }
    if (policy.scoring.query_heads != WKV_QUERY_HEADS_MEAN || p.scope != WKV_SCOPE_HEAD || n_layers_ranked(view) != 1 ||
            p.whole_windows || p.omega > OMEGA_MAX_DEVICE) {
        return false;
    }
    return is_gapless;
}

int64_t select_on_devices_bytes(const cache_view & view, int32_t il0, int32_t il1) {
    if (!needs_scores_for_budgets(view.policy)) {
        return 0;
    }
    const int64_t n_heads = view.index(il1, 0) - view.index(il0, 0);
    const int64_t n_cells = view.offsets[view.index(il1, 0)] - view.offsets[view.index(il0, 0)];
    // counts, see compete(), as they come from the device and in its order; 32 bytes to ask for those of a head
    return 2*std::max<int64_t>(16*sizeof(int32_t)*n_heads, n_cells/4) + 32*n_heads;
}

namespace {

// the layers il0 to il1 - 1
class device_selection {
public:
    device_selection(const cache_view & view, device_keys & devices, int32_t il0, int32_t il1, head_budgets & own) :
        view(view), p(view.policy.selection), devices(devices), il0(il0), il1(il1), i0(view.index(il0, 0)), n(view.index(il1, 0) - i0),
        own(own), stays(n), n_marked(n), taken(n) {
    }

    void run() {
        p.kind == WKV_KIND_WINDOWS ? windows() : tokens();
    }

private:
    const cache_view    & view;
    const wkv_selection & p;
    device_keys         & devices;

    const int32_t il0, il1;
    const size_t  i0, n; // heads

    head_budgets & own;

    std::vector<int32_t>      stays; // of the heads, as the next two
    std::vector<int32_t>      n_marked;
    std::vector<places_taken> taken;

    bool competes() const { return needs_scores_for_budgets(view.policy); }

    int32_t n_cells (size_t j) const { return view.shapes.cells[i0 + j]; }
    int32_t n_review(size_t j) const { return std::max(0, n_cells(j) - view.policy.scoring.window_size); }

    void compete_by(places kind, competition c, int32_t * res) {
        c.n_bits  = n_bits(kind);
        c.n_stays = stays.data();
        c.count   = [this, kind](const key_digit & digit, int32_t * counts) { devices.count(kind, digit, counts); };
        compete(c, res);
    }

    // of head j: the newest n_recent cells, n_best before the observation window, n_rest of the others in it
    void take(size_t j, int32_t n_recent, int32_t n_best, int32_t n_rest) {
        taken[j]    = { n_best, n_cells(j) - n_recent - n_rest };
        n_marked[j] = n_recent + n_best + n_rest;
    }

    // as compete_tokens() and mark_tokens_of()
    void tokens() {
        if (competes()) {
            for (size_t j = 0; j < n; ++j) {
                stays[j] = std::min(n_cells(j), p.n_recent);
            }
            compete_by(places::tokens, competition_of(view, own, il0, il1), own.n_cells.data() + i0);
        }
        for (size_t j = 0; j < n; ++j) {
            const int32_t budget   = own.n_cells[i0 + j];
            const int32_t n_recent = std::min({ n_cells(j), p.n_recent, budget });
            const int32_t n_best   = std::min(n_review(j), budget - n_recent);
            take(j, n_recent, n_best, std::min(n_cells(j) - n_recent - n_review(j), budget - n_recent - n_best));
        }
        devices.mark(places::tokens, taken);
    }

    // as budget_windows() and mark_windows()
    void windows() {
        if (competes()) {
            for (size_t j = 0; j < n; ++j) {
                stays[j] = n_recent_of(n_cells(j), p, own.own[i0 + j]) + (p.protect_first ? std::min(p.omega, n_review(j)) : 0);
            }
            budget_windows();
        }
        for (size_t j = 0; j < n; ++j) {
            const size_t  i        = i0 + j;
            const int32_t n_stay   = p.token_share == 0.0 ? own.n_cells[i] :
                std::min(own.n_cells[i], own.n_windows.empty() ? n_before_tokens(view, own.own, i) : own.n_windows[i]);
            const int32_t n_newest = n_recent_of(n_cells(j), p, own.own[i]);
            const int32_t n_recent = std::min(n_newest, n_stay);
            const int32_t n_best   = std::min(n_review(j), n_stay - n_recent);
            take(j, n_recent, n_best, std::min(n_cells(j) - n_newest - n_review(j), n_stay - n_recent - n_best));
        }
        devices.mark(places::windows, taken);
        if (p.token_share > 0.0) {
            rest();
        }
    }

    void budget_windows() {
        const auto c = competition_of(view, own, il0, il1);
        if (p.token_share == 0.0) {
            compete_by(places::windows, c, own.n_cells.data() + i0);
            return;
        }
        const auto first     = n_before_tokens(view, own.own, i0, i0 + n);
        const auto first_due = n_before_tokens(view, own.due, i0, i0 + n);

        competition before = c;
        before.own = first.data();
        before.due = first_due.empty() ? nullptr : first_due.data();

        own.n_windows.resize(i0 + n);
        compete_by(places::windows, before, own.n_windows.data() + i0);
        compete_with_stays(c, own.n_windows.data() + i0, own.n_cells.data() + i0);
    }

    // as budget_tokens() and mark_tokens()
    void rest() {
        const auto begin = own.n_cells.begin() + i0;
        if (competes() && std::find(begin, begin + n, BUDGET_OPEN) != begin + n) {
            for (size_t j = 0; j < n; ++j) {
                stays[j] = std::min(own.n_windows[i0 + j], n_cells(j));
            }
            compete_by(places::rest, competition_of(view, own, il0, il1), own.n_cells.data() + i0);
        }
        for (size_t j = 0; j < n; ++j) {
            taken[j] = { std::max(0, own.n_cells[i0 + j] - n_marked[j]), n_cells(j) };
        }
        devices.mark(places::rest, taken);
    }
};

} // namespace

std::string select_on_devices(const cache_view & view, device_keys & devices, int32_t il0, int32_t il1, head_budgets & own, marks & keep) {
    const int32_t n_head_kv = view.shapes.n_head_kv;

    const int64_t i_bad = devices.not_finite();
    if (i_bad >= 0) {
        return not_finite(il0 + i_bad/n_head_kv, i_bad%n_head_kv);
    }
    device_selection(view, devices, il0, il1, own).run();
    devices.read(keep, view.index(il0, 0));
    return "";
}

} // namespace wkv
