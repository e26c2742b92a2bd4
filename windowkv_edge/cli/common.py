"""What the commands share: errors with exit code 2, arguments, models and formats."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jinja2
import psutil
import typer

from windowkv_edge import KVPolicy, Llama, UnsupportedModelError, WindowKVError, get_policy
from windowkv_edge._text import for_terminal
from windowkv_edge.eval.sources import read_text
from windowkv_edge.gguf_info import GGUFInfo, read_info
from windowkv_edge.models import fetch_smollm2

__all__ = [
    "CLIError",
    "load",
    "mib",
    "n_cores",
    "open_model",
    "parse_budget",
    "parse_lengths",
    "parse_policies",
    "parse_policy",
    "read_text",
    "reports_errors",
    "split_names",
]

P = ParamSpec("P")
R = TypeVar("R")
L = TypeVar("L", bound=Llama)

SMOLLM2 = "smollm2"


class CLIError(WindowKVError):
    """Bad input of a command: what was got, what was expected, what to do."""


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command: an error of this package becomes one line on the error stream, and exit code 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except WindowKVError as error:
            typer.echo(for_terminal(f"error: {error}"), err=True)
            raise typer.Exit(2) from None

    return run


def parse_budget(text: str) -> float | int:
    """``0.12`` and ``12%`` are fractions of the prompt, ``512`` counts cells per head."""
    expected = (
        "expected a fraction above 0 and up to 1.0 (0.12), a percentage (12%) or a number of cells per head (512)"
    )
    try:
        if text.isdecimal():
            cells = int(text)
            if cells >= 1:
                return cells
        else:
            budget = float(text[:-1]) / 100 if text.endswith("%") else float(text)
            if 0 < budget <= 1:
                return budget
    except ValueError:
        pass
    raise CLIError(f"the budget is {text!r}, {expected}")


def parse_lengths(text: str, option: str = "--lengths") -> list[int]:
    """Numbers of tokens: ``"1k,500"`` gives [1024, 500]."""
    res = []
    for part in text.lower().split(","):
        match = re.fullmatch(r"\s*([1-9]\d{0,8})(k?)\s*", part, re.ASCII)
        if not match:
            raise CLIError(f"{option} has {part!r}, expected a number of tokens of at least 1, such as 4k or 4096")
        res.append(int(match[1]) * (1024 if match[2] else 1))
    return res


def parse_policy(name: str) -> KVPolicy:
    """The policy of this name, with parameters if given: ``windowkv(omega=8)``."""
    try:
        return get_policy(name)
    except ValueError as error:
        raise CLIError(str(error).replace("kv_policy is", "the policy is", 1)) from None


def split_names(text: str) -> list[str]:
    """The parts between commas, each once. Commas inside of brackets do not count."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def parse_policies(text: str) -> dict[str, KVPolicy]:
    """Policies by the names they were given."""
    return {name: parse_policy(name) for name in split_names(text)}


def n_cores() -> int:
    """Number of physical cores that this process may use."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


def open_model(model: str) -> GGUFInfo:
    """Header of a GGUF file, given by its path or as ``smollm2``, which is fetched."""
    if model == SMOLLM2:
        return read_info(fetch_smollm2(progress=True))
    return read_info(Path(model).expanduser())


def load(
    cls: type[L], info: GGUFInfo, n_ctx: int, threads: int | None, policy: KVPolicy | None, budget: float | None,
    **more: Any,
) -> L:
    """A session of class ``cls`` on ``threads`` CPU threads; None = as many as llama-cpp-python takes. ``more``: other
    arguments."""
    try:
        return cls(
            str(info.path),
            n_ctx=n_ctx,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            kv_policy=policy,
            kv_budget=budget,
            verbose=False,
            **more,
        )
    except UnsupportedModelError:
        raise
    except (ValueError, RuntimeError, jinja2.TemplateError) as error:  # also a chat template that cannot be read
        fix = f"the file may be damaged, or the memory too small for {n_ctx:,} positions"
        raise CLIError(f"cannot load {info.path}: {error}; {fix}") from error


def mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.1f}"

