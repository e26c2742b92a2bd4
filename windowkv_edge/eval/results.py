"""Results read from files: shares of the full cache's score, with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._json import shown
from .._text import for_terminal
from .case import EvalError
from .records import read_records
from .run import FULL

__all__ = ["Budget", "Line", "Results", "budget_name", "load"]

Budget = Any
"""None for the full cache, a float or an int."""

N_BOOTSTRAP = 2000

SUITES = ("needle", "ruler", "turns", "forms", "chat", "fidelity", "generate", "tasks", "long")
DISTANCES = ("fidelity", "generate")
MAX_LINES, MAX_BUDGETS = 64, 32
MAX_VALUE = 1e15  # sums and plots stay finite
MAX_PARTS = 64


@dataclass(frozen=True, order=True)
class Line:
    """One line of a table or plot: a policy with a cell type."""

    policy: str
    cells: str

    def __str__(self) -> str:
        return self.policy if self.cells == "f16" else f"{self.policy}, {self.cells}"


@dataclass(frozen=True)
class Results:
    """One suite of one results file.

    Attributes:
        header: of the file.
        suite: its name.
        rows: of the prompts.
        source: the file.
    """

    header: Mapping[str, Any]
    suite: str
    rows: Sequence[Mapping[str, Any]]
    source: str

    @property
    def title(self) -> str:
        """Name of the file, and of the part if the suite has several."""
        return self.source.removesuffix(".jsonl") + ("-" + self.suite.split("/")[1] if "/" in self.suite else "")

    @property
    def is_fidelity(self) -> bool:
        return self.suite in DISTANCES

    @property
    def is_generate(self) -> bool:
        return self.suite == "generate"

    @property
    def budgets(self) -> list[Budget]:
        """The budgets of the policies, largest first: numbers of cells, then shares."""
        return sorted(
            {r["budget"] for row in self.rows for r in row["results"] if r["policy"] != FULL},
            key=lambda b: (isinstance(b, int), b), reverse=True,
        )  # fmt: skip

    @property
    def lines(self) -> list[Line]:
        """The policies in the order of the file, the full cache first."""
        return list(dict.fromkeys(Line(r["policy"], r["cells"]) for row in self._counted() for r in row["results"]))

    def _counted(self) -> list[Mapping[str, Any]]:
        """Prompts that the full f16 cache answers, wholly or in part; for distances, all prompts."""
        if self.is_fidelity:
            return list(self.rows)
        return [row for row in self.rows if row["results"][0]["score"] > 0]

    @property
    def n_counted(self) -> int:
        return len(self._counted())

    def pairs(
        self, line: Line, budget: Budget, value: str = "score", where: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> list[tuple[float, float]]:
        """(value of a policy, value of the full f16 cache) for every counted prompt."""
        res = []
        for row in self._counted():
            if where is None or where(row):
                for r in row["results"]:
                    same = (r["policy"], r["cells"], r["budget"]) == (line.policy, line.cells, budget)
                    if same and r[value] is not None:
                        res.append((float(r[value]), float(row["results"][0].get(value) or 0.0)))
        return res

    def retention(
        self, line: Line, budget: Budget, where: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> float | None:
        """A policy's score as a share of the full f16 cache's over the counted prompts."""
        pairs = self.pairs(line, budget, where=where)
        full = sum(want for _, want in pairs)
        return sum(got for got, _ in pairs) / full if full else None

    def mean(
        self, line: Line, budget: Budget, value: str, where: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> float | None:
        pairs = self.pairs(line, budget, value, where)
        return float(np.mean([got for got, _ in pairs])) if pairs else None

    def interval(self, line: Line, budget: Budget, value: str | None = None) -> tuple[float, float] | None:
        """95 % confidence interval of the retention, or of the mean of a value, by bootstrap over prompts.

        None with fewer than four prompts, or with nothing that varies.

        Windows of a text count as one each, as their tokens depend on each other. Prompts that hide one fact at several
        places count as independent, so that intervals say nothing about other facts.
        """
        pairs = np.array(self.pairs(line, budget, value or "score"))
        if len(pairs) < 4 or (pairs == pairs[0]).all():
            return None
        pick = np.random.default_rng(0).integers(0, len(pairs), (N_BOOTSTRAP, len(pairs)))
        got, want = pairs[pick, 0].mean(axis=1), pairs[pick, 1].mean(axis=1)
        means = got if value else got / np.maximum(want, 1e-12)
        low, high = np.percentile(means, (2.5, 97.5))
        return float(low), float(high)

    def value(self, line: Line, budget: Budget) -> float | None:
        """The value that policies are ranked by: KL divergence, or the share of the full cache's score."""
        return self.mean(line, budget, "kl") if self.is_fidelity else self.retention(line, budget)


def load(paths: Iterable[Path]) -> list[Results]:
    """The suites of results files.

    Raises:
        EvalError: a file cannot be read or holds no result.
    """
    res = []
    for path in paths:
        header, rows = read_records(path)
        if not rows:
            raise EvalError(f"{path} holds no results yet; run its evaluation again, it goes on from there")
        for i, fault in enumerate([_header_fault(header), *map(_row_fault, rows)], 1):
            if fault:
                raise EvalError(f"{path}: line {i}: {fault}; run its evaluation again with another --out")
        by_suite: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            by_suite[row["suite"] + ("/" + row["task"] if row["suite"] == "turns" else "")].append(row)
        res += [Results(header, suite, own, for_terminal(path.name)) for suite, own in by_suite.items()]
        for own in res[-len(by_suite) :]:
            if len(own.lines) > MAX_LINES or len(own.budgets) > MAX_BUDGETS:
                raise EvalError(
                    f"{path}: {len(own.lines)} policies with {len(own.budgets)} budgets in {own.suite}, "
                    f"expected at most {MAX_LINES} with {MAX_BUDGETS}: no table or picture holds more"
                )
    return res


#
# what a file has to hold, so that tables and pictures can be made of it
#


def _header_fault(header: Mapping[str, Any]) -> str | None:
    for key in ("model", "model_sha256", "package"):
        if not isinstance(header.get(key), str):
            return f"{key!r} is {shown(header.get(key))}, expected text"
    seed = header.get("seed")
    return None if _is_number(seed, -MAX_VALUE) else f"'seed' is {shown(seed)}, expected a number"


def _row_fault(row: Mapping[str, Any]) -> str | None:
    """Why a line is not the result of a prompt."""
    depth, results = row.get("depth"), row.get("results")
    if not isinstance(row.get("suite"), str) or row["suite"] not in SUITES:
        return f"'suite' is {shown(row.get('suite'))}, expected one of {', '.join(SUITES)}"
    if not isinstance(row.get("task"), str):
        return f"'task' is {shown(row.get('task'))}, expected text"
    for key in ("length", "n_follow") if row["suite"] in DISTANCES else ("length",):
        if not _is_number(row.get(key)):
            return f"{key!r} is {shown(row.get(key))}, expected a number"
    if "depth" not in row or not (depth is None or _is_number(depth, 0, 1)):
        return f"'depth' is {shown(depth)}, expected a share of 0 to 1, or null"
    if not isinstance(results, list) or not results or not all(isinstance(r, dict) for r in results):
        return f"'results' is {shown(results)}, expected a list of objects"
    cells = results[0].get("cells") if row["suite"] == "long" else "f16"  # these are all of one type
    if (results[0].get("policy"), results[0].get("cells")) != (FULL, cells):
        return "the first of 'results' is not that of the full f16 cache"
    return next((fault for fault in (_result_fault(r, row["suite"]) for r in results) if fault), None)


def _result_fault(result: Mapping[str, Any], suite: str) -> str | None:
    """Why one of the results of a prompt cannot be counted."""
    for key in ("policy", "cells"):
        if not isinstance(result.get(key), str):
            return f"{key!r} of a result is {shown(result.get(key))}, expected text"
    budget = result.get("budget")
    is_number = type(budget) is int and _is_number(budget, 1) or type(budget) is float and 0 < budget <= 1
    if "budget" not in result or not (budget is None if result["policy"] == FULL else is_number):
        return f"'budget' of {shown(result['policy'])} is {shown(budget)}, expected a share, a number of cells, or null"
    if not _is_number(result.get("kv_bytes")):
        return f"'kv_bytes' is {shown(result.get('kv_bytes'))}, expected a number"
    if suite not in DISTANCES and not _is_number(result.get("score"), 0, 1):
        return f"'score' is {shown(result.get('score'))}, expected a number of 0 to 1"
    for key in ("kl", "top1", "nll_increase") if suite in DISTANCES else ("decode_ms",):
        if key not in result or not (result[key] is None or _is_number(result[key], -MAX_VALUE)):
            return f"{key!r} is {shown(result.get(key))}, expected a number or null"
    return _answer_fault(result) if suite == "generate" else None


def _answer_fault(result: Mapping[str, Any]) -> str | None:
    """Why what a long answer has beside its distances cannot be shown; its own text need not be there."""
    for key in ("kl_by_part", "ms_by_part"):
        parts = result.get(key, [])
        if not isinstance(parts, list) or len(parts) > MAX_PARTS or not all(p is None or _is_number(p) for p in parts):
            return f"{key!r} is {shown(parts)}, expected at most {MAX_PARTS} numbers or nulls"
    repeats = result.get("repeats", {})
    if not isinstance(repeats, dict) or not all(_is_number(share, 0, 1) for share in repeats.values()):
        return f"'repeats' is {shown(repeats)}, expected shares of 0 to 1"
    for key in ("decode_ms", "compact_ms"):
        if not (result.get(key) is None or _is_number(result[key])):
            return f"{key!r} is {shown(result.get(key))}, expected a number or null"
    return None


def _is_number(value: object, low: float = 0, high: float = MAX_VALUE) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def budget_name(budget: Budget) -> str:
    return "all" if budget is None else f"{budget:,}" if isinstance(budget, int) else f"{100 * budget:g} %"
