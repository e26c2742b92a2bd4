"""Which question a session keeps cells for: what kv_query says, and what it chooses where that is "auto"."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaRAMCache
from scripted import OTHERS, TOKENS, answer, decode, evaluate, positions

from windowkv_edge import (
    POLICIES,
    Auto,
    HeadScores,
    Llama,
    NativeError,
    SnapKV,
    UnsupportedCallError,
    get_policy,
    repeating,
    room,
)
from windowkv_edge.eval.forms import RULES
from windowkv_edge.policies import QUERIES

Open = Callable[..., Llama]

WIDE = {"n_batch": 256, "n_ctx": 700}
QUESTION = "What did Master Aldous buy?"


def chat(text: str, question: str = QUESTION) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{text}\n\n{question}"}]


def reply(llm: Any, messages: list[dict[str, str]], n: int = 2) -> str:
    return str(llm.create_chat_completion(messages, max_tokens=n, temperature=0.0)["choices"][0]["message"]["content"])


#
# what is said
#


@pytest.mark.parametrize(
    ("query", "policy", "cells"),
    [
        ("last", "auto", None),
        ("both", "auto(replay_share=0.5)", None),
        ("any", "auto(replay_share=1)", None),
        ("any", "kvzip", 8),
    ],
)
def test_auto_does_as_it_is_told(tiny: Path, opened: Open, query: Any, policy: str, cells: int | None) -> None:
    """With kv_query it keeps the cells of that policy, on a prompt and on what comes behind it."""
    types = {} if cells is None else {"type_k": cells, "type_v": cells}
    llm = opened(tiny, kv_policy="auto", kv_query=query, kv_budget=60, **WIDE)
    other = opened(tiny, kv_policy=policy, kv_budget=60, **WIDE, **types)
    for own in (llm, other):
        evaluate(own, TOKENS[:400])
        assert own.kv_stats().query == query and own.kv_stats().cells.sum() == 360
    assert positions(llm) == positions(other)
    assert (llm.kv_stats().n_replayed > 0) == (query != "last")
    for own in (llm, other):
        evaluate(own, OTHERS[:120])
        assert own.kv_stats().n_compactions == 2
    assert positions(llm) == positions(other)


def test_a_share_of_its_own_stays() -> None:
    own = Auto(replay_share=0.2)
    assert own.query == "both" and own.for_query("both") is own
    assert own.for_query("last") == Auto() and own.for_query("any") == Auto(replay_share=1)
    assert [Auto().for_query(query).query for query in QUERIES] == list(QUERIES)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "auto"])
def test_others_say_what_they_keep_cells_for(name: str) -> None:
    policy = get_policy(name)
    assert policy.query == ("any" if name == "kvzip" else "last") and policy.queries == ()
    for query in QUERIES:
        if query == policy.query:
            assert policy.for_query(query) is policy
            continue
        with pytest.raises(ValueError, match=f"kv_query='{query}': '.*' keeps cells for '{policy.query}'; .*'auto'"):
            policy.for_query(query)


def test_refused(tiny: Path, smollm2: Path, opened: Open) -> None:
    for given, reason in (
        ({"kv_query": "all"}, "kv_query is 'all', expected one of auto, last, any, both"),
        ({"kv_query": "both", "kv_policy": None}, "kv_query='both' without kv_policy has no effect"),
        ({"kv_query": "any", "kv_policy": "snapkv"}, "kv_query='any': 'snapkv' keeps cells for 'last'"),
        ({"kv_query": "last", "kv_policy": "kvzip"}, "kv_query='last': 'kvzip' keeps cells for 'any'"),
    ):
        with pytest.raises(ValueError, match=reason):
            opened(tiny, **{"kv_policy": "auto", "kv_budget": None, **WIDE, **given})
    with pytest.raises(ValueError, match="kv_limit=70 holds 70 cells per head, expected at least"):
        opened(smollm2, kv_policy="auto", kv_query="both", kv_limit=70, **WIDE)
    llm = opened(tiny, kv_policy="snapkv", **WIDE)
    with pytest.raises(ValueError, match="'snapkv' keeps cells for 'last'"):
        llm.kv_query = "any"
    assert llm.kv_query == "auto"
    with pytest.raises(UnsupportedCallError, match="needs a session with a policy"):
        opened(tiny, kv_policy=None, **WIDE).kv_query = "any"


def test_set_later(smollm2: Path, opened: Open) -> None:
    """It holds for copies, and for another policy if that does so, too."""
    llm = opened(smollm2, kv_policy="auto", kv_budget=60, **WIDE)
    llm.kv_query = "any"
    assert llm.kv_query == "any"
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.kv_query == "any" and copy.kv_stats().query == "any"
    copy.close()
    evaluate(llm, TOKENS[:300])
    before = positions(llm)
    with pytest.raises(ValueError, match="kv_query='any': 'snapkv' keeps"):
        llm.kv_policy = "snapkv"
    assert llm.kv_policy == Auto() and positions(llm) == before and llm.kv_stats().query == "any"
    with pytest.raises(ValueError, match="kv_limit=70 holds"):
        llm.kv_limit = 70
    llm.kv_policy = "kvzip"
    assert llm.kv_stats().query == "any"
    llm.kv_policy, llm.kv_query = "auto", "auto"
    llm.kv_limit = 70
    with pytest.raises(ValueError, match="kv_limit=70 holds"):
        llm.kv_query = "both"
    assert llm.kv_query == "auto" and llm.kv_stats().query == "last"


def test_another_question_for_what_is_there(tiny: Path, opened: Open) -> None:
    """What was repeated is chosen from anew at the next prompt's end, the same prompt included; what was chosen for the
    last question alone cannot be repeated, and is read again."""
    llm = opened(tiny, kv_policy="auto", kv_query="any", kv_budget=60, kv_growth=9, **WIDE)
    other = opened(tiny, kv_policy="auto", kv_query="both", kv_budget=60, **WIDE)
    answer(llm, TOKENS[:300])
    before, n_evaluated = positions(llm), llm.kv_stats().n_evaluated
    llm.kv_query = "both"
    assert positions(llm) == before
    assert answer(llm, TOKENS[:300]) == answer(other, TOKENS[:300])
    assert llm.kv_stats().n_evaluated == n_evaluated + 300  # compacted for another question
    assert llm.kv_stats().query == "both" and positions(llm) == positions(other)
    llm.kv_query = "last"
    answer(llm, [*TOKENS[:300], *OTHERS[:40]])
    assert llm.kv_stats().n_evaluated_last == 40 and llm.kv_stats().n_replayed < 300  # of these nothing was repeated
    llm.kv_query = "any"
    answer(llm, [*TOKENS[:300], *OTHERS[:60]])
    assert llm.kv_stats().n_evaluated_last == 360 and llm.kv_stats().n_replayed > 300
    llm.kv_query = "last"
    llm.kv_query = "auto"  # which is the same here
    n = llm.kv_stats().n_compactions
    answer(llm, [*TOKENS[:300], *OTHERS[:70]])
    assert llm.kv_stats().n_evaluated_last == 10 and llm.kv_stats().n_compactions == n + 1


def test_a_stream_goes_on(smollm2: Path, opened: Open, document: str) -> None:
    """Another question is no reason to lose the answer that is being read."""
    llm, other = (opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25) for _ in range(2))
    prompt = llm.tokenize(document[:1600].encode())
    stream = llm.generate(prompt, temp=0.0)
    got = [next(stream)]
    llm.kv_query = "any"
    got += [next(stream) for _ in range(5)]
    stream.close()
    assert got == answer(other, prompt, 6)
    assert llm.kv_stats().query == "last"  # what is there
    more = llm.generate(llm.tokenize(b" And"), temp=0.0, reset=False)
    next(more)
    more.close()
    assert llm.n_tokens > len(prompt)
    answer(llm, [*prompt, *llm.tokenize(b" And then?")])
    assert llm.kv_stats().n_evaluated_last > len(prompt) and llm.kv_stats().n_replayed > 300


def test_states_of_another_question(tiny: Path, opened: Open, tmp_path: Path) -> None:
    """Caches of states and checkpoints leave them alone; what was kept for the last question alone is refused."""
    llm = opened(tiny, kv_policy="auto", kv_query="last", kv_budget=60, kv_checkpoints="64MiB", **WIDE)
    llm.set_cache(LlamaRAMCache())
    history = TOKENS[:300]
    answer(llm, history)
    answer(llm, history := [*history, *OTHERS[:120]])
    assert llm.kv_stats().n_compactions == 2 and llm.kv_stats().n_checkpoints >= 2
    llm.cache[history] = llm.save_state()  # type: ignore[index]
    llm.kv_save(tmp_path / "last.session")
    state = llm.save_state()
    llm.kv_query = "any"
    follow = [*history, *OTHERS[120:140]]
    assert not llm._take_best(llm.cache, follow)  # type: ignore[arg-type]
    for load in (lambda: llm.kv_load(tmp_path / "last.session"), lambda: llm.load_state(state)):
        with pytest.raises(UnsupportedCallError, match="kept for the last question, and this session has kv_query='any'"):
            load()
    answer(llm, [*history, *OTHERS[120:140]])
    stats = llm.kv_stats()
    assert stats.n_reused_last <= 300 and stats.n_replayed > 400  # the first prompt's whole cells, or nothing
    llm.kv_save(tmp_path / "any.session")
    state, more = llm.save_state(), np.array([*follow, 1, 2], dtype=np.intc)
    assert llm._saves(state, more) == len(follow)
    llm.kv_query = "last"
    assert llm._saves(state, more) == 0
    llm.kv_query = "auto"
    assert llm._saves(state, more) == len(follow)
    last = opened(tiny, kv_policy="auto", kv_query="last", kv_budget=60, **WIDE)
    last.kv_load(tmp_path / "any.session")
    n = last.kv_stats().n_compactions
    answer(last, [*history, *OTHERS[120:150]])
    assert last.kv_stats().n_compactions == n + 1 and last.kv_stats().n_evaluated_last == 10


def test_what_cannot_be_repeated_any_more(tiny: Path, opened: Open) -> None:
    """Cells that others left: the session says what to do."""
    llm = opened(tiny, kv_policy="auto", kv_query="any", kv_budget=60, **WIDE)
    llm.eval(TOKENS[:300])
    llm._kv_cache.compact(80, policy=SnapKV(window_size=4))  # type: ignore[union-attr]
    with pytest.raises(UnsupportedCallError, match=r"heads have lost some of it already; call reset\(\)"):
        llm.kv_compact(40)
    assert llm.kv_stats().cells.mean() == 80
    llm.reset()
    evaluate(llm, TOKENS[:300])
    assert llm.kv_stats().cells.mean() == 60


@pytest.mark.parametrize("query", QUERIES)
def test_every_share_observes_enough(tiny: Path, opened: Open, query: Any) -> None:
    """A session of any share keeps the queries that another question needs."""
    for share in (0.0, 0.3, 1.0):
        llm = opened(tiny, kv_policy=Auto(replay_share=share), kv_query=query, kv_budget=60, **WIDE)
        evaluate(llm, TOKENS[:300])
        assert llm.kv_stats().query == query and llm.kv_stats().cells.mean() == 60


#
# what it chooses
#


def test_chats_keep_cells_for_any_question(smollm2: Path, opened: Open, document: str) -> None:
    """Completions and prompts by hand keep them for the one that they end in."""
    text = document[:1600]
    llm = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25)
    reply(llm, chat(text))
    first = llm.kv_stats()
    assert first.query == "both" and first.n_replayed > 200 and first.n_compactions == 1

    llm.create_completion(f"{text}\n\nQuestion: {QUESTION}\nAnswer:", max_tokens=1)
    assert llm.kv_stats().query == "last" and llm.kv_stats().n_replayed == 0
    held = positions(llm)
    reply(llm, chat(text, "Who was late?"))
    llm.reset()
    llm.eval(llm.tokenize(f"{text}\n\nQuestion: {QUESTION}\nAnswer:".encode()))
    llm.sample()
    assert llm.kv_stats().query == "last" and positions(llm) == held

    llm.kv_query = "last"
    reply(llm, chat(text))
    assert llm.kv_stats().query == "last" and llm.kv_stats().n_replayed == 0
    llm.kv_query = "auto"
    for part in llm.create_chat_completion(chat(f"Read this. {text}"), max_tokens=2, stream=True):
        assert part
    assert llm.kv_stats().query == "both" and llm.kv_stats().n_replayed > 200


@pytest.mark.parametrize(
    "given",
    [{"kv_limit": 300}, {"kv_interval": 32}, {"kv_prefill": "bounded"}, {"kv_policy": "windowkv"}],
    ids=lambda given: next(iter(given)),
)
def test_chats_that_do_not(smollm2: Path, opened: Open, document: str, given: dict[str, Any]) -> None:
    """Where every step and every part of an answer would have to be repeated, and where the policy cannot."""
    llm = opened(smollm2, **{"n_ctx": 1024, "kv_policy": "auto", "kv_budget": 0.25, **given})
    reply(llm, chat(document[:1600]))
    stats = llm.kv_stats()
    assert stats.query == "last" and stats.n_replayed == 0 and stats.n_compactions > 0


def test_a_limit_that_is_set_later(smollm2: Path, opened: Open, document: str) -> None:
    """What was repeated stays, and nothing is any more: answers are compacted, too."""
    llm = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25)
    reply(llm, chat(document[:1600]))
    n = llm.kv_stats().n_replayed
    assert n > 200
    llm.kv_limit = 100
    for _ in range(40):
        llm.eval([llm.sample(temp=0.0)])
    stats = llm.kv_stats()
    assert stats.query == "last" and stats.n_replayed == n and stats.cells.mean() <= 100
    reply(llm, chat(document[:1600], "Who was late?"))  # from a checkpoint of before
    assert llm.kv_stats().query == "last" and llm.kv_stats().cells.mean() <= 100


def test_no_room_to_repeat(smollm2: Path, opened: Open, document: str) -> None:
    """A chat that ends close to the end of the context is answered nevertheless."""
    llm = opened(smollm2, n_ctx=512, kv_policy="auto", kv_budget=0.25)
    n = 0
    while len(llm.tokenize(document[: n + 8].encode())) < 446:
        n += 8
    reply(llm, chat(document[:n]))
    assert llm.kv_stats().n_past > 480 and llm.kv_stats().query == "last" and llm.kv_stats().n_replayed == 0
    llm.reset()
    reply(llm, chat(document[: n // 2]))
    assert llm.kv_stats().query == "both"


def test_an_edit_that_leaves_no_room(smollm2: Path, opened: Open, document: str) -> None:
    """The session goes back to where it kept cells for both, and cannot repeat what is new there."""
    llm = opened(smollm2, n_ctx=512, kv_policy="auto", kv_budget=0.25)
    half, more = document[:900], document[900:3000]
    said = [*chat(half), {"role": "assistant", "content": "Bread."}]
    reply(llm, chat(half), 1)
    reply(llm, [*said, *chat(more[:200])], 1)
    assert llm.kv_stats().query == "both" and llm.kv_stats().n_replayed > 0
    n = 0
    while len(llm.tokenize((half + more[: n + 8]).encode())) < 430:
        n += 8
    reply(llm, [*said, *chat(more[:n])], 1)
    assert llm.kv_stats().n_reused_last > 150  # it went back
    assert llm.kv_stats().n_past > 485 and llm.kv_stats().query == "last"


def test_compactions_by_hand(smollm2: Path, opened: Open, document: str) -> None:
    """Where the session chose to repeat and cannot, it compacts nevertheless: at the end of the context, and what
    others decoded."""
    llm = opened(smollm2, n_ctx=512, kv_policy="auto", kv_budget=0.9, kv_min_prompt=0)
    reply(llm, chat(document[:1500]), 1)
    assert llm.kv_stats().query == "both"
    while llm.n_tokens < 500:
        llm.eval([llm.sample(temp=0.0)])
    llm.kv_compact(0.1)
    assert llm.kv_stats().query == "last" and llm.kv_stats().cells.mean() < 110
    llm.reset()
    reply(llm, chat(document[:1200]), 1)
    assert llm.kv_stats().query == "both"
    assert decode(llm, llm.tokenize(b" and so on, as ever" * 5)) == 0
    llm.kv_compact(0.1)
    assert llm.kv_stats().query == "last" and llm.kv_stats().cells.mean() < 110


def test_behind_a_reset(smollm2: Path, opened: Open, document: str) -> None:
    llm = opened(smollm2, n_ctx=512, kv_policy="auto", kv_budget=0.25)
    reply(llm, chat(document[:1200]), 1)
    assert llm.kv_stats().query == "both"
    llm.reset()
    assert llm.kv_stats().query == "last"
    for token in llm.tokenize(document[:60].encode()):
        llm.eval([token])
    llm.kv_compact(10)
    assert llm.kv_stats().query == "last" and llm.kv_stats().n_replayed == 0


def test_little_memory(smollm2: Path, opened: Open, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not read with the full cache is not repeated, step by step; it is if there is a prompt like that first."""
    llm = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25)
    reply(llm, chat(document[:1600]))
    assert llm.kv_stats().query == "both"
    monkeypatch.setattr(room, "WORTH_ASKING", 0)
    monkeypatch.setattr(room, "usable_memory", lambda share: 100 * int(llm._kv.stats().bytes_cell))  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="so much is not free"):
        reply(llm, chat(document[2000:3600]))
    assert llm.kv_stats().query == "last" and llm.kv_stats().n_replayed == 0
    exact = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25, kv_prefill="exact")
    reply(exact, chat(document[2000:3600]))
    assert exact.kv_stats().query == "both"


def test_an_answer_within_a_limit(smollm2: Path, opened: Open, document: str) -> None:
    """Another question while it grows: its compactions go on to keep what they kept cells for."""
    llm, other = (opened(smollm2, n_ctx=1024, kv_policy="auto", kv_query="last", kv_limit=150) for _ in range(2))
    prompt = llm.tokenize(document[:1600].encode())
    streams = [own.generate(prompt, temp=0.0) for own in (llm, other)]
    got = [[next(stream) for _ in range(4)] for stream in streams]
    llm.kv_query = "any"
    for _ in range(50):
        for own, stream in zip(got, streams, strict=True):
            own.append(next(stream))
    assert got[0] == got[1] and positions(llm) == positions(other)
    assert llm.kv_stats().n_replayed == 0 and llm.kv_stats().n_compactions >= 3
    for stream in streams:
        stream.close()
    answer(llm, [*prompt, *got[0], 1])
    assert llm.kv_stats().query == "any" and llm.kv_stats().n_evaluated_last > len(prompt)
    assert llm.kv_stats().miss  # why, or what would have kept it


def test_nothing_was_evicted(tiny: Path, opened: Open, tmp_path: Path) -> None:
    """A compaction that all cells survive says nothing about questions."""
    llm = opened(tiny, kv_policy="auto", kv_query="last", kv_budget=0.6, **WIDE)
    answer(llm, TOKENS[:300])
    assert (llm.kv_stats().cells == 300).all()
    llm.kv_save(tmp_path / "all.session")
    other = opened(tiny, kv_policy="auto", kv_query="any", kv_budget=60, **WIDE)
    other.kv_load(tmp_path / "all.session")
    other.kv_compact(60)
    assert other.kv_stats().n_replayed > 280
    llm.kv_query = "any"
    answer(llm, [*TOKENS[:300], *OTHERS[:10]])
    assert llm.kv_stats().n_evaluated_last == 10


def test_a_policy_that_repeats_by_itself(tiny: Path, opened: Open) -> None:
    """With "auto" as with its name: what was kept for the last question alone is read again."""
    llm = opened(tiny, kv_policy="auto(replay_share=0.2)", kv_query="last", kv_budget=60, kv_checkpoints="64MiB", **WIDE)
    answer(llm, TOKENS[:300])
    answer(llm, [*TOKENS[:300], *OTHERS[:100]])
    llm.kv_query = "auto"
    answer(llm, [*TOKENS[:300], *OTHERS[:120]])
    assert llm.kv_stats().query == "both" and llm.kv_stats().n_replayed > 390


def test_pins_take_of_what_repeating_chooses(smollm2: Path, opened: Open, document: str) -> None:
    """With a system prompt that takes half of the cells the next turns go on to be repeated."""
    llm = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=130)
    messages = [{"role": "system", "content": document[3000:3240]}, *chat(document[:2200])]
    reply(llm, messages)
    assert llm.kv_pinned and 40 < llm.kv_pinned[0][1] < 65
    for i in range(3):
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": document[3600 + 300 * i :][:300]}]
        reply(llm, messages)
        assert llm.kv_stats().query == "both"
    assert llm.kv_stats().n_compactions >= 2


def test_no_memory_to_repeat(smollm2: Path, opened: Open, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes all the same, if the session chose to repeat; what was told to is an error."""
    llm = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25)
    told = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25, kv_query="both")
    last = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25, kv_query="last")

    def replay(*_: Any) -> Any:
        raise NativeError("memory ran out")

    monkeypatch.setattr(repeating, "replay", replay)
    assert reply(llm, chat(document[:1600]), 8) == reply(last, chat(document[:1600]), 8)
    assert llm.kv_stats().query == "last" and positions(llm) == positions(last)
    with pytest.raises(NativeError, match="memory ran out"):
        reply(told, chat(document[:1600]), 8)

    def replay_and_lose(kv: Any, *_: Any) -> Any:
        llm._ctx.kv_cache_clear()
        raise NativeError("the cache was cleared")

    monkeypatch.setattr(repeating, "replay", replay_and_lose)
    llm.reset()
    with pytest.raises(NativeError, match="the cache was cleared"):
        reply(llm, chat(document[:1600]), 8)
    assert llm.n_tokens == 0


def test_streams_that_nobody_reads_on(smollm2: Path, opened: Open, document: str) -> None:
    """A chat is one while its prompt begins, whatever begins before and behind."""
    llm = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25)
    stream = llm.create_chat_completion(chat(document[:1200]), max_tokens=8, stream=True)
    next(stream)  # type: ignore[call-overload]
    next(stream)  # type: ignore[call-overload]
    assert llm.kv_stats().query == "both"
    llm.create_completion(document[2000:3600], max_tokens=1)
    assert llm.kv_stats().query == "last"
    stream.close()  # type: ignore[union-attr]
    reply(llm, [{"role": "system", "content": document[:1200]}])  # nobody asks, a chat all the same
    assert llm.kv_stats().query == "both"


def test_a_policy_that_says_so_itself(smollm2: Path, opened: Open, document: str) -> None:
    """A share that was given holds for every prompt."""
    llm = opened(smollm2, n_ctx=1024, kv_policy="auto(replay_share=0.2)", kv_budget=0.25)
    llm.create_completion(document[:1600], max_tokens=1)
    assert llm.kv_stats().query == "both" and llm.kv_stats().n_replayed > 200
    reply(llm, chat(document[:1600]))
    assert llm._kv_bound.parts().replay_share == 0.2


def test_head_scores_stay(tiny: Path, opened: Open) -> None:
    """Those that the session found for its model."""
    scores = HeadScores({kind: np.random.default_rng(0).random((3, 4)) for kind in ("r", "r2")})
    llm = opened(tiny, kv_policy=Auto(importance=scores, beta=2.0), kv_query="both", kv_budget=60, **WIDE)
    alone = opened(tiny, kv_policy=Auto(importance=scores, beta=2.0), kv_budget=60, **WIDE)
    parts, want = llm._kv_bound.parts(), alone._kv_bound.parts()
    assert parts.allocation.beta == want.allocation.beta == 2.0 and parts.replay_share == 0.5
    np.testing.assert_array_equal(parts.allocation.importance, want.allocation.importance)


def test_saved_sessions(smollm2: Path, opened: Open, document: str, tmp_path: Path) -> None:
    """A chat goes on with what its cells were kept for."""
    llm = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25)
    reply(llm, chat(document[:1600]))
    llm.kv_save(tmp_path / "own.session")
    other = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25)
    other.kv_load(tmp_path / "own.session")
    assert other.kv_stats().query == "both" and positions(other) == positions(llm)
    for own in (llm, other):
        own.kv_compact(0.12)
    assert positions(other) == positions(llm)
    last = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25, kv_query="last")
    last.kv_load(tmp_path / "own.session")
    assert last.kv_stats().query == "last"
    state = llm.save_state()
    state.session["noted"]["query"] = "none"  # type: ignore[attr-defined]
    before = positions(other)
    with pytest.raises(ValueError, match="the question 'none', expected one of last, any, both"):
        other.load_state(state)
    assert positions(other) == before
    for given in ({"kv_limit": 200}, {"kv_interval": 32}, {"kv_prefill": "bounded"}):
        bound = opened(smollm2, n_ctx=1024, kv_policy="auto", kv_budget=0.25, **given)
        bound.kv_load(tmp_path / "own.session")
        bound.eval([1])
        assert bound.kv_stats().query == "last"
        bound.close()


def test_a_question_in_front_of_rules(smollm2: Path, opened: Open, document: str) -> None:
    """Its answer stays, though nothing at the prompt's end says what is asked."""
    fact = "The registration number of the violet piano is 395152."
    text = f"{document[:1800]}\n{fact}\n{document[1800:3600]}"
    messages = chat(text, f"What is the registration number of the violet piano?\n\n{RULES}")
    llm = opened(smollm2, n_ctx=1536, kv_policy="auto", kv_budget=0.12)
    said = {}
    for query in ("auto", "last"):
        llm.kv_query = query  # type: ignore[assignment]
        llm.reset()
        said[query] = reply(llm, messages, 20)
    assert "395152" in said["auto"] and "395152" not in said["last"], said
