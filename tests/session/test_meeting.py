"""Where limits, intervals, shifts, checkpoints, pins, saved sessions and streams meet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from scripted import OTHERS, TOKENS, answer

from windowkv_edge import Llama, UnsupportedCallError
from windowkv_edge.asking import find_asked

Open = Callable[..., Llama]

LONG = np.random.default_rng(3).integers(0, tiny_model.N_VOCAB, 1500).tolist()
SMALL: dict[str, Any] = {"kv_policy": "snapkv", "n_batch": 64}


@pytest.mark.parametrize("n_ctx", [300, 500])
def test_a_context_of_any_size_shifts(tiny: Path, opened: Open, n_ctx: int) -> None:
    """llama.cpp rounds it up, the tokens have room for what was asked for."""
    llm = opened(tiny, kv_budget=1.0, n_ctx=n_ctx, kv_shift="shift", **SMALL)
    answer(llm, LONG[:700], 3)
    assert llm.n_tokens <= n_ctx and llm.kv_stats().n_shifted > 0
    answer(llm, LONG[: n_ctx - 20], 60)
    assert llm.n_tokens == llm.kv_stats().n_past <= n_ctx
    llm.reset()
    llm.eval(LONG[:700])
    assert llm.input_ids[llm.n_tokens - 50 : llm.n_tokens].tolist() == LONG[650:700]
    other = opened(tiny, kv_budget=1.0, n_ctx=n_ctx, kv_shift="shift", **SMALL)
    other.load_state(llm.save_state())
    assert other.n_tokens == other.kv_stats().n_past == llm.n_tokens


@pytest.mark.parametrize("room", [256, 254])
def test_tokens_that_are_sent_at_the_end(tiny: Path, opened: Open, room: int) -> None:
    """They follow the token that they were sent behind."""
    llm = opened(tiny, kv_budget=1.0, n_ctx=256, kv_shift="shift", logits_all=True, **SMALL)
    stream: Any = llm.generate(LONG[:room], temp=0.0)
    token = next(stream)
    for _ in range(4):
        following = stream.send([7, 8])
        ids = llm.input_ids[: llm.n_tokens].tolist()
        assert ids[-3:] == [token, 7, 8] and llm.n_tokens == llm.kv_stats().n_past
        token = following
    stream.close()


def test_a_limit_that_came_later(tiny: Path, opened: Open) -> None:
    """A checkpoint that it does not hold is left alone."""
    llm = opened(tiny, kv_budget=0.25, kv_min_prompt=0, kv_checkpoints="64MiB", n_ctx=512, **SMALL)
    answer(llm, TOKENS, 3)
    llm.kv_limit = 120
    most = [0.0]
    decode = llm._ctx.decode

    def watched(batch: Any) -> None:
        decode(batch)
        most[0] = max(most[0], float(llm._kv_cache.kv.cells().mean()))  # type: ignore[union-attr]

    llm._ctx.decode = watched  # type: ignore[method-assign]
    answer(llm, [*TOKENS[:395], 3, 4, 5], 2)
    assert most[0] <= 120 + 64


def test_full_is_no_policy_for_intervals(tiny: Path, opened: Open) -> None:
    with pytest.raises(ValueError, match="kv_policy='full' keeps every cell, which kv_interval does not allow"):
        opened(tiny, kv_policy="full", kv_interval=16)
    llm = opened(tiny, kv_interval=16, **SMALL)
    with pytest.raises(ValueError, match="which kv_interval does not allow"):
        llm.kv_policy = "full"  # type: ignore[assignment]
    assert llm.kv_policy is not None and llm.kv_policy.name == "snapkv"


def test_pins_of_a_file_and_a_limit(tiny: Path, opened: Open, tmp_path: Path) -> None:
    llm, other = opened(tiny, **SMALL), opened(tiny, kv_limit=100, **SMALL)
    llm.kv_pin(0, 150)
    llm.eval(TOKENS[:200])
    llm.kv_save(tmp_path / "saved")
    answer(other, OTHERS[:20])
    with pytest.raises(UnsupportedCallError, match="150 positions are pinned in it, and kv_limit=100 leaves"):
        other.kv_load(tmp_path / "saved")
    assert other.n_tokens == 20 and not other.kv_pinned
    with pytest.raises(ValueError, match="kv_budget=40 leaves nothing for cells other than the 150 pinned ones"):
        llm.kv_budget = 40


def test_checkpoints_behind_a_compaction_by_hand(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_budget=0.5, kv_min_prompt=0, kv_growth=1, n_ctx=1024, **SMALL)
    history: list[int] = []
    for i in range(6):
        history += OTHERS[40 * i : 40 * i + 40]
        history += answer(llm, history, 3)
    stats = llm.kv_compact(0.05)
    assert llm.kv_stats().bytes_checkpoints <= 4 * (stats.bytes_live + stats.bytes_other)


def test_an_empty_session_with_all_logits(tiny: Path, opened: Open, tmp_path: Path) -> None:
    llm = opened(tiny, logits_all=True, **SMALL)
    llm.kv_save(tmp_path / "empty")
    answer(llm, TOKENS[:20])
    llm.kv_load(tmp_path / "empty")
    assert llm.n_tokens == llm.kv_stats().n_past == 0


def test_short_messages_are_not_looked_for() -> None:
    pieces = {1: b"<user>", 2: b"a", 3: b"<ass", 4: b"istant>", 5: b"Why?"}
    assert find_asked("a", [1, 2, 3, 4], lambda token: pieces[token]) is None
    assert find_asked("Why?", [1, 5, 3, 4], lambda token: pieces[token]) == (1, 2)


def test_a_chat_longer_than_the_context(
    session: Open, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its system prompt stays, its question observes every piece, and progress is that of the whole prompt."""
    told: list[tuple[int, int]] = []
    llm = session(
        kv_policy="snapkv", kv_limit=200, n_ctx=512, n_batch=128, kv_shift="shift",
        kv_progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    asked: list[str] = []
    observe = llm._observe
    monkeypatch.setattr(
        llm, "_observe", lambda cache, asks: (asked.append(llm.detokenize(asks).decode()), observe(cache, asks))
    )
    question = "What does the keeper of the harbour do every evening?"
    system = {"role": "system", "content": "You know the rules of the island."}
    text = " ".join(document.split()[:600])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own: Any = llm.create_chat_completion(
            [system, {"role": "user", "content": f"{text}\n\n{question}"}], max_tokens=4, temperature=0.0, stream=True
        )
        other: Any = llm.create_chat_completion([{"role": "user", "content": "Hello there."}], max_tokens=2, stream=True)
        list(own)  # the other chat was only asked for
    ((start, stop),) = llm.kv_pinned
    assert start == 0 and system["content"] in llm.detokenize(llm.input_ids[:stop].tolist()).decode()
    assert llm.kv_stats().n_shifted > 0
    assert len(asked) > 3 and all(question[-20:] in own for own in asked), asked
    assert told[-1][0] == told[-1][1] and len({total for _, total in told}) == 1
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    list(other)
    assert llm.kv_pinned == ()
