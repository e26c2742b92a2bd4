"""How a prompt is read: within its budget, a limit that changes, or the memory that is free; who observes; progress."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from scripted import OTHERS, TOKENS, alarm, answer, positions
from test_limit import BATCH, LIMIT, LONG, n_held, watch_cells

from windowkv_edge import Llama, UnsupportedCallError, WindowKV, _memory, room, session
from windowkv_edge.asking import asked_text, find_asked

Open = Callable[..., Llama]

#
# within the budget, and within the memory that is free
#


@pytest.mark.parametrize(("budget", "peak"), [(120, 120), (0.2, 140)])
def test_bounded_is_within_the_budget(
    tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, budget: float, peak: int
) -> None:
    """The peak is what the budget grants for the whole prompt, and a batch; later prompts may let it grow first."""
    llm = opened(tiny, kv_policy="snapkv", kv_budget=budget, kv_prefill="bounded", n_batch=BATCH)
    assert llm.kv_room(700) == peak
    seen = watch_cells(llm, monkeypatch)
    answer(llm, LONG[:700], 1)
    assert peak < max(seen) <= peak + BATCH and n_held(llm) == peak, seen
    n = llm.kv_stats().n_compactions
    answer(llm, [*llm.input_ids[:700].tolist(), *OTHERS[:20]], 1)
    assert llm.kv_stats().n_compactions == n and llm.kv_stats().n_evaluated_last == 20


def test_short_prompts_are_not_bounded_by_a_share(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=0.2, kv_prefill="bounded", n_batch=BATCH)
    answer(llm, LONG[:200], 1)
    assert n_held(llm) == 200 and llm.kv_stats().n_compactions == 0


def test_the_smaller_of_budget_and_limit(tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    for prefill, most in (("auto", LIMIT), ("bounded", 100)):
        llm = opened(tiny, kv_policy="snapkv", kv_budget=100, kv_limit=LIMIT, kv_prefill=prefill, n_batch=BATCH)
        seen = watch_cells(llm, monkeypatch)
        answer(llm, LONG[:700], 1)
        assert most < max(seen) <= most + BATCH and n_held(llm) == 100


@pytest.mark.parametrize("policy", ["auto", "snapkv", "auto(replay_share=0.5)", "kvzip"])
def test_the_peak_is_the_limit_and_a_batch(tmp_path: Path, opened: Open, policy: str) -> None:
    """In bytes, with what observing and compactions take for a moment: at most a twentieth more."""
    path = tiny_model.write_llama(tmp_path / "deep.gguf", n_layer=30, head_dim=64)
    llm = opened(path, kv_policy=policy, kv_limit=768, n_batch=256)
    answer(llm, [*LONG, *OTHERS], 20)
    stats = llm._kv.stats()  # type: ignore[union-attr]
    beside = int(stats.bytes_live) - int(stats.bytes_pool)
    assert llm.kv_stats().n_compactions > 3 and n_held(llm) <= 768
    assert stats.bytes_peak - beside <= 1.05 * (768 + 256) * stats.bytes_cell


def test_what_comes_behind_a_compaction(tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies may choose otherwise between the batches of a prompt, behind it, and in an answer."""
    llm = opened(tiny, kv_policy="auto", kv_limit=LIMIT, n_batch=BATCH)
    seen = []
    compact = session.compact
    monkeypatch.setattr(session, "compact", lambda *args: seen.append(args[-1]) or compact(*args))
    answer(llm, LONG[:700], 200)
    n = seen.count("batch")
    assert seen == ["batch"] * n + ["answer's start"] + ["answer"] * (len(seen) - n - 1) and 3 < n < len(seen) - 2


def test_what_is_free_bounds(tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit; the budget holds behind the prompt, and nothing is said where there is enough."""
    llm = opened(tiny, kv_policy="snapkv", kv_budget=0.1, n_batch=BATCH)
    n_cell = int(llm._kv.stats().bytes_cell)  # type: ignore[union-attr]
    monkeypatch.setattr(room, "WORTH_ASKING", 500 * n_cell)
    monkeypatch.setattr(_memory, "free_memory", lambda: (400 * n_cell, 0))
    seen = watch_cells(llm, monkeypatch)
    with pytest.warns(
        UserWarning, match=r"the full cache of these 700 tokens .* within 268 cells per head; set kv_limit"
    ):
        answer(llm, LONG[:700], 1)
    assert max(seen) <= 300 and n_held(llm) == 70
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer(llm, OTHERS, 1)  # not worth asking
        monkeypatch.setattr(_memory, "free_memory", lambda: (4000 * n_cell, 0))
        answer(llm, LONG[:800], 1)
        exact = opened(tiny, kv_policy="snapkv", kv_budget=0.1, kv_prefill="exact", n_batch=BATCH)
        monkeypatch.setattr(_memory, "free_memory", lambda: (0, 0))
        answer(exact, LONG[:800], 1)
    assert positions(exact) == positions(llm)


def test_memory_that_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host, devices = _memory.free_memory()
    assert host > 1 << 20 and devices >= 0
    for free, share, want in (
        ((800, 0), 0.0, 600),
        ((800, 400), 0.5, 600),
        ((8000, 400), 1.0, 300),
        ((800, 0), 1.0, 600),
    ):
        monkeypatch.setattr(_memory, "free_memory", lambda free=free: free)
        assert _memory.usable_memory(share) == want
    for name, text in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 600\ninactive_file 90\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_memory, "_FOLDER", tmp_path)
    assert _memory._cgroup_free("memory.max", "memory.current", "inactive_file") == 390
    (tmp_path / "memory.max").write_text("max\n")
    assert _memory._cgroup_free("memory.max", "memory.current", "inactive_file") is None


#
# a limit that changes
#


def test_a_limit_that_changes(tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=1.0, n_batch=BATCH, kv_checkpoints=0)
    assert llm.kv_limit is None
    answer(llm, LONG[:600], 1)
    assert n_held(llm) == 600
    llm.kv_limit = 300
    assert n_held(llm) == 600 and llm.kv_limit == 300 and pickle.loads(pickle.dumps(llm)).kv_limit == 300
    llm.eval([5])  # the next token
    assert n_held(llm) <= 300
    llm.kv_limit = LIMIT
    seen = watch_cells(llm, monkeypatch)
    answer(llm, [*LONG[:600], *OTHERS], 1)  # the next prompt
    assert max(seen[1:]) <= LIMIT + BATCH  # the first one observes what the larger limit left
    llm.kv_limit = None
    answer(llm, LONG[:700], 1)
    assert n_held(llm) == 700 and llm.kv_limit is None


def test_limits_that_cannot_be_set(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_limit=LIMIT, n_batch=BATCH)
    llm.kv_pin(0, 60)
    for bad, error, text in (
        (20, ValueError, "expected at least"), ("MiB", ValueError, "expected bytes"), (0.5, TypeError, "cells per head"),
        (90, ValueError, "leaves 58 cells per head for what stays, and 60 positions are pinned"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            llm.kv_limit = bad  # type: ignore[assignment]
        assert llm.kv_limit == LIMIT
    with pytest.raises(UnsupportedCallError, match="needs a session with a policy"):
        opened(tiny).kv_limit = 300
    with pytest.raises(ValueError, match="n_tokens is -1"):
        llm.kv_room(-1)


#
# who observes
#


def watch_observers(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Tokens that observed, at every compaction within a prompt."""
    seen: list[list[int]] = []
    observe = llm._observe

    def call(cache: Any, asks: list[int]) -> None:
        seen.append(asks)
        observe(cache, asks)

    monkeypatch.setattr(llm, "_observe", call)
    return seen


MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": [{"type": "text", "text": " What is the name of the miller's cat? "}]},
]


def test_where_the_question_stands() -> None:
    assert asked_text(MESSAGES) == "What is the name of the miller's cat?" and asked_text(MESSAGES[:3]) == "Why?"
    for none in ([], None, "text", [{}], MESSAGES[:1]):
        assert asked_text(none) == ""
    pieces = [b"<u>", b"Wh", b"y? ", b"Wh", b"\xc3", b"\xa4t?", b"\n", b"<a>"]
    tokens = list(range(8))
    assert find_asked("Wh\u00e4t?", tokens, pieces.__getitem__) == (3, 6)
    assert find_asked("Wh\u00e4", tokens, pieces.__getitem__) == (3, 6)
    assert find_asked("h\u00e4", tokens, pieces.__getitem__) is None  # so short a text may stand anywhere
    assert find_asked("Why?", tokens, pieces.__getitem__) == (1, 3)
    assert find_asked("When?", tokens, pieces.__getitem__) is None
    assert find_asked("bbbb", list(range(5000)), lambda i: b"bbbb" if i == 4700 else b"x") is None  # too far from the end
    assert find_asked("b" * 9000, list(range(5000)), lambda i: b"bb" if i < 4990 else b"x") == (3966, 4990)  # its end


def test_the_last_user_message_observes(session: Open, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat's template puts tokens behind it, which ask nothing; a long message asks at its end."""
    llm = session(kv_policy=WindowKV(window_size=8), kv_limit=100, n_batch=64)
    observed = watch_observers(llm, monkeypatch)
    content = f"{document[:700]}\n\nWho?"
    llm.create_chat_completion([{"role": "user", "content": content}], max_tokens=1, temperature=0.0)
    said = {llm.detokenize(own).decode() for own in observed}
    assert len(observed) >= 2 and len(said) == 1
    (text,) = said
    assert text.endswith("Who?") and len(text) > 4 and content.endswith(text.strip())
    # the same text in a prompt that is no chat, and goes on behind it
    observed.clear()
    answer(llm, llm.tokenize((content + document[700:1100]).encode()), 1)
    assert observed and all(own == llm.input_ids[llm.n_tokens - 8 : llm.n_tokens].tolist() for own in observed)


def test_a_short_question_observes_alone(session: Open, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the end of what was read before it."""
    llm = session(kv_policy=WindowKV(window_size=8), kv_limit=150, n_batch=64)
    observed, cache = watch_observers(llm, monkeypatch), llm._kv_cache
    assert cache is not None
    asked: list[int | None] = []
    compact = cache.compact

    def call(n_cells: int, task: Any, policy: Any = None, n_observers: int | None = None, comes: Any = "batch") -> int:
        asked.append(n_observers)
        return compact(n_cells, task, policy, n_observers, comes)

    monkeypatch.setattr(cache, "compact", call)
    messages: list[Any] = [
        {"role": "user", "content": document[:1200]}, {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "Who?"},
    ]  # fmt: skip
    llm.create_chat_completion(messages, max_tokens=1, temperature=0.0)
    assert {llm.detokenize(own) for own in observed} == {b"Who?"}
    n = len(observed[0])
    assert n < 8 and asked == [*[n] * len(observed), *[None] * (len(asked) - len(observed))]


def test_observers_that_were_read_in_part(tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch begins inside of what is asked."""
    llm = opened(tiny, kv_policy="snapkv", kv_limit=LIMIT, n_batch=BATCH)
    observed = watch_observers(llm, monkeypatch)
    prompt = LONG[: 12 * BATCH + 3]
    answer(llm, prompt, 1)
    assert observed and all(own == prompt[-len(own) :] for own in observed)


def test_a_long_system_prompt_is_not_listed(session: Open, document: str) -> None:
    messages: list[Any] = [{"role": "system", "content": document[:1500]}, {"role": "user", "content": "What is this?"}]
    llm = session(kv_policy="snapkv", kv_budget=0.2)
    with pytest.warns(UserWarning, match="the system prompt is not pinned"):
        llm.create_chat_completion(messages, max_tokens=2, temperature=0.0)
    assert llm.kv_pinned == ()
    messages[0]["content"] = "Answer briefly."
    messages[1]["content"] = document[:2400]
    llm.create_chat_completion(messages, max_tokens=2, temperature=0.0)
    assert len(llm.kv_pinned) == 1


#
# progress
#


@pytest.mark.parametrize("kwargs", [{}, {"kv_policy": "snapkv"}, {"kv_policy": "snapkv", "kv_limit": LIMIT}])
def test_progress_of_prompts(tiny: Path, opened: Open, kwargs: Any) -> None:
    seen: list[tuple[int, int]] = []
    llm = opened(tiny, n_batch=BATCH, kv_progress=lambda *own: seen.append(own), **kwargs)
    answer(llm, TOKENS[:100], 5)
    assert seen == [(32, 100), (64, 100), (96, 100), (100, 100)]
    seen.clear()
    answer(llm, [*TOKENS[:100], *OTHERS[:40]], 1)
    assert seen == [(32, 40), (40, 40)]
    seen.clear()
    llm.reset()
    llm.eval(TOKENS[:40])
    llm.sample(temp=0.0)
    llm.eval([3])
    assert seen == [(32, 40), (40, 40)]
    assert pickle.loads(pickle.dumps(llm)).kv_progress is None


@pytest.mark.parametrize("kwargs", [{}, {"kv_policy": "snapkv", "kv_limit": LIMIT}])
def test_progress_that_raises(tiny: Path, opened: Open, kwargs: Any) -> None:
    """The batches before it were evaluated; the session goes on."""
    for error in (KeyboardInterrupt, RuntimeError("full")):
        llm = opened(tiny, n_batch=BATCH, **kwargs)
        want = answer(llm, LONG[:400], 4)
        llm.reset()

        def stop(done: int, total: int, error: Any = error) -> None:
            if done == 5 * BATCH:
                raise error

        llm.kv_progress = stop
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            answer(llm, LONG[:400], 1)
        assert llm.n_tokens == llm.kv_stats().n_past == 5 * BATCH
        llm.kv_progress = None
        llm.reset()
        assert answer(llm, LONG[:400], 4) == want


def test_progress_leaves_the_session_alone(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", n_batch=BATCH)
    refused = []

    def meddle(done: int, total: int) -> None:
        assert llm.kv_stats().n_past == done
        for call in (
            llm.reset,
            lambda: llm.eval([1]),
            lambda: llm.kv_compact(40),
            lambda: setattr(llm, "kv_limit", 99),
        ):
            with pytest.raises(UnsupportedCallError, match="was called while kv_progress runs"):
                call()
            refused.append(done)

    llm.kv_progress = meddle
    assert len(answer(llm, TOKENS[:100], 3)) == 3 and len(refused) == 16
    for bad in (5, "bar"):
        with pytest.raises(TypeError, match="kv_progress is"):
            llm.kv_progress = bad  # type: ignore[assignment]
        with pytest.raises(TypeError, match="kv_progress is"):
            opened(tiny, kv_progress=bad)


#
# failures
#


@pytest.mark.parametrize("kind", ["write_llama", "write_lfm2"])
def test_signals_while_a_prompt_is_read_within_a_limit(tmp_path: Path, opened: Open, kind: str) -> None:
    """While tokens are observed, cells compacted or pools grown: the next prompt is answered as by a fresh session."""
    import time

    llm = opened(getattr(tiny_model, kind)(tmp_path / "model.gguf"), kv_policy="auto", kv_limit=LIMIT, n_batch=BATCH)
    want = answer(llm, LONG[:700], 4)
    llm.reset()
    start = time.perf_counter()
    assert answer(llm, LONG[:700], 4) == want
    took = time.perf_counter() - start
    interrupted = 0
    for i in range(1, 25):
        llm.reset()
        try:
            with alarm(took * i / 22):
                answer(llm, LONG[:700], 4)
        except KeyboardInterrupt:
            interrupted += 1
        assert llm.n_tokens == llm.kv_stats().n_past
        if i % 6 == 0:
            llm.reset()
            assert answer(llm, LONG[:700], 4) == want
    assert interrupted > 5


def test_observing_that_fails(tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decode of a prompt in turn, the observers' among them."""
    llm = opened(tiny, kv_policy="snapkv", kv_limit=LIMIT, n_batch=BATCH)
    want, where = answer(llm, LONG[:300], 4), positions(llm)
    decode = llm._ctx.decode
    calls, fails = [0], [-1]

    def call(batch: Any) -> None:
        calls[0] += 1
        if calls[0] - 1 == fails[0]:
            raise RuntimeError("llama_decode returned -2")
        decode(batch)

    monkeypatch.setattr(llm._ctx, "decode", call)
    llm.reset()
    answer(llm, LONG[:300], 1)
    n = calls[0]
    assert n > 300 / BATCH + 2
    for fails[0] in range(n):
        llm.reset()
        calls[0] = 0
        with pytest.raises(Exception, match="."):
            answer(llm, LONG[:300], 1)
        assert llm.n_tokens == llm.kv_stats().n_past
        kv = llm._kv
        assert kv is not None and (llm.n_tokens == 0 or kv.queries(0, 0)[0].max(initial=0) < llm.n_tokens)
        fails[0], calls[0] = -1, 0
        got = answer(llm, LONG[:300], 4)  # goes on behind what was read
        assert len(got) == 4 and n_held(llm) <= LIMIT
    llm.reset()
    assert (answer(llm, LONG[:300], 4), positions(llm)) == (want, where)


def test_answers_within_a_bound_of_a_bounded_prompt_are_not_bounded(tiny: Path, opened: Open) -> None:
    """kv_prefill is about prompts."""
    llm = opened(tiny, kv_policy="snapkv", kv_budget=100, kv_prefill="bounded", n_batch=BATCH)
    answer(llm, LONG[:400], 60)
    assert n_held(llm) == 159
