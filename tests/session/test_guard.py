"""Who may use a session: not its policy while that selects, not two threads at once, and no forked child."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from scripted import TOKENS, Script, evaluate

from windowkv_edge import Llama, SnapKV, UnsupportedCallError


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda llm: llm.reset(), r"reset\(\)"),
        (lambda llm: llm.eval([1]), r"eval\(\)"),
        (lambda llm: next(llm.generate([1, 2])), r"generate\(\)"),
        (lambda llm: setattr(llm, "kv_policy", "snapkv"), "setting kv_policy"),
        (lambda llm: setattr(llm, "kv_budget", 5), "setting kv_budget"),
        (lambda llm: llm.kv_compact(10), r"kv_compact\(\)"),
        (lambda llm: llm.close(), r"close\(\)"),
        (lambda llm: llm.embed("a"), r"embed\(\)"),
        (lambda llm: llm.save_state(), r"save_state\(\)"),
        (lambda llm: llm.load_state(None), r"load_state\(\)"),
        (lambda llm: llm.__init__(llm.model_path, n_ctx=64), r"close\(\)"),
    ],
    ids=["reset", "eval", "generate", "policy", "budget", "compact", "close", "embed", "save", "load", "init"],
)
def test_a_policy_leaves_its_session_alone(
    tiny: Path, opened: Callable[..., Llama], call: Callable[[Llama], object], name: str
) -> None:
    sessions: list[Llama] = []
    llm = opened(tiny, kv_policy=Script(action=lambda: call(sessions[0])), kv_budget=60)
    sessions.append(llm)
    with pytest.raises(UnsupportedCallError, match=f"{name} was called while kv_policy='script' selects"):
        evaluate(llm, TOKENS)
    assert (llm.kv_stats().cells == 400).all() and llm.kv_stats().n_compactions == 0
    assert llm.kv_budget == 60 and llm.kv_policy is not None and llm.kv_policy.name == "script"
    llm.eval([1])
    assert (llm.kv_stats().cells == 401).all()


def test_completions_while_a_policy_selects(smollm2: Path, opened: Callable[..., Llama]) -> None:
    llm: Llama
    said: list[str] = []

    def action() -> None:
        for call in (
            lambda: llm("Hello", max_tokens=1),
            lambda: llm.create_completion([1, 2], max_tokens=1),
            lambda: next(llm.create_completion("Hello", max_tokens=1, stream=True)),
            lambda: llm.create_chat_completion([{"role": "user", "content": "Hello"}], max_tokens=1),
        ):
            with pytest.raises(UnsupportedCallError) as caught:
                call()
            said.append(str(caught.value))

    llm = opened(smollm2, kv_policy=Script(action=action), kv_budget=20, n_ctx=128)
    evaluate(llm, TOKENS[:60])
    assert len(said) == 4 and all("generate() was called while kv_policy='script' selects" in one for one in said)
    assert (llm.kv_stats().cells == 20).all() and llm.n_tokens == 60


def test_a_policy_may_look(tiny: Path, opened: Callable[..., Llama]) -> None:
    sessions: list[Llama] = []
    llm = opened(tiny, kv_policy=Script(action=lambda: (sessions[0].kv_stats(), sessions[0].kv_positions(0, 0))), kv_budget=60)
    sessions.append(llm)
    evaluate(llm, TOKENS)
    assert (llm.kv_stats().cells == 60).all()


@pytest.mark.parametrize("policy", [True, False])
def test_two_threads_at_once(tiny: Path, opened: Callable[..., Llama], policy: bool) -> None:
    inside, done = threading.Event(), threading.Event()

    def wait(*args: Any) -> Any:
        inside.set()
        assert done.wait(60)
        return args[1] if args else None

    llm = opened(tiny, kv_policy=Script(action=wait), kv_budget=60) if policy else opened(tiny)

    def work() -> None:
        if policy:
            evaluate(llm, TOKENS)
        else:
            next(llm.generate(TOKENS, temp=0.0, logits_processor=llama_cpp.LogitsProcessorList([wait])))

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    try:
        for call in (
            lambda: llm.eval([1]), lambda: next(llm.generate([1, 2])), llm.sample, lambda: llm.embed("a"), llm.kv_stats,
            lambda: setattr(llm, "kv_budget", 5), llm.kv_compact, llm.save_state, llm.reset, llm.close,
        ):  # fmt: skip
            with pytest.raises(UnsupportedCallError, match=r"another thread is inside (eval|sample)\(\) of this session"):
                call()
    finally:
        done.set()
        thread.join()
    # one after the other is fine
    llm.eval([1])
    assert llm.n_tokens == 401


def test_a_forked_child_is_told(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=60)
    evaluate(llm, TOKENS)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs dies
        said = b"nothing"
        calls = (
            lambda: next(llm.generate([1])), llm.kv_stats, lambda: llm.kv_positions(0, 0), llm.kv_compact, llm.reset, llm.sample,
            lambda: setattr(llm, "kv_policy", "snapkv"), lambda: setattr(llm, "kv_budget", 5), llm.save_state, lambda: llm.eval([1]),
        )  # fmt: skip
        try:
            for call in calls:
                said = b"nothing"
                try:
                    call()
                except UnsupportedCallError as error:
                    said = str(error).encode()
                if b"created in process" not in said:
                    break
        finally:
            os.write(write, said)
            llm.close()
            os.write(write, b" closed")
            os._exit(0)
    os.close(write)
    said = b""
    while part := os.read(read, 4096):
        said += part
    os.waitpid(child, 0)
    os.close(read)
    assert said.startswith(b"eval(): ") and b"created in process" in said and b"multiprocessing's 'spawn'" in said and said.endswith(b"closed")
    llm.eval([1])


def test_what_ctrl_c_leaves_behind_locks_nobody_out(tiny: Path, opened: Callable[..., Llama]) -> None:
    """A signal between two lines of the guard's own code: nobody is inside, and the session says that somebody is."""
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=60)
    llm._kv_guard._inside[0] = threading.get_ident()
    llm._kv_guard._selecting = "snapkv"
    found: list[object] = []

    def other() -> None:
        try:
            llm.eval(TOKENS)
            found.append(llm.kv_stats().n_past)
        except UnsupportedCallError as error:
            found.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [400]
    llm.reset()


def test_ctrl_c_below_comes_out_at_once(tiny: Path, opened: Callable[..., Llama]) -> None:
    """While a policy selects inside llama_decode, which somebody else called and where no exception gets out."""
    llm = opened(tiny, kv_policy=Script(action=lambda: signal.raise_signal(signal.SIGINT)), kv_budget=60)
    ids = (llama_cpp.llama_token * 400)(*TOKENS)
    with pytest.raises(KeyboardInterrupt):
        llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(ids, 400))
        for _ in range(2000):
            llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(ids, 1))
    assert llm.kv_stats().n_past < 1500  # a loaded machine may be late, 2,000 tokens would not fit
    assert (llm.kv_stats().cells == llm.kv_stats().n_past).all()
