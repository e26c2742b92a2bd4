"""``windowkv-edge profile``: measure which heads of a model find the answers in a text."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from windowkv_edge._files import check_output
from windowkv_edge._text import for_terminal
from windowkv_edge.heads import HeadScores, profile_beside
from windowkv_edge.profile import DEPTHS, LENGTHS, Outcome, Plan, check_copy, measure, write_gguf

from .common import CLIError, open_model, parse_lengths, read_text, reports_errors

__all__ = ["profile"]


def _parse_depths(text: str) -> tuple[float, ...]:
    try:
        depths = tuple(float(part) for part in text.split(","))
    except ValueError:
        depths = ()
    if not depths or not all(0 <= depth <= 1 for depth in depths):  # nan is none of these
        raise CLIError(f"--depths is {text!r}, expected shares of 0 to 1 with commas between them")
    return depths


@reports_errors
def profile(
    model: Annotated[str, typer.Argument(help="GGUF file, or smollm2.")],
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write. Default: MODEL.heads.json, where sessions find it.")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="Also write a copy of the model that carries the scores.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of text around the needle.")] = ",".join(map(str, LENGTHS)),
    depths: Annotated[str, typer.Option(help="Places of the needle, as shares of the text.")] = ",".join(
        map(str, DEPTHS)
    ),
    text: Annotated[Path | None, typer.Option(help="The text. Default: the one that is shipped.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Measure head scores for headkv, headkv-r2 and windowkv+headkv. If it is interrupted, the same command goes on."""
    console = Console()
    info = open_model(model)
    all_lengths = parse_lengths(lengths)
    if min(all_lengths) < 64:
        raise CLIError(f"--lengths is {lengths!r}, expected at least 64 tokens each")
    plan = Plan(tuple(all_lengths), _parse_depths(depths), text=None if text is None else read_text(text))
    target = profile_beside(info.path) if out is None else out
    part = target.with_name(target.name + ".measuring.jsonl")
    check_output(target, "--out", keeps=(info.path, text, gguf))
    if gguf is not None:
        check_copy(info.path, gguf, keeps=(text,))

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    right = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("needles")

        def report(done: int, total: int, outcome: Outcome | None) -> None:
            nonlocal right
            right += outcome is not None and outcome.earned is not None
            progress.update(task, completed=done, total=total, description=f"needles, {right} right")

        command = shlex.join(["windowkv-edge", *sys.argv[1:]])
        try:
            scores = measure(info.path, part, plan, threads, report, command)
        except KeyboardInterrupt:
            progress.stop()
            console.print(for_terminal(f"interrupted; the same command goes on from {part}"), markup=False)
            raise typer.Exit(130) from None
    try:
        scores.save(target)
    except OSError as error:
        raise CLIError(
            f"cannot write {target}: {error.strerror or error}; make room and run the same command again, "
            "nothing is measured twice"
        ) from error
    part.unlink(missing_ok=True)
    _print(console, scores, target)
    if gguf is not None:
        write_gguf(info.path, scores, gguf)
        console.print(for_terminal(f"{gguf} carries the scores"), markup=False)


def _print(console: Console, scores: HeadScores, target: Path) -> None:
    for kind, count in scores.about["counts"].items():
        console.print(f"{kind}: {count['right']} of {count['asked']} answers were right and count")
        if kind in scores.scores:
            rows = scores.scores[kind]
            order = rows.ravel().argsort()[::-1]
            share = rows.ravel()[order][: max(1, rows.size // 10)].sum() / max(rows.sum(), 1e-12)
            best = ", ".join(f"{i // rows.shape[1]}-{i % rows.shape[1]}" for i in order[:5])
            console.print(f"   a tenth of the heads holds {share:.0%} of the score; most: {best} (layer-head)")
    console.print(for_terminal(f"written to {target}"), markup=False)
