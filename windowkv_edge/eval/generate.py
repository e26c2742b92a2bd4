"""Long answers: a text that the full cache generated, read by policies that hold few of its cells, and their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..answers import Bound, make_room
from ..bench.distributions import divergence, log_softmax
from ..bench.session import Model, Session
from ..policies import Full, KVPolicy
from ..stats import cell_types
from ..task import prompt_task
from .case import EvalError
from .records import Records
from .run import FULL, Plan
from .style import Style

__all__ = ["PROMPTS", "GenerateCase", "Generator", "generate_cases", "repeats"]

PROMPTS = {
    "story": "Write a long story about a village by the sea, its people, and what happens to them over the years.",
    "food": "Explain how bread, cheese and wine are made, step by step, with the history of each.",
    "town": "Describe everything that a visitor can see in an old town, street by street and house by house.",
}
"""What is asked for, by name."""

N_GRAMS = range(4, 9)
N_BATCH = 128
N_PARTS = 8
"""Parts of a text that are told apart by position."""

Logits = npt.NDArray[np.float32]
"""float32 [tokens, n_vocab]"""


@dataclass(frozen=True)
class GenerateCase:
    """One answer.

    Attributes:
        task: name of what is asked for.
        index: number of the answer; each has a seed of its own.
        prompt: tokens.
        n_tokens: of the answer.
        n_free: of the answers that the policies generate themselves, 0 = none.
        interval: tokens between two compactions.
        temperature: of sampling. The end of the text is never sampled.
        seed: of sampling.
    """

    task: str
    index: int
    prompt: Sequence[int]
    n_tokens: int
    n_free: int
    interval: int
    temperature: float
    seed: int

    @property
    def key(self) -> str:
        return f"generate/{self.task}/{self.n_tokens}/-/{self.index}"


def generate_cases(
    style: Style,
    names: Sequence[str],
    n_tokens: int,
    n_free: int,
    interval: int,
    temperature: float,
    seed: int,
    n_ctx: int,
) -> list[GenerateCase]:
    """An answer to each of some prompts.

    Args:
        style: of the prompts.
        names: of :data:`PROMPTS`.
        n_tokens: tokens of an answer; fewer where the prompt leaves no room for so many.
        n_free, interval, temperature, seed: see :class:`GenerateCase`.
        n_ctx: positions that the model was trained with.

    Raises:
        EvalError: the model has no tokenizer.
    """
    res = []
    for index, name in enumerate(names):
        end = "" if style.chat else "\n\n"
        prompt = [*style.head, *style.tokenize(PROMPTS[name] + end), *(style.ask("") if style.chat else [])]
        if not prompt:
            raise EvalError(f"{style.model.path.name} has no tokenizer, expected one: answers begin with a prompt")
        n = min(n_tokens, n_ctx - len(prompt) - 1)
        res.append(GenerateCase(name, index, prompt, n, min(n_free, n), interval, temperature, seed + index))
    return res


def repeats(tokens: Sequence[int]) -> dict[str, float]:
    """Share of the n-grams of a text that it has said before, for n of 4 to 8."""
    res = {}
    for n in N_GRAMS:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        res[str(n)] = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return res


def _parts(values: Sequence[float], n_all: int, of: Callable[[npt.NDArray[np.float64]], Any]) -> list[float | None]:
    """A figure for every eighth of a text of n_all tokens, None where there are no values."""
    edges = [n_all * i // N_PARTS for i in range(N_PARTS + 1)]
    parts = [np.array(values[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    return [None if part.size == 0 else round(float(of(part)), 5) for part in parts]


class Writer:
    """A session that holds no more than n_cells cells per head on average while an answer grows.

    Args:
        model: the weights.
        policy: what chooses them; :class:`Full` holds all.
        case: the answer.
        n_cells: cells per (layer, kv head).
        threads: CPU threads.

    Raises:
        WindowKVError: see :class:`windowkv_edge.bench.session.Session`.
    """

    def __init__(self, model: Model, policy: KVPolicy, case: GenerateCase, n_cells: int, threads: int) -> None:
        n_ctx = len(case.prompt) + case.n_tokens + 1
        self.session = Session(model, n_ctx, "f16", policy, True, threads, N_BATCH, own_cells=policy.cells)
        assert self.session.cache is not None
        self.cache, self.kv = self.session.cache, self.session.kv
        self.bound = None if isinstance(policy, Full) else Bound(n_cells, case.interval)
        self.task = prompt_task(case.prompt, model.detokenize) if policy.needs_task else "localization"
        self.compact_ms: list[float] = []
        self.most_cells = self.most_bytes = 0.0
        for i in range(0, len(case.prompt), N_BATCH):
            self.session.decode(case.prompt[i : i + N_BATCH])
        self.kv.prompt_done()

    def _make_room(self, n_tokens: int) -> bool:
        start = time.perf_counter()
        if self.bound is None or not make_room(self.cache, self.bound, n_tokens, self.task):
            return False
        self.compact_ms.append(1000 * (time.perf_counter() - start))
        return True

    def _note(self) -> None:
        self.most_cells = max(self.most_cells, float(self.kv.cells().mean()))
        self.most_bytes = max(self.most_bytes, int(self.kv.stats().bytes_pool))

    def read(self, tokens: Sequence[int]) -> Logits:
        """Logits behind each of the tokens, an interval of them at most: what one by one gives, but for rounding."""
        self._make_room(len(tokens))
        res = self.session.decode_all(tokens)
        self._note()
        return res

    def step(self, token: int) -> tuple[float, bool]:
        """Evaluate one token; milliseconds, and whether a compaction came before it, which is not part of these."""
        made = self._make_room(1)
        ms = 1000 * self.session.decode([token])
        self._note()
        return ms, made

    def close(self) -> None:
        self.session.close()


class Sampler:
    """Tokens of one answer.

    Args:
        model: the weights.
        case: the answer.
    """

    def __init__(self, model: Model, case: GenerateCase) -> None:
        self.rng = np.random.default_rng(case.seed)
        self.temperature = case.temperature
        self.ends = np.array([model.is_end(token) for token in range(model.n_vocab)])

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        own = logits.astype(np.float64)
        own[self.ends] = -np.inf
        if self.temperature == 0:
            return int(own.argmax())
        share = np.exp((own - own.max()) / self.temperature)
        return int(self.rng.choice(len(share), p=share / share.sum()))


@dataclass
class _Read:
    """What one policy made of the full cache's text."""

    kl: list[float]
    top1: list[bool]
    nll: list[float]


class Generator:
    """Every policy beside the full cache, which writes a text that all of them read.

    Args:
        model: the weights.
        plan: policies, and cells per head in place of its budgets.
        records: where results go.
        report: ``report(what, n)``: a step was done, and n answers.
    """

    def __init__(self, model: Model, plan: Plan, records: Records, report: Callable[..., None]) -> None:
        self.model, self.plan, self.records, self.report = model, plan, records, report
        if repeats_text := [name for name, policy in plan.policies.items() if policy.replays]:
            raise EvalError(
                f"{repeats_text[0]} has the model repeat what it has read, which this command does not; leave it out, "
                "sessions do it"
            )
        (self.n_cells,) = (int(budget) for budget in plan.budgets)

    def run(self, cases: Sequence[GenerateCase]) -> None:
        """Measure every answer that has no record yet."""
        for case in cases:
            if case.key not in self.records:
                self.records.add(self._case(case))
            self.report(case.key, 1)

    def _writer(self, name: str, case: GenerateCase) -> Writer:
        policy = Full() if name == FULL else self.plan.policies[name]
        return Writer(self.model, policy, case, self.n_cells, self.plan.threads)

    def _case(self, case: GenerateCase) -> dict[str, Any]:
        results, text = self._read_all(case)
        for row in results if case.n_free > 0 else []:
            row |= self._free(row["policy"], case)
        return {
            "case": case.key,
            "suite": "generate",
            "task": case.task,
            "length": case.n_tokens,
            "depth": None,
            "index": case.index,
            "n_prompt": len(case.prompt),
            "n_follow": case.n_tokens,
            "n_free": case.n_free,
            "interval": case.interval,
            "repeats": repeats(text),
            "output": self.model.detokenize(text),
            "results": results,
        }

    def _read_all(self, case: GenerateCase) -> tuple[list[dict[str, Any]], list[int]]:
        names = [FULL, *self.plan.policies]
        sampler, text = Sampler(self.model, case), list[int]()
        with ExitStack() as stack:
            writers = {}
            for name in names:
                writers[name] = self._writer(name, case)
                stack.callback(writers[name].close)
            reads = {name: _Read([], [], []) for name in names}
            full = writers[FULL]
            logits = full.session.logits()
            while len(text) < case.n_tokens:
                n = min(case.interval, N_BATCH, case.n_tokens - len(text))
                chunk, rows = [], []
                for _ in range(n):
                    chunk.append(sampler(logits))
                    full.step(chunk[-1])
                    logits = full.session.logits()
                    rows.append(logits)
                want = log_softmax(np.array(rows))
                # the token behind the chunk is not known yet: its share counts from the second token on
                for name in names:
                    got = want if name == FULL else log_softmax(writers[name].read(chunk))
                    _compare(reads[name], want, got, chunk)
                text += chunk
                self.report(f"generate/{case.task}: {len(text):,} tokens")
            return [self._row(name, writers[name], reads[name], case) for name in names], text

    def _row(self, name: str, writer: Writer, read: _Read, case: GenerateCase) -> dict[str, Any]:
        return {
            "policy": name,
            "budget": None if name == FULL else self.n_cells,
            "cells": "f16" if name == FULL else cell_types(writer.kv.stats())[0],
            "n_cells": writer.most_cells,
            "kv_bytes": int(writer.most_bytes),
            "kl": float(np.mean(read.kl)),
            "top1": float(np.mean(read.top1)),
            "nll_increase": float(np.mean(read.nll)),
            "kl_by_part": _parts(read.kl, case.n_tokens, np.mean),
        }

    def _free(self, name: str, case: GenerateCase) -> dict[str, Any]:
        """A policy's own text: what it repeats, and the time of a token by position, without those that compact."""
        writer, sampler, text = self._writer(name, case), Sampler(self.model, case), list[int]()
        times: list[float] = []
        try:
            while len(text) < case.n_free:
                text.append(sampler(writer.session.logits()))
                ms, compacted = writer.step(text[-1])
                # the graph is built again behind a compaction
                times.append(np.nan if compacted else ms)
                if len(text) % 256 == 0:
                    self.report(f"{name}, {case.task}: {len(text):,} tokens")
        finally:
            writer.close()
        return {
            "repeats": repeats(text),
            "decode_ms": round(float(np.nanmedian(times)), 3),
            "ms_by_part": _parts(times, case.n_tokens, np.nanmedian),
            "compact_ms": round(float(np.median(writer.compact_ms)), 3) if writer.compact_ms else None,
            "n_compactions": len(writer.compact_ms),
            "output": self.model.detokenize(text),
        }


def _compare(
    read: _Read, want: npt.NDArray[np.float64], got: npt.NDArray[np.float64], chunk: Sequence[int]
) -> None:
    read.kl += divergence(want, got).tolist()
    read.top1 += (want.argmax(axis=1) == got.argmax(axis=1)).tolist()
    at = np.arange(len(chunk) - 1), np.array(chunk[1:], dtype=int)
    read.nll += (want[at] - got[at]).tolist()
