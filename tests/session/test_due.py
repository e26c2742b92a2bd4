"""Whether a compaction is due follows what the cache holds, whoever evaluated it and whatever failed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from scripted import OTHERS, TOKENS, Script, answer, decode, evaluate, once, positions

from windowkv_edge import (
    CacheView,
    Llama,
    SnapKV,
    UnsupportedCallError,
)


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_a_failed_selection_is_made_up_for(tiny: Path, opened: Callable[..., Llama], error: BaseException) -> None:
    llm = opened(tiny, kv_policy=Script(action=once(error)), kv_budget=60)
    with pytest.raises(type(error)):
        answer(llm, TOKENS)
    assert (llm.kv_stats().cells == 400).all() and llm.n_tokens == 400
    answer(llm, TOKENS)  # "full prompt already cached"
    assert (llm.kv_stats().cells == 60).all()


class Uneven(Script):
    """The first head of a layer keeps twice as many cells as the second."""

    ragged = True

    def select(self, scores: Any, budget: int, ctx: CacheView) -> Any:
        self.action()
        return [[first[-80:], second[-40:]] for first, second in ctx.positions]


def test_a_prompt_is_compacted_once(tiny: Path, opened: Callable[..., Llama]) -> None:
    """Heads that hold more than the budget's average are no reason to ask again."""
    asked: list[int] = []
    llm = opened(tiny, kv_policy=Uneven(action=lambda: asked.append(1)), kv_budget=60)
    for _ in range(3):
        answer(llm, TOKENS)  # "full prompt already cached" from the second on
        assert llm.kv_stats().cells.tolist() == [[80, 40]] * 3
    assert asked == [1] and llm.kv_stats().n_compactions == 1


def test_a_stream_that_somebody_holds(tiny: Path, opened: Callable[..., Llama]) -> None:
    """As the traceback of a notebook does."""
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=60)
    stream = llm.generate(TOKENS, temp=0.0)
    next(stream)
    llm.reset()
    evaluate(llm, OTHERS)
    assert (llm.kv_stats().cells == 60).all() and llm.kv_stats().n_past == 400
    evaluate(llm, TOKENS[:100])
    assert (llm.kv_stats().cells == 60).all() and llm.kv_stats().n_past == 500
    other = llm.generate(TOKENS[:300], temp=0.0)
    next(other)
    assert (llm.kv_stats().cells == 60).all() and llm.kv_stats().n_past == 300
    next(other)
    assert (llm.kv_stats().cells == 61).all() and llm.kv_stats().n_compactions == 4
    stream.close()


@pytest.mark.parametrize("pieces", [[400], [200, 200]])
def test_libraries_that_decode_on_the_context(tiny: Path, opened: Callable[..., Llama], pieces: list[int]) -> None:
    llm, fresh = (opened(tiny, kv_policy=SnapKV(), kv_budget=60, n_ctx=1024) for _ in range(2))
    evaluate(fresh, TOKENS)
    at = 0
    for n in pieces:
        assert decode(llm, TOKENS[at : at + n]) == 0
        at += n
    assert (llm.kv_stats().cells == 400).all()
    assert decode(llm, [5]) == 0
    assert llm.kv_stats().n_compactions == 1 and (llm.kv_stats().cells == 61).all()
    assert decode(llm, [6]) == 0
    assert llm.kv_stats().n_compactions == 1 and (llm.kv_stats().cells == 62).all()
    if pieces == [400]:  # other batches round differently
        assert [own[:60] for own in positions(llm)] == positions(fresh)


def test_short_prompts_on_the_context_stay_whole(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=0.1)
    decode(llm, TOKENS[:100])
    for token in TOKENS[:3]:
        decode(llm, [token])
    assert (llm.kv_stats().cells == 103).all()


def test_an_error_inside_decode_comes_with_the_next_call(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=Script(action=once(ZeroDivisionError("in select"))), kv_budget=60)
    decode(llm, TOKENS)
    with pytest.warns(UserWarning, match="its compaction failed, the full cache stays: ZeroDivisionError"):
        assert decode(llm, [5]) == 0
    assert (llm.kv_stats().cells == 401).all()
    with pytest.raises(ZeroDivisionError, match="in select"):
        llm.kv_compact()
    llm.kv_compact()
    assert (llm.kv_stats().cells == 60).all()


def test_drafts_and_long_prompts_are_no_prompts_below(tiny: Path, opened: Callable[..., Llama]) -> None:
    """A last batch of one token is part of the prompt, a batch of drafts is part of the answer."""
    draft = lambda ids: np.array([1, 2, 3])  # noqa: E731
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=60, n_batch=133, logits_all=True, draft_model=draft)
    stream = llm.generate(TOKENS, temp=0.0)  # 3 x 133 + 1
    for _ in range(9):
        next(stream)
    assert llm.kv_stats().n_compactions == 1
    stream.close()
    assert decode(llm, [5]) == 0  # nor does the next one find a prompt in the answer
    assert llm.kv_stats().n_compactions == 1


def test_a_prompt_of_others_goes_on_in_the_class(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=60)
    decode(llm, TOKENS)
    llm.n_tokens = len(TOKENS)
    llm.eval([5])
    assert llm.kv_stats().n_compactions == 1 and (llm.kv_stats().cells == 61).all()


def test_old_failures_do_not_pile_up(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=Script(action=lambda: 1 / 0), kv_budget=60)
    with pytest.warns(UserWarning, match="its compaction failed"):
        for i in range(3):
            decode(llm, TOKENS[:120])
            decode(llm, [i])
    with pytest.raises(ZeroDivisionError):
        llm.kv_budget = 50
    llm.kv_budget = 50
    assert llm.kv_stats().n_past == 363
    with pytest.warns(UserWarning, match="its compaction failed"):
        decode(llm, TOKENS[:2])
        decode(llm, [1])
    llm.reset()  # about what is gone
    assert llm.kv_stats().n_past == 0
    with pytest.warns(UserWarning, match="its compaction failed"):
        decode(llm, TOKENS)
        decode(llm, [1])
    llm.kv_policy = "snapkv"  # type: ignore[assignment]
    evaluate(llm, TOKENS)
    assert (llm.kv_stats().cells == 50).all()


def test_compacting_what_others_decoded(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=1.0)
    decode(llm, TOKENS)
    assert (llm.kv_compact(50).cells == 50).all()
    assert llm.kv_stats().n_past == 400

    llm.reset()
    llm.eval(TOKENS[:200])
    decode(llm, TOKENS[200:])
    assert (llm.kv_compact(0.25).cells == 100).all()


def test_n_tokens_that_fits_neither_is_refused(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=1.0)
    llm.eval(TOKENS)
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, 300, -1)
    with pytest.raises(UnsupportedCallError, match="n_tokens is 400 and the cache holds 300 positions; set n_tokens = 300"):
        llm.kv_compact(50)
    llm.n_tokens = 300
    llm.eval(TOKENS[300:310])
    assert (llm.kv_compact(50).cells == 50).all()
