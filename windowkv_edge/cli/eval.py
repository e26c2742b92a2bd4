"""``windowkv-edge eval``: what compression costs, on your model and your kind of text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from windowkv_edge._files import owned, write_text, writing
from windowkv_edge._text import for_file_name, for_terminal
from windowkv_edge.bench.session import Model
from windowkv_edge.eval import (
    Case,
    FidelityCase,
    Style,
    fidelity_cases,
    fingerprint,
    hay_tokens,
    needle_cases,
    prose,
    read_texts,
    ruler_cases,
    tasks_cases,
    turns_cases,
)
from windowkv_edge.eval import needle as needles
from windowkv_edge.eval import ruler as rulers
from windowkv_edge.eval.run import OWN
from windowkv_edge.eval.tables import markdown
from windowkv_edge.eval.metrics import score
from windowkv_edge.eval.page import html
from windowkv_edge.eval.pictures import png, why_none
from windowkv_edge.eval.results import Results, load
from windowkv_edge.profile import sha256

from .common import CLIError, open_model, parse_lengths, reports_errors
from .eval_run import (
    Budgets,
    Chat,
    First,
    GPULayers,
    Haystack,
    Lengths,
    ModelArg,
    Out,
    Policies,
    Seed,
    Threads,
    Types,
    about_haystack,
    chosen,
    make_folder,
    parse_depths,
    start,
)

__all__ = ["app"]

app = typer.Typer(help="What compression costs: needles, RULER's tasks, distances, second questions, LongBench files.")

POLICIES = (
    "auto,windowkv+headkv,windowkv+adakv,windowkv,windowkv-paper,headkv-r2,adakv,snapkv,pyramidkv,streamingllm"
)
BUDGETS = "12%,6%,3%"


@app.command()
@reports_errors
def needle(
    model: ModelArg,
    lengths: Lengths = "1k,2k,4k",
    depths: Annotated[str, typer.Option(help="Shares of the text in front of the needle.")] = "0.1,0.5,0.9",
    kinds: Annotated[str, typer.Option(help="Needles: " + ", ".join(needles.KINDS) + ".")] = ",".join(needles.KINDS),
    count: Annotated[int, typer.Option(min=1, help="Needles of each kind at every length and depth.")] = 1,
    haystack: Haystack = None,
    policies: Policies = POLICIES,
    budgets: Budgets = BUDGETS,
    types: Types = OWN,
    chat: Chat = False,
    seed: Seed = 0,
    first: First = 0,
    out: Out = None,
    threads: Threads = None,
    gpu_layers: GPULayers = 0,
) -> None:
    """Facts hidden in a text at several depths, with the question at its end."""
    run = start("needle", model, policies, budgets, types, seed, out, threads, gpu_layers)
    sizes, places = parse_lengths(lengths), parse_depths(depths)
    names = chosen(kinds, needles.KINDS, "--kinds")
    about = {
        "suite": "needle", "lengths": sizes, "depths": places, "kinds": names, "count": count, "first": first,
        "haystack": about_haystack(haystack), "chat": chat,
    }  # fmt: skip

    def prepare(weights: Model) -> list[Case]:
        hay = hay_tokens(weights, haystack, max(sizes), seed)
        return list(needle_cases(Style(weights, chat), hay, sizes, places, names, count, seed, first))

    run.go(about, prepare)


@app.command()
@reports_errors
def ruler(
    model: ModelArg,
    lengths: Lengths = "1k,2k,4k",
    tasks: Annotated[str, typer.Option(help="Of " + ", ".join(rulers.TASKS) + ".")] = ",".join(rulers.TASKS),
    count: Annotated[int, typer.Option(min=1, help="Prompts of each task at every length.")] = 4,
    haystack: Haystack = None,
    policies: Policies = POLICIES,
    budgets: Budgets = BUDGETS,
    types: Types = OWN,
    chat: Chat = False,
    seed: Seed = 0,
    first: First = 0,
    out: Out = None,
    threads: Threads = None,
    gpu_layers: GPULayers = 0,
) -> None:
    """RULER's task families: keys, values, variables, frequent words, questions."""
    run = start("ruler", model, policies, budgets, types, seed, out, threads, gpu_layers)
    sizes, names = parse_lengths(lengths), chosen(tasks, list(rulers.TASKS), "--tasks")
    if min(sizes) < 512:
        raise CLIError(f"--lengths has {min(sizes)}, expected at least 512: the tasks need room for what they hide")
    about = {
        "suite": "ruler", "lengths": sizes, "tasks": names, "count": count, "first": first,
        "haystack": about_haystack(haystack), "chat": chat,
    }  # fmt: skip

    def prepare(weights: Model) -> list[Case]:
        hay = hay_tokens(weights, haystack, max(sizes), seed)
        return list(ruler_cases(Style(weights, chat), hay, sizes, names, count, seed, first))

    run.go(about, prepare)


@app.command()
@reports_errors
def fidelity(
    model: ModelArg,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text or a folder; several times for several. Default: generated prose."),
    ] = None,
    lengths: Lengths = "2k",
    windows: Annotated[int, typer.Option(min=1, help="Windows per text and length.")] = 4,
    follow: Annotated[int, typer.Option(min=2, max=512, help="Tokens behind each that are forced.")] = 96,
    policies: Policies = POLICIES,
    budgets: Budgets = BUDGETS,
    types: Types = OWN,
    seed: Seed = 0,
    out: Out = None,
    threads: Threads = None,
    gpu_layers: GPULayers = 0,
) -> None:
    """KL divergence, top-1 agreement and NLL increase against the full cache over free text."""
    run = start("fidelity", model, policies, budgets, types, seed, out, threads, gpu_layers)
    sizes = parse_lengths(lengths)
    texts = [own for path in text or [] for own in read_texts(path)]
    about = {
        "suite": "fidelity", "lengths": sizes, "windows": windows, "follow": follow,
        "texts": [name for name, _ in texts] or ["own prose"], "texts_sha256": fingerprint(texts),
    }  # fmt: skip

    def prepare(weights: Model) -> list[FidelityCase]:
        own = texts or [("own prose", prose(windows * 8 * (max(sizes) + follow), seed))]
        return list(fidelity_cases(Style(weights), own, sizes, follow, windows))

    run.go(about, prepare)


@app.command()
@reports_errors
def turns(
    model: ModelArg,
    lengths: Lengths = "1k,2k",
    count: Annotated[int, typer.Option(min=1, help="Documents per length.")] = 4,
    questions: Annotated[int, typer.Option(min=2, max=20, help="Questions per document.")] = 4,
    haystack: Haystack = None,
    policies: Policies = POLICIES,
    budgets: Budgets = BUDGETS,
    types: Types = OWN,
    chat: Chat = False,
    seed: Seed = 0,
    first: First = 0,
    out: Out = None,
    threads: Threads = None,
    gpu_layers: GPULayers = 0,
) -> None:
    """Compact on the first question, then ask about other places of the same document."""
    run = start("turns", model, policies, budgets, types, seed, out, threads, gpu_layers)
    sizes = parse_lengths(lengths)
    about = {
        "suite": "turns", "lengths": sizes, "count": count, "questions": questions, "first": first,
        "haystack": about_haystack(haystack), "chat": chat,
    }  # fmt: skip

    def prepare(weights: Model) -> list[Case]:
        hay = hay_tokens(weights, haystack, max(sizes), seed)
        return list(turns_cases(Style(weights, chat), hay, sizes, count, questions, seed, first))

    run.go(about, prepare)


@app.command()
@reports_errors
def tasks(
    model: ModelArg,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines in LongBench's format.")],
    n_ctx: Annotated[int, typer.Option(min=256, help="Positions; longer contexts lose their middle.")] = 4096,
    limit: Annotated[int | None, typer.Option(min=1, help="Lines at most.")] = None,
    before: Annotated[
        bool, typer.Option("--before", help="Compact each context once, before any of its questions is read.")
    ] = False,
    policies: Policies = POLICIES,
    budgets: Budgets = BUDGETS,
    types: Types = OWN,
    chat: Chat = False,
    seed: Seed = 0,
    out: Out = None,
    threads: Threads = None,
    gpu_layers: GPULayers = 0,
) -> None:
    """Questions, summaries, classes and code of files in LongBench's format."""
    run = start("tasks", model, policies, budgets, types, seed, out, threads, gpu_layers)
    about = {"suite": "tasks", "file": file.name, "n_ctx": n_ctx, "limit": limit, "chat": chat, "before": before}

    def prepare(weights: Model) -> list[Case]:
        cases, skipped = tasks_cases(Style(weights, chat), file, n_ctx, limit, before)
        for reason, number in skipped.items():
            typer.echo(for_terminal(f"skipped {number} x: {reason}"), err=True)
        for metric in dict.fromkeys(case.metric for case in cases):
            score(metric, "", ("a",))  # a missing package is found here, not behind the first prompt
        about["sha256"], about["skipped"] = sha256(file), sum(skipped.values())
        return cases

    run.go(about, prepare, n_ctx)


@app.command("all")
@reports_errors
def all_suites(
    model: ModelArg,
    to: Annotated[Path, typer.Option("--to", help="Folder for results, tables, pictures and the page.")] = Path("eval"),
    small: Annotated[bool, typer.Option("--small", help="A few minutes instead of an hour: one short length.")] = False,
    policies: Policies = POLICIES,
    budgets: Budgets = "12%,6%,3%,1.5%",
    types: Types = OWN,
    seed: Seed = 0,
    threads: Threads = None,
    gpu_layers: GPULayers = 0,
) -> None:
    """Needles in two texts, RULER, second questions, distances, and a report: what eval/README.md shows."""
    if why := why_none():
        typer.echo(f"the report will have no pictures: {why}", err=True)
    journey = Path(str(resources.files("windowkv_edge") / "data" / "journey.txt"))
    lengths, depths, short = ("600", "0.5", "600") if small else ("1000,2000,4000", "0.2,0.8", "1000,2000")
    common: dict[str, Any] = {
        "policies": policies, "budgets": budgets, "types": types, "seed": seed, "threads": threads,
        "gpu_layers": gpu_layers,
    }  # fmt: skip
    files = {name: to / f"{name}.jsonl" for name in ("needle-prose", "needle-journey", "ruler", "turns", "fidelity")}
    open_model(model)  # before anything is written
    with _folder_of_one_run(to):
        text = to / "prose.txt"
        with _tells_what_to_do(to):
            write_text(text, prose(60_000, seed))
        needle(model, lengths, depths, first=0, out=files["needle-prose"], **common)
        needle(model, lengths, depths, first=1, haystack=journey, out=files["needle-journey"], **common)
        ruler(model, "600" if small else "1000,2000", count=1 if small else 2, out=files["ruler"], **common)
        turns(model, short, count=1 if small else 3, haystack=journey, out=files["turns"], **common)
        size, windows = ("600", 1) if small else ("2000", 2)
        fidelity(model, [journey, text], size, windows, out=files["fidelity"], **common)
        _write_report(load(files.values()), to)


@app.command()
@reports_errors
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results files; several give ranks as well.")],
    to: Annotated[Path | None, typer.Option("--to", help="Folder for report.md, report.html and PNG pictures.")] = None,
) -> None:
    """Tables and pictures of results: accuracy against bytes, by depth and as heatmaps, speed against bytes."""
    results = load(files)
    if to is None:
        print(markdown(results))
        return
    with _folder_of_one_run(to):
        _write_report(results, to)


@contextmanager
def _folder_of_one_run(to: Path) -> Iterator[None]:
    """Make a folder, and be the one run that writes a report into it."""
    make_folder(to, "--to")
    with owned(to / "report.md", "--to"):
        yield


@contextmanager
def _tells_what_to_do(to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CLIError(
            f"cannot write to {to}: {error.strerror or error}; "
            "make room and run the same command again, or give another --to"
        ) from error


def _write_report(results: Sequence[Results], to: Path) -> None:
    """Tables, a page, and pictures if there is matplotlib."""
    with _tells_what_to_do(to):
        write_text(to / "report.md", markdown(results))
        why = why_none()
        drawn: list[dict[str, bytes]] = [{} if why else png(res) for res in results]
        write_text(to / "report.html", html(results, drawn))
        for res, files in zip(results, drawn, strict=True):
            for name, data in files.items():
                with writing(to / f"{for_file_name(res.title)}-{name}.png") as part:
                    part.write_bytes(data)
    pictures = f"(no pictures: {why})" if why else "and pictures"
    print(for_terminal(f"report.md, report.html {pictures} are in {to}{os.sep}"))
