"""``windowkv-edge eval generate``: what compression costs in answers that grow longer than the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from windowkv_edge.bench.session import Model
from windowkv_edge.eval import GenerateCase, Style, generate_cases
from windowkv_edge.eval.generate import N_BATCH, PROMPTS

from .common import CLIError, open_model, parse_lengths, reports_errors
from .eval_run import Chat, GPULayers, ModelArg, Out, Policies, Seed, Threads, chosen, start

__all__ = ["generate"]

POLICIES = "auto,windowkv,headkv-r2,snapkv,adakv,tova,corm,h2o,streamingllm"


def _one(text: str, option: str) -> int:
    sizes = parse_lengths(text)
    if len(sizes) != 1:
        raise CLIError(f"{option} is {text!r}, expected one number such as 2048 or 2k")
    return sizes[0]


@reports_errors
def generate(
    model: ModelArg,
    tokens: Annotated[str, typer.Option(help="Tokens of an answer; 2k is 2048. At most what the model holds.")] = "2k",
    cells: Annotated[int, typer.Option(min=16, help="Cells per head that an answer may hold.")] = 512,
    interval: Annotated[
        int | None,
        typer.Option(min=1, max=N_BATCH, help="Tokens between two compactions. Default: an eighth of the cells."),
    ] = None,
    free: Annotated[
        str | None,
        typer.Option(help="Tokens of the answers that every policy generates itself, 0 = none. Default: --tokens."),
    ] = None,
    prompts: Annotated[str, typer.Option(help="Of " + ", ".join(PROMPTS) + ".")] = next(iter(PROMPTS)),
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of sampling. What small models generate greedily repeats itself.")
    ] = 1.0,
    policies: Policies = POLICIES,
    chat: Chat = False,
    seed: Seed = 0,
    out: Out = None,
    threads: Threads = None,
    gpu_layers: GPULayers = 0,
) -> None:
    """Long answers: KL to the full cache token by token, and what each policy's own text repeats."""
    run = start("generate", model, policies, str(cells), "own", seed, out, threads, gpu_layers)
    every = min(N_BATCH, max(1, cells // 8)) if interval is None else interval
    if every >= cells:
        raise CLIError(f"--interval is {every}, expected less than the {cells} --cells")
    n_tokens = _one(tokens, "--tokens")
    n_free = n_tokens if free is None else 0 if free.strip() == "0" else _one(free, "--free")
    names = chosen(prompts, list(PROMPTS), "--prompts")
    n_ctx = open_model(model).n_ctx_train
    about = {
        "suite": "generate", "tokens": n_tokens, "interval": every, "free": n_free, "prompts": names,
        "temperature": temperature, "chat": chat,
    }  # fmt: skip

    def prepare(weights: Model) -> list[GenerateCase]:
        return generate_cases(Style(weights, chat), names, n_tokens, n_free, every, temperature, seed, n_ctx)

    run.go(about, prepare)
