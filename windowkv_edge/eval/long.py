"""Documents longer than the memory: read within a limit, beside the full cache and what is left of it afterwards.

Two readings of a prompt: with the full cache, which answers, and is then compacted to the limit by every policy
(:data:`EXACT`); and within the limit, once for every policy. Both leave as many cells, so that they differ in nothing
but when these were chosen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bench.session import Model
from ..limit import slack
from ..llama import Llama
from ..policies import KVPolicy
from ..replay import N_ROOM
from .branch import N_BATCH, Branches, Read
from .case import Case, EvalError
from .metrics import score
from .records import Records
from .run import FULL, Report

__all__ = ["EXACT", "LongPlan", "LongRunner"]

EXACT = " (exact)"
"""Behind the name of a policy: the prompt was read with the full cache, and compacted to the limit afterwards."""


@dataclass(frozen=True)
class LongPlan:
    """How every document is read.

    Attributes:
        policies: by name; within each limit.
        exact: of these the ones that also compact the full cache.
        limits: cells per head.
        cells: type of all cells, a name of :data:`windowkv_edge.budget.TYPES`.
        threads: CPU threads.
    """

    policies: Mapping[str, KVPolicy]
    exact: Sequence[str]
    limits: tuple[int, ...]
    cells: str
    threads: int

    def __post_init__(self) -> None:
        if not self.policies or not self.limits:
            raise EvalError("policies and limits need at least one entry each")
        if unknown := [name for name in self.exact if name not in self.policies]:
            raise EvalError(f"{unknown[0]!r} is to compact the full cache and is none of the policies")


class LongRunner:
    """The loop over documents.

    The full cache is the reference: a document whose question it does not answer is counted and read no second time.

    Args:
        model: the weights.
        plan: how to read.
        n_ctx: positions of the longest prompt with its answer.
        records: where results go.
        report: see :data:`windowkv_edge.eval.run.Report`.
        read: told how far a prompt is, see :data:`windowkv_edge.eval.branch.Read`.

    Raises:
        WindowKVError: the model does not serve a policy, or there is no memory.
    """

    def __init__(
        self, model: Model, plan: LongPlan, n_ctx: int, records: Records, report: Report, read: Read | None = None
    ) -> None:
        n_ctx += N_ROOM if any(policy.replays for policy in plan.policies.values()) else 0
        self.model, self.plan, self.n_ctx, self.records, self.report = model, plan, n_ctx, records, report
        self.read = read
        window = max(policy.n_observed for policy in plan.policies.values())
        self.branches = Branches(model, n_ctx, window, plan.cells, plan.threads, read=read)
        try:
            if self.branches.cells != plan.cells:
                raise EvalError(f"the rows of this model's heads are no whole blocks of {plan.cells}; give --types f16")
            for policy in plan.policies.values():
                self.branches.bind(policy)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LongRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.branches.close()

    def run(self, cases: Sequence[Case]) -> None:
        """Read, answer and score every document that has no record yet."""
        for case in cases:
            if case.key not in self.records:
                self.records.add(self._one(case))
            self.report(case.key)

    def _one(self, case: Case) -> dict[str, Any]:
        return {
            "case": case.key,
            "suite": "long",
            "task": case.task,
            "length": case.length,
            "depth": case.depth,
            "index": case.index,
            "n_prompt": len(case.prompt),
            "answers": case.answers,
            "metric": case.metric,
            "results": self._results(case),
        }

    def _results(self, case: Case) -> list[dict[str, Any]]:
        own, n = self.branches, len(case.prompt)
        start = time.perf_counter()
        own.prefill(case.prompt)
        seconds = time.perf_counter() - start
        own.restore()
        results = [self._row(FULL, None, n, seconds, case, own.greedy(case.max_tokens), own.decode_ms)]
        if results[0]["score"] == 0:
            return results
        for name, limit in ((name, limit) for limit in self.plan.limits for name in self.plan.exact):
            n_cells = min(n, limit - slack(limit)) if n > limit else n
            own.compact(self.plan.policies[name], n_cells)
            answer = own.greedy(case.max_tokens)
            results.append(self._row(name + EXACT, limit, n, seconds, case, answer, own.decode_ms))
        for limit in self.plan.limits:
            results += [self._bounded(name, policy, limit, case) for name, policy in self.plan.policies.items()]
        return results

    def _bounded(self, name: str, policy: KVPolicy, limit: int, case: Case) -> dict[str, Any]:
        """Read within a limit by a session, as anybody's."""
        llm = Llama(
            str(self.model.path), kv_policy=policy, kv_limit=limit, n_ctx=self.n_ctx, n_batch=N_BATCH,
            n_gpu_layers=self.model.n_gpu_layers, n_threads=self.plan.threads, n_threads_batch=self.plan.threads,
            type_k=self.branches.type, type_v=self.branches.type, kv_progress=self.read, verbose=False,
        )  # fmt: skip
        try:
            stream = llm.generate(list(case.prompt), temp=0.0)
            times, answer = [time.perf_counter()], []
            for token in stream:
                times.append(time.perf_counter())
                if self.model.is_end(token):
                    break
                answer.append(token)
                if len(answer) == case.max_tokens:
                    break
            stream.close()
            stats = llm.kv_stats()
            behind = [1000 * (b - a) for a, b in zip(times[1:-1], times[2:], strict=True)]
            decode_ms = sum(behind) / len(behind) if behind else None
            peak = stats.bytes_peak - (stats.bytes_live - _pools(llm))
            row = self._row(name, limit, peak / self._cell, times[1] - times[0], case, answer, decode_ms)
            return {**row, "n_compactions": stats.n_compactions}
        finally:
            llm.close()

    @property
    def _cell(self) -> int:
        return int(self.branches.kv.stats().bytes_cell)

    def _row(
        self, policy: str, limit: int | None, n_peak: float, seconds: float, case: Case, answer: list[int],
        decode_ms: float | None,
    ) -> dict[str, Any]:  # fmt: skip
        """kv_bytes are those of the cells at the peak: while the prompt was read."""
        text = self.model.detokenize(answer)
        return {
            "policy": policy,
            "budget": limit,
            "cells": self.plan.cells,
            "kv_bytes": round(n_peak * self._cell),
            "n_peak": round(n_peak, 1),
            "prefill_s": round(seconds, 2),
            "score": round(score(case.metric, text, case.answers, case.classes), 4),
            "decode_ms": decode_ms,
            "output": text,
        }


def _pools(llm: Llama) -> int:
    kv = llm._kv
    return 0 if kv is None else int(kv.stats().bytes_pool)
