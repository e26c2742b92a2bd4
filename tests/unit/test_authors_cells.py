"""``published`` keeps what the code keeps that the papers' authors released (data/README.md), natively and by definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import adakv, headkv, pyramidkv, snapkv, windowkv
from reference.common import Cache, Kept

from windowkv_edge import AdaKV, HeadKV, HeadScores, KVPolicy, PyramidKV, SnapKV, WindowKV, _native
from windowkv_edge.heads import ModelHeads

DATA = np.load(Path(__file__).parent.parent / "data" / "authors.npz")
CASES: list[dict[str, Any]] = json.loads(str(DATA["cases"]))
cases = pytest.mark.parametrize("i", range(len(CASES)), ids=[f"{i}-{case['policy']}" for i, case in enumerate(CASES)])


def cache(i: int) -> tuple[Cache, np.ndarray]:
    """Scores of a case and the cells that the authors keep, bool [layers, heads, n]."""
    scores: np.ndarray = DATA[f"scores{i}"]
    keep = np.unpackbits(DATA[f"keep{i}"], axis=-1)[..., : CASES[i]["n"]].astype(bool)
    if keep.ndim == 2:
        keep = np.repeat(keep[:, None], scores.shape[1], axis=1)
    return [list(layer) for layer in scores], keep


def options(case: dict[str, Any]) -> dict[str, Any]:
    """Those of a case that its policy takes, by our names."""
    ours = {"alpha": "window_size", "kernel": "kernel_size", "floor": "alpha_safeguard"}
    takes = {
        "snapkv": ("alpha", "kernel"),
        "pyramidkv": ("alpha", "kernel", "beta"),
        "adakv": ("alpha", "kernel", "floor"),
        "headkv": ("alpha", "kernel", "beta"),
        "windowkv": ("alpha", "omega", "gamma", "lam", "strategy"),
    }[case["policy"]]
    return {ours.get(name, name): case[name] for name in takes}


def policy_of(case: dict[str, Any]) -> KVPolicy:
    """The published form of the policy with the options of a case."""
    own = options(case)
    if case["policy"] == "windowkv":
        return WindowKV.published(localization=own.pop("strategy"), task="localization", **own)
    if case["policy"] == "headkv":
        importance = np.array(case["importance"])
        model = ModelHeads("model", {}, *importance.shape, tuple(range(len(importance))))
        return HeadKV.published(importance=HeadScores({"r": importance}), **own).bind(model)
    return {"snapkv": SnapKV, "pyramidkv": PyramidKV, "adakv": AdaKV}[case["policy"]].published(**own)


def assert_same(case: dict[str, Any], scores: Cache, got: Kept, want: np.ndarray) -> None:
    """Equal, but for cells whose pooled score is the lowest that stays; windows without exception."""
    assert [[int(own.sum()) for own in layer] for layer in got] == want.sum(axis=-1).tolist()
    for il, layer in enumerate(got):
        for ih, own in enumerate(layer):
            theirs = want[il, ih]
            if case["policy"] == "windowkv":
                assert (own == theirs).all(), f"layer {il}"
                continue
            n_review = len(own) - case["alpha"]
            assert own[n_review:].all() and theirs[n_review:].all()
            pooled = snapkv.max_pool(scores[il][ih][:n_review], case["kernel"])
            differ = (own != theirs)[:n_review]
            assert (pooled[differ] == pooled[own[:n_review]].min()).all(), f"layer {il}, head {ih}"


@cases
def test_definitions_keep_the_authors_cells(i: int) -> None:
    case = CASES[i]
    scores, want = cache(i)
    published: Callable[..., Kept] = {
        "snapkv": snapkv.published,
        "pyramidkv": pyramidkv.published,
        "adakv": adakv.published,
        "headkv": headkv.published,
        "windowkv": windowkv.published,
    }[case["policy"]]
    more = {"importance": np.array(case["importance"])} if case["policy"] == "headkv" else {}
    assert_same(case, scores, published(scores, case["cells"], **options(case), **more), want)


@cases
def test_policies_keep_the_authors_cells(i: int) -> None:
    case = CASES[i]
    scores, want = cache(i)
    positions = [[np.arange(case["n"], dtype=np.int32) for _ in layer] for layer in scores]
    parts = policy_of(case).parts()
    budget = _native.budgets(parts, np.full(want.shape[:2], case["n"]), case["cells"], positions, scores)
    assert_same(case, scores, _native.select(parts, budget, positions, scores), want)
    if case["policy"] != "windowkv":  # whole windows miss the budget
        assert budget.tolist() == want.sum(axis=-1).tolist()


@pytest.mark.parametrize("n_head_kv", [1, 2, 4])
@pytest.mark.parametrize("i", [i for i, case in enumerate(CASES) if case["policy"] == "windowkv"])
def test_windows_of_query_heads_that_share_a_kv_head(i: int, n_head_kv: int) -> None:
    """Four query heads on one, two or four kv heads keep the same windows."""
    case = CASES[i]
    _, want = cache(i)
    shape = (case["layers"], n_head_kv, 4 // n_head_kv, case["n"])
    scores = [list(layer) for layer in DATA[f"scores{i}"].reshape(shape)]
    positions = [[np.arange(case["n"], dtype=np.int32) for _ in layer] for layer in scores]
    parts = policy_of(case).parts()
    budget = _native.budgets(parts, np.full(shape[:2], case["n"]), case["cells"])
    assert (np.array(_native.select(parts, budget, positions, scores)) == want[:, :n_head_kv]).all()
    assert (np.array(windowkv.published(scores, case["cells"], **options(case))) == want[:, :n_head_kv]).all()


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
