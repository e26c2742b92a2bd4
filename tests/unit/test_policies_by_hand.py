"""Native budgets and selections that can be worked out by hand, and what the native code refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from reference.windowkv import published_budgets

from windowkv_edge import AdaKV, HeadKV, HeadScores, KVPolicy, KVzip, NativeError, SnapKV, WindowAdaKV, WindowKV, _native
from windowkv_edge.errors import NativeArgumentError
from windowkv_edge.heads import ModelHeads
from windowkv_edge.policies.parts import Parts


def test_headkv_budgets_are_the_papers() -> None:
    """b - b/beta + S * (b/beta) * heads, by hand: b = 100, beta = 2, eight heads, one with half of the importance."""
    scores = np.array([[8.0, 4.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    policy = HeadKV(beta=2.0, importance=HeadScores({"r": scores})).bind(ModelHeads("m", {}, 2, 4, (0, 1)))
    got = _native.budgets(policy.parts(), np.full((2, 4), 1000), 100)
    assert got.tolist() == [[250, 150, 100, 100], [50, 50, 50, 50]]


def test_what_exceeds_the_prompt_goes_to_the_others_by_importance() -> None:
    scores = np.array([[8.0, 4.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    policy = HeadKV(beta=2.0, importance=HeadScores({"r": scores})).bind(ModelHeads("m", {}, 2, 4, (0, 1)))
    got = _native.budgets(policy.parts(), np.full((2, 4), 200), 100)
    # 50 cells over the prompt's 200 go to the others at 4 : 2 : 2
    assert got.tolist() == [[200, 175, 113, 112], [50, 50, 50, 50]]
    # when all that matter are full, the rest is shared equally
    got = _native.budgets(policy.parts(), np.full((2, 4), 110), 100)
    assert got.tolist() == [[110, 110, 110, 110], [90, 90, 90, 90]]


def test_adakv_gives_the_best_cells_to_whoever_holds_them() -> None:
    pos = [[np.arange(12, dtype=np.int32)] * 2]
    score = [[np.full(12, 0.1, dtype=np.float32), np.linspace(0.5, 0.9, 12).astype(np.float32)]]
    policy = AdaKV(window_size=2, kernel_size=1, alpha_safeguard=0.25)
    budget = _native.budgets(policy.parts(), [[12, 12]], 6, pos, score)
    # each head is sure of its 2 newest cells and a quarter of the other 4; the 6 that are left go to the second head
    assert budget.tolist() == [[3, 9]]
    keep = _native.select(policy.parts(), budget, pos, score)[0]
    assert np.flatnonzero(keep[0]).tolist() == [0, 10, 11]
    assert np.flatnonzero(keep[1]).tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("across", ["layer", "model"])
def test_what_a_head_is_sure_of_does_not_shrink_with_what_it_lost(across: Any) -> None:
    """50 cells each: the head that nothing asks for keeps 2 newest cells and half of 48, however often they are compacted."""
    policy = AdaKV(window_size=2, kernel_size=1, alpha_safeguard=0.5, across=across)
    positions = [[np.arange(50, dtype=np.int32)] * 2]
    for n_past in range(60, 260, 10):
        new = np.arange(n_past - 10, n_past, dtype=np.int32)
        positions = [[np.concatenate([own, new]) for own in positions[0]]]
        scores = [[np.full(own.size, score, dtype=np.float32) for own, score in zip(positions[0], (0.0, 0.5), strict=True)]]
        budget = _native.budgets(policy.parts(), [[own.size for own in positions[0]]], 50, positions, scores)
        least = max(26, 100 - n_past)  # the other head keeps all it has read until then
        assert budget.tolist() == [[least, 100 - least]]
        keep = _native.select(policy.parts(), budget, positions, scores)[0]
        positions = [[own[stays] for own, stays in zip(positions[0], keep, strict=True)]]


def test_windows_compete_across_heads() -> None:
    """The head that looks at two places holds both windows, the other one its sure cells."""
    pos = [[np.arange(34, dtype=np.int32)] * 2]
    score = [[np.zeros(34, dtype=np.float32), np.zeros(34, dtype=np.float32)]]
    score[0][0][20:24] = 0.1
    score[0][1][4:8] = score[0][1][12:16] = 0.9
    policy = WindowAdaKV(window_size=2, omega=4, carry=0, recent_share=1.0, alpha_safeguard=0.0)
    budget = _native.budgets(policy.parts(), [[34, 34]], 6, pos, score)
    assert budget.tolist() == [[2, 10]]
    keep = _native.select(policy.parts(), budget, pos, score)[0]
    assert np.flatnonzero(keep[0]).tolist() == [32, 33]
    assert np.flatnonzero(keep[1]).tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 32, 33]


@pytest.mark.parametrize(
    ("n_layer", "n_cells", "gamma", "lam", "want"),
    [
        # hand-computed from the authors' arithmetic: last = int(C*gamma/lambda), first = 2C - last, step = (first - last)//3
        (32, 512, 8, 14.0, [732, 586, 440, 292]),
        (32, 1024, 8, 14.0, [1463, 1171, 879, 585]),
        (28, 512, 7, 14.0, [768, 598, 428, 256]),
        (28, 2048, 7, 14.0, [3072, 2390, 1708, 1024]),
        (30, 512, 7, 14.0, [768, 640, 512, 384, 256]),
        (4, 512, 8, 14.0, [512]),
    ],
)
def test_paper_accounting(n_layer: int, n_cells: int, gamma: int, lam: float, want: list[int]) -> None:
    assert published_budgets(n_layer, n_cells, gamma=gamma, lam=lam) == [want[il // gamma] for il in range(n_layer)]
    policy = WindowKV(accounting="paper", budget="arithmetic", gamma=gamma, lam=lam, window_size=32)
    got = _native.budgets(policy.parts(), np.full((n_layer, 8), 100_000), n_cells)
    # the observation window comes on top
    assert got.tolist() == [[want[il // gamma] + 32] * 8 for il in range(n_layer)]


def test_groups_never_form_an_inverted_pyramid() -> None:
    policy = WindowKV(budget="arithmetic", gamma=10, lam=2.0, accounting="native")
    assert (_native.budgets(policy.parts(), np.full((30, 2), 1000), 100) == 100).all()


def test_a_short_last_group_keeps_the_mean_exact() -> None:
    policy = WindowKV(budget="arithmetic", gamma=8)
    got = _native.budgets(policy.parts(), np.full((30, 3), 4000), 480)[:, 0]
    assert got.sum() == 480 * 30
    assert (np.diff(got) <= 1).all() and got[0] > got[-1]


def test_layer_scope_refuses_heads_that_differ() -> None:
    positions = [[np.array([0, 1, 2, 3], dtype=np.int32), np.array([0, 2, 3, 5], dtype=np.int32)]]
    scores = [[np.zeros(4, dtype=np.float32)] * 2]
    with pytest.raises(NativeError, match="scope = layer needs heads that hold the same positions"):
        _native.select(WindowKV(scope="layer").parts(), [[2, 2]], positions, scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": 9}, "kind is 9, expected a value of enum wkv_kind"),
        ({"window_size": 0}, "window_size is 0, expected at least 1"),
        ({"n_recent": 99}, "n_recent is 99, expected 0 to window_size"),
        ({"kernel_size": 0}, "kernel_size is 0, expected at least 1"),
        ({"pooling": "max", "kernel_size": 4}, "kernel_size is 4, expected an odd number"),
        ({"omega": 0}, "omega is 0"),
        ({"top_p": 99}, "top_p is 99, expected 1 to omega"),
        ({"gamma": 0}, "gamma is 0"),
        ({"recent_share": 0.0}, "recent_share"),
        ({"protect_first": 2}, "protect_first is 2, expected 0 or 1"),
        ({"token_share": 1.5}, "token_share is 1.5.*, expected 0 to 1"),
        ({"token_share": math.nan}, "token_share is nan, expected 0 to 1"),
        ({"window_floor": -1}, "window_floor is -1, expected at least 0"),
        ({"window_floor": 8}, "window_floor is given, but token_share is 0"),
        ({"token_share": 0.5, "token_window_size": 0}, "token_window_size is 0, expected at least 1"),
        ({"token_window_size": 8}, "token_window_size is given, but token_share is 0"),
        ({"token_share": 0.5, "gamma": 2}, "token_share needs scope = head and gamma = 1"),
        ({"token_share": 0.5, "whole_windows": True}, "whole_windows leaves nothing for single tokens"),
        ({"query_heads": "each"}, "query_heads = each needs windows, kernel_size = 1"),
        ({"n_sink": 4}, "n_sink is given, but only kind = recent keeps sinks"),
        ({"layers": "arithmetic", "lam": 0.0}, "lam is 0.0.*, expected a positive number"),
        ({"layers": "arithmetic", "lam": math.inf}, "lam is inf, expected a positive number, and a finite one"),
        ({"layers": "arithmetic", "lam": math.nan}, "lam is nan, expected a positive number"),
        ({"lam": 14.0}, "lam is 14.0.*, expected 0, layers = arithmetic alone uses it"),
        ({"layers": "pyramid", "beta": 0.5}, "beta is 0.5.*, expected at least 1"),
        ({"layers": "pyramid", "beta": math.inf}, "beta is inf, expected at least 1 and finite"),
        ({"heads": "importance", "beta": math.nan}, "beta is nan, expected at least 1"),
        ({"heads": "score", "across": "model", "beta": math.inf}, "beta is inf, expected 0, or at least 1 and finite"),
        ({"beta": 2.0}, "beta is 2.0.*, expected 0"),
        ({"beta": math.nan}, "beta is nan, expected 0"),
        ({"heads": 7}, "heads is 7, expected a value of enum wkv_heads"),
        ({"heads": "importance", "beta": 0.5}, "beta is 0.5.*, expected at least 1"),
        ({"heads": "importance", "beta": 2.0}, "importance holds 0 scores, expected 1 layers x 1 kv heads"),
        ({"heads": "importance", "beta": 2.0, "importance": np.array([-1.0])}, "negative"),
        ({"heads": "importance", "beta": 2.0, "importance": np.array([math.inf])}, "not a number"),
        ({"heads": "importance", "beta": 2.0, "layers": "pyramid"}, "heads = importance needs layers = flat"),
        ({"importance": np.array([1.0])}, "importance is given, but nothing is divided by it"),
        ({"heads": "score", "alpha_safeguard": -0.1}, "alpha_safeguard is -0.1.*, expected 0 to 1"),
        ({"alpha_safeguard": 0.1}, "alpha_safeguard is 0.1.*, expected 0, heads do not compete"),
        ({"heads": "score", "alpha_safeguard": 0.2, "scope": "layer"}, "scope = layer"),
        ({"heads": "score", "whole_windows": True}, "whole_windows needs heads = equal"),
        ({"across": 2}, "across is 2, expected a value of enum wkv_across"),
        ({"across": "model"}, "across is given, but heads do not compete"),
        ({"importance_floor": -1}, "importance_floor is -1, expected at least 0"),
        ({"heads": "score", "beta": 2.0}, "across = model"),
        ({"heads": "score", "across": "model", "layers": "arithmetic", "lam": 1.0}, "across = model needs layers = flat"),
        ({"heads": "score", "across": "model", "beta": 2.0}, "importance holds 0 scores"),
        ({"heads": "score", "alpha_safeguard": 0.2}, "heads that compete need both"),
        ({"heads": "score", "accounting": "paper"}, "accounting = paper knows windows with heads = equal only"),
    ],
)
def test_bad_policies_are_refused(change: dict[str, object], message: str) -> None:
    def changed(part: Any) -> Any:
        own = {field.name for field in dataclasses.fields(part)} & set(change)
        return dataclasses.replace(part, **{name: change[name] for name in own})

    with pytest.raises(NativeError, match=message):
        _native.budgets(Parts(*map(changed, WindowKV().parts()[:3])), [[10]], 5)


@pytest.mark.parametrize(
    ("share", "policy", "message"),
    [
        (-0.1, WindowKV(), "replay_share is -0.1.*, expected 0 to less than 1"),
        (1.0, WindowKV(), "replay_share is 1.0.*, expected 0 to less than 1"),
        (math.nan, WindowKV(), "replay_share is nan, expected 0 to less than 1"),
        (0.5, KVzip(), "replay_share divides .*: not with reduce = replay"),
        (0.5, SnapKV(accounting="paper"), "replay_share divides .* accounting = paper"),
        (0.5, WindowKV(), "replay_share is for the cells of a context, expected 0 here"),
    ],
)
def test_bad_shares_of_a_replay_are_refused(share: float, policy: KVPolicy, message: str) -> None:
    with pytest.raises(NativeError, match=message):
        _native.budgets(policy.parts()._replace(replay_share=share), [[10]], 5)


def test_a_budget_below_zero_is_refused() -> None:
    positions, scores = [[np.arange(9, dtype=np.int32)] * 2], [[np.zeros(9, dtype=np.float32)] * 2]
    for policy in (WindowKV(), AdaKV()):
        with pytest.raises(NativeArgumentError, match="the budget of layer 0, kv head 1 is -3, expected at least 0"):
            _native.select(policy.parts(), [[4, -3]], positions, scores)
        assert all(own.all() for own in _native.select(policy.parts(), [[9, 2**31 - 1]], positions, scores)[0])


def test_the_authors_budgets_cut_what_a_layer_does_not_hold() -> None:
    """The others do not get it, whichever policy it is: each head's number of cells is fixed before it is looked at."""
    cells = [[5, 5], [40, 30], [100, 100]]
    assert _native.budgets(SnapKV.published(window_size=4).parts(), cells, 20).tolist() == [[5, 5], [20, 20], [20, 20]]
    assert _native.budgets(SnapKV(window_size=4).parts(), cells, 20).tolist() == [[5, 5], [28, 28], [27, 27]]


def test_windows_stay_whole() -> None:
    """One strong token keeps its window's neighbours, as far as the budget reaches."""
    score = np.zeros(100, dtype=np.float32)
    score[43] = 1.0
    pos = np.arange(100, dtype=np.int32)
    keep = _native.select(WindowKV(omega=8, window_size=4, carry=0, recent_share=1.0).parts(), [[12]], [[pos]], [[score]])[0][0]
    assert np.flatnonzero(keep).tolist() == [*range(40, 48), 96, 97, 98, 99]


def test_scores_carry_over_to_what_follows() -> None:
    """The window behind a strong token beats windows that nobody looks at."""
    score = np.zeros(100, dtype=np.float32)
    score[46] = 1.0
    score[80] = 0.1
    pos = np.arange(100, dtype=np.int32)
    keep = _native.select(WindowKV(omega=8, window_size=4, carry=5, recent_share=0.25).parts(), [[20]], [[pos]], [[score]])[0][0]
    assert np.flatnonzero(keep).tolist() == [*range(40, 56), 96, 97, 98, 99]


def test_scores_carry_over_gaps_by_position() -> None:
    """What stands behind a gap did not follow the strong token."""
    pos = np.array([0, 1, 2, 10, 11, 12, 14, 30, 31, 32, 33, 34, 35], dtype=np.int32)
    score = np.zeros(len(pos), dtype=np.float32)
    score[[1, 4]] = 0.5, 1.0
    policy = WindowKV(omega=1, window_size=2, carry=3, recent_share=0.5)
    keep = _native.select(policy.parts(), [[8]], [[pos]], [[score]])[0][0]
    assert pos[keep].tolist() == [0, 1, 2, 11, 12, 14, 34, 35]  # 0: of all that has nothing the first
