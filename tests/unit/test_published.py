"""The published form of a policy keeps what the code keeps that the paper's authors released (data/README.md)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import adakv, headkv, pyramidkv, snapkv, windowkv
from reference.common import Cache, Kept

DATA = np.load(Path(__file__).parent.parent / "data" / "authors.npz")
CASES: list[dict[str, Any]] = json.loads(str(DATA["cases"]))
IDS = [f"{i}-{case['policy']}" for i, case in enumerate(CASES)]


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


def assert_same(case: dict[str, Any], scores: Cache, got: Kept, want: np.ndarray) -> None:
    """Equal, but for cells whose pooled score is the lowest that stays; windows without exception."""
    for il, layer in enumerate(got):
        for ih, own in enumerate(layer):
            theirs = want[il, ih]
            assert own.sum() == theirs.sum(), f"layer {il}, head {ih}"
            if case["policy"] == "windowkv":
                assert (own == theirs).all(), f"layer {il}"
                continue
            n_review = len(own) - case["alpha"]
            assert own[n_review:].all() and theirs[n_review:].all()
            pooled = snapkv.max_pool(scores[il][ih][:n_review], case["kernel"])
            differ = (own != theirs)[:n_review]
            lowest = pooled[own[:n_review]].min()
            assert (pooled[differ] == lowest).all(), f"layer {il}, head {ih}"


@pytest.mark.parametrize("i", range(len(CASES)), ids=IDS)
def test_reference_keeps_the_authors_cells(i: int) -> None:
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
