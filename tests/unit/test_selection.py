"""Native budgets and selection equal the definitions in tests/reference, cell by cell, for every row of policy_table.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_table import NATIVE, ROWS, budgets_of, kept, total, with_scores
from reference.common import Cache, sizes

from windowkv_edge import POLICIES, KVPolicy, _native, get_policy
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
    shares = st.sampled_from([0.1, 0.3, 0.5, 0.9]).map(lambda x: int(x * np.mean(sizes(positions))) + 1)
    edges = st.sampled_from([max(1, n_past - 1), n_past, n_past + 1])
    n_cells = draw(st.one_of(st.integers(1, 300), shares, shares, edges))
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
    if policy.selection().scope != "layer" or policy.selection().kind != "windows":
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


def test_definitions_share_nothing_with_the_package() -> None:
    """A misreading of a paper in the package would not show if its tests read there, too."""
    for path in Path(reference.__file__).parent.glob("*.py"):
        assert not re.search(r"(from|import) windowkv_edge", path.read_text(encoding="utf-8")), path.name


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
