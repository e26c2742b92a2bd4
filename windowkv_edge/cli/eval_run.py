"""What the commands of ``windowkv-edge eval`` share: their options, and one run of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

import windowkv_edge
from windowkv_edge._files import owned
from windowkv_edge._native import build_stamp
from windowkv_edge.bench.session import Model
from windowkv_edge.budget import TYPES
from windowkv_edge.eval import (
    Case,
    FidelityCase,
    GenerateCase,
    Generator,
    Plan,
    Records,
    Runner,
    fingerprint,
    read_texts,
)
from windowkv_edge.eval.run import OWN
from windowkv_edge.eval.tables import markdown
from windowkv_edge.eval.results import load
from windowkv_edge.gguf_info import GGUFInfo
from windowkv_edge.profile import sha256

from .bars import suite_bars
from .common import CLIError, n_cores, open_model, parse_budget, parse_policies, split_names

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or 'smollm2' (fetched once).")]
Out = Annotated[
    Path | None, typer.Option(help="Results, JSON lines; a run that stopped goes on. Default: eval-<name>.jsonl.")
]
Policies = Annotated[
    str, typer.Option(help="Policies, comma-separated, with parameters if wanted: 'windowkv(omega=8),snapkv'.")
]
Budgets = Annotated[
    str,
    typer.Option(help="Shares of the bytes that the whole prompt takes in f16 cells, or numbers of cells per head."),
]
Types = Annotated[str, typer.Option(help="Cells: f32, f16, bf16, q8_0, q4_0, or own: what each policy prefers.")]
Lengths = Annotated[str, typer.Option(help="Tokens, comma-separated; 4k is 4096.")]
Haystack = Annotated[
    Path | None, typer.Option(help="A text, or a folder of .txt and .md files. Default: generated prose.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
First = Annotated[int, typer.Option(min=0, help="Number of the first item of every kind; others are other facts.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: the physical cores.")]
GPULayers = Annotated[int, typer.Option(help="Layers on the GPU, -1 for all.")]

Cases = Sequence[Case] | Sequence[FidelityCase] | Sequence[GenerateCase]


@dataclass(frozen=True)
class Run:
    """What every evaluation takes."""

    info: GGUFInfo
    plan: Plan
    out: Path
    seed: int
    gpu_layers: int

    def go(
        self,
        about: Mapping[str, Any],
        prepare: Callable[[Model], Cases],
        n_ctx: int | None = None,
    ) -> None:
        """Build the prompts, run those that the results file lacks, print the tables."""
        make_folder(self.out.parent, "--out")
        with owned(self.out, "--out"):
            self._measure(about, prepare, n_ctx)
        results = load([self.out])
        console = Console()
        console.print(
            Markdown(markdown(results)) if console.is_terminal else markdown(results), markup=False, soft_wrap=True
        )

    def _measure(
        self,
        about: Mapping[str, Any],
        prepare: Callable[[Model], Cases],
        n_ctx: int | None,
    ) -> None:
        model = Model(self.info.path, self.gpu_layers)
        try:
            cases = prepare(model)
            header = {
                "model": self.info.path.name,
                "model_sha256": sha256(self.info.path),
                "package": windowkv_edge.__version__,
                "build": build_stamp()[:12],
                "seed": self.seed,
                "policies": {name: repr(policy) for name, policy in self.plan.policies.items()},
                "budgets": self.plan.budgets,
                "cells": self.plan.types,
                "threads": self.plan.threads,
                "gpu_layers": self.gpu_layers,
                **about,
            }
            with Records(self.out, header, free=("threads",)) as records:
                self._loop(model, cases, records, n_ctx)
        finally:
            model.close()

    def _loop(
        self, model: Model, cases: Cases, records: Records, n_ctx: int | None
    ) -> None:
        n_ctx = n_ctx or max(n_positions(case) for case in cases)
        self._check_positions(n_ctx)
        with suite_bars(len(cases)) as bars:
            if records.n_old:
                bars.note(f"{self.out} has {records.n_old} of {len(cases)} prompts, going on from there")
            if isinstance(cases[0], GenerateCase):
                Generator(model, self.plan, records, bars.step).run(cases)  # type: ignore[arg-type]
                return
            with Runner(model, self.plan, n_ctx, records, bars.done, bars.read) as runner:
                if isinstance(cases[0], FidelityCase):
                    runner.run_fidelity(cases)  # type: ignore[arg-type]
                else:
                    runner.run(cases)  # type: ignore[arg-type]

    def _check_positions(self, n_ctx: int) -> None:
        if n_ctx > self.info.n_ctx_train:
            raise CLIError(
                f"the longest prompt takes {n_ctx:,} positions, {self.info.path.name} was trained with "
                f"{self.info.n_ctx_train:,}; ask for shorter --lengths"
            )


def make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CLIError(f"cannot make the folder {path}: {error.strerror or error}; give another {option}") from error


def n_positions(case: Case | FidelityCase | GenerateCase) -> int:
    if isinstance(case, GenerateCase):
        return len(case.prompt) + case.n_tokens + 1
    behind = len(case.follow) if isinstance(case, FidelityCase) else len(case.follow_up) + case.max_tokens
    return len(case.prompt) + behind + 1


def start(
    name: str,
    model: str,
    policies: str,
    budgets: str,
    types: str,
    seed: int,
    out: Path | None,
    threads: int | None,
    gpu_layers: int,
) -> Run:
    plan = Plan(
        policies=parse_policies(policies),
        budgets=tuple(dict.fromkeys(parse_budget(part) for part in split_names(budgets))),
        types=tuple(split_names(types)),
        threads=threads or n_cores(),
    )
    for cells in plan.types:
        if cells not in (OWN, *TYPES):
            raise CLIError(f"--types has {cells!r}, expected some of {OWN}, {', '.join(TYPES)}")
    return Run(open_model(model), plan, out or Path(f"eval-{name}.jsonl"), seed, gpu_layers)


def chosen(text: str, known: Sequence[str], option: str) -> list[str]:
    names = split_names(text)
    for name in names:
        if name not in known:
            raise CLIError(f"{option} has {name!r}, expected some of {', '.join(known)}")
    if not names:
        raise CLIError(f"{option} is empty, expected some of {', '.join(known)}")
    return names


def parse_depths(text: str) -> list[float]:
    res = []
    for part in split_names(text):
        try:
            value = float(part[:-1]) / 100 if part.endswith("%") else float(part)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise CLIError(f"--depths has {part!r}, expected shares of the text such as 0.5 or 50%")
        res.append(value)
    if not res:
        raise CLIError("--depths is empty, expected shares of the text such as 0.1,0.5,0.9")
    return res


def about_haystack(haystack: Path | None) -> str:
    """Name of the haystack and hash of its contents: with a changed text it is another run."""
    return "own prose" if haystack is None else f"{haystack.name} {fingerprint(read_texts(haystack))[:16]}"


