"""Answers that are taken back and budgets that change: the cells are those of a fresh session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from scripted import OTHERS, TOKENS, answer, positions

from windowkv_edge import (
    Llama,
    SnapKV,
)


@pytest.mark.parametrize("policy", ["snapkv", "auto", "adakv", "h2o"])
def test_going_back_chooses_the_cells_of_a_fresh_session(tiny: Path, opened: Callable[..., Llama], policy: str) -> None:
    fresh, back, lower = (opened(tiny, kv_policy=policy, kv_budget=1.0, n_ctx=1024) for _ in range(3))
    fresh.eval(TOKENS)
    fresh.kv_compact(60)

    # an answer is taken back
    back.eval(TOKENS)
    for token in OTHERS[:70]:
        back.eval([token])
    back.n_tokens = 400
    back.kv_compact(60)
    assert positions(back) == positions(fresh)

    # a lowered budget and the same prompt
    answer(lower, TOKENS, 50)
    lower.kv_budget = 60
    answer(lower, TOKENS)
    # the prompt's last token is evaluated anew, in a batch of one that rounds differently
    same = [len(set(a) & set(b)) for a, b in zip(positions(lower), positions(fresh))]
    assert sum(same) >= 0.98 * sum(map(len, positions(fresh)))


def test_another_budget_and_the_same_prompt(tiny: Path, opened: Callable[..., Llama]) -> None:
    """What was evicted is evaluated again."""
    llm, fresh = (opened(tiny, kv_policy=SnapKV(), kv_budget=60, n_ctx=1024) for _ in range(2))
    answer(fresh, TOKENS)
    for budget in (100, 30, 60):
        llm.kv_budget = budget
        answer(llm, TOKENS)
        assert (llm.kv_stats().cells == budget).all()
    assert positions(llm) == positions(fresh)


def test_one_cell_is_not_all_of_them(tiny: Path, opened: Callable[..., Llama]) -> None:
    with pytest.warns(UserWarning):
        llm = opened(tiny, kv_policy="snapkv", kv_budget=1)
    answer(llm, TOKENS)
    llm.kv_budget = 1.0
    answer(llm, TOKENS)
    assert (llm.kv_stats().cells == 400).all()
