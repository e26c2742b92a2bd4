"""Tables and pictures of long answers: by position in the text, what is said again, and the time of a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._text import for_plot
from .results import Line, Results
from .run import FULL

__all__ = ["answers_picture", "kl_rows", "own_rows"]


def _of(res: Results, line: Line) -> list[Mapping[str, Any]]:
    return [r for row in res.rows for r in row["results"] if (r["policy"], r["cells"]) == (line.policy, line.cells)]


def _mean_parts(found: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    """Mean over the answers, part by part."""
    lists = [own[key] for own in found if own.get(key)]
    columns = zip(*(own for own in lists if len(own) == len(lists[0])), strict=True)
    values = [[x for x in column if x is not None] for column in columns]
    return [float(np.mean(own)) if own else None for own in values]


def _mean(found: Sequence[Mapping[str, Any]], key: str) -> str:
    numbers = [own[key] for own in found if own.get(key) is not None]
    return "" if not numbers else f"{np.mean(numbers):.2f}"


def kl_rows(res: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows: KL per token of every policy, by eighths of the text."""
    rows = []
    for line in (line for line in res.lines if line.policy != FULL):
        parts = _mean_parts(_of(res, line), "kl_by_part")
        rows.append([str(line), *("" if x is None else f"{x:.4f}" for x in parts)])
    n = max((len(row) - 1 for row in rows), default=0)
    return ["policy", *(f"part {i + 1} of {n}" for i in range(n))], rows


def own_rows(res: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows: repeated n-grams of the texts that the policies generated, and the time of a token; no rows where
    none did."""
    rows = []
    for line in res.lines:
        found = [own for own in _of(res, line) if own.get("repeats")]
        if not found:
            continue
        grams = [_mean([own["repeats"] for own in found], n) for n in ("4", "8")]
        ms = [x for x in _mean_parts(found, "ms_by_part") if x is not None]
        first = "" if len(ms) < 2 else f"{ms[1]:.2f}"
        last = "" if len(ms) < 2 else f"{ms[-1]:.2f}"
        compact = _mean(found, "compact_ms")
        rows.append([str(line), *grams, _mean(found, "decode_ms"), first, last, compact])
    head = ["policy", "4-grams said before", "8-grams said before", "ms per token", "in part 2", "in the last part"]
    return [*head, "ms per compaction"], rows


def answers_picture(res: Results) -> Any:
    """KL, and the time of a token, by position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    for i, (key, name) in enumerate((("kl_by_part", "KL to the full cache"), ("ms_by_part", "ms per token"))):
        axes = figure.add_subplot(1, 2, i + 1)
        for line in res.lines:
            parts = _mean_parts(_of(res, line), key)
            if not parts or (line.policy == FULL and key == "kl_by_part"):
                continue
            length = max(row["length"] for row in res.rows)
            at = (np.arange(len(parts)) + 0.5) * length / len(parts)
            values = [np.nan if x is None else x for x in parts]
            is_full = line.policy == FULL
            axes.plot(at, values, "k:" if is_full else "o-", label=for_plot(str(line)))
        axes.set_xlabel("tokens of the answer")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(for_plot(f"long answers: {res.header['model']}"))
    return figure
