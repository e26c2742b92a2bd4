"""Native budgets and selection equal the definitions in tests/reference, cell by cell, for every row of policy_table.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_table import NATIVE, ROWS, budgets_of, kept, total, with_scores
from reference.common import Cache, sizes
from reference.windowkv import published_budgets

from windowkv_edge import (
    POLICIES,
    AdaKV,
    HeadKV,
    HeadScores,
    KVPolicy,
    NativeError,
    WindowAdaKV,
    WindowKV,
    _native,
    get_policy,
)
from windowkv_edge.heads import ModelHeads
from windowkv_edge.policies import Task

policies = NATIVE
tasks = st.sampled_from(["localization", "aggregation"])


@st.composite
def caches(draw: st.DrawFn, heads: str) -> tuple[Cache, Cache, int]:
    """Positions and scores of a small cache, and a budget; often few distinct scores, so that ties are common.

    heads: "alike" = all heads of all layers hold the same positions, "equal" = those of a layer hold equally many,
    "ragged" = every head holds its own number.
    """
    n_layer, n_head = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_past = draw(st.sampled_from([1, 2, 7, 31, 32, 33, 100, 100, 257, 257, 257, 400]))
    n_levels = draw(st.sampled_from([1, 3, 1000, 1000, 1000]))
    evicted = draw(st.booleans())
    shared = rng.integers(1, n_past + 1)
    alike = np.sort(rng.choice(n_past, size=shared, replace=False))
    positions: Cache = []
    scores: Cache = []
    for _ in range(n_layer):
        n = rng.integers(1, n_past + 1)
        positions.append([])
        for _ in range(n_head):
            if not evicted:
                pos = np.arange(n_past)
            elif heads == "alike":
                pos = alike
            else:
                size = n if heads == "equal" else rng.integers(1, n_past + 1)
                pos = np.sort(rng.choice(n_past, size=size, replace=False))
            positions[-1].append(pos.astype(np.int32))
        scores.append([(rng.integers(0, n_levels, size=p.size) / n_levels).astype(np.float32) for p in positions[-1]])
    mean = np.mean(sizes(positions))
    n_cells = draw(st.one_of(st.integers(1, 300), st.sampled_from([0.1, 0.3, 0.5, 0.9]).map(lambda x: int(x * mean) + 1)))
    return positions, scores, n_cells


def token_plane(policy: KVPolicy, scores: Cache) -> Cache | None:
    """Scores of single tokens, other ones than those of windows, for policies that look at them."""
    if getattr(policy, "token_share", 0) == 0:
        return None
    return [[own[::-1].copy() for own in layer] for layer in scores]


def check(policy: KVPolicy, positions: Cache, scores: Cache, n_cells: int, task: Task) -> None:
    cells = np.array(sizes(positions))
    policy = with_scores(policy, *cells.shape, seed=n_cells)
    parts = policy.parts(task)
    tokens = token_plane(policy, scores)
    if getattr(policy, "query_heads", "mean") == "each":
        scores = [[np.stack([own, own[::-1], own * own]) for own in layer] for layer in scores]
    want = kept(policy, positions, scores, n_cells, task, tokens)
    budget = budgets_of(policy, positions, n_cells, task, want)
    assert _native.budgets(parts, cells, n_cells, positions, scores, tokens).tolist() == budget, policy

    got = _native.select(parts, budget, positions, scores, tokens)
    for il, (a, b) in enumerate(zip(got, want, strict=True)):
        for head, (x, y) in enumerate(zip(a, b, strict=True)):
            assert np.array_equal(x, y), f"layer {il}, head {head}: {policy}"


def same_in_heads(policy: KVPolicy, positions: Cache, scores: Cache, n_cells: int) -> tuple[Cache, Cache, int]:
    """Policies that choose once for all heads of a layer need heads that hold the same positions."""
    if not isinstance(policy, WindowKV) or policy.scope != "layer":
        return positions, scores, n_cells
    return (
        [[layer[0]] * len(layer) for layer in positions],
        [[layer[0] * (head + 1) for head in range(len(layer))] for layer in scores],
        n_cells,
    )


@settings(max_examples=400, deadline=None)
@given(policy=policies, cache=caches(heads="alike"), task=tasks)
def test_native_equals_reference(policy: KVPolicy, cache: tuple[Cache, Cache, int], task: Task) -> None:
    check(policy, *cache, task)


@settings(max_examples=400, deadline=None)
@given(
    policy=policies,
    cache=st.one_of(caches(heads="equal"), caches(heads="ragged")),
    task=tasks,
)
def test_native_equals_reference_on_cells_that_differ(
    policy: KVPolicy, cache: tuple[Cache, Cache, int], task: Task
) -> None:
    check(policy, *same_in_heads(policy, *cache), task)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_has_a_row(name: str) -> None:
    """And the row's options are of that policy. It is compared once more by itself: above every row has few of the cases."""
    cls = POLICIES[name]
    assert cls in ROWS, f"{name} has no row in tests/policy_table.py"
    row = ROWS[cls]
    assert (row.kept is None) == get_policy(name).in_python

    @settings(max_examples=200, deadline=None)
    @given(policy=row.options, cache=st.one_of(caches(heads="alike"), caches(heads="ragged")), task=tasks)
    def run(policy: KVPolicy, cache: tuple[Cache, Cache, int], task: Task) -> None:
        assert type(policy) is cls
        if row.kept:
            check(policy, *same_in_heads(policy, *cache), task)
        else:
            check_in_python(policy, *cache)

    run()


def test_every_row_is_a_policy_of_the_package() -> None:
    assert set(ROWS) == set(POLICIES.values())


@dataclasses.dataclass(frozen=True)
class View:
    """A CacheView without a session: random keys, values and queries of two query heads per kv head."""

    positions: Cache
    n_past: int
    n_gqa: int = 2
    cell_types: tuple[str, str] = ("f16", "f16")

    @property
    def n_layer(self) -> int:
        return len(self.positions)

    @property
    def n_head_kv(self) -> int:
        return len(self.positions[0])

    def keys(self, layer: int, head: int) -> np.ndarray:
        return np.random.default_rng([layer, head]).normal(size=(len(self.positions[layer][head]), 8)).astype(np.float32)

    values = keys

    def queries(self, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        n = min(self.n_past, 20)
        rows = np.random.default_rng([7, layer, head]).normal(size=(max(n, 2), 8))
        return np.arange(self.n_past - len(rows), self.n_past, dtype=np.int32), rows.astype(np.float32)


def check_in_python(policy: KVPolicy, positions: Cache, scores: Cache, n_cells: int) -> None:
    """A policy that selects in NumPy is its own definition; what every one promises: the budget, order, the newest cell."""
    n_past = 1 + max(int(pos[-1]) for layer in positions for pos in layer)
    found = policy.select(scores, n_cells, View(positions, n_past))  # type: ignore[arg-type]
    for layer, own in zip(found, positions, strict=True):
        for pos, have in zip(layer, own, strict=True):
            got = np.asarray(pos)
            assert len(got) == min(n_cells, len(have))
            assert (np.diff(got) > 0).all() and np.isin(got, have).all()
            assert got[-1] == have[-1]


@settings(max_examples=300, deadline=None)
@given(policy=policies, cache=caches(heads="ragged"))
def test_budgets_spend_exactly_what_is_there(policy: KVPolicy, cache: tuple[Cache, Cache, int]) -> None:
    positions, scores, n_cells = cache
    cells = np.array(sizes(positions))
    policy = with_scores(policy, *cells.shape, seed=n_cells)
    got = _native.budgets(policy.parts(), cells, n_cells, positions, scores, scores)
    assert (0 <= got).all() and (got <= cells).all()
    spent = total(policy, positions, n_cells)
    assert spent is None or got.sum() == spent


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
        _native.select(WindowKV(scope="layer").native(), [[2, 2]], positions, scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": 9}, "kind is 9"),
        ({"alpha": 0}, "alpha is 0, expected at least 1"),
        ({"suffix": 99}, "suffix is 99, expected 0 to alpha"),
        ({"omega": 0}, "omega is 0"),
        ({"top_p": 99}, "top_p is 99, expected 1 to omega"),
        ({"gamma": 0}, "gamma is 0"),
        ({"carry": -1}, "carry is -1"),
        ({"suffix_share": 0.0}, "suffix_share"),
        ({"tokens": 1.5}, "tokens must be 0 to 1"),
        ({"window_floor": -1}, "window_floor is -1, expected at least 0"),
        ({"tokens": 0.5, "token_alpha": 0}, "token_alpha is 0, expected at least 1"),
        ({"tokens": 0.5, "gamma": 2}, "tokens beside windows need scope = head and gamma = 1"),
        ({"shape": 1, "slope": 0.0}, "slope"),
        ({"heads": 7}, "heads is 7"),
        ({"heads": 1, "pool": 1.5}, "pool must be 0 to 1"),
        ({"heads": 1, "pool": 0.5}, "importance holds 0 scores, expected 1 layers x 1 kv heads"),
        ({"heads": 1, "pool": 0.5, "importance": np.array([-1.0])}, "negative"),
        ({"heads": 2, "floor_share": -0.1}, "floor_share"),
        ({"heads": 2, "floor_share": 0.2, "scope": 0}, "scope = layer"),
        ({"span": 2}, "span is 2, expected a value of enum wkv_span"),
        ({"pool_floor": -1}, "pool_floor is -1, expected at least 0"),
        ({"heads": 2, "pool": 0.5}, "pool needs span = model"),
        ({"heads": 2, "span": 1, "shape": 1}, "span = model needs flat budgets"),
        ({"heads": 2, "span": 1, "pool": 0.5}, "importance holds 0 scores"),
        ({"heads": 2, "floor_share": 0.2}, "heads that compete need both"),
    ],
)
def test_bad_policies_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(NativeError, match=message):
        _native.budgets({**WindowKV().native(), **change}, [[10]], 5)


def test_windows_stay_whole() -> None:
    """One strong token keeps its window's neighbours, as far as the budget reaches."""
    score = np.zeros(100, dtype=np.float32)
    score[43] = 1.0
    pos = np.arange(100, dtype=np.int32)
    keep = _native.select(WindowKV(omega=8, window_size=4, carry=0, recent_share=1.0).native(), [[12]], [[pos]], [[score]])[0][0]
    assert np.flatnonzero(keep).tolist() == [*range(40, 48), 96, 97, 98, 99]


def test_scores_carry_over_to_what_follows() -> None:
    """The window behind a strong token beats windows that nobody looks at."""
    score = np.zeros(100, dtype=np.float32)
    score[46] = 1.0
    score[80] = 0.1
    pos = np.arange(100, dtype=np.int32)
    keep = _native.select(WindowKV(omega=8, window_size=4, carry=5, recent_share=0.25).native(), [[20]], [[pos]], [[score]])[0][0]
    assert np.flatnonzero(keep).tolist() == [*range(40, 56), 96, 97, 98, 99]
