"""Every policy x budget x cell type from one prefill per prompt and cell type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bench.distributions import divergence
from ..bench.session import Model
from ..budget import bits, n_cells
from ..policies import KVPolicy
from ..replay import N_ROOM
from .branch import Branches, Read
from .case import Case, EvalError
from .metrics import RECALL, score
from .records import Records

__all__ = ["FULL", "OWN", "FidelityCase", "Plan", "Runner"]

FULL = "full"
OWN = "own"

Report = Callable[[str], None]
"""``report(what)``: a prompt was done."""


@dataclass(frozen=True)
class Plan:
    """What every prompt is branched into.

    Attributes:
        policies: by name.
        budgets: see :class:`windowkv_edge.Llama`; fractions are of the bytes that f16 cells of the whole prompt
            take, so that smaller cells are more.
        types: types of the cells. OWN stands for what a policy prefers, which is f16 for most.
        threads: CPU threads.
    """

    policies: Mapping[str, KVPolicy]
    budgets: tuple[float | int, ...]
    types: tuple[str, ...]
    threads: int

    def __post_init__(self) -> None:
        if not self.policies or not self.budgets or not self.types:
            raise EvalError("policies, budgets and types need at least one entry each")

    def types_of(self, policy: KVPolicy) -> tuple[str, ...]:
        """Cells that a policy is run with."""
        return tuple(dict.fromkeys((policy.cells or "f16") if cells == OWN else cells for cells in self.types))

    @property
    def window(self) -> int:
        return max(policy.n_observed for policy in self.policies.values())

    @property
    def accumulates(self) -> bool:
        return any(policy.accumulates for policy in self.policies.values())


@dataclass(frozen=True)
class FidelityCase:
    """A window of a text and what follows it.

    Attributes:
        text: name of the text.
        index: number of the window.
        prompt: tokens; the cache is compacted after them.
        follow: the tokens that are forced.
    """

    text: str
    index: int
    prompt: Sequence[int]
    follow: Sequence[int]

    @property
    def key(self) -> str:
        return f"fidelity/{self.text}/{len(self.prompt)}/-/{self.index}"


class Runner:
    """Sessions of all cell types on one model, and the loop over prompts.

    The full f16 cache is the reference: a prompt that it does not answer at all is counted and not branched.

    Args:
        model: the weights.
        plan: what to branch into.
        n_ctx: positions of the longest prompt with its answer.
        records: where results go.
        report: see :data:`Report`.
        read: told how far a prompt is, see :data:`windowkv_edge.eval.branch.Read`.
    """

    def __init__(
        self, model: Model, plan: Plan, n_ctx: int, records: Records, report: Report, read: Read | None = None
    ) -> None:
        self.model, self.plan, self.records, self.report = model, plan, records, report
        self.stack = ExitStack()
        self.branches: dict[str, Branches] = {}
        self.instead: dict[str, str] = {}  # of cells that a policy prefers and the model cannot have
        try:
            own_types = (cells for policy in plan.policies.values() for cells in plan.types_of(policy))
            for cells in dict.fromkeys(("f16", *own_types)):
                n_more = N_ROOM if any(policy.replays for policy in plan.policies.values()) else 0
                own = Branches(model, n_ctx + n_more, plan.window, cells, plan.threads, plan.accumulates, read)
                self.stack.callback(own.close)
                if own.cells == cells:
                    self.branches[cells] = own
                elif cells in plan.types:
                    raise EvalError(f"the rows of this model's heads are no whole blocks of {cells}; leave it out")
                else:
                    self.instead[cells] = own.cells
            for policy in plan.policies.values():
                self.branches["f16"].bind(policy)
        except BaseException:
            self.stack.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def run(self, cases: Sequence[Case]) -> None:
        """Generate and score every prompt that has no record yet."""
        for case in cases:
            if case.key not in self.records:
                self.records.add(self._generate(case))
            self.report(case.key)

    def run_fidelity(self, cases: Sequence[FidelityCase]) -> None:
        """Teacher-forced distances from the full f16 cache."""
        for case in cases:
            if case.key not in self.records:
                self.records.add(self._fidelity(case))
            self.report(case.key)

    #
    # one prompt
    #

    def _variants(self, cells: str) -> list[tuple[str, KVPolicy, float | int]]:
        policies = self.plan.policies.items()
        chosen = [
            (name, own)
            for name, own in policies
            if cells in {self.instead.get(want, want) for want in self.plan.types_of(own)}
        ]
        return [(name, policy, budget) for name, policy in chosen for budget in self.plan.budgets]

    def _each(self, prompt: Sequence[int], measure: Callable[[Branches], dict[str, Any]]) -> list[dict[str, Any]]:
        """Results of the full cache and of every variant. The first is that of the full f16 cache; if it scores
        nothing, it is the only one."""
        results: list[dict[str, Any]] = []
        for cells, own in self.branches.items():
            if results and results[0].get("score") == 0:
                break
            own.prefill(prompt)
            if not results or self._variants(cells):
                own.restore()
                results.append(self._row(own, FULL, None, cells, measure))
                if results[0].get("score") == 0:
                    break
            for name, policy, budget in self._variants(cells):
                try:
                    own.compact(policy, min(len(prompt), n_cells(budget, len(prompt), cells)))
                except ValueError as error:  # of a policy in Python
                    raise EvalError(f"{name} at {budget} with {cells} cells: {error}") from error
                results.append(self._row(own, name, budget, cells, measure))
        return results

    def _row(
        self,
        own: Branches,
        policy: str,
        budget: float | int | None,
        cells: str,
        measure: Callable[[Branches], dict[str, Any]],
    ) -> dict[str, Any]:
        stats = own.kv.stats()
        held = int(own.kv.cells().sum())
        f16 = stats.bytes_full / (stats.n_past * stats.n_layer * stats.n_head_kv)  # the context's own type
        about = {
            "policy": policy,
            "budget": budget,
            "cells": cells,
            "n_cells": held / (stats.n_layer * stats.n_head_kv),
            "kv_bytes": round(held * f16 * bits(own.cells) / 16),
        }
        if policy != FULL and held < stats.n_past * stats.n_layer * stats.n_head_kv:
            about["compact_ms"] = round(stats.t_score_ms + stats.t_select_ms + stats.t_gather_ms, 2)
        return {**about, **measure(own)}

    def _generate(self, case: Case) -> dict[str, Any]:
        def value_of(text: str) -> float:
            return score(case.metric, text, case.answers, case.classes)

        def measure(own: Branches) -> dict[str, Any]:
            first = own.extend(case.follow_up) if case.follow_up else None
            # an answer that holds all that is asked for gets no better
            done = (lambda tokens: value_of(self.model.detokenize(tokens)) == 1) if case.metric in RECALL else None
            text = self.model.detokenize(own.greedy(case.max_tokens, first, done))
            if case.first_line:
                text = text.lstrip("\n").split("\n")[0]
            return {"score": round(value_of(text), 4), "decode_ms": own.decode_ms, "output": text}

        return {
            "case": case.key,
            "suite": case.suite,
            "task": case.task,
            "length": case.length,
            "depth": case.depth,
            "index": case.index,
            "n_prompt": len(case.prompt),
            "answers": case.answers,
            "metric": case.metric,
            "results": self._each(case.prompt, measure),
        }

    def _fidelity(self, case: FidelityCase) -> dict[str, Any]:
        follow = np.array(case.follow)
        at = np.arange(len(follow) - 1), follow[1:]  # the first token was predicted by the full cache
        full: list[npt.NDArray[np.float64]] = []

        def measure(own: Branches) -> dict[str, Any]:
            got = own.log_probs(case.follow)
            if not full:
                full.append(got)
            (want,) = full
            return {
                "kl": float(divergence(want, got).mean()),
                "top1": float((want.argmax(axis=1) == got.argmax(axis=1)).mean()),
                "nll_increase": float((want[at] - got[at]).mean()),
            }

        return {
            "case": case.key,
            "suite": "fidelity",
            "task": case.text,
            "length": len(case.prompt),
            "depth": None,
            "index": case.index,
            "n_prompt": len(case.prompt),
            "n_follow": len(case.follow),
            "results": self._each(case.prompt, measure),
        }
