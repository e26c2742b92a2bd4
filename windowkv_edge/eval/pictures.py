"""Pictures of results: score and time against bytes, score by depth, heatmaps."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from .._text import for_plot
from .answer_tables import answers_picture
from .results import Line, Results, budget_name
from .run import FULL

__all__ = ["draw", "png", "why_none"]


def why_none() -> str:
    """Why no picture can be drawn; "" if they can."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        return 'they need matplotlib; pip install "windowkv-edge[eval]"'
    return ""


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _label(line: Line) -> str:
    return for_plot(str(line))


def _curves(res: Results) -> Any:
    """Score, and time per token, against bytes."""
    panels = (
        [("kl", "KL to the full cache")]
        if res.is_fidelity
        else [("score", "share of the full cache's score"), ("ms", "ms per token")]
    )
    figure = _figure(7 * len(panels), 5)
    for i, (what, name) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for line in res.lines:
            budgets = [None] if line.policy == FULL else res.budgets
            points = []
            for budget in budgets:
                x = res.mean(line, budget, "kv_bytes")
                y = res.mean(line, budget, "decode_ms") if what == "ms" else res.value(line, budget)
                if x is not None and y is not None:
                    points.append((x / 2**20, y))
            if not points:
                continue
            if line.policy == FULL:
                if line.cells == "f16" and what != "kl":
                    axes.axhline(points[0][1], color="black", linestyle=":", label=_label(line))
                elif what != "kl":
                    axes.plot(*zip(*points, strict=True), marker="x", color="black", linestyle="", label=_label(line))
            else:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=_label(line))
        axes.set_xscale("log")
        axes.set_xlabel("KV cells, MiB (mean over prompts)")
        axes.set_ylabel(name)
        if what == "kl":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(for_plot(f"{res.suite}: {res.header['model']}"))
    return figure


def _depths(res: Results) -> Any:
    """Share by depth, one panel per budget."""
    depths = sorted({row["depth"] for row in res._counted() if row["depth"] is not None})
    figure = _figure(4.5 * len(res.budgets), 4)
    for i, budget in enumerate(res.budgets):
        axes = figure.add_subplot(1, len(res.budgets), i + 1)
        for line in res.lines:
            if line.policy == FULL:
                continue
            shares = [res.retention(line, budget, where=lambda row, d=d: row["depth"] == d) for d in depths]  # type: ignore[misc]
            axes.plot(depths, [np.nan if s is None else s for s in shares], marker="o", label=_label(line))
        axes.set_title(budget_name(budget))
        axes.set_xlabel("depth")
        axes.set_ylim(-0.03, 1.05)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of the full cache's score")
    figure.axes[-1].legend(fontsize="small")
    return figure


def _heatmaps(res: Results) -> Any:
    """Depth x length, a row per budget, a column per policy."""
    lengths = sorted({row["length"] for row in res.rows})
    depths = sorted({row["depth"] for row in res.rows if row["depth"] is not None})
    lines, budgets = [line for line in res.lines if line.policy != FULL], res.budgets
    figure = _figure(2.4 * len(lines) + 1, 2.2 * len(budgets) + 0.6)
    image = None
    for r, budget in enumerate(budgets):
        for c, line in enumerate(lines):
            axes = figure.add_subplot(len(budgets), len(lines), r * len(lines) + c + 1)
            grid = np.full((len(depths), len(lengths)), np.nan)
            for y, depth in enumerate(depths):
                for x, length in enumerate(lengths):
                    share = res.retention(
                        line, budget, where=lambda row, d=depth, n=length: (row["depth"], row["length"]) == (d, n)  # type: ignore[misc]
                    )  # fmt: skip
                    grid[y, x] = np.nan if share is None else share
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
            if r == 0:
                axes.set_title(_label(line), fontsize=9)
            if c == 0:
                axes.set_ylabel(budget_name(budget))
    if image is not None:
        figure.colorbar(image, ax=figure.axes, shrink=0.8)
    return figure


def draw(res: Results) -> dict[str, Any]:
    """Figures of one suite by their names."""
    if not res.budgets:  # the full cache answered nothing
        return {}
    if res.is_generate:
        return {"answers": answers_picture(res)}
    figures = {"bytes": _curves(res)}
    if res.suite in ("needle", "chat", "long"):
        figures["depth"] = _depths(res)
        figures["heatmap"] = _heatmaps(res)
    return figures


def png(res: Results) -> dict[str, bytes]:
    """PNG files of one suite's figures by their names."""
    files = {}
    for name, figure in draw(res).items():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=120)
        files[name] = data.getvalue()
    return files
