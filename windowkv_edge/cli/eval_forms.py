"""``windowkv-edge eval forms``: where the question stands, with sessions as a chat has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from windowkv_edge import KVPolicy, Llama
from windowkv_edge.bench.session import Model
from windowkv_edge.eval import Records, Style, hay_tokens
from windowkv_edge.eval.forms import FORMS, FormCase, ask, form_cases, row
from windowkv_edge.eval.run import FULL, OWN
from windowkv_edge.repeating import ASKED_QUERIES
from windowkv_edge.replay import N_ROOM

from .bars import suite_bars
from .common import load, parse_lengths, reports_errors
from .eval_run import (
    Budgets, First, GPULayers, Haystack, Lengths, ModelArg, Out, Policies, Run, Seed, Threads, about_haystack, chosen,
    start,
)  # fmt: skip

__all__ = ["forms"]


@dataclass(frozen=True)
class _FormsRun(Run):
    """Every policy, budget and query has a session of its own, which reads every chat.

    Attributes:
        queries: values of ``kv_query``, for the policies that do as they are told; others have their own alone.
    """

    queries: tuple[str, ...] = ("auto",)

    def _variants(self) -> Iterator[tuple[str, KVPolicy | None, float | int | None, str]]:
        yield FULL, None, None, "auto"
        for name, policy in self.plan.policies.items():
            for query in self.queries if policy.queries else ("auto",):
                for budget in self.plan.budgets:
                    yield name if query == "auto" else f"{name}, {query}", policy, budget, query

    def _loop(self, model: Model, cases: Sequence[Any], records: Records, n_ctx: int | None) -> None:
        n_ctx = n_ctx or max(case.n_positions for case in cases) + 1
        self._check_positions(n_ctx)
        todo: list[FormCase] = [own for own in cases if own.key not in records]
        variants = list(self._variants())
        with suite_bars(len(todo)) as bars, ExitStack() as stack:
            if records.n_old:
                bars.note(f"{self.out} has {records.n_old} of {len(cases)} chats, going on from there")
            sessions = []
            for name, policy, budget, query in variants if todo else ():
                llm = load(
                    Llama, self.info, n_ctx + N_ROOM, self.plan.threads, policy, budget, n_gpu_layers=self.gpu_layers,
                    kv_query=query, kv_checkpoints=0,
                )  # fmt: skip
                stack.callback(llm.close)
                about = {"policy": name, "budget": budget, "cells": llm.kv_stats().cell_types[0]}
                sessions.append((llm, about))
            for case in todo:
                results: list[dict[str, Any]] = []
                for llm, about in sessions:
                    results.append(ask(llm, case, about))
                    if results[0]["score"] == 0:
                        break
                records.add(row(case, results))
                bars.done(case.key)


@reports_errors
def forms(
    model: ModelArg,
    lengths: Lengths = "800",
    kinds: Annotated[str, typer.Option("--forms", help="Of " + ", ".join(FORMS) + ".")] = ",".join(FORMS),
    count: Annotated[int, typer.Option(min=1, help="Documents per length.")] = 4,
    haystack: Haystack = None,
    policies: Policies = "auto,windowkv,headkv-r2,snapkv",
    queries: Annotated[
        str, typer.Option(help="What cells are kept for, of " + ", ".join(ASKED_QUERIES) + " (kv_query).")
    ] = "auto,last",
    budgets: Budgets = "12%",
    seed: Seed = 0,
    first: First = 0,
    out: Out = None,
    threads: Threads = None,
    gpu_layers: GPULayers = 0,
) -> None:
    """Chats about a document whose question stands behind it, in front of it, or has rules or examples behind it."""
    asked = tuple(chosen(queries, ASKED_QUERIES, "--queries"))
    own = start("forms", model, policies, budgets, OWN, seed, out, threads, gpu_layers)
    run = _FormsRun(**vars(own), queries=asked)
    sizes, names = parse_lengths(lengths), chosen(kinds, FORMS, "--forms")
    about = {
        "suite": "forms", "lengths": sizes, "forms": names, "count": count, "first": first, "queries": asked,
        "haystack": about_haystack(haystack),
    }  # fmt: skip

    def prepare(weights: Model) -> list[Any]:
        hay = hay_tokens(weights, haystack, 4 * max(sizes), seed)
        return list(form_cases(Style(weights, chat=True), hay, sizes, names, count, seed, first))

    run.go(about, prepare)
