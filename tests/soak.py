"""Random operations on one session for a long time: the memory of the process stays, and at the end it answers as a fresh one.

python -m tests.soak                    # 1,000 operations on SmolLM2, under ten minutes
python -m tests.soak 150 --seed 7
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import windowkv_edge  # noqa: E402, I001
import llama_cpp  # noqa: E402
from scripted import Script, alarm, answer, positions  # noqa: E402
from windowkv_edge import Llama, UnsupportedCallError, models  # noqa: E402

SEED, N_CTX = 7, 256
POLICIES: tuple[Any, ...] = (
    "windowkv", "windowkv+adakv", "snapkv", "adakv", "pyramidkv", "streamingllm", "h2o", "auto", "headkv", Script(action=int),
)  # fmt: skip


class Soak:
    """A session, and what is done to it.

    Args:
        model: the file.
        seed: of all choices.
        opened: makes the session.
    """

    def __init__(self, model: Path, seed: int, **kwargs: Any) -> None:
        self.kwargs = {
            "n_ctx": N_CTX,
            "n_threads": 2,
            "n_threads_batch": 2,
            "n_batch": N_CTX,
            "verbose": False,
            **kwargs,
        }
        self.model, self.rng = model, np.random.default_rng(seed)
        self.llm = Llama(str(model), kv_policy="windowkv", kv_budget=0.25, **self.kwargs)
        text = (Path(windowkv_edge.__file__).parent / "data" / "document.txt").read_text(encoding="utf-8")
        self.words, self.tokens = text.split(), self.llm.tokenize(text.encode())
        self.last = ""
        self.messages: list[Any] = []
        self.done: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        own = [name for name in vars(Soak) if name.startswith("do_")]
        self.operations: dict[str, Callable[[], None]] = {name.removeprefix("do_"): getattr(self, name) for name in own}

    def number(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high))

    def prompt(self, low: int = 2, high: int = 32) -> list[int]:
        n = self.number(low, high)
        at = self.number(0, len(self.tokens) - n)
        return self.tokens[at : at + n]

    def step(self) -> str:
        """One operation; AssertionError if the session and its cache disagree afterwards."""
        name = self.last = str(self.rng.choice(list(self.operations)))
        self.operations[name]()
        self.done[name] += 1
        stats = self.llm.kv_stats()
        assert self.llm.n_tokens == stats.n_past, (
            f"{name}: n_tokens is {self.llm.n_tokens}, the cache has {stats.n_past}"
        )
        assert (stats.cells <= stats.n_past).all() and stats.bytes_live > 0, name
        return name

    def refused(self, call: Callable[[], Any], *kinds: type[BaseException], match: str = "") -> None:
        """A call that has to fail."""
        try:
            call()
        except kinds as error:
            assert re.search(match, str(error)), error
            self.ends[type(error).__name__] += 1
            return
        raise AssertionError("a call that had to fail did not")

    # what is done

    def do_prompt(self) -> None:
        answer(self.llm, self.prompt(), self.number(1, 4))

    def do_longer_prompt(self) -> None:
        """One that continues what is there."""
        ids = self.llm.input_ids[: self.llm.n_tokens].tolist()
        answer(self.llm, [*ids[: N_CTX // 4], *self.prompt(2, 20)], self.number(1, 4))

    def do_text(self) -> None:
        at = self.number(0, len(self.words) - 30)
        self.llm.create_completion(" ".join(self.words[at : at + self.number(4, 12)]), max_tokens=3, temperature=0.0)

    def do_dropped_stream(self) -> None:
        at = self.number(0, len(self.words) - 30)
        prompt = " ".join(self.words[at : at + self.number(4, 12)])
        stream = iter(self.llm.create_completion(prompt, max_tokens=16, temperature=0.0, stream=True))
        for _ in range(self.number(0, 3)):
            next(stream, None)
        if self.rng.random() < 0.5:
            stream.close()  # type: ignore[attr-defined]

    def do_chat(self) -> None:
        """The next turn of a conversation of two."""
        if len(self.messages) > 2:
            self.messages = []
        at = self.number(0, len(self.words) - 10)
        self.messages.append({"role": "user", "content": " ".join(self.words[at : at + self.number(2, 8)])})
        reply: Any = self.llm.create_chat_completion(self.messages, max_tokens=3, temperature=0.0)
        self.messages.append(reply["choices"][0]["message"])

    def do_take_back(self) -> None:
        """As far as the cache can go, or a refusal. What was set is undone then."""
        n = self.llm.n_tokens
        if n + 40 > N_CTX or n < 2:
            self.llm.reset()
            return
        self.llm.n_tokens = self.number(1, n)
        with contextlib.suppress(UnsupportedCallError):
            self.llm.eval(self.prompt(1, 4))
            return
        self.ends["went too far back"] += 1
        self.llm.n_tokens = self.llm.kv_stats().n_past

    def do_compact(self) -> None:
        if self.llm.n_tokens > 0:
            self.llm.kv_compact(self.number(8, 80) if self.rng.random() < 0.5 else float(self.rng.uniform(0.05, 1.0)))

    def do_policy(self) -> None:
        self.llm.kv_policy = POLICIES[self.number(0, len(POLICIES))]

    def do_budget(self) -> None:
        self.llm.kv_budget = self.number(8, 80) if self.rng.random() < 0.5 else float(self.rng.uniform(0.05, 1.0))

    def do_reset(self) -> None:
        self.llm.reset()

    def do_too_long(self) -> None:
        n = N_CTX - self.llm.n_tokens + self.number(1, 50)
        if n <= N_CTX:
            self.refused(lambda: self.llm.eval(self.tokens[:n]), UnsupportedCallError)
        else:
            self.refused(lambda: self.llm.create_completion(self.tokens[:n]), ValueError)

    def do_bad_argument(self) -> None:
        for value in (0, -1, 1.5, 0.0, float("nan"), "12 %", True, 2**31):
            self.refused(
                lambda value=value: setattr(self.llm, "kv_budget", value), ValueError, TypeError, match="kv_budget is"
            )  # type: ignore[misc]
        for policy in ("nothing", "snapkv(window_size=0)", "snapkv(", 5):
            self.refused(lambda policy=policy: setattr(self.llm, "kv_policy", policy), ValueError, TypeError)  # type: ignore[misc]

    def do_bad_token(self) -> None:
        self.refused(lambda: self.llm.eval([1, 10**6]), ValueError)

    def do_failing_policy(self) -> None:
        """In Python, and it raises."""

        def fail() -> None:
            raise ZeroDivisionError

        before = self.llm.kv_policy
        self.llm.kv_policy = Script(action=fail)
        self.llm.kv_budget = 16
        self.refused(lambda: answer(self.llm, self.prompt(20, 30)), ZeroDivisionError)
        assert before is not None
        self.llm.kv_policy = before

    def do_interrupt(self) -> None:
        with contextlib.suppress(KeyboardInterrupt), alarm(float(self.rng.uniform(0.001, 0.2))):
            answer(self.llm, self.prompt(20), 4)
            return
        self.ends["KeyboardInterrupt"] += 1

    # the end

    def end(self) -> None:
        """What the session answers is what a fresh one answers, bit for bit."""
        fresh = Llama(str(self.model), kv_policy="windowkv+adakv", kv_budget=60, **self.kwargs)
        try:
            self.llm.kv_policy, self.llm.kv_budget = "windowkv+adakv", 60  # type: ignore[assignment]
            found = [state(llm, self.tokens[:200]) for llm in (self.llm, fresh)]
        finally:
            fresh.close()
        for name, own, other in zip(("answers", "logits", "positions", "statistics"), *found):
            assert own == other, f"{name} differ from those of a fresh session: {own!s:.200} and {other!s:.200}"


def state(llm: Llama, tokens: list[int]) -> tuple[Any, ...]:
    found = answer(llm, tokens, 12)
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).tobytes()
    own = llm.kv_stats()
    return (
        found,
        logits,
        positions(llm),
        (own.n_past, own.cells.tolist(), own.bytes_live, own.bytes_full, own.cell_types),
    )


def held() -> int:
    """Bytes of the process, without the mapped model and without freed blocks."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])  # type: ignore[index]
    import psutil

    return int(psutil.Process().memory_info().rss)


def run(model: Path, n: int, seed: int = SEED, say: Callable[[str], None] = print) -> list[int]:
    """Soak, and the bytes held by the empty session ten times on the way.

    Raises:
        AssertionError: the session did what it must not; says after which operation.
    """
    start, sizes = time.perf_counter(), list[int]()
    soak = Soak(model, seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few cells
            for i in range(1, n + 1):
                try:
                    name = soak.step()
                except BaseException as error:
                    what = f"operation {i} with the seed {seed}, {soak.last}"
                    raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
                if i % max(1, n // 10) == 0:
                    soak.llm.reset()
                    sizes.append(held())
                    took = time.perf_counter() - start
                    say(f"{i:5} operations, the last {name}: {took:5.0f} s, {sizes[-1] / 2**20:.1f} MiB")
            soak.end()
    finally:
        soak.llm.close()
    say(f"operations: {dict(soak.done)}")
    say(f"refused, interrupted: {dict(soak.ends)}")
    return sizes


def growth(sizes: list[int]) -> int:
    """Bytes that the second half of a soak holds more than its middle."""
    middle = len(sizes) // 2
    return max(sizes[middle:]) - sizes[middle - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, nargs="?", default=1000, help="operations")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--model", type=Path, help="SmolLM2 by default")
    args = parser.parse_args()
    sizes = run(args.model or models.fetch_smollm2(progress=False), args.n, args.seed)
    print(f"grown by {growth(sizes) / 2**20:.1f} MiB in the second half; the end equals a fresh session")


if __name__ == "__main__":
    main()
