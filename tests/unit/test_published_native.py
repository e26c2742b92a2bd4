"""``published()`` keeps, natively, what the code keeps that the paper's authors released (data/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from windowkv_edge import AdaKV, HeadKV, HeadScores, KVPolicy, PyramidKV, SnapKV, WindowKV, _native
from windowkv_edge.heads import ModelHeads

DATA = np.load(Path(__file__).parent.parent / "data" / "authors.npz")
CASES: list[dict[str, Any]] = json.loads(str(DATA["cases"]))


def published(case: dict[str, Any]) -> KVPolicy:
    name, size = case["policy"], case["alpha"]
    if name == "windowkv":
        return WindowKV.published(
            omega=case["omega"], window_size=size, gamma=case["gamma"], lam=case["lam"], localization=case["strategy"],
            task="localization",
        )  # fmt: skip
    own: dict[str, Any] = {"window_size": size, "kernel_size": case["kernel"]}
    if name == "snapkv":
        return SnapKV.published(**own)
    if name == "pyramidkv":
        return PyramidKV.published(beta=case["beta"], **own)
    if name == "adakv":
        return AdaKV.published(alpha_safeguard=case["floor"], **own)
    importance = np.array(case["importance"])
    model = ModelHeads("model", {}, *importance.shape, tuple(range(len(importance))))
    policy = HeadKV.published(beta=case["beta"], importance=HeadScores({"r": importance}), **own)
    return policy.bind(model)


def max_pool(score: np.ndarray, kernel_size: int) -> np.ndarray:
    padded = np.pad(score, kernel_size // 2, constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, kernel_size).max(axis=1)


@pytest.mark.parametrize("i", range(len(CASES)), ids=[f"{i}-{case['policy']}" for i, case in enumerate(CASES)])
def test_published_keeps_the_authors_cells(i: int) -> None:
    """Equal, but for cells whose pooled score is the lowest that stays; windows without exception."""
    case, scores = CASES[i], DATA[f"scores{i}"]
    want = np.unpackbits(DATA[f"keep{i}"], axis=-1)[..., : case["n"]].astype(bool)
    if want.ndim == 2:
        want = np.repeat(want[:, None], scores.shape[1], axis=1)
    parts = published(case).parts()
    cache = [list(layer) for layer in scores]
    positions = [[np.arange(case["n"], dtype=np.int32) for _ in layer] for layer in cache]
    budget = _native.budgets(parts, np.full(scores.shape[:2], case["n"]), case["cells"], positions, cache)
    keep = np.array(_native.select(parts, budget, positions, cache))
    assert keep.sum(axis=-1).tolist() == want.sum(axis=-1).tolist()
    if case["policy"] == "windowkv":
        assert (keep == want).all()
        return
    assert budget.tolist() == want.sum(axis=-1).tolist()
    n_review = case["n"] - case["alpha"]
    for il, ih in np.ndindex(*scores.shape[:2]):
        pooled = max_pool(scores[il, ih, :n_review], case["kernel"])
        own, differ = keep[il, ih, :n_review], (keep != want)[il, ih, :n_review]
        assert keep[il, ih, n_review:].all()
        assert (pooled[differ] == pooled[own].min(initial=np.inf)).all(), f"layer {il}, head {ih}"


def test_windows_are_scored_per_query_head() -> None:
    """Two query heads of one kv head look at two tokens each of the first window, the second window has 0.3 in both: the
    better half of the first is 0.4 in each head, and 0.2 of the mean over them."""
    scores = np.zeros((2, 12), dtype=np.float32)
    scores[0, 0:2] = scores[1, 2:4] = 0.4
    scores[:, 4:6] = 0.3
    positions = [[np.arange(12, dtype=np.int32)]]
    options: dict[str, Any] = dict(omega=4, window_size=2, gamma=1, task="localization", budget="flat")
    kept = {}
    for query_heads in ("mean", "each"):
        parts = WindowKV.published(query_heads=query_heads, **options).parts()
        own = scores if query_heads == "each" else scores.mean(axis=0)
        budget = _native.budgets(parts, [[12]], 4)
        assert budget.tolist() == [[6]]
        kept[query_heads] = np.flatnonzero(_native.select(parts, budget, positions, [[own]])[0][0]).tolist()
    # of 10 cells before the observation window two windows go, the short one counts as a whole one
    assert kept == {"mean": [4, 5, 6, 7, 10, 11], "each": [0, 1, 2, 3, 10, 11]}


def test_whole_windows_at_the_edges() -> None:
    score = [[np.linspace(0, 1, 21).astype(np.float32)]]
    positions = [[np.arange(21, dtype=np.int32)]]
    parts = WindowKV.published(omega=4, window_size=3, gamma=1, task="localization", budget="flat").parts()
    kept = {}
    for n in (1, 2, 3, 4, 6, 7, 17, 18, 100):
        budget = _native.budgets(parts, [[21]], n)
        kept[n] = np.flatnonzero(_native.select(parts, budget, positions, score)[0][0]).tolist()
    # 18 cells before the observation window: four windows, and one of two cells that counts as a whole one
    last = [18, 19, 20]
    assert kept[1] == last  # five windows would have to go to get from 18 cells to 1
    assert kept[2] == kept[3] == kept[4] == [16, 17, *last]
    assert kept[6] == kept[7] == [*range(12, 18), *last]
    assert kept[17] == [*range(4, 18), *last]
    assert kept[18] == kept[100] == list(range(21))
