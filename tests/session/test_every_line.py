"""Ctrl-C before every line of the Python session that a call runs: the session is whole afterwards, or closed and freed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tiny_model
from scripted import Script, answer, evaluate, positions

import windowkv_edge
from windowkv_edge import KVPolicy, Llama, NativeError, SnapKV, StreamingLLM, UnsupportedCallError, _native

FOLDER = Path(windowkv_edge.__file__).parent
NAMES = (
    "llama", "limited", "evaluation", "room", "progress", "going_back", "checkpoints", "native_state", "session", "compaction", "guard", "_native", "stats",
    "states",
)  # fmt: skip
FILES = frozenset(str(FOLDER / f"{name}.py") for name in NAMES)

PROMPTS = np.random.default_rng(5).integers(0, tiny_model.N_VOCAB, (2, 48))
PROMPTS[:, 0] = 1, 2  # no common beginning
FIRST, SECOND = PROMPTS.tolist()


class Lines:
    """Runs a call and raises KeyboardInterrupt before the n-th line of ours; n = 0: counts them."""

    def __init__(self, n: int) -> None:
        self.n, self.seen, self.at = n, 0, ""

    def _enter(self, frame: Any, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename in FILES else None

    def _line(self, frame: Any, event: str, arg: object) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self.n:
                self.at = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line

    def run(self, call: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(before)


def every_line(prepare: Callable[[], Callable[[], object]], check: Callable[[str], None]) -> None:
    """Interrupt what ``prepare`` returns before each of its lines; ``check`` gets the file and the line."""
    whole = Lines(0)
    whole.run(prepare())
    assert whole.seen > 3
    check("uninterrupted")
    for n in range(1, whole.seen + 1):
        lines = Lines(n)
        call = prepare()
        try:
            lines.run(call)
        except KeyboardInterrupt:
            pass
        else:
            assert not lines.at, f"the interrupt before {lines.at} was swallowed"
        check(lines.at)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_llama(tmp_path_factory.mktemp("lines") / "tiny.gguf", n_layer=2)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Number of models and contexts that were created and not freed since."""
    held: list[int] = []

    def create(name: str) -> None:
        made = getattr(llama_cpp.llama_cpp, name)

        def call(*args: Any) -> Any:
            res = made(*args)
            if res:
                held.append(res)
            return res

        monkeypatch.setattr(llama_cpp.llama_cpp, name, call)

    def free(name: str) -> None:
        gone = getattr(llama_cpp.llama_cpp, name)

        def call(pointer: Any) -> None:
            held.remove(pointer)
            gone(pointer)

        monkeypatch.setattr(llama_cpp.llama_cpp, name, call)

    create("llama_model_load_from_file")
    create("llama_init_from_model")
    free("llama_model_free")
    free("llama_free")
    return lambda: len(held)


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    hook = sys.unraisablehook
    yield
    assert "ignored" not in capfd.readouterr().err
    assert sys.unraisablehook is hook


def opened(model: Path, policy: KVPolicy | None, **kwargs: Any) -> Llama:
    return Llama(
        str(model), kv_policy=policy, kv_budget=None if policy is None else 12, n_ctx=128, n_batch=32, n_threads=1, n_threads_batch=1, verbose=False, **kwargs
    )  # fmt: skip


def script() -> KVPolicy:
    return Script(action=lambda: None)


@pytest.mark.parametrize("make", [lambda: SnapKV(window_size=4), script], ids=["native", "python"])
@pytest.mark.parametrize(
    "call",
    [
        lambda llm: evaluate(llm, FIRST),
        lambda llm: answer(llm, FIRST, 4),
        lambda llm: answer(llm, SECOND, 4),
        lambda llm: llm.reset(),
        lambda llm: setattr(llm, "kv_policy", StreamingLLM()),
        lambda llm: setattr(llm, "kv_budget", 20),
        lambda llm: llm.kv_compact(8),
        lambda llm: llm.load_state(llm.save_state()),
    ],
    ids=["eval", "generate", "again", "reset", "policy", "budget", "compact", "states"],
)
def test_a_session_goes_on(model: Path, call: Callable[[Llama], object], make: Callable[[], KVPolicy]) -> None:
    own = make()
    want = {}
    for policy in (own, StreamingLLM()):
        for budget in (12, 20):
            fresh = opened(model, policy)
            fresh.kv_budget = budget
            want[policy.name, budget] = answer(fresh, SECOND, 4), positions(fresh)
            fresh.close()
    llm = opened(model, own)

    def prepare() -> Callable[[], object]:
        if llm.kv_policy != own:
            llm.kv_policy = own
        llm.kv_budget = 12
        answer(llm, SECOND, 2)
        return lambda: call(llm)

    def check(at: str) -> None:
        assert llm.n_tokens == llm.kv_stats().n_past, at
        assert llm.kv_policy is not None and llm._kv is not None
        assert llm._kv.stats().n_observed == llm.kv_policy.n_observed, at
        llm.reset()
        assert (answer(llm, SECOND, 4), positions(llm)) == want[llm.kv_policy.name, llm.kv_budget], at

    every_line(prepare, check)
    llm.close()


def test_a_session_within_a_limit_goes_on(model: Path) -> None:
    """While tokens observe, while cells are compacted within a prompt, and while it is told how far it is."""
    kwargs: dict[str, Any] = {"n_ctx": 128, "n_batch": 16, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    llm = Llama(str(model), kv_policy=SnapKV(window_size=4), kv_limit=20, kv_progress=lambda done, total: None, **kwargs)
    want = answer(llm, SECOND, 3), positions(llm)
    assert llm.kv_stats().n_compactions >= 2

    def prepare() -> Callable[[], object]:
        llm.reset()
        llm.kv_limit = 20
        return lambda: (answer(llm, FIRST, 2), setattr(llm, "kv_limit", 18))

    def check(at: str) -> None:
        assert llm.n_tokens == llm.kv_stats().n_past, at
        llm.kv_limit = 20
        llm.reset()
        assert (answer(llm, SECOND, 3), positions(llm)) == want, at

    every_line(prepare, check)
    llm.close()


def test_going_back(model: Path) -> None:
    """To a checkpoint: the session is there, or empty, or where it was."""
    llm, edited = opened(model, SnapKV(window_size=4)), [*SECOND, *FIRST[12:24]]

    def prepare() -> Callable[[], object]:
        llm.reset()
        answer(llm, SECOND)
        answer(llm, [*SECOND, *FIRST[:12]])
        assert llm._n_kept(np.array(edited)) == 48 and llm.kv_stats().n_compactions > 1
        return lambda: answer(llm, edited)

    def check(at: str) -> None:
        assert llm.n_tokens == llm.kv_stats().n_past, at
        got.append((answer(llm, edited, 4), positions(llm)))
        assert got[-1] == got[0], at

    got: list[object] = []
    every_line(prepare, check)
    llm.close()


@pytest.mark.parametrize("policy", [SnapKV(window_size=4), None], ids=["snapkv", "stock"])
def test_creating(model: Path, alive: Callable[[], int], policy: KVPolicy | None) -> None:
    made: list[Llama] = []

    def check(at: str) -> None:
        for llm in made:
            llm.close()
        made.clear()
        if alive():
            gc.collect()
        assert alive() == 0, at
        # what was asked for does not go to a context of somebody else
        stock = llama_cpp.Llama(str(model), n_ctx=32, n_threads=1, verbose=False)
        with pytest.raises(NativeError, match="created without a KV policy"):
            _native.Context(stock.ctx).cells()
        stock.close()

    every_line(lambda: lambda: made.append(opened(model, policy)), check)


@pytest.mark.parametrize("policy", [SnapKV(window_size=4), None], ids=["snapkv", "stock"])
def test_closing(model: Path, alive: Callable[[], int], policy: KVPolicy | None) -> None:
    held: list[Llama] = []

    def prepare() -> Callable[[], object]:
        held[:] = [opened(model, policy)]
        return held[0].close

    def check(at: str) -> None:
        (llm,) = held
        llm.close()
        assert alive() == 0, at
        for call in (llm.kv_stats, lambda: llm.eval([1]), lambda: llm.ctx):
            with pytest.raises(UnsupportedCallError, match="was closed"):
                call()

    every_line(prepare, check)
