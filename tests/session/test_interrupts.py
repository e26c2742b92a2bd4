"""Ctrl-C at any time: it surfaces at once, the cache and ``n_tokens`` agree, and the session goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from scripted import OTHERS, TOKENS, Script, alarm, answer, evaluate, once

from windowkv_edge import Llama, SnapKV, StreamingLLM
from windowkv_edge.compaction import compact


def test_ctrl_c_in_select(tiny: Path, opened: Callable[..., Llama], capfd: pytest.CaptureFixture[str]) -> None:
    llm = opened(tiny, kv_policy=Script(action=once(KeyboardInterrupt())), kv_budget=60)
    with pytest.raises(KeyboardInterrupt):
        evaluate(llm, TOKENS)
    assert llm.n_tokens == llm.kv_stats().n_past == 400
    assert (llm.kv_stats().cells == 400).all()
    assert "ignored" not in capfd.readouterr().err


class Stop(Exception):
    """Ends a selection, so that nothing is evicted and the next try finds the same cache."""


@dataclass(frozen=True, kw_only=True)
class Slow(Script):
    """Observes the whole prompt, so that scoring takes a while in native code."""

    @property
    def n_observed(self) -> int:
        return 300


def stop() -> None:
    for _ in range(200):
        np.sort(np.arange(1000) % 7)
    raise Stop


@pytest.mark.parametrize("of_a_session", [True, False])
def test_signals_at_any_time_of_a_compaction(
    tiny: Path, opened: Callable[..., Llama], capfd: pytest.CaptureFixture[str], of_a_session: bool
) -> None:
    """Before, while native code scores (the signal is pending then when the callback starts), and inside select."""

    def compaction() -> None:
        assert llm._kv is not None and llm.kv_policy is not None
        if of_a_session:
            llm.kv_compact(60)
        else:
            compact(llm._kv, llm.kv_policy, 60)

    llm = opened(tiny, kv_policy=Slow(action=stop), kv_budget=1.0)
    llm.eval(TOKENS)
    for _ in range(2):  # the first one reserves its graph
        start = time.perf_counter()
        with pytest.raises(Stop):
            compaction()
        took = time.perf_counter() - start
    ends = []
    for i in range(120):  # on a busy machine many come too late
        with pytest.raises((KeyboardInterrupt, Stop)) as caught, alarm(took * (1 + i % 30) / 24):
            compaction()
        ends.append(caught.type)
        assert llm.n_tokens == llm.kv_stats().n_past == 400
        assert llm.kv_stats().n_compactions == 0
        if i >= 29 and ends.count(KeyboardInterrupt) > 10:
            break
    assert ends.count(KeyboardInterrupt) > 10
    assert "ignored" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["write_llama", "write_lfm2"])
def test_signals_while_evaluating(tmp_path: Path, opened: Callable[..., Llama], kind: str) -> None:
    """The positions of the cache and n_tokens agree at once, and the session goes on."""
    llm = opened(getattr(tiny_model, kind)(tmp_path / "model.gguf"), kv_policy=SnapKV(), kv_budget=60, n_batch=64)
    for _ in range(2):  # the first one reserves its graphs
        llm.reset()
        start = time.perf_counter()
        evaluate(llm, TOKENS)
        took = time.perf_counter() - start
    interrupted = 0
    for i in range(1, 31):
        llm.reset()
        try:
            with alarm(took * i / 25):
                evaluate(llm, TOKENS)
        except KeyboardInterrupt:
            interrupted += 1
        assert llm.n_tokens == llm.kv_stats().n_past
    assert interrupted > 5
    answer(llm, TOKENS)
    assert (llm.kv_stats().cells == 60).all() and llm.n_tokens == 400


def test_signals_while_generating(tiny: Path, opened: Callable[..., Llama]) -> None:
    """Prefixes are trimmed to and drafts taken back outside of eval()."""
    draft = lambda ids: np.array([1, 2, 3])  # noqa: E731
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=1.0, logits_all=True, draft_model=draft)
    prompts = [TOKENS[:200] + OTHERS[:50], TOKENS[:220], TOKENS[:220]]
    start = time.perf_counter()
    answer(llm, prompts[0], 8)
    took = time.perf_counter() - start
    interrupted = 0
    for i in range(30):
        try:
            with alarm(took * (i + 1) / 30):
                answer(llm, prompts[i % 3], 8)
        except KeyboardInterrupt:
            interrupted += 1
        assert llm.n_tokens == llm.kv_stats().n_past
    assert interrupted > 5
    assert len(answer(llm, prompts[1], 8)) == 8


def test_a_signal_between_trimming_and_counting(tiny: Path, opened: Callable[..., Llama]) -> None:
    """generate() trims the cache to what a prompt shares with the last one, then says so."""
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=1.0)
    answer(llm, TOKENS[:250])
    trim, errors = llm._ctx.kv_cache_seq_rm, [KeyboardInterrupt()]

    def interrupted(*args: int) -> bool:
        done = trim(*args)
        if errors:
            raise errors.pop()
        return done

    llm._ctx.kv_cache_seq_rm = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        answer(llm, TOKENS[:200] + OTHERS[:50])
    assert llm.n_tokens == llm.kv_stats().n_past == 200
    answer(llm, TOKENS[:200] + OTHERS[:50])
    assert llm.n_tokens == llm.kv_stats().n_past == 250


def test_signals_while_setting_a_policy(tiny: Path, opened: Callable[..., Llama]) -> None:
    """The new policy or the old one, and what it observes."""
    llm = opened(tiny, kv_policy=StreamingLLM(), kv_budget=60)
    policies = (SnapKV(), StreamingLLM())
    start = time.perf_counter()
    llm.kv_policy = policies[0]
    took = time.perf_counter() - start
    for i in range(1, 41):
        new, old = policies[i % 2], llm.kv_policy
        try:
            with alarm(took * i / 30):
                llm.kv_policy = new
        except KeyboardInterrupt:
            pass
        assert llm.kv_policy in (new, old) and llm.kv_policy is not None and llm._kv is not None
        assert llm._kv.stats().n_observed == llm.kv_policy.n_observed
        assert llm.n_tokens == llm.kv_stats().n_past
        llm.reset()
        evaluate(llm, TOKENS[:100])
        assert (llm.kv_stats().cells == 60).all()
