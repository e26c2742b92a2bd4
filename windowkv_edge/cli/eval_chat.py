"""``windowkv-edge eval chat``: conversations, with sessions as a chat has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from windowkv_edge import KVPolicy, Llama
from windowkv_edge.bench.session import Model
from windowkv_edge.eval import Conversation, Records, Style, conversations, hay_tokens
from windowkv_edge.eval.chat import MIN_TURNS, Replies, rows
from windowkv_edge.eval.run import FULL, OWN
from windowkv_edge.replay import N_ROOM

from .bars import suite_bars
from .common import CLIError, load, reports_errors
from .eval_run import (
    Budgets, Chat, First, GPULayers, Haystack, ModelArg, Out, Policies, Run, Seed, Threads, about_haystack, start,
)  # fmt: skip

__all__ = ["chat"]


@dataclass(frozen=True)
class _ChatRun(Run):
    """Every policy and budget holds every conversation, in a session of its own.

    Attributes:
        limited: budgets are limits, which hold at every moment.
    """

    limited: bool = False

    def _variants(self) -> Iterator[tuple[KVPolicy | None, float | int | None]]:
        yield None, None
        for policy in self.plan.policies.values():
            for budget in self.plan.budgets:
                yield policy, budget

    @contextmanager
    def _replies(self, policy: KVPolicy | None, budget: float | int | None, n_ctx: int) -> Iterator[Replies]:
        given: tuple[Any, Any] = (None, budget) if self.limited else (budget, None)
        llm = load(Llama, self.info, n_ctx + N_ROOM, self.plan.threads, policy, *given, n_gpu_layers=self.gpu_layers)
        try:
            names = {id(own): name for name, own in self.plan.policies.items()}
            about = {
                "policy": FULL if policy is None else names[id(policy)],
                "budget": budget,
                "cells": llm.kv_stats().cell_types[0],
            }
            yield Replies(llm, about)
        finally:
            llm.close()

    def _loop(self, model: Model, cases: Sequence[Any], records: Records, n_ctx: int | None) -> None:
        n_ctx = n_ctx or max(case.n_positions for case in cases) + 1
        if n_ctx > self.info.n_ctx_train:
            raise CLIError(
                f"the longest conversation takes {n_ctx:,} positions, {self.info.path.name} was trained with "
                f"{self.info.n_ctx_train:,}; ask for fewer --turns or a shorter --document"
            )
        todo: list[Conversation] = [own for own in cases if any(own.key(at) not in records for at in own.questions)]
        variants = list(self._variants())
        with suite_bars(len(todo) * len(variants)) as bars:
            if records.n_old:
                bars.note(f"{self.out} has {records.n_old} questions, going on from there")
            for conversation in todo:
                found = []
                for policy, budget in variants:
                    with self._replies(policy, budget, n_ctx) as replies:
                        found.append(replies.hold(conversation))
                    bars.done(f"{FULL if policy is None else policy.name} {'' if budget is None else budget}".strip())
                for row in rows(conversation, found):
                    if row["case"] not in records:
                        records.add(row)


@reports_errors
def chat(
    model: ModelArg,
    turns: Annotated[int, typer.Option(min=MIN_TURNS, max=64, help="Messages of the user in a conversation.")] = 20,
    count: Annotated[int, typer.Option(min=1, help="Conversations.")] = 2,
    document: Annotated[int, typer.Option(min=50, help="Tokens of a pasted document, without its facts.")] = 300,
    haystack: Haystack = None,
    policies: Policies = "auto,windowkv,headkv-r2,snapkv,streamingllm",
    budgets: Budgets = "25%,12%",
    limited: Annotated[
        bool, typer.Option("--limited", help="The budgets, in cells per head, hold at every moment (kv_limit).")
    ] = False,
    chat: Chat = False,
    seed: Seed = 0,
    first: First = 0,
    out: Out = None,
    threads: Threads = None,
    gpu_layers: GPULayers = 0,
) -> None:
    """Conversations: facts told, documents pasted, and questions about all of it some turns later."""
    run = _ChatRun(
        **vars(start("chat", model, policies, budgets, OWN, seed, out, threads, gpu_layers)), limited=limited
    )
    if limited and not all(isinstance(budget, int) for budget in run.plan.budgets):
        raise CLIError(f"--budgets has {budgets!r}, expected numbers of cells per head with --limited, such as 512,256")
    about = {
        "suite": "chat", "turns": turns, "count": count, "document": document, "first": first, "limited": limited,
        "haystack": about_haystack(haystack), "chat": chat,
    }  # fmt: skip

    def prepare(weights: Model) -> list[Any]:
        hay = hay_tokens(weights, haystack, 4 * document, seed)
        return list(conversations(Style(weights, chat), hay, turns, count, document, seed, first))

    run.go(about, prepare)
