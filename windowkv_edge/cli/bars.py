"""Bars that say how far a prompt is: a share, and tokens per second. None where nobody looks at a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from windowkv_edge import Llama
from windowkv_edge._text import for_terminal

__all__ = ["SuiteBars", "prompt_bar", "suite_bars"]


class _Rate(ProgressColumn):
    """Tokens per second of a prompt."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "", style="progress.data.speed")


class _OfPrompts(MofNCompleteColumn):
    """How many prompts, of the first bar alone."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.id == 0 else Text(f"{task.percentage:3.0f} %")


class _RateOfTokens(_Rate):
    """Of the second bar alone."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.id > 0 else Text("")


@contextmanager
def prompt_bar(llm: Llama, console: Console, name: str) -> Iterator[None]:
    """A bar of what the session reads meanwhile.

    Args:
        llm: the session; its ``kv_progress`` is another one meanwhile.
        console: where the bar is; without a terminal there is none.
        name: in front of it.
    """
    columns = TextColumn("{task.description:<12}", markup=False), BarColumn(), TaskProgressColumn(), _Rate()
    before = llm.kv_progress
    shows = console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not shows) as bar:
        task = bar.add_task(for_terminal(name), total=None)
        llm.kv_progress = lambda done, total: bar.update(task, completed=done, total=total)
        try:
            yield
        finally:
            llm.kv_progress = before


class SuiteBars:
    """Two bars: prompts of a suite, and the tokens of the one that is read now.

    Args:
        progress: what shows them.
        n_prompts: prompts in all.
    """

    def __init__(self, progress: Progress, n_prompts: int) -> None:
        self._progress = progress
        self._prompts = progress.add_task("loading", total=n_prompts)
        self._tokens = progress.add_task("tokens", total=None, visible=False)

    def done(self, what: str) -> None:
        """A prompt was done."""
        self._progress.update(self._prompts, description=for_terminal(what), advance=1)

    def step(self, what: str, n: int = 0) -> None:
        """Something was done, and n prompts."""
        self._progress.update(self._prompts, description=for_terminal(what), advance=n)

    def read(self, done: int, total: int) -> None:
        """So many tokens of a prompt were read; shown for prompts of several batches."""
        if done < total and not self._progress.tasks[1].visible:
            self._progress.reset(self._tokens, total=total, visible=True)
        self._progress.update(self._tokens, completed=done, total=total)

    def note(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(for_terminal(text), markup=False)


@contextmanager
def suite_bars(n_prompts: int) -> Iterator[SuiteBars]:
    """Bars of a suite of so many prompts, on the error stream."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        _OfPrompts(),
        _RateOfTokens(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield SuiteBars(progress, n_prompts)
