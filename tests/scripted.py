"""What tests of sessions share: tokens, a policy that does what a test says, and a Ctrl-C at a chosen time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import llama_cpp
import numpy as np
import tiny_model

from windowkv_edge import CacheView, KVPolicy, Llama

TOKENS = np.random.default_rng(7).integers(0, tiny_model.N_VOCAB, 400).tolist()
OTHERS = np.random.default_rng(8).integers(0, tiny_model.N_VOCAB, 400).tolist()


@dataclass(frozen=True, kw_only=True)
class Script(KVPolicy):
    """Does what a test says, then keeps the last cells."""

    action: Callable[[], Any]

    name: ClassVar[str] = "script"

    @property
    def n_observed(self) -> int:
        return 8

    def select(self, scores: Any, budget: int, ctx: CacheView) -> Any:
        self.action()
        return [[own[-budget:] for own in layer] for layer in ctx.positions]


def once(error: BaseException) -> Callable[[], None]:
    """Raises at the first call only."""
    errors = [error]

    def action() -> None:
        if errors:
            raise errors.pop()

    return action


def answer(llm: Llama, tokens: list[int], n: int = 1) -> list[int]:
    """The first tokens of an answer; whole, as the stream is closed."""
    stream = llm.generate(tokens, temp=0.0)
    try:
        return [next(stream) for _ in range(n)]
    finally:
        stream.close()


def evaluate(llm: Llama, tokens: Sequence[int]) -> None:
    """A whole prompt by hand; sampling ends it."""
    llm.eval(tokens)
    llm.sample(temp=0.0)


def positions(llm: Llama) -> list[list[int]]:
    n_layer, n_head_kv = llm.kv_stats().cells.shape
    return [llm.kv_positions(il, ih).tolist() for il in range(n_layer) for ih in range(n_head_kv)]


def decode(llm: Llama, tokens: list[int]) -> int:
    """As libraries do that only take the context of a session."""
    ids = (llama_cpp.llama_token * len(tokens))(*tokens)
    return int(llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(ids, len(ids))))


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises KeyboardInterrupt after a while, as Ctrl-C does; whoever swallows it fails the test."""
    fired = []

    def handler(number: int, frame: Any) -> None:
        fired.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
        assert not fired, "the signal was swallowed"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
