"""Copies of a session, by pickle: what was said stays said, what was left out is resolved anew."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted import TOKENS, answer, evaluate, positions

from windowkv_edge import (
    Llama,
    SnapKV,
)


def test_a_copy_resolves_what_was_left_out(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy="auto", n_ctx=512)
    copy = pickle.loads(pickle.dumps(llm))
    try:
        for session in (llm, copy):
            evaluate(session, TOKENS)
        assert llm.kv_stats().cell_types == copy.kv_stats().cell_types == ("q8_0", "q8_0")
        assert positions(llm) == positions(copy)
        given = {"model_path", "n_ctx", "n_threads", "n_threads_batch", "verbose", "kv_policy", "kv_min_prompt", "kv_growth", "kv_pin_system", "kv_exact"}
        assert set(llm.__getstate__()) == set(copy.__getstate__()) == given
    finally:
        copy.close()


def test_a_copy_has_what_was_said_and_changed(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy="auto", type_k=1, type_v=1, kv_budget=100, n_ctx=512)
    llm.kv_policy, llm.kv_budget = SnapKV(window_size=16), 60
    llm.set_seed(11)
    llm.chat_format = "chatml"
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.kv_stats().cell_types == ("f16", "f16")
    assert (copy.kv_policy, copy.kv_budget, copy._seed, copy.chat_format) == (SnapKV(window_size=16), 60, 11, "chatml")
    copy.close()


@pytest.mark.parametrize(("first", "then"), [("snapkv", "auto"), ("auto", "snapkv")])
def test_a_copy_keeps_the_cells_of_a_changed_policy(
    tiny: Path, opened: Callable[..., Llama], first: str, then: str
) -> None:
    llm = opened(tiny, kv_policy=first, kv_budget=0.12)
    llm.kv_policy = then  # type: ignore[assignment]
    copy = pickle.loads(pickle.dumps(llm))
    try:
        found = [(answer(own, TOKENS, 4), positions(own), own.kv_stats().cell_types) for own in (llm, copy)]
        assert found[0] == found[1]
    finally:
        copy.close()
