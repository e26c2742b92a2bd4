"""Native budgets and selection at the limits of their numbers: sizes, shares, scores that are none, host memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

from windowkv_edge import (
    POLICIES,
    AdaKV,
    Auto,
    HeadKV,
    HeadScores,
    NativeError,
    PyramidKV,
    SnapKV,
    WindowAdaKV,
    WindowKV,
    _native,
    get_policy,
)
from windowkv_edge.heads import ModelHeads
from windowkv_edge.policies.parts import Parts

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


def cache(n_layer: int, n_head: int, n: int, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    positions = [[np.arange(n, dtype=np.int32) for _ in range(n_head)] for _ in range(n_layer)]
    return positions, [[rng.random(n, dtype=np.float32) for _ in range(n_head)] for _ in range(n_layer)]


@pytest.mark.parametrize("n_cells", [INT32_MAX, INT32_MAX + 1, 2**62, INT64_MAX])
@pytest.mark.parametrize("policy", [AdaKV(), AdaKV(across="model"), Auto(), WindowKV(), PyramidKV(), WindowKV.published()])
def test_more_cells_than_there_are(policy: Any, n_cells: int) -> None:
    positions, scores = cache(3, 2, 50)
    got = _native.budgets(policy.parts(), np.full((3, 2), 50), n_cells, positions, scores, scores)
    assert (got == 50).all()


@pytest.mark.parametrize("lam", [1e-300, 5e-324, 1e-9, 1e300])
@pytest.mark.parametrize("accounting", ["native", "paper"])
def test_any_lambda(lam: float, accounting: Any) -> None:
    """The last group gets C*gamma/lam, C at most and 0 at least: what a double holds is no limit."""
    policy = WindowKV(budget="arithmetic", gamma=2, lam=lam, accounting=accounting, window_size=1)
    got = _native.budgets(policy.parts(), np.full((6, 1), 10_000), 100)[:, 0]
    if lam < 1:
        assert (got == (100 if accounting == "native" else 101)).all()
    elif accounting == "paper":
        assert got.tolist() == [201, 201, 101, 101, 1, 1]
    else:
        assert got.sum() == 600 and got[0] > got[2] > got[4] >= policy.omega + 1


@pytest.mark.parametrize("change", [
    {"omega": INT32_MAX, "top_p": INT32_MAX}, {"kernel_size": INT32_MAX}, {"kernel_size": INT32_MAX, "pooling": "max"}, {"gamma": INT32_MAX},
    {"window_size": INT32_MAX, "n_recent": INT32_MAX}, {"omega": INT32_MAX, "layers": "arithmetic", "lam": 14.0},
])  # fmt: skip
def test_the_largest_options(change: dict[str, Any]) -> None:
    def changed(part: Any) -> Any:
        own = {field.name for field in dataclasses.fields(part)} & set(change)
        return dataclasses.replace(part, **{name: change[name] for name in own})

    positions, scores = cache(2, 2, 90)
    parts = Parts(*map(changed, WindowKV(recent_share=1.0).parts()[:3]))
    budget = _native.budgets(parts, np.full((2, 2), 90), 20, positions, scores)
    assert (budget == 20).all()
    assert all(own.sum() == 20 for layer in _native.select(parts, budget, positions, scores) for own in layer)


@pytest.mark.parametrize("tiny", [1e-30, 1e-300, 5e-324])
def test_importance_of_any_scale(tiny: float) -> None:
    """Heads that matter are full; what is left goes to one head, however little it matters, and not to those without any."""
    importance = np.array([[1.0, tiny, 0.0, 0.0]])
    model = ModelHeads("model", {}, 1, 4, (0,))
    policy = HeadKV(beta=2.0, window_size=1, importance=HeadScores({"r": importance})).bind(model)
    parts = policy.parts()
    parts = parts._replace(allocation=dataclasses.replace(parts.allocation, importance=importance))
    # a mean of 60: 120 cells equally, 30 each; 120 by importance, of which the first head takes 70 and the second the rest
    assert _native.budgets(parts, np.full((1, 4), 100), 60).tolist() == [[100, 80, 30, 30]]


def test_importance_whose_sum_no_double_holds() -> None:
    for policy in (HeadKV, HeadKV.published):
        budget = []
        for scale in (1.0, 2.0**1023):
            importance = np.array([[1.0, 0.5, 0.25, 1.0]]) * scale
            parts = policy(beta=1.0, window_size=1).parts()
            parts = parts._replace(allocation=dataclasses.replace(parts.allocation, importance=importance))
            budget.append(_native.budgets(parts, np.full((1, 4), 100), 23).tolist())
        assert budget[0] == budget[1] and budget[0][0][0] > budget[0][0][1] > budget[0][0][2]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 10**400, True, "2"], ids=["inf", "-inf", "nan", "huge", "bool", "str"])
def test_numbers_that_no_double_holds(value: Any) -> None:
    for policy, option in ((WindowKV, "lam"), (PyramidKV, "beta"), (HeadKV, "beta")):
        with pytest.raises(ValueError, match=f"{option} is .*, expected a finite number of at least"):
            policy(**{option: value})


@pytest.mark.parametrize("value", [2**31, 2**63, 10**30, -(2**31)])
def test_options_beyond_32_bits(value: int) -> None:
    for policy, option in ((WindowKV, "omega"), (WindowKV, "carry"), (SnapKV, "window_size"), (Auto, "importance_floor")):
        with pytest.raises(ValueError, match=f"{option} is {value}, expected an int of at least . and below 2"):
            policy(**{option: value})


def of_budgets(parts: Parts, positions: Any, scores: Any, n_cells: int) -> tuple[list[list[int]], list[list[int]]]:
    """Budgets, and how many cells of every head stay."""
    budget = _native.budgets(parts, [[len(own) for own in layer] for layer in positions], n_cells, positions, scores, scores)
    found = _native.select(parts, budget, positions, scores, scores)
    return budget.tolist(), [[int(own.sum()) for own in layer] for layer in found]


@pytest.mark.parametrize("lam", [1e-300, 1e9, 1.7e308])
@pytest.mark.parametrize("accounting", ["native", "paper"])
def test_budgets_that_fall_to_nothing_leave_a_cell(lam: float, accounting: str) -> None:
    positions, scores = cache(6, 2, 90)
    for spec in (f"windowkv(omega=2147483647, budget='arithmetic', lam={lam}", f"windowkv-paper(lam={lam}, gamma=1"):
        budget, kept = of_budgets(get_policy(f"{spec}, accounting='{accounting}')").parts(), positions, scores, 20)
        assert min(map(min, budget)) >= 1 and min(map(min, kept)) >= 1
        if accounting == "native":
            assert sum(map(sum, budget)) == 6 * 2 * 20


@pytest.mark.parametrize("policy", [AdaKV(alpha_safeguard=0.0), AdaKV(alpha_safeguard=0.0, across="model"), HeadKV(beta=1.0)])
def test_every_head_keeps_a_cell_without_recent_tokens(policy: Any) -> None:
    """And its best one, where others could win or be given all of them."""
    positions, scores = cache(2, 2, 90)
    scores[1][1] *= 1e-9
    parts = policy.parts()
    importance = np.array([[1.0, 1.0], [1.0, 0.0]]) if isinstance(policy, HeadKV) else None
    parts = parts._replace(
        selection=dataclasses.replace(parts.selection, n_recent=0),
        allocation=dataclasses.replace(parts.allocation, importance=importance),
    )
    budget, kept = of_budgets(parts, positions, scores, 10)
    assert budget == kept and budget[1][1] == 1 and sum(map(sum, budget)) == 40


@pytest.mark.parametrize("policy", [
    WindowAdaKV(gamma=2, alpha_safeguard=0.0), WindowAdaKV(gamma=2, alpha_safeguard=0.0, across="model"), WindowKV(gamma=2, whole_windows=True),
])  # fmt: skip
def test_every_head_keeps_a_cell_of_a_group_whose_cells_it_lacks(policy: Any) -> None:
    """The second layer holds none of the positions that stay in the first; heads of one layer hold different ones."""
    positions, scores = cache(2, 2, 40)
    positions[1] = [np.arange(100, 140, dtype=np.int32), np.arange(40, dtype=np.int32)]
    budget, kept = of_budgets(policy.parts(), positions, scores, 10)
    assert min(map(min, budget)) >= 1 and min(map(min, kept)) >= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("policy", "plane"),
    [
        *((policy, "scores") for policy in (SnapKV(), AdaKV(), AdaKV.published(), WindowKV(), WindowAdaKV(), Auto())),
        (Auto(), "token_scores"),
        (WindowKV(token_share=0.5), "token_scores"),
    ],
)
def test_scores_that_are_none(policy: Any, bad: float, plane: str) -> None:
    """Every choice among them would be arbitrary."""
    parts = policy.parts()
    positions, scores = cache(3, 2, 100)
    tokens = cache(3, 2, 100, seed=1)[1]
    (scores if plane == "scores" else tokens)[1][1][3] = bad
    message = "the scores of layer 1, kv head 1 are not finite"
    with pytest.raises(NativeError, match=message):
        _native.select(parts, np.full((3, 2), 40), positions, scores, tokens)
    if parts.allocation.heads == "score":
        with pytest.raises(NativeError, match=message):
            _native.budgets(parts, np.full((3, 2), 100), 40, positions, scores, tokens)


def test_policies_say_what_they_keep() -> None:
    for name, cls in POLICIES.items():
        assert cls.name == name and cls.keeps and "\n" not in cls.keeps and len(cls.keeps) < 100


MEASURE = """
import resource, sys
import numpy as np
from windowkv_edge import _native, get_policy
ffi, lib = _native.ffi, _native.lib

def run(n):
    shapes = _native._shapes(np.full((16, 8), n, dtype=np.int32), n)
    pos = np.empty(128 * n, dtype=np.int32)
    pos.reshape(128, n)[:] = np.arange(n, dtype=np.int32)
    scores = np.empty(2 * 128 * n, dtype=np.float32)
    np.random.default_rng(0).random(out=scores, dtype=np.float32)
    keep, budget = np.ones(pos.size, dtype=np.uint8), np.ones(128, dtype=np.int32)
    args = [ffi.from_buffer(kind, x) for kind, x in (("int32_t[]", pos), ("float[]", scores), ("int32_t[]", budget))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    policy = _native.policy_struct(get_policy(sys.argv[1]).parts())
    assert lib.wkv_budgets(policy, shapes, n // 8, *args) == 0
    assert lib.wkv_select(policy, shapes, args[2], args[0], args[1], ffi.from_buffer("uint8_t[]", keep)) == 0
    assert 0 < keep.sum() <= 128 * (n // 8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / pos.size

run(10)
print(run(20_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize(
    ("policy", "limit"),
    [
        ("auto", 1.0),
        ("windowkv+adakv(across='model')", 0.6),
        ("adakv(across='model')", 0.8),
        ("adakv", 0.4),
        ("windowkv", 0.4),
        ("windowkv(gamma=4,share='mean',scope='layer')", 0.8),
    ],
)
def test_host_memory_of_a_selection(policy: str, limit: float) -> None:
    """Bytes a cell beside positions and scores: a bit that says whether it stays, counts of keys where heads compete, and what one
    head at a time, of 128 here, takes for its windows and pooled scores. Nothing is held of all cells."""
    code = textwrap.dedent(MEASURE)
    out = subprocess.run([sys.executable, "-c", code, policy], capture_output=True, text=True, check=True).stdout
    assert float(out) < limit
