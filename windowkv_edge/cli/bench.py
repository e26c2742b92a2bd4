"""``windowkv-edge bench``: speed and memory of policies beside stock llama.cpp."""

from __future__ import annotations

import platform
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import llama_cpp
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import windowkv_edge
from windowkv_edge._files import owned
from windowkv_edge._json import dumps
from windowkv_edge._text import for_markup, for_terminal
from windowkv_edge.bench import SHAPES, Bench, Plan, Row, fetch_shape, plot
from windowkv_edge.bench.plot import check_plot
from windowkv_edge.bench.run import STOCK_TYPES, fits
from windowkv_edge.bench.session import TYPES, Model
from windowkv_edge.gguf_info import GGUFInfo, read_info

from .common import (
    CLIError,
    mib,
    n_cores,
    open_model,
    parse_budget,
    parse_lengths,
    parse_policies,
    read_text,
    reports_errors,
    split_names,
)

__all__ = ["bench"]

_WIDTH = 110  # of the tables in a file


@reports_errors
def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"A GGUF file, 'smollm2' (fetched once), or a shape with random weights: {', '.join(SHAPES)}.",
        ),
    ],
    lengths: Annotated[str, typer.Option(help="Positions, comma-separated; 4k is 4096.")] = "4k",
    policies: Annotated[
        str, typer.Option(help="Policies, comma-separated; 'full' evicts nothing and attends with our kernel.")
    ] = "windowkv,full",
    budgets: Annotated[str, typer.Option(help="Cells that stay: 12% of the prompt, or a number.")] = "12%",
    types: Annotated[str, typer.Option(help="Cells of the policies: f32, f16, bf16, q8_0, q4_0.")] = "f16",
    baselines: Annotated[
        str | None, typer.Option(help="Cells of the stock sessions; '' for none. Default: f16, q8_0 and q4_0.")
    ] = None,
    references: Annotated[
        str, typer.Option(help="Depths of more stock f16 sessions; 2 shows what the weights cost; '' for none.")
    ] = "2,512",
    rounds: Annotated[int, typer.Option(min=1, help="Tokens that every session decodes.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: the physical cores.")] = None,
    gpu_layers: Annotated[int, typer.Option(help="Layers on the GPU, -1 for all.")] = 0,
    fill: Annotated[
        bool | None,
        typer.Option(
            "--fill/--prefill", help="Random cells, or an evaluated prompt. Default: random cells for shapes only."
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact/--fast", help="Attend to f16 and f32 cells as stock until some are evicted, or as we do."
        ),
    ] = True,
    text: Annotated[Path | None, typer.Option(help="The prompt. Default: a text that is shipped.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Write a picture: .png, .svg or .pdf.")] = None,
) -> None:
    """Prefill and decode speed, KV bytes and RSS of policies beside stock llama.cpp in the same run.

    A gate comes first: while nothing is evicted, the answers have to be those of stock. Then the sessions take turns,
    at every chunk of the prompt and at every token.
    """
    plan = Plan(
        lengths=tuple(dict.fromkeys(parse_lengths(lengths))),
        policies=parse_policies(policies),
        budgets=tuple(dict.fromkeys(parse_budget(part) for part in split_names(budgets))),
        types=_types(types, "--types"),
        baselines=STOCK_TYPES if baselines is None else _types(baselines, "--baselines"),
        references=tuple(dict.fromkeys(parse_lengths(references, "--references"))) if references.strip() else (),
        rounds=rounds,
        threads=threads or n_cores(),
        fill=model in SHAPES if fill is None else fill,
        exact=exact,
    )
    if not plan.policies or not plan.budgets or not plan.types:
        raise CLIError("--policies, --budgets and --types need at least one entry each")
    with ExitStack() as stack:
        if plot_to is not None:
            check_plot(plot_to)
            stack.enter_context(owned(plot_to, "--plot", keeps=(None if model in SHAPES else Path(model), text)))
        _run(model, plan, gpu_layers, baselines is None, text, as_json, plot_to)


def _run(
    model: str, plan: Plan, gpu_layers: int, fit_baselines: bool, text: Path | None, as_json: bool, plot_to: Path | None
) -> None:
    """Measure, print, and draw."""
    prompt = read_text(text) if text is not None else _shipped_text()

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loading", total=None)

        def wrote(done: int, total: int) -> None:
            progress.update(task, description=for_terminal(f"writing {model}"), completed=done, total=total)

        info = read_info(fetch_shape(model, wrote)) if model in SHAPES else open_model(model)
        if fit_baselines:  # blocks of 32 values do not divide every head
            plan = replace(plan, baselines=tuple(cells for cells in STOCK_TYPES if fits(info, cells)))
        weights = Model(info.path, gpu_layers)
        try:
            run = Bench(
                weights, info, plan, weights.tokenize(prompt), is_random=model in SHAPES,
                report=lambda what, steps: progress.update(task, description=for_terminal(what), advance=steps),
            )  # fmt: skip
            progress.update(task, description="gate", completed=0, total=run.n_steps)
            rows = run.run()
        finally:
            weights.close()

    about = _about(info, plan, gpu_layers)
    if as_json:
        print(dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1))
    else:
        console = Console()
        _print(console if console.is_terminal else Console(width=_WIDTH), rows, about)
    if plot_to is not None:
        try:
            plot(rows, about["title"], plot_to)
        except OSError as error:
            raise CLIError(f"cannot write {plot_to}: {error.strerror or error}; give another --plot") from error


def _types(text: str, option: str) -> tuple[str, ...]:
    names = split_names(text)
    for name in names:
        if name not in TYPES:
            raise CLIError(f"{option} has {name!r}, expected some of {', '.join(TYPES)}")
    return tuple(names)


def _shipped_text() -> str:
    return (resources.files("windowkv_edge") / "data" / "document.txt").read_text(encoding="utf-8")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _about(info: GGUFInfo, plan: Plan, gpu_layers: int) -> dict[str, Any]:
    cells = "random cells" if plan.fill else "an evaluated prompt"
    offloaded = f", {gpu_layers if gpu_layers > 0 else 'all'} layers on the GPU" if gpu_layers else ""
    return {
        "title": f"{info.path.name}, {_cpu()}, {plan.threads} threads{offloaded}, {cells}",
        "gpu_layers": gpu_layers,
        "model": info.path.name,
        "n_layer": info.n_layer,
        "n_head_kv": max(info.n_head_kv, default=0),
        "head_dim": info.head_dim_k,
        "cpu": _cpu(),
        "features": llama_cpp.llama_print_system_info().decode("utf-8", "replace"),
        "system": platform.platform(),
        "threads": plan.threads,
        "filled": plan.fill,
        "exact": plan.exact,
        "rounds": plan.rounds,
        "version": windowkv_edge.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _print(console: Console, rows: list[Row], about: dict[str, Any]) -> None:
    console.print(for_terminal(about["title"]), highlight=False, markup=False, soft_wrap=True)
    for length in dict.fromkeys(row.length for row in rows):
        group = [row for row in rows if row.length == length]
        stock = next((row for row in group if row.session == "stock f16"), None)
        table = Table(title=f"{length:,} positions", title_justify="left", title_style="")
        table.add_column("session", no_wrap=True)
        for name in ("cells", "prefill tok/s", "compact ms", "decode ms", "x stock f16", "KV MiB", "peak", "RSS MiB"):
            table.add_column(name, justify="right")
        on_device = any(row.device_bytes for row in group)
        if on_device:
            table.add_column("GPU MiB", justify="right")
        for row in group:
            table.add_row(
                for_markup(row.session),
                f"{row.n_cells:,.0f}",
                "" if row.prefill_tokens_per_s is None else f"{row.prefill_tokens_per_s:,.1f}",
                "" if row.compaction_ms is None else f"{row.compaction_ms:,.0f}",
                f"{row.decode_ms:.2f}",
                "" if stock is None else f"{stock.decode_ms / row.decode_ms:.2f}",
                mib(row.kv_bytes),
                mib(row.kv_bytes_peak),
                mib(row.rss_bytes),
                *([mib(row.device_bytes)] if on_device else []),
            )
        console.print(table)
