"""Tables of results in Markdown: each policy's share of what the full cache answers, and its place among the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .._text import for_markdown
from .answer_tables import kl_rows, own_rows
from .results import Budget, Line, Results, budget_name
from .run import FULL

__all__ = [
    "Table",
    "about",
    "answer_tables",
    "by",
    "fidelity_table",
    "markdown",
    "mean_ranks",
    "ranks",
    "retention_table",
    "summary",
    "summary_text",
]


class Table(NamedTuple):
    """Text as it is; :meth:`__str__` is Markdown, in which names from files stay names."""

    head: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(
            "| " + " | ".join(cell if row is lines[1] else for_markdown(cell) for cell in row) + " |" for row in lines
        )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    return Table(list(head), [list(row) for row in rows])


def retention_table(res: Results) -> Table:
    rows = []
    for line in res.lines:
        if line.policy == FULL:
            value = res.retention(line, None)
            rows.append([str(line), *(["" if value is None else f"{value:.1%}"] * len(res.budgets))])
            continue
        cells = []
        for budget in res.budgets:
            value, interval = res.retention(line, budget), res.interval(line, budget)
            text = "" if value is None else f"{value:.1%}"
            cells.append(text if interval is None else f"{text} ({interval[0]:.0%} to {interval[1]:.0%})")
        rows.append([str(line), *cells])
    return _table(["policy", *map(budget_name, res.budgets)], rows)


def fidelity_table(res: Results) -> Table:
    rows = []
    for line in res.lines:
        if line.policy == FULL:
            continue
        for value, name in (("kl", "KL"), ("top1", "top-1"), ("nll_increase", "NLL +")):
            cells = []
            for budget in res.budgets:
                mean, interval = res.mean(line, budget, value), res.interval(line, budget, value)
                if mean is None or interval is None:
                    cells.append("" if mean is None else f"{mean:.3f}")
                else:
                    cells.append(f"{mean:.3f} ({interval[0]:.3f} to {interval[1]:.3f})")
            rows.append([str(line) if value == "kl" else "", name, *cells])
    return _table(["policy", "", *map(budget_name, res.budgets)], rows)


def answer_tables(res: Results) -> list[tuple[str, Table]]:
    """Further tables of long answers, with their names."""
    if not res.is_generate:
        return []
    found = [("KL by position", kl_rows(res)), ("Own texts", own_rows(res))]
    return [(name, _table(head, rows)) for name, (head, rows) in found if rows]


def _kl_by_text(res: Results) -> Table:
    texts = list(dict.fromkeys(row["task"] for row in res.rows))
    rows = []
    for line in (line for line in res.lines if line.policy != FULL):
        cells = []
        for text in texts:
            values = [res.mean(line, b, "kl", lambda row, text=text: row["task"] == text) for b in res.budgets]  # type: ignore[misc]
            cells.append(" ".join("-" if value is None else f"{value:.3f}" for value in values))
        rows.append([str(line), *cells])
    return _table(["policy", *texts], rows)


def by(res: Results, key: str) -> Table:
    """Retention by a field of the prompts, at every budget."""
    values = sorted({row[key] for row in res._counted() if row[key] is not None}, key=lambda v: (isinstance(v, str), v))
    rows = []
    for line in res.lines:
        for budget in [None] if line.policy == FULL else res.budgets:
            cells = []
            for value in values:
                share = res.retention(line, budget, where=lambda row, value=value: row[key] == value)  # type: ignore[misc]
                cells.append("" if share is None else f"{share:.0%}")
            rows.append([str(line), budget_name(budget), *cells])
    counts = [sum(row[key] == value for row in res._counted()) for value in values]
    return _table(["policy", "budget", *(f"{v} (n={n})" for v, n in zip(values, counts, strict=True))], rows)


def about(res: Results) -> str:
    """One line: model, what was counted."""
    header = res.header
    text = (
        f"{header['model']} ({header['model_sha256'][:12]}), windowkv-edge {header['package']}, seed {header['seed']}"
    )
    if res.is_fidelity:
        tokens = res.rows[0]["n_follow"]
        said = f"{len(res.rows)} windows, {tokens} forced tokens each"
        if res.is_generate:
            how = f"compacted every {res.header.get('interval')} tokens, temperature {res.header.get('temperature')}"
            return f"{text}: {len(res.rows)} answers of {tokens} tokens, {how}; budgets are cells per head"
        return f"{text}: {said}; budgets are shares of the full f16 cache's bytes"
    full = sum(row["results"][0]["score"] for row in res.rows)
    kind = "full cache" if res.suite == "long" else "full f16 cache"
    return (
        f"{text}: the {kind} scores {full:.1f} of {len(res.rows)} prompts; {res.n_counted} count, "
        f"{len(res.rows) - res.n_counted} that it fails do not; shares are of its score"
    )


def markdown(results: Sequence[Results]) -> str:
    """All tables."""
    parts = [f"## Summary\n\n{for_markdown(summary_text(results))}\n\n{summary(results)}"] if len(results) > 1 else []
    for res in results:
        parts.append(f"## {for_markdown(f'{res.suite}: {res.source}')}\n\n{for_markdown(about(res))}")
        if res.is_fidelity:
            parts.append(str(fidelity_table(res)))
            parts += [f"### {name}\n\n{table}" for name, table in answer_tables(res)]
            if len({row["task"] for row in res.rows}) > 1:
                parts.append(f"### KL by text, at {', '.join(map(budget_name, res.budgets))}\n\n{_kl_by_text(res)}")
            continue
        parts.append(str(retention_table(res)))
        for key, name in (("task", "kind"), ("length", "length"), ("depth", "depth")):
            if len({row[key] for row in res.rows if row[key] is not None}) > 1 and (
                key != "depth" or res.suite in ("needle", "chat", "long")
            ):
                parts.append(f"### By {name}\n\n{by(res, key)}")
    table = ranks(results)
    if table:
        parts.append("## Ranks\n\nPlaces among the policies (1 = best), mean over the suites\n\n" + str(table))
    return "\n\n".join(parts) + "\n"


def _same_budgets(results: Sequence[Results]) -> list[Budget]:
    """Budgets that all suites have."""
    return [b for b in results[0].budgets if all(b in res.budgets for res in results)]


def summary_text(results: Sequence[Results]) -> str:
    budgets = ", ".join(map(budget_name, _same_budgets(results)))
    counts = ", ".join(f"{res.n_counted} of {len(res.rows)} in {res.title}" for res in results if not res.is_fidelity)
    return (
        f"At {budgets}: percent of the full f16 cache's score, and KL to it. "
        f"Prompts that it answers and that count: {counts}"
    )


def summary(results: Sequence[Results]) -> Table:
    """One row per policy: its share of every suite's score, at the budgets that all suites have."""
    budgets = _same_budgets(results)
    lines = [line for line in results[0].lines if line.policy != FULL and all(line in res.lines for res in results)]
    rows = []
    for line in lines:
        cells = []
        for res in results:
            values = [res.value(line, budget) for budget in budgets]
            form = "{:.3f}".format if res.is_fidelity else lambda value: f"{100 * value:.0f}"
            cells.append(" ".join("-" if value is None else form(value) for value in values))
        rows.append([str(line), *cells])
    return _table(["policy", *(f"{res.title}, KL" if res.is_fidelity else res.title for res in results)], rows)


def _places(values: Mapping[Line, float]) -> dict[Line, float]:
    """Places, the best value first; equal values share the mean of their places."""
    res = {}
    for line, value in values.items():
        better = sum(other > value for other in values.values())
        same = sum(other == value for other in values.values())
        res[line] = better + (same + 1) / 2
    return res


def mean_ranks(results: Sequence[Results]) -> dict[Budget, dict[Line, float]]:
    """Mean places by budget, of the policies that all suites have; suites of one kind count as one."""
    kinds: dict[str, list[Results]] = defaultdict(list)
    for res in results:
        kinds[res.suite].append(res)
    budgets = _same_budgets(results)
    found: dict[Budget, dict[Line, float]] = {}
    for budget in budgets:
        places: dict[Line, list[float]] = defaultdict(list)
        for group in kinds.values():
            per_line: dict[Line, list[float]] = defaultdict(list)
            for res in group:
                for line in res.lines:
                    if line.policy == FULL:
                        continue
                    value = res.value(line, budget)
                    if value is not None:
                        per_line[line].append(-value if res.is_fidelity else value)
            means = {line: float(np.mean(v)) for line, v in per_line.items() if len(v) == len(group)}
            for line, own in _places(means).items():
                places[line].append(own)
        found[budget] = {line: float(np.mean(p)) for line, p in places.items() if len(p) == len(kinds)}
    return found


def ranks(results: Sequence[Results]) -> Table | None:
    """Table of mean places, None with fewer than two suites."""
    if len({res.suite for res in results}) < 2:
        return None
    found = mean_ranks(results)
    lines = list(dict.fromkeys(line for places in found.values() for line in places))
    if not lines:
        return None
    rows = [
        [str(line), *(f"{found[b][line]:.1f}" if line in found[b] else "" for b in found)]
        for line in sorted(lines, key=lambda line: sum(found[b].get(line, 0) for b in found))
    ]
    return _table(["policy", *map(budget_name, found)], rows)
