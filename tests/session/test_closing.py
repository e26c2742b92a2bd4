"""Sessions that end: closed, dropped, created anew, or left open when the interpreter ends."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from scripted import TOKENS, once

import windowkv_edge
from windowkv_edge import Llama, SnapKV, UnsupportedCallError

CALLS: dict[str, Callable[[Llama], object]] = {
    "create_chat_completion": lambda llm: llm.create_chat_completion([{"role": "user", "content": "a"}]),
    "create_chat_completion_openai_v1": lambda llm: llm.create_chat_completion_openai_v1([{"role": "user", "content": "a"}]),
    "create_completion": lambda llm: llm.create_completion("a"),
    "create_embedding": lambda llm: llm.create_embedding("a"),
    "ctx": lambda llm: llm.ctx,
    "detokenize": lambda llm: llm.detokenize([1]),
    "embed": lambda llm: llm.embed("a"),
    "eval": lambda llm: llm.eval([1]),
    "generate": lambda llm: next(llm.generate([1, 2])),
    "kv_budget": lambda llm: setattr(llm, "kv_budget", 0.5),
    "kv_compact": lambda llm: llm.kv_compact(10),
    "kv_pin": lambda llm: llm.kv_pin(0, 3),
    "kv_limit": lambda llm: setattr(llm, "kv_limit", 100),
    "kv_load": lambda llm: llm.kv_load("nowhere"),
    "kv_policy": lambda llm: setattr(llm, "kv_policy", "snapkv"),
    "kv_positions": lambda llm: llm.kv_positions(0, 0),
    "kv_query": lambda llm: setattr(llm, "kv_query", "last"),
    "kv_room": lambda llm: llm.kv_room(10),
    "kv_save": lambda llm: llm.kv_save("nowhere"),
    "kv_stats": lambda llm: llm.kv_stats(),
    "kv_unpin": lambda llm: llm.kv_unpin(),
    "load_state": lambda llm: llm.load_state(None),
    "model": lambda llm: llm.model,
    "n_ctx": lambda llm: llm.n_ctx(),
    "n_embd": lambda llm: llm.n_embd(),
    "n_vocab": lambda llm: llm.n_vocab(),
    "pooling_type": lambda llm: llm.pooling_type(),
    "sample": lambda llm: llm.sample(),
    "save_state": lambda llm: llm.save_state(),
    "token_bos": lambda llm: llm.token_bos(),
    "token_eos": lambda llm: llm.token_eos(),
    "token_nl": lambda llm: llm.token_nl(),
    "tokenize": lambda llm: llm.tokenize(b"a"),
    "tokenizer": lambda llm: llm.tokenizer().encode("a"),
}
"""What needs the model or the cache."""

HARMLESS: dict[str, Callable[[Llama], object]] = {
    "cache": lambda llm: setattr(llm, "cache", llm.cache),
    "close": lambda llm: llm.close(),
    "eval_logits": lambda llm: llm.eval_logits,
    "eval_tokens": lambda llm: llm.eval_tokens,
    "from_pretrained": lambda llm: llm.from_pretrained,
    "kv_pinned": lambda llm: llm.kv_pinned,
    "kv_progress": lambda llm: setattr(llm, "kv_progress", llm.kv_progress),
    "kv_shift": lambda llm: llm.kv_shift,
    "logits_to_logprobs": lambda llm: llm.logits_to_logprobs([0.0]),
    "longest_token_prefix": lambda llm: llm.longest_token_prefix([1], [1]),
    "reset": lambda llm: llm.reset(),
    "set_cache": lambda llm: llm.set_cache(None),
    "set_seed": lambda llm: llm.set_seed(1),
}


def test_every_public_name_is_here() -> None:
    assert {name for name in dir(Llama) if not name.startswith("_")} == set(CALLS) | set(HARMLESS)


@pytest.mark.parametrize("policy", ["snapkv", None])
def test_a_closed_session(tiny: Path, opened: Callable[..., Llama], policy: str | None) -> None:
    llm = opened(tiny, kv_policy=policy)
    with contextlib.closing(llm):
        llm.eval(TOKENS)
    for call in CALLS.values():
        with pytest.raises(UnsupportedCallError, match="this session was closed, create a new one"):
            call(llm)
    assert llm.n_tokens == 400
    for call in HARMLESS.values():
        call(llm)
    assert llm.n_tokens == 0
    assert "Llama" in repr(llm) and (llm.kv_policy is None) == (policy is None) and llm.kv_budget == 0.12
    llm.__del__()
    again = pickle.loads(pickle.dumps(llm))
    again.eval(TOKENS)
    again.close()


def test_a_closed_session_whose_policy_was_changed_cannot_be_copied(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy="snapkv")
    llm.kv_policy = SnapKV(window_size=8)
    llm.close()
    with pytest.raises(UnsupportedCallError, match="copying .* this session was closed"):
        copy.copy(llm)


def test_dropping_a_session_frees_it_at_once(tiny: Path) -> None:
    gc.disable()
    try:
        llm = Llama(str(tiny), n_ctx=512, kv_policy=SnapKV(), kv_budget=60, verbose=False)
        llm.eval(TOKENS)
        weak = weakref.ref(llm)
        del llm
        assert weak() is None
    finally:
        gc.enable()


def test_ctrl_c_while_a_session_is_dropped(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """``__del__`` is a place that no exception gets out of."""
    freed: list[Any] = []
    free, interrupt = llama_cpp.llama_cpp.llama_free, once(KeyboardInterrupt())
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_free", lambda ctx: (freed.append(ctx), free(ctx)))
    llm = Llama(str(tiny), n_ctx=512, kv_policy=SnapKV(), verbose=False)
    assert llm._kv is not None
    monkeypatch.setattr(type(llm._kv), "close", lambda self: interrupt())
    with pytest.raises(KeyboardInterrupt):
        del llm
        for _ in range(1000):
            time.sleep(0.01)
    assert len(freed) == 1
    assert "ignored" not in capfd.readouterr().err


@pytest.mark.parametrize("policy", ["snapkv", None])
def test_a_session_that_is_created_anew(tiny: Path, opened: Callable[..., Llama], policy: str | None) -> None:
    """As pickle's ``__setstate__`` does; the first one's memory is freed."""
    llm = opened(tiny, kv_policy=policy)
    llm.eval(TOKENS)
    first = llm._ctx
    llm.__init__(str(tiny), n_ctx=512, verbose=False, kv_policy="full")  # type: ignore[misc]
    assert first.ctx is None
    llm.eval(TOKENS)
    assert llm.kv_stats().policy == "full" and llm.kv_stats().n_past == 400


#
# the interpreter's end
#

PROGRAM = """
import sys, types
early = types.ModuleType("early")  # gone after the modules that closing needs
sys.modules["early"] = early
import os, windowkv_edge, llama_cpp, threading
from scripted import TOKENS, Script

def opened(**kwargs):
    return windowkv_edge.Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False, **kwargs)

def failing(policy):
    llm = opened(kv_policy=policy)
    stream = llm.generate(TOKENS, temp=0.0)
    next(stream)
    1 / 0

def hold(where):
    where.sessions = [opened(kv_policy=policy) for policy in ("snapkv", Script(action=int), None)]
    where.streams = [llm.generate(TOKENS, temp=0.0) for llm in where.sessions]
    for stream in where.streams:
        next(stream)
    where.errors = []
    for policy in ("snapkv", None):
        try:
            failing(policy)
        except ZeroDivisionError as error:
            where.errors.append(error)
"""

HOLDERS = {
    "globals": "hold(sys.modules['__main__'])",
    "a-module": "hold(early); sys.held = list(sys.modules.values())",
    "sys": "hold(sys); sys.last_value = sys.errors[0]",
    "a-cycle": "hold(early); early.sessions[0].me = early.sessions[0]; early.sessions[0].stream = early.streams[0]",
    "a-thread": "hold(early); threading.Thread(target=lambda: [early.sessions[0].eval([1]) for _ in range(9)], daemon=True).start()",
    "a-fork": "hold(early); child = os.fork(); child and os.waitpid(child, 0)",
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_sessions_that_are_open_at_the_end(tiny: Path, holder: str) -> None:
    """Nothing is printed: not by us, and not by the parts of llama_cpp that a session holds."""
    paths = [str(Path(__file__).parents[1]), str(Path(windowkv_edge.__file__).parents[1])]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM) + HOLDERS[holder], str(tiny)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
