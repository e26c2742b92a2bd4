"""A policy that selects leaves its session alone: above, below, and after it has returned."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tiny_model
from scripted import TOKENS, Script, answer, decode

from windowkv_edge import (
    CacheView,
    Llama,
    UnsupportedCallError,
)


class Keeps(Script):
    """Keeps what it was given, and answers with a position twice."""

    def select(self, scores: Any, budget: int, ctx: CacheView) -> Any:
        self.action(ctx)
        return [[[*own[-10:], own[-1]] for own in layer] for layer in ctx.positions]


def test_a_kept_view_reads_nothing(tiny: Path, opened: Callable[..., Llama]) -> None:
    """It ended in memory that was gone. And a position twice left fewer cells than it said."""
    kept: list[CacheView] = []
    llm = opened(tiny, kv_policy=Keeps(action=lambda ctx: (kept.append(ctx), ctx.keys(0, 0))), kv_budget=60)
    with pytest.raises(ValueError, match="layer 0, kv head 0 returned 1 of its 11 positions more than once"):
        answer(llm, TOKENS)
    assert (llm.kv_stats().cells == 400).all()
    for when in ("after select", "after close"):
        with pytest.raises(ValueError, match="ctx is null"):
            kept[0].keys(0, 0)
        if when == "after select":
            kv = llm._kv
            llm.close()
    with pytest.raises(ValueError, match="null"):
        kv.stats()


@pytest.mark.parametrize("write", [tiny_model.write_llama, tiny_model.write_gpt_oss, tiny_model.write_lfm2])
def test_selections_cannot_meddle_below(
    write: Callable[..., Path], tmp_path: Path, opened: Callable[..., Llama]
) -> None:
    """What llama.h offers changes no part of a memory while a selection runs: windows and recurrent states stay, too."""
    llm: Llama
    seen: list[int] = []

    def action() -> None:
        memory = llama_cpp.llama_get_memory(llm.ctx)
        llama_cpp.llama_memory_clear(memory, True)
        llama_cpp.llama_memory_seq_cp(memory, 0, 1, -1, -1)
        llama_cpp.llama_memory_seq_keep(memory, 1)
        for flags in (0, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY):  # that: windows and recurrent states alone
            size = llama_cpp.llama_state_seq_get_size_ext(llm.ctx, 0, flags)
            state = (ctypes.c_uint8 * size)()
            assert llama_cpp.llama_state_seq_get_data_ext(llm.ctx, state, size, 0, flags) == size > 0
            assert llama_cpp.llama_state_seq_set_data_ext(llm.ctx, state, size, 0, flags) == 0
        assert not llama_cpp.llama_memory_seq_rm(memory, -1, 0, -1)
        assert decode(llm, TOKENS[:1]) == 1
        seen.append(llama_cpp.llama_memory_seq_pos_max(memory, 0))

    model = write(tmp_path / "tiny.gguf")
    llm = opened(model, kv_policy=Script(action=action), kv_budget=60)
    found = answer(llm, TOKENS, 8)
    assert seen == [399]
    assert found == answer(opened(model, kv_policy=Script(action=lambda: None), kv_budget=60), TOKENS, 8)


def test_selections_below_cannot_meddle(tiny: Path, opened: Callable[..., Llama]) -> None:
    """Inside llama_decode, where a batch of several tokens ended the process and one of another token took the place of it."""
    llm: Llama
    statuses: list[int] = []

    def action() -> None:
        statuses.extend((decode(llm, [3]), decode(llm, [3, 4])))
        for call, name in ((llm.close, "close"), (llm.reset, "reset"), (lambda: llm.eval([1]), "eval")):
            with pytest.raises(UnsupportedCallError, match=rf"{name}\(\) was called while kv_policy='script' selects"):
                call()

    rows = []
    for act in (action, lambda: None):
        llm = opened(tiny, kv_policy=Script(action=act), kv_budget=60)
        decode(llm, TOKENS)
        assert decode(llm, [5]) == 0
        assert llm.kv_stats().n_past == 401 and (llm.kv_stats().cells == 61).all()
        rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy())
    assert statuses == [1, 1]
    assert np.array_equal(*rows)
