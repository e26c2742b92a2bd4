"""A picture of a bench: time of a token and bytes of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._files import writing
from .._text import for_plot
from ..errors import WindowKVError
from .run import STOCK, Row

__all__ = ["check_plot", "plot"]


def check_plot(path: Path) -> None:
    """Raise WindowKVError unless pictures can be drawn with this ending; before anything is measured."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise WindowKVError('--plot needs matplotlib; install it with: pip install "windowkv-edge[plot]"') from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise WindowKVError(f"--plot is {str(path)!r}, expected a name that ends in .{', .'.join(sorted(known))}")


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars for one length, lines over several."""
    from matplotlib.figure import Figure

    own = [row for row in rows if not row.is_reference]
    lengths = sorted({row.length for row in own})
    names = list(dict.fromkeys(row.session for row in own))
    figure = Figure(figsize=(11, 2 + (0.35 * len(names) if len(lengths) == 1 else 3.5)), layout="constrained")
    figure.suptitle(for_plot(title))
    axes = figure.subplots(1, 2)
    for axis, label, value in (
        (axes[0], "decode, ms per token (median)", lambda row: row.decode_ms),
        (axes[1], "KV cache while decoding, MiB", lambda row: row.kv_bytes / 2**20),
    ):
        if len(lengths) == 1:
            _bars(axis, names, own, value)
        else:
            _lines(axis, names, lengths, own, value)
        (axis.set_xlabel if len(lengths) == 1 else axis.set_ylabel)(label)
    if len(lengths) > 1:
        axes[0].legend(fontsize="small")
    with writing(path) as part:
        figure.savefig(part, dpi=150)


def _bars(axis: Any, names: list[str], rows: list[Row], value: Any) -> None:
    values = {row.session: value(row) for row in rows}
    colours = ["0.65" if name.startswith(STOCK) else "C0" for name in names]
    bars = axis.barh(range(len(names)), [values[name] for name in names], color=colours)
    axis.set_yticks(range(len(names)), [for_plot(name) for name in names])
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.margins(x=0.15)
    axis.invert_yaxis()


def _lines(axis: Any, names: list[str], lengths: list[int], rows: list[Row], value: Any) -> None:
    for name in names:
        points = {row.length: value(row) for row in rows if row.session == name}
        at = [n for n in lengths if n in points]
        style = "--" if name.startswith(STOCK) else "-"
        axis.plot(at, [points[n] for n in at], style, marker="o", label=for_plot(name))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.set_xlabel("positions")
    axis.grid(alpha=0.3)
