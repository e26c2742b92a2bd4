"""Checkpoints: what a session that goes back evaluates again, and that it goes on as if it had never left."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tiny_model
from kinds import WRITERS, logits
from scripted import OTHERS, TOKENS, answer, decode, positions

from windowkv_edge import Llama, going_back
from windowkv_edge.checkpoints import AUTO

Open = Callable[..., Llama]

SMALL: dict[str, Any] = {"n_ctx": 1024, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1}
BUDGET, LIMIT = 60, 160
DOCUMENT, QUESTION, OTHER = TOKENS[:300], OTHERS[:20], OTHERS[20:45]


def make(opened: Open, model: Path, **kwargs: Any) -> Llama:
    given = {"kv_policy": "snapkv", "kv_growth": 1, **SMALL, **kwargs}
    if "kv_limit" not in given:
        given.setdefault("kv_budget", BUDGET)
    return opened(model, **given)


def cost(llm: Llama) -> tuple[int, int]:
    own = llm.kv_stats()
    return own.n_evaluated_last, own.n_reused_last


def n_bytes(llm: Llama) -> int:
    own = llm.kv_stats()
    return own.bytes_live + own.bytes_other


def state(llm: Llama) -> tuple[Any, ...]:
    """All that what follows depends on."""
    return llm._input_ids.tolist(), logits(llm).tobytes(), positions(llm), bytes(llm.save_state().llama_state)


def talk(llm: Llama, messages: list[list[int]], n: int = 5) -> list[int]:
    """A conversation of these messages; its tokens."""
    history: list[int] = []
    for message in messages:
        history += message
        history += answer(llm, history, n)
    return history


MESSAGES = [TOKENS[:200], OTHERS[:30], OTHERS[30:70], OTHERS[70:95]]


#
# going back
#


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("limit", [None, LIMIT])
def test_an_edited_message(models: dict[str, Path], opened: Open, kind: str, limit: int | None) -> None:
    """It costs its tokens, and the one of the answer before that was not read yet; the rest is that of a session that took this
    path alone."""
    given = {"kv_limit": limit} if limit else {}
    llm, fresh = (make(opened, models[kind], **given) for _ in range(2))
    history = talk(llm, MESSAGES[:2])
    for edited in (OTHERS[200:240], OTHERS[240:300]):
        for n in (1, 6):
            got = answer(llm, [*history, *edited], n)
        assert cost(llm) == (0, len(history) + len(edited))
    answer(llm, [*history, *MESSAGES[2]], 6)
    assert cost(llm) == (len(MESSAGES[2]) + 1, len(history) - 1)

    want = talk(fresh, MESSAGES[:2])
    assert want == history
    answer(fresh, [*history, *MESSAGES[2]], 6)
    assert state(llm) == state(fresh)
    assert answer(llm, [*history, *edited], 6) == got  # and there


@pytest.mark.parametrize("kind", WRITERS)
def test_turns_are_taken_back(models: dict[str, Path], opened: Open, kind: str) -> None:
    """Two of them."""
    llm, fresh = (make(opened, models[kind], kv_checkpoints="64MiB") for _ in range(2))
    talk(llm, MESSAGES)
    history = talk(fresh, MESSAGES[:2])
    want = answer(fresh, [*history, *OTHERS[300:330]], 6)
    got = answer(llm, [*history, *OTHERS[300:330]], 6)
    assert got == want and state(llm)[:1] == state(fresh)[:1]
    assert cost(llm)[0] <= 31 and llm.kv_stats().miss == ""
    first = answer(fresh, MESSAGES[0], 5)
    assert answer(llm, MESSAGES[0], 5) == first == history[200:205] and cost(llm) == (0, 200)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_answer_again(models: dict[str, Path], opened: Open, kind: str) -> None:
    """Nothing of its prompt is evaluated, though a limit asked for compactions meanwhile; what was said is said again."""
    llm = make(opened, models[kind], kv_limit=LIMIT, n_batch=32)
    prompt = TOKENS[:250]
    first, n = answer(llm, prompt, 200), llm.kv_stats().n_compactions
    kept = state(llm)
    assert n > 3
    for n_tokens in (200, 1, 50, 200):
        assert answer(llm, prompt, n_tokens) == first[:n_tokens]
        assert cost(llm) == (0, 250) and llm.kv_stats().miss == ""
    assert state(llm) == kept and llm.kv_stats().n_checkpoints == 1
    assert llm.kv_stats().cells.mean() <= LIMIT


def test_going_back_stays_within_the_limit(models: dict[str, Path], opened: Open) -> None:
    """There are never the cells of both; the peak is what it was."""
    llm = make(opened, models["llama"], kv_limit=LIMIT, n_batch=32)
    answer(llm, TOKENS[:250], 200)
    peak = llm.kv_stats().bytes_peak
    answer(llm, TOKENS[:250], 200)
    assert cost(llm) == (0, 250) and llm.kv_stats().bytes_peak == peak


@pytest.mark.parametrize("kind", WRITERS)
def test_an_answer_that_is_rendered_otherwise(models: dict[str, Path], opened: Open, kind: str) -> None:
    """As templates do that strip it, or drop the reasoning in it: what is the same is not evaluated, as far as that layer goes
    back."""
    llm = make(opened, models[kind], kv_limit=LIMIT, n_batch=32)
    first = answer(llm, TOKENS[:150], 100)
    assert llm.kv_stats().n_compactions > 0
    answer(llm, [*TOKENS[:150], *first[:8], *OTHERS[:30]], 3)
    assert cost(llm) == ((30, 158) if kind == "llama" else (38, 150))


def test_another_question_about_a_text(models: dict[str, Path], opened: Open) -> None:
    """In the same message: with bytes for the whole cells it costs the question."""
    llm = make(opened, models["llama"], kv_checkpoints="64MiB")
    full = make(opened, models["llama"], kv_budget=1.0)
    for own in (llm, full):
        answer(own, [*DOCUMENT, *QUESTION], 6)
    full.kv_budget = BUDGET
    assert answer(llm, [*DOCUMENT, *OTHER], 6) == answer(full, [*DOCUMENT, *OTHER], 6)
    assert cost(llm) == cost(full) == (25, 300)
    assert state(llm)[:3] == state(full)[:3]
    answer(llm, [*DOCUMENT, *QUESTION, *OTHERS[100:110]], 6)
    assert cost(llm)[0] == 10


def test_another_question_about_a_long_text(models: dict[str, Path], opened: Open) -> None:
    """Within a limit there are never all cells, but those of the beginning are no choice of a question."""
    llm = make(opened, models["llama"], kv_limit=LIMIT, n_batch=32, kv_checkpoints="64MiB")
    fresh = make(opened, models["llama"], kv_limit=LIMIT, n_batch=32)
    answer(llm, [*DOCUMENT, *OTHERS[:60]])
    assert answer(llm, [*DOCUMENT, *OTHER], 6) == answer(fresh, [*DOCUMENT, *OTHER], 6)
    assert cost(llm)[1] == LIMIT and state(llm) == state(fresh)


def test_what_more_bytes_would_have_kept(models: dict[str, Path], opened: Open) -> None:
    llm = make(opened, models["llama"])
    for question in (QUESTION, OTHER):
        answer(llm, [*DOCUMENT, *question])
    assert cost(llm) == (325, 0) and llm.kv_stats().n_checkpoints == 0
    why = "the prompt differs at token 300 of 325, and positions below 320 were compacted"
    found = re.fullmatch(rf'{why}; kv_checkpoints="(\d+MiB)" would have kept 300 tokens of it', llm.kv_stats().miss)
    assert found
    other = make(opened, models["llama"], kv_checkpoints=found[1])
    for question in (QUESTION, OTHER):
        answer(other, [*DOCUMENT, *question])
    assert cost(other) == (25, 300) and other.kv_stats().miss == ""


def test_a_prompt_that_came_between(models: dict[str, Path], opened: Open) -> None:
    """What was read of a conversation is in a checkpoint, up to the last message."""
    llm = make(opened, models["llama"], kv_checkpoints="64MiB")
    history = talk(llm, MESSAGES)
    answer(llm, OTHERS[300:400])
    answer(llm, [*history, *OTHERS[:10]])
    assert cost(llm) == (5 + 10, len(history) - 5)


def test_pieces_have_a_beginning(models: dict[str, Path], opened: Open) -> None:
    llm = make(opened, models["llama"])
    history = talk(llm, MESSAGES[:1])
    for i in range(0, 40, 10):
        llm.eval([*history[-1:], *OTHERS][i : i + 10])
    llm.sample(temp=0.0)
    assert llm.kv_stats().n_checkpoints == 1
    answer(llm, [*history, *OTHERS[50:60]])
    assert cost(llm) == (11, 204)


def test_what_others_decode_is_no_checkpoint(models: dict[str, Path], opened: Open) -> None:
    llm = make(opened, models["llama"], kv_checkpoints="64MiB")
    decode(llm, TOKENS[:60])
    decode(llm, TOKENS[60:100])
    decode(llm, [5])
    assert llm.kv_stats().n_compactions == 1 and llm.kv_stats().n_checkpoints == 0
    llm.reset()
    assert len(answer(llm, TOKENS[:300], 3)) == 3


#
# how many, and how long
#


@pytest.mark.parametrize("kind", WRITERS)
def test_auto_is_a_multiple_of_what_is_live(models: dict[str, Path], opened: Open, kind: str) -> None:
    llm = make(opened, models[kind])
    history: list[int] = []
    for i in range(12):
        history += OTHERS[30 * i : 30 * i + 30]
        history += answer(llm, history, 5)
        own = llm.kv_stats()
        assert own.bytes_checkpoints <= AUTO * n_bytes(llm)
        assert own.bytes_checkpoints == llm._kv_checkpoints.n_bytes
    assert own.n_checkpoints >= 3
    assert f"MiB in {own.n_checkpoints} checkpoints" in str(own)
    answer(llm, OTHERS[-8:])
    assert llm.kv_stats().bytes_checkpoints <= AUTO * n_bytes(llm)


def test_no_copy_that_is_never_used(models: dict[str, Path], opened: Open) -> None:
    """Where everything that can come can go back by removing positions."""
    llm = make(opened, models["llama"], kv_growth=100)
    talk(llm, MESSAGES)
    assert llm.kv_stats().n_compactions == 1 and llm.kv_stats().n_checkpoints == 0
    llm = make(opened, models["llama"], kv_limit=1000)
    talk(llm, MESSAGES)
    assert llm.kv_stats().n_checkpoints == 0
    for kwargs in ({"kv_checkpoints": 0}, {"kv_checkpoints": None}, {"logits_all": True}):
        llm = make(opened, models["granite"], **kwargs)
        talk(llm, MESSAGES)
        assert llm.kv_stats().n_checkpoints == llm.kv_stats().bytes_checkpoints == 0
        assert len(answer(llm, TOKENS[:50], 3)) == 3


def test_the_least_recently_used_goes_first(models: dict[str, Path], opened: Open) -> None:
    llm = make(opened, models["llama"], kv_checkpoints="64MiB")
    history = talk(llm, MESSAGES[:1])
    for i in range(3):  # each is read behind the first answer; what it was stays as a whole
        answer(llm, [*history, *OTHERS[40 * i : 40 * i + 40]])
    held = llm._kv_checkpoints.held
    sizes = [own.n_bytes for own in held]
    assert [len(own.tokens) for own in held] == [200, 245, 245, 204, 245]  # used by every question
    whole = [own.tokens.tolist() for own in held]

    bounded = make(opened, models["llama"], kv_checkpoints=f"{sum(sizes[-3:]) + 100}B")
    talk(bounded, MESSAGES[:1])
    for i in range(3):
        answer(bounded, [*history, *OTHERS[40 * i : 40 * i + 40]])
        assert bounded.kv_stats().bytes_checkpoints <= sum(sizes[-3:]) + 100
    kept = [own.tokens.tolist() for own in bounded._kv_checkpoints.held]
    assert kept == whole[-len(kept) :] and 2 <= len(kept) <= 3
    answer(bounded, [*history, *OTHERS[:40]])
    assert cost(bounded) == (41, 204)

    tiny = make(opened, models["llama"], kv_checkpoints="1KiB")
    assert talk(tiny, MESSAGES) == talk(make(opened, models["llama"]), MESSAGES)
    assert tiny.kv_stats().n_checkpoints == 0


def test_what_drops_them(models: dict[str, Path], opened: Open) -> None:
    llm = make(opened, models["llama"])
    for drop in (llm.reset, lambda: setattr(llm, "kv_policy", "streamingllm"), llm.close):
        talk(llm, MESSAGES)
        assert llm.kv_stats().n_checkpoints > 0
        drop()
        assert not llm._kv_checkpoints.held and not llm._kv_checkpoints._missed


def test_another_budget_and_other_pins(models: dict[str, Path], opened: Open) -> None:
    """A checkpoint was compacted for its own."""
    llm = make(opened, models["llama"])
    history = talk(llm, MESSAGES)
    first = [*history[:205], *OTHERS[100:130]]
    for change, undo in (
        (lambda: setattr(llm, "kv_budget", 80), lambda: setattr(llm, "kv_budget", BUDGET)),
        (lambda: llm.kv_pin(500, 505), llm.kv_unpin),
    ):
        assert llm._n_kept(np.array(first)) == 204
        change()
        assert llm._n_kept(np.array(first)) == 0
        undo()
    answer(llm, first)
    assert cost(llm) == (31, 204)
    llm.kv_budget = 80
    answer(llm, first)
    assert cost(llm) == (235, 0) and (llm.kv_stats().cells == 80).all()


def test_saved_sessions_and_checkpoints(models: dict[str, Path], opened: Open, tmp_path: Path) -> None:
    """A file holds none, loading one keeps those of the session."""
    llm, other = (make(opened, models["llama"]) for _ in range(2))
    history = talk(llm, MESSAGES)
    n = llm.kv_stats().n_checkpoints
    llm.kv_save(tmp_path / "saved")
    saved = llm.save_state()
    other.kv_load(tmp_path / "saved")
    assert other.kv_stats().n_checkpoints == 0
    talk(llm, [OTHERS[:100]])
    llm.load_state(saved)
    assert llm.kv_stats().n_checkpoints >= n - 1
    edited = [*history[: -len(MESSAGES[3]) - 5], *OTHERS[100:130]]
    answer(llm, edited)
    assert cost(llm)[0] == 31
    copy = pickle.loads(pickle.dumps(llm))
    assert copy._kv_checkpoints.given == "auto" and copy.kv_stats().n_checkpoints == 0
    copy.close()
    sized = make(opened, models["llama"], kv_checkpoints="2MiB")
    copy = pickle.loads(pickle.dumps(sized))
    assert copy._kv_checkpoints.given == 2 << 20
    copy.close()


def test_a_cache_of_states_beside_them(models: dict[str, Path], opened: Open) -> None:
    """The state of the cache is loaded only where it saves more."""
    llm = make(opened, models["llama"])
    history = talk(llm, MESSAGES[:2])
    cache = llama_cpp.LlamaRAMCache()
    cache[history] = llm.save_state()
    answer(llm, [*history, *MESSAGES[2]], 5)
    edited = [*history, *OTHERS[100:130]]
    assert not llm._take_best(cache, edited)
    answer(llm, edited)
    assert cost(llm)[0] == 31
    llm.reset()
    assert llm._take_best(cache, edited)


#
# what goes wrong
#


@pytest.mark.parametrize("at", ["_clear", "_kv_note"])
def test_interrupted_while_going_back(
    models: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    llm, fresh = (make(opened, models["granite"]) for _ in range(2))
    history = talk(llm, MESSAGES[:2])
    edited = [*history[:205], *OTHERS[100:130]]
    own, errors = getattr(llm, at), [KeyboardInterrupt()]

    def interrupted(*args: Any) -> None:
        own(*args)
        if errors:
            raise errors.pop()

    monkeypatch.setattr(llm, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(llm, edited)
    assert llm.n_tokens == llm.kv_stats().n_past == 0
    got = answer(llm, edited, 6)
    assert cost(llm) == (31, 204)
    talk(fresh, MESSAGES[:1])
    assert got == answer(fresh, edited, 6) and state(llm) == state(fresh)
    errors.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        answer(llm, edited)
    assert llm.n_tokens == llm.kv_stats().n_past == 0
    assert answer(llm, edited, 6) == got and cost(llm) == (0, 235)  # nor are its logits lost


def test_no_memory_for_a_checkpoint(models: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not kept, and the session knows nothing of it. native/failing-alloc.cpp fails what is native."""
    want = talk(make(opened, models["granite"]), MESSAGES)
    llm = make(opened, models["granite"])
    empty = np.empty

    def fail(shape: Any, *args: Any, **kwargs: Any) -> Any:
        if np.prod(shape) > 10_000:
            raise MemoryError
        return empty(shape, *args, **kwargs)

    monkeypatch.setattr(np, "empty", fail)
    assert talk(llm, MESSAGES) == want and llm.kv_stats().n_checkpoints == 0


def test_no_memory_to_go_back(models: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is empty then, says why, and answers."""
    llm, fresh = (make(opened, models["llama"]) for _ in range(2))
    history = talk(llm, MESSAGES)
    edited = [*history[:205], *OTHERS[100:130]]
    monkeypatch.setattr(going_back, "set_state", lambda ctx, data: 0)
    assert answer(llm, edited, 6) == answer(fresh, edited, 6) and cost(llm) == (235, 0)
    assert "a checkpoint of 204 tokens could not be read" in llm.kv_stats().miss
    assert positions(llm) == positions(fresh)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("12 apples", ValueError, 'kv_checkpoints is .*expected bytes such as 512MiB or 1.5GiB; or "auto", or 0 for none'),
        (4096, TypeError, 'kv_checkpoints is 4096, expected "auto", a number of bytes'),
        (0.5, TypeError, "kv_checkpoints is 0.5"),
        (True, TypeError, "kv_checkpoints is True"),
        (-1, TypeError, "kv_checkpoints is -1"),
    ],
)
def test_bad_arguments(tiny: Path, opened: Open, given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        opened(tiny, kv_policy="snapkv", kv_checkpoints=given)


def test_without_a_policy(tiny: Path, opened: Open) -> None:
    with pytest.raises(ValueError, match="kv_checkpoints='1MiB' without kv_policy has no effect"):
        opened(tiny, kv_checkpoints="1MiB")
    for none in ("auto", 0, None):
        llm = opened(tiny, kv_checkpoints=none, n_ctx=128)
        assert llm.kv_stats().n_checkpoints == 0
        assert tiny_model.N_VOCAB == llm.n_vocab()
