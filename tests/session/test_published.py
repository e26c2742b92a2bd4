"""Policies as published, and budgets at their limits, in sessions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_model

from windowkv_edge import AdaKV, Llama, SnapKV, WindowKV, _native

TOKENS = np.random.default_rng(3).integers(0, tiny_model.N_VOCAB, 400).tolist()


def test_windows_are_scored_in_every_query_head(tiny: Path, opened: Callable[..., Llama]) -> None:
    """Two query heads share a kv head; with one observing token their scores are the attention of that token."""
    options: dict[str, Any] = dict(omega=6, window_size=1, gamma=1, lam=3.0, task="localization")
    policy = WindowKV.published(**options)
    llm = opened(tiny, kv_policy=policy, kv_budget=500)
    llm.eval(TOKENS)
    kv = llm._kv
    assert kv is not None
    scores = [kv.attention(il) for il in range(3)]
    assert scores[0][0].shape == (2, 400)
    positions = [[np.arange(400, dtype=np.int32)] * 2] * 3
    budget = _native.budgets(policy.parts(), np.full((3, 2), 400), 60)
    # 60 is the mean beside the observation window: 2 * 60 - 60 * 1 / 3 = 100 falls to 20
    assert budget[:, 0].tolist() == [101, 61, 21]
    want = _native.select(policy.parts(), budget, positions, scores)
    llm.kv_compact(60)
    for il in range(3):
        for head in range(2):
            assert llm.kv_positions(il, head).tolist() == np.flatnonzero(want[il][head]).tolist()
    # the mean over the query heads chooses other windows
    other = WindowKV.published(query_heads="mean", **options)
    mean = _native.select(other.parts(), budget, positions, [[own.mean(axis=0) for own in layer] for layer in scores])
    assert any((a != b).any() for a, b in zip(mean[0], want[0]))


def test_a_budget_beyond_all_cells(tiny: Path, opened: Callable[..., Llama]) -> None:
    """The largest number that C takes evicts nothing, whoever competes and whoever selects."""
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=500)
    llm.eval(TOKENS)
    kv = llm._kv
    assert kv is not None
    most = 2**63 - 1
    for policy in (AdaKV(), AdaKV(across="model"), WindowKV()):
        assert kv.compact(_native.policy_struct(policy.parts()), most) == 0

    def choose(n_cells: int, positions: Any, scores: Any, keep: Any) -> None:
        for layer in keep:
            for own in layer:
                own[-50:] = 1

    assert kv.compact_custom(8, most, choose) == 3 * 2 * 350
    assert (llm.kv_stats().cells == 50).all()
