"""Native budgets and selection equal windowkv_edge/reference.py, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from windowkv_edge import Full, KVPolicy, NativeError, PyramidKV, SnapKV, StreamingLLM, WindowKV, _native, reference

windowkv = st.builds(
    WindowKV,
    omega=st.integers(1, 40),
    alpha=st.integers(1, 40),
    suffix=st.sampled_from([1.0, 0.5, 0.25, 0.1]),
    carry=st.integers(0, 12),
    localization=st.sampled_from(["average", "max"]),
    gamma=st.integers(1, 9),
    share=st.sampled_from(["first", "mean"]),
    scope=st.sampled_from(["layer", "head"]),
    budget=st.sampled_from(["arithmetic", "flat"]),
    lam=st.floats(0.5, 30),
    accounting=st.sampled_from(["native", "paper"]),
    protect_first=st.booleans(),
)
policies = st.one_of(
    st.just(Full()),
    st.builds(StreamingLLM, n_sink=st.integers(0, 8)),
    st.builds(SnapKV, alpha=st.integers(1, 40), kernel=st.sampled_from([1, 3, 7, 21])),
    st.builds(PyramidKV, alpha=st.integers(1, 40), kernel=st.sampled_from([1, 7]), beta=st.floats(1, 40)),
    windowkv,
    windowkv,
)


@st.composite
def caches(draw: st.DrawFn, layers_agree: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Positions and scores of a small cache; few distinct scores, so that ties are common."""
    n_layer, n_head = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n_past = draw(st.sampled_from([1, 2, 7, 31, 32, 33, 100, 257]))
    n_levels = draw(st.sampled_from([1, 3, 1000]))
    evicted = draw(st.booleans())
    positions, scores = [], []
    shared = np.sort(rng.choice(n_past, size=rng.integers(1, n_past + 1), replace=False))
    for _ in range(n_layer):
        n = int(rng.integers(1, n_past + 1)) if evicted and not layers_agree else len(shared) if evicted else n_past
        if not evicted:
            pos = np.tile(np.arange(n_past), (n_head, 1))
        elif layers_agree:
            pos = np.tile(shared, (n_head, 1))
        else:
            pos = np.stack([np.sort(rng.choice(n_past, size=n, replace=False)) for _ in range(n_head)])
        positions.append(pos.astype(np.int32))
        scores.append((rng.integers(0, n_levels, size=pos.shape) / n_levels).astype(np.float32))
    return positions, scores


def check(policy: KVPolicy, positions: list[np.ndarray], scores: list[np.ndarray], n_cells: int) -> None:
    cells = [p.shape[1] for p in positions]
    fields = policy.native()
    want = reference.budgets(policy, cells, n_cells)
    got = _native.budgets(fields, cells, positions[0].shape[0], n_cells).tolist()
    assert got == want

    keep_want = reference.select(policy, want, positions, scores)
    keep_got = _native.select(fields, want, positions, scores)
    for il, (a, b) in enumerate(zip(keep_got, keep_want)):
        assert np.array_equal(a, b), f"layer {il}: {policy}"
        assert (b.sum(axis=1) == min(want[il], cells[il])).all()


@settings(max_examples=400, deadline=None)
@given(policy=policies, cache=caches(layers_agree=True), n_cells=st.integers(1, 300))
def test_native_equals_reference(
    policy: KVPolicy, cache: tuple[list[np.ndarray], list[np.ndarray]], n_cells: int
) -> None:
    check(policy, *cache, n_cells)


@settings(max_examples=200, deadline=None)
@given(policy=policies, cache=caches(layers_agree=False), n_cells=st.integers(1, 300))
def test_native_equals_reference_on_cells_that_differ(
    policy: KVPolicy, cache: tuple[list[np.ndarray], list[np.ndarray]], n_cells: int
) -> None:
    positions, scores = cache
    if isinstance(policy, WindowKV) and policy.scope == "layer":
        positions = [np.tile(p[:1], (len(p), 1)) for p in positions]
    check(policy, positions, scores, n_cells)


@settings(max_examples=200, deadline=None)
@given(policy=policies, cells=st.lists(st.integers(0, 500), min_size=1, max_size=40), n_cells=st.integers(1, 600))
def test_budgets_spend_exactly_what_is_there(policy: KVPolicy, cells: list[int], n_cells: int) -> None:
    got = _native.budgets(policy.native(), cells, 2, n_cells)
    assert got.tolist() == reference.budgets(policy, cells, n_cells)
    assert (0 <= got).all() and (got <= cells).all()
    if isinstance(policy, Full):
        assert got.tolist() == cells
    elif not (isinstance(policy, WindowKV) and policy.accounting == "paper"):
        assert got.sum() == min(n_cells * len(cells), sum(cells))


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
    assert reference.paper_window_budgets(n_cells, n_layer, gamma, lam) == want
    policy = WindowKV(accounting="paper", budget="arithmetic", gamma=gamma, lam=lam, alpha=32)
    got = _native.budgets(policy.native(), [100_000] * n_layer, 8, n_cells)
    # the observation window comes on top
    assert got.tolist() == [want[il // gamma] + 32 for il in range(n_layer)]


def test_groups_never_form_an_inverted_pyramid() -> None:
    policy = WindowKV(budget="arithmetic", gamma=10, lam=2.0, accounting="native")
    assert _native.budgets(policy.native(), [1000] * 30, 2, 100).tolist() == [100] * 30


def test_a_short_last_group_keeps_the_mean_exact() -> None:
    policy = WindowKV(budget="arithmetic", gamma=8)
    got = _native.budgets(policy.native(), [4000] * 30, 3, 480)
    assert got.sum() == 480 * 30
    assert (np.diff(got) <= 1).all() and got[0] > got[-1]


def test_layer_scope_refuses_heads_that_differ() -> None:
    positions = [np.array([[0, 1, 2, 3], [0, 2, 3, 5]], dtype=np.int32)]
    scores = [np.zeros((2, 4), dtype=np.float32)]
    with pytest.raises(NativeError, match="scope = layer needs heads that hold the same positions"):
        _native.select(WindowKV(scope="layer").native(), [2], positions, scores)


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
        ({"shape": 1, "slope": 0.0}, "slope"),
    ],
)
def test_bad_policies_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(NativeError, match=message):
        _native.budgets({**WindowKV().native(), **change}, [10], 1, 5)


def test_windows_stay_whole() -> None:
    """One strong token keeps its window's neighbours, as far as the budget reaches."""
    score = np.zeros((1, 100), dtype=np.float32)
    score[0, 43] = 1.0
    pos = np.arange(100, dtype=np.int32)[None]
    keep = _native.select(WindowKV(omega=8, alpha=4, carry=0, suffix=1.0).native(), [12], [pos], [score])[0][0]
    assert np.flatnonzero(keep).tolist() == [*range(40, 48), 96, 97, 98, 99]


def test_scores_carry_over_to_what_follows() -> None:
    """The window behind a strong token beats windows that nobody looks at."""
    score = np.zeros((1, 100), dtype=np.float32)
    score[0, 46] = 1.0
    score[0, 80] = 0.1
    pos = np.arange(100, dtype=np.int32)[None]
    keep = _native.select(WindowKV(omega=8, alpha=4, carry=5, suffix=0.25).native(), [20], [pos], [score])[0][0]
    assert np.flatnonzero(keep).tolist() == [*range(40, 56), 96, 97, 98, 99]
