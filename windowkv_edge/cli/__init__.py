"""The command line: ``windowkv-edge demo``, ``chat``, ``bench``, ``eval``, ``info`` and ``profile``."""

from __future__ import annotations

from typing import Annotated

import typer

import windowkv_edge
from windowkv_edge._libs import LLAMA_CPP_PYTHON

from .bench import bench
from .chat import chat
from .demo import demo
from .eval import app as eval_app
from .eval_chat import chat as eval_chat
from .eval_forms import forms
from .eval_generate import generate
from .eval_long import long
from .info import info
from .profile import profile

__all__ = ["app"]

app = typer.Typer(
    help="llama.cpp sessions whose KV cache keeps only the cells that matter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(chat)
app.command()(bench)
app.command()(info)
app.command()(profile)
eval_app.command("chat")(eval_chat)
eval_app.command("forms")(forms)
eval_app.command()(generate)
eval_app.command()(long)
app.add_typer(eval_app, name="eval")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"windowkv-edge {windowkv_edge.__version__} (llama-cpp-python {LLAMA_CPP_PYTHON})")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...
