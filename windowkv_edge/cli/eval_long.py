"""``windowkv-edge eval long``: documents longer than the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from windowkv_edge.bench.session import Model
from windowkv_edge.budget import TYPES
from windowkv_edge.eval import Case, Records, Style, hay_tokens, needle_cases
from windowkv_edge.eval import needle as needles
from windowkv_edge.eval.long import LongPlan, LongRunner
from windowkv_edge.eval.run import OWN, Plan
from windowkv_edge.policies import Full

from .bars import suite_bars
from .common import CLIError, n_cores, open_model, parse_lengths, parse_policies, reports_errors
from .eval_run import (
    Chat,
    First,
    GPULayers,
    Haystack,
    ModelArg,
    Out,
    Run,
    Seed,
    Threads,
    about_haystack,
    chosen,
    n_positions,
    parse_depths,
)

__all__ = ["long"]

_TIMES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class _LongRun(Run):
    """A run whose documents are read within limits."""

    long: LongPlan

    def _loop(self, model: Model, cases: Sequence[Any], records: Records, n_ctx: int | None) -> None:
        n_ctx = max(n_positions(case) for case in cases)
        self._check_positions(n_ctx)
        with suite_bars(len(cases)) as bars:
            if records.n_old:
                bars.note(f"{self.out} has {records.n_old} of {len(cases)} prompts, going on from there")
            with LongRunner(model, self.long, n_ctx, records, bars.done, bars.read) as runner:
                runner.run(cases)


@reports_errors
def long(
    model: ModelArg,
    limits: Annotated[str, typer.Option("--limits", help="Cells per head, comma-separated; 1k is 1024.")] = "512",
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens of the documents. Default: 1, 2, 4, 8 and 16 times the largest limit, as they fit."),
    ] = None,
    depths: Annotated[str, typer.Option(help="Shares of the text in front of the needle.")] = "0.1,0.5,0.9",
    kinds: Annotated[str, typer.Option(help="Needles: " + ", ".join(needles.KINDS) + ".")] = ",".join(needles.KINDS),
    count: Annotated[int, typer.Option(min=1, help="Needles of each kind at every length and depth.")] = 1,
    haystack: Haystack = None,
    policies: Annotated[str, typer.Option(help="Policies that read within the limits.")] = "auto,streamingllm",
    exact: Annotated[
        str, typer.Option(help="Of these the ones that also compact the full cache to them; '' for none.")
    ] = "auto",
    types: Annotated[
        str, typer.Option(help="Cells of all: f16, q8_0 and so on, or own: what the first policy prefers.")
    ] = OWN,
    chat: Chat = False,
    seed: Seed = 0,
    first: First = 0,
    out: Out = None,
    threads: Threads = None,
    gpu_layers: GPULayers = 0,
) -> None:
    """Documents longer than the memory: read within a limit, with the full cache, and compacted to it afterwards."""
    info = open_model(model)
    named = parse_policies(policies)
    sizes = tuple(dict.fromkeys(parse_lengths(limits, "--limits")))
    if any(isinstance(policy, Full) for policy in named.values()):
        raise CLIError("--policies has full, which keeps every cell and is measured in any case; leave it out")
    if not named:
        raise CLIError("--policies is empty, expected some such as auto,streamingllm")
    exact_names = chosen(exact, tuple(named), "--exact") if exact.strip() else []
    cells = next(iter(named.values())).cells or "f16" if types == OWN else types
    if cells not in TYPES:
        raise CLIError(f"--types has {types!r}, expected {OWN} or one of {', '.join(TYPES)}")
    plan = Plan(named, sizes, (cells,), threads or n_cores())
    long_plan = LongPlan(named, exact_names, sizes, cells, plan.threads)
    room = info.n_ctx_train - 256  # for the question and its answer
    tokens = parse_lengths(lengths) if lengths else [n * max(sizes) for n in _TIMES if n * max(sizes) <= room]
    if not tokens:
        raise CLIError(f"{info.path.name} was trained with {info.n_ctx_train:,} positions; give smaller --limits")
    places, names = parse_depths(depths), chosen(kinds, needles.KINDS, "--kinds")
    run = _LongRun(info, plan, out or Path("eval-long.jsonl"), seed, gpu_layers, long=long_plan)
    about = {
        "suite": "long", "lengths": tokens, "depths": places, "kinds": names, "count": count, "first": first,
        "haystack": about_haystack(haystack), "chat": chat, "exact": exact_names,
    }  # fmt: skip

    def prepare(weights: Model) -> list[Case]:
        hay = hay_tokens(weights, haystack, max(tokens), seed)
        cases = needle_cases(Style(weights, chat), hay, tokens, places, names, count, seed, first)
        return [replace(case, suite="long") for case in cases]

    run.go(about, prepare)
