"""Random sequences of operations on a session against a model of its cache that only keeps lists of positions.

    python tests/session/test_fuzz.py 1000000      # as many steps as wanted, with a first seed as the second argument

The model follows what is done to the cache: every compaction, whoever asked for it, has to keep the cells of the policy's
definition (policy_table.py, reference/pinned.py), and what is removed, saved and loaded has to be what the lists say.
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny_model  # noqa: E402
from policy_table import kept  # noqa: E402
from reference.common import sizes  # noqa: E402
from reference.pinned import NothingLeftError, pinned  # noqa: E402
from scripted import answer  # noqa: E402

from windowkv_edge import (  # noqa: E402
    AdaKV,
    HeadKV,
    HeadScores,
    KVPolicy,
    KVzip,
    Llama,
    NativeError,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    UnsupportedCallError,
    WindowAdaKV,
    WindowHeadKV,
    WindowKV,
)
from windowkv_edge.answers import newest  # noqa: E402
from windowkv_edge.compaction import N_ANSWER, Comes  # noqa: E402
from windowkv_edge.pins import n_pinned  # noqa: E402
from windowkv_edge.policies import Task  # noqa: E402
from windowkv_edge.replay import N_BEFORE, N_LEAST  # noqa: E402

N_LAYER, N_HEAD, N_HEAD_KV, N_CTX, N_BATCH = 3, 4, 2, 512, 32
RNG = np.random.default_rng(0)
SCORES = HeadScores({kind: RNG.random((N_LAYER, N_HEAD)) ** 3 for kind in ("r", "r2")})
POLICIES: tuple[KVPolicy, ...] = (
    WindowKV(window_size=6, omega=4),
    WindowKV(window_size=6, omega=4, gamma=2, scope="layer", budget="arithmetic", recent_share=1.0, carry=0),
    SnapKV(window_size=5, kernel_size=3),
    PyramidKV(window_size=5, kernel_size=3, beta=4.0),
    StreamingLLM(n_sink=2),
    AdaKV(window_size=5, kernel_size=3, alpha_safeguard=0.1),
    AdaKV(window_size=5, kernel_size=3, alpha_safeguard=0.5, across="model"),
    WindowAdaKV(window_size=6, omega=4, alpha_safeguard=0.1),
    WindowAdaKV(window_size=6, omega=4, alpha_safeguard=0.5, across="model"),
    HeadKV(window_size=5, kernel_size=3, beta=1.1, importance=SCORES),
    WindowHeadKV(window_size=6, omega=4, beta=1.1, importance=SCORES),
    KVzip(),
    KVzip(alpha_safeguard=0.4),
)


class Model:
    """What the cache should hold: the positions of every head."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.n = self.boundary = 0
        self.heads = [[np.zeros(0, dtype=np.int32) for _ in range(N_HEAD_KV)] for _ in range(N_LAYER)]

    def append(self, n: int) -> None:
        new = np.arange(self.n, self.n + n, dtype=np.int32)
        self.heads = [[np.concatenate([own, new]) for own in layer] for layer in self.heads]
        self.n += n

    def trim(self, p0: int) -> bool:
        if p0 == 0:
            self.clear()
        elif p0 < min(self.boundary, self.n):
            return False
        else:
            self.heads = [[own[own < p0] for own in layer] for layer in self.heads]
            self.n = min(self.n, p0)
        return True

    def shift(self, p0: int, n: int) -> None:
        def close(own: np.ndarray) -> np.ndarray:
            return np.concatenate([own[own < p0], own[own >= p0 + n] - n])

        self.heads = [[close(own) for own in layer] for layer in self.heads]
        if self.boundary > p0:
            self.boundary = max(p0, self.boundary - n, 1)
        self.n -= n

    def keep(self, masks: list[list[np.ndarray]]) -> None:
        self.heads = [[own[m] for own, m in zip(a, b, strict=True)] for a, b in zip(self.heads, masks, strict=True)]
        self.boundary = self.n


class Saved(NamedTuple):
    state: Any
    model: Model
    policy: KVPolicy


class Run:
    """A session, the model of its cache, and what is done to both.

    Args:
        path: the model file.
        seed: of all choices.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.llm = Llama(
            str(path), n_ctx=N_CTX, n_batch=N_BATCH, kv_policy=POLICIES[0], kv_budget=N_CTX, n_threads=1,
            n_threads_batch=1, verbose=False, kv_shift="shift" if seed % 2 else "refuse",
        )  # fmt: skip
        assert self.llm._kv is not None
        self.kv = self.llm._kv
        self.model = Model()
        self.saved: list[Saved] = []
        self.checkpoints: dict[int, Saved] = {}
        self.prompts: list[list[int]] = []
        self.n_gone = 0  # positions that this step gave up
        self.n_asked = 0  # tokens that observed since the last compaction, and are taken back
        self.done: Counter[str] = Counter()
        self.folder = tempfile.TemporaryDirectory()
        self.watch()
        names = {name.removeprefix("do_"): getattr(self, name) for name in vars(Run) if name.startswith("do_")}
        self.operations: dict[str, Callable[[], None]] = names
        weights = np.array([WEIGHTS.get(name, 1) for name in names], dtype=float)
        self.weights = weights / weights.sum()

    def close(self) -> None:
        self.llm.close()
        self.folder.cleanup()

    #
    # the model follows
    #

    def catch_up(self) -> None:
        """What was evaluated since the last look."""
        n_past = int(self.kv.stats().n_past)
        assert n_past >= self.model.n, f"{n_past} positions are there, expected {self.model.n} at least"
        self.model.append(n_past - self.model.n)

    def watch(self) -> None:
        cache, ctx, llm = self.llm._kv_cache, self.llm._ctx, self.llm
        assert cache is not None
        native_compact, native_rm = cache.compact, ctx.kv_cache_seq_rm

        def compact(
            n_cells: int,
            task: Task = "localization",
            policy: KVPolicy | None = None,
            n_observers: int | None = None,
            comes: Comes = "answer's start",
        ) -> int:
            assert n_observers is None  # of questions in chats
            self.catch_up()
            bound = policy or cache.bound
            n_observed = min(bound.n_observed, N_ANSWER) if comes == "answer" else bound.n_observed
            read = self.kv.replayed if bound.replays else partial(self.kv.scores, window_size=n_observed)
            scores = [read(il) for il in range(N_LAYER)]
            ranges = [*llm._kv_pins.ranges()]
            if comes == "answer":
                ranges += newest(bound, self.model.n, n_cells - n_pinned(ranges))
            try:
                keep = pinned(
                    lambda own, planes, n, n_past: kept(bound, own, planes[0], n, task, n_past=n_past),
                    self.model.heads, [scores], n_cells, ranges, self.model.n,
                )
            except NothingLeftError:
                native_compact(n_cells, task, policy, comes=comes)
                raise AssertionError(f"{n_cells} cells per head that hold {ranges} were not refused") from None
            n_released = native_compact(n_cells, task, policy, comes=comes)
            # heads that compete are not asked where everything fits
            fits = all(sum(own) <= n_cells * N_HEAD_KV for own in sizes(self.model.heads))
            is_asked = not fits or bound.parts("localization").allocation.heads != "score"
            if is_asked and not all(own.all() for layer in keep for own in layer):
                self.model.keep(keep)
                self.done["compactions"] += 1
                self.done["asked in answers"] += comes == "answer" and self.n_asked > 0
            self.n_asked = 0
            assert self.llm.kv_stats().cells.tolist() == sizes(self.model.heads)
            return n_released

        def seq_rm(seq_id: int, p0: int, p1: int) -> bool:
            self.catch_up()
            res = native_rm(seq_id, p0, p1)
            assert p1 == -1 and res == self.model.trim(p0)
            return bool(res)

        def move_down(cache: Any, p0: int, p1: int) -> None:
            self.catch_up()
            native_move(cache, p0, p1)
            self.model.shift(p0, p1 - p0)
            self.n_gone += p1 - p0
            self.done["moves"] += 1

        def keep_checkpoint(own: Any) -> None:
            self.catch_up()
            assert self.model.n == len(own.tokens)
            native_add(own)
            held = {id(other) for other in llm._kv_checkpoints.held}
            self.checkpoints = {at: saved for at, saved in self.checkpoints.items() if at in held}
            self.checkpoints[id(own)] = Saved(own, copy.deepcopy(self.model), llm.kv_policy)

        def become(own: Any) -> str:
            why = str(native_become(own))
            assert not why
            self.model = copy.deepcopy(self.checkpoints[id(own)].model)
            self.done["went back"] += 1
            return why

        def watch_observers(cache: Any, asks: list[int]) -> None:
            self.n_asked = len(asks)
            observe(cache, asks)

        observe = llm._observe
        native_move, native_add, native_become = llm._move_down, llm._kv_checkpoints.add, llm._become
        cache.compact, ctx.kv_cache_seq_rm = compact, seq_rm  # type: ignore[method-assign]
        llm._move_down, llm._kv_checkpoints.add, llm._become = move_down, keep_checkpoint, become  # type: ignore[method-assign]
        llm._observe = watch_observers  # type: ignore[method-assign]

    def same(self) -> None:
        """The session holds what the model says."""
        self.catch_up()
        stats, model = self.llm.kv_stats(), self.model
        assert stats.n_past == model.n == self.llm.n_tokens
        assert stats.cells.tolist() == [[len(own) for own in layer] for layer in model.heads]
        for il, layer in enumerate(model.heads):
            for ih, own in enumerate(layer):
                assert self.llm.kv_positions(il, ih).tolist() == own.tolist()

    def step(self) -> None:
        name = str(self.rng.choice(list(self.operations), p=self.weights))
        self.done[name] += 1
        self.n_gone = 0
        try:
            self.operations[name]()
        except UnsupportedCallError as error:  # who repeats needs positions behind the others
            if "has the model repeat what it has read" not in str(error):
                raise
            self.same()
            assert self.llm.kv_policy.replays and self.model.n > N_CTX - N_BEFORE - N_LEAST
            self.llm.reset()
        self.same()

    #
    # what is done
    #

    def number(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high))

    def tokens(self, n: int) -> list[int]:
        return self.rng.integers(0, tiny_model.N_VOCAB, n).tolist()

    def bounded(self) -> None:
        """Behind tokens that the session evaluated: the limit holds."""
        if self.llm._kv_limit is not None:
            n_most = self.llm._kv_limit.n_cells(self.kv.stats()) + N_BATCH
            assert float(self.llm.kv_stats().cells.mean()) <= n_most

    def do_one(self) -> None:
        if self.model.n == N_CTX and self.llm._kv_shift == "refuse":
            with pytest.raises(UnsupportedCallError):
                self.llm.eval(self.tokens(1))
            return
        n = self.model.n
        self.llm.eval(self.tokens(1))
        assert self.llm.n_tokens == n + 1 - self.n_gone
        self.bounded()

    def do_piece(self) -> None:
        """Of a prompt that is evaluated by hand."""
        n, n_new = self.model.n, self.number(2, 120)
        if n + n_new > N_CTX and self.llm._kv_shift == "refuse":
            with pytest.raises(UnsupportedCallError):
                self.llm.eval(self.tokens(n_new))
            return
        self.llm.eval(self.tokens(n_new))
        assert self.llm.n_tokens == n + n_new - self.n_gone
        self.bounded()

    def do_prompt(self) -> None:
        """One that goes on where an earlier one differs, or a new one, and some tokens of an answer."""
        held = self.llm.input_ids[: self.llm.n_tokens].tolist()
        if self.prompts and self.rng.random() < 0.4:
            held = self.prompts[self.number(0, len(self.prompts))]
        n_same = self.number(0, len(held) + 1) if self.rng.random() < 0.3 else len(held)
        if n_same > N_CTX - 100 or self.rng.random() < 0.1:
            n_same = 0
        prompt, n_answer = [*held[:n_same], *self.tokens(self.number(1, 80))], self.number(1, 8)
        self.prompts = [*self.prompts[-4:], prompt]
        answer(self.llm, prompt, n_answer)
        if not self.llm._kv_lost.parts:
            assert self.llm.input_ids[: len(prompt)].tolist() == prompt
            assert self.llm.n_tokens == len(prompt) + n_answer - 1
        self.bounded()

    def do_edit(self) -> None:
        """A message takes the place of the last one."""
        answer(self.llm, self.tokens(self.number(40, 100)), 2)
        before = self.llm.input_ids[: self.llm.n_tokens].tolist()
        for _ in range(2):
            answer(self.llm, [*before, *self.tokens(self.number(1, 100))], self.number(1, 40))
            self.same()
        self.bounded()

    def do_compact(self) -> None:
        if self.model.n == 0:
            return
        try:
            self.llm.kv_compact(self.number(1, 80))
        except NativeError as error:
            assert "leaves nothing for the others" in str(error)  # more is pinned than stays

    def do_trim(self) -> None:
        p0 = self.number(0, self.model.n + 2)
        self.llm._ctx.kv_cache_seq_rm(-1, p0, -1)
        self.llm.n_tokens = self.model.n

    def do_shift(self) -> None:
        """On one side of the boundary, before the last tokens on both: definitions take these for held by all heads."""
        low, high = (0, self.model.boundary - 8) if self.rng.random() < 0.5 else (self.model.boundary, self.model.n - 8)
        if high - low >= 2 and self.llm._kv_cache is not None:
            p0 = self.number(low, high - 1)
            self.llm._move_down(self.llm._kv_cache, p0, self.number(p0 + 1, high))

    def do_clear(self) -> None:
        self.llm.reset()
        self.model.clear()

    def do_policy(self) -> None:
        self.llm.kv_policy = POLICIES[self.number(0, len(POLICIES))]
        self.model.clear()

    def do_budget(self) -> None:
        budgets: tuple[Any, ...] = (self.number(40, N_CTX), float(self.rng.uniform(0.1, 1.0)), N_CTX)
        self.llm.kv_budget = budgets[self.number(0, 3)]

    def do_limit(self) -> None:
        """Another limit, for an empty cache."""
        self.do_clear()
        self.llm.kv_limit = None if self.rng.random() < 0.4 else self.number(160, 260)
        self.llm._kv_interval = None if self.rng.random() < 0.5 else self.number(8, 80)
        self.llm._kv_checkpoints.given = ("auto", 0, 1 << 20, 16 << 20)[self.number(0, 4)]

    def do_asks(self) -> None:
        """A prompt, and an answer that its question observes."""
        answer(self.llm, self.tokens(self.number(80, 160)), 2)
        self.llm._kv_asks = self.tokens(4)
        for _ in range(self.number(20, 80)):
            self.same()
            self.n_gone = 0
            self.do_one()

    def do_pin(self) -> None:
        """A few positions that are there in full or still to come, or none any more."""
        if self.llm.kv_pinned:
            self.llm.kv_unpin()
            return
        if self.model.boundary >= N_CTX - 8:
            return
        start = self.number(self.model.boundary, N_CTX - 8)
        self.llm.kv_pin(start, start + self.number(1, 8))

    def do_snapshot(self) -> None:
        if self.model.n == 0:
            return
        self.kv.snapshot_save()
        before, limit = copy.deepcopy(self.model), self.llm._kv_limit
        extra = min(self.number(1, 40), N_CTX - self.model.n)
        if extra:
            self.llm._kv_limit = None  # a compaction gives the snapshot's boundary up
            self.llm.eval(self.tokens(extra))
            self.llm._kv_limit = limit
        self.kv.snapshot_restore()
        self.kv.snapshot_drop()
        self.model, self.llm.n_tokens = before, before.n

    def do_save(self) -> None:
        policy = self.llm.kv_policy
        assert policy is not None
        self.saved = [*self.saved[-3:], Saved(self.llm.save_state(), copy.deepcopy(self.model), policy)]

    def do_load(self) -> None:
        if not self.saved:
            return
        own = self.saved[self.number(0, len(self.saved))]
        if own.policy != self.llm.kv_policy:
            with pytest.raises(UnsupportedCallError, match="this session has"):
                self.llm.load_state(own.state)
            return
        self.llm.load_state(own.state)
        self.model = copy.deepcopy(own.model)

    def do_file(self) -> None:
        """Saved, gone and loaded."""
        path = Path(self.folder.name) / "session"
        self.llm.kv_save(path)
        before = copy.deepcopy(self.model)
        self.llm.reset()
        self.llm.kv_load(path)
        self.model = before


WEIGHTS = {"one": 30, "piece": 8, "prompt": 8, "compact": 8, "trim": 7, "clear": 2, "policy": 2, "limit": 2, "budget": 3, "snapshot": 3, "load": 3, "save": 3, "pin": 3, "shift": 3, "edit": 3, "asks": 2}
"""How often, against 1."""


def run(path: Path, n_steps: int, seed: int) -> dict[str, int]:
    """Returns how often each operation was done; raises AssertionError at the first difference, and says where."""
    own = Run(path, seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few cells
            for i in range(n_steps):
                try:
                    own.step()
                except BaseException as error:
                    raise AssertionError(f"step {i} with the seed {seed}: {type(error).__name__}: {error}") from error
    finally:
        own.close()
    return dict(own.done)


def test_random_operations(tiny: Path) -> None:
    for seed in (0, 1):  # without and with kv_shift
        done = run(tiny, 4000, seed)
        assert set(done) == {*WEIGHTS, "file", "compactions", "moves", "went back", "asked in answers"} and min(done.values()) > 5


@pytest.mark.slow
def test_twenty_thousand_operations(tiny: Path) -> None:
    for seed in (2, 3):
        run(tiny, 10_000, seed)


CHUNK = 10_000
"""Steps of one session, before another one begins with a seed of its own."""


def run_all(path: Path, n_steps: int, first_seed: int) -> Counter[str]:
    """As :func:`run`, in a process per core; says how far it is. Odd seeds shift at the end of the positions."""
    res: Counter[str] = Counter()
    sizes = [min(CHUNK, n_steps - i) for i in range(0, n_steps, CHUNK)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        todo = [pool.submit(run, path, n, first_seed + i) for i, n in enumerate(sizes)]
        try:
            for i, one in enumerate(as_completed(todo), 1):
                res.update(one.result())
                print(f"{sum(sizes[:i]):,} of {n_steps:,} steps", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return res


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    own_seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as own_folder:
        tiny_path = tiny_model.write_llama(Path(own_folder) / "tiny.gguf")
        print(steps, "steps without a difference:", dict(run_all(tiny_path, steps, own_seed)))
