"""How far a prompt is: the ``kv_progress`` of a session, called behind every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .guard import Guard

__all__ = ["KVProgress", "check_progress", "report"]

KVProgress = Callable[[int, int], object]
"""``kv_progress(done, total)``: tokens of a prompt that were evaluated, and those that it evaluates in all."""


def check_progress(progress: Any) -> KVProgress | None:
    """Return a valid ``kv_progress``.

    Raises:
        TypeError: neither None nor something to call.
    """
    if progress is not None and not callable(progress):
        raise TypeError(f"kv_progress is {progress!r}, expected None or a function of two numbers of tokens")
    return progress  # type: ignore[no-any-return]


def report(progress: KVProgress | None, guard: Guard, done: int, total: int) -> None:
    """Call it; meanwhile calls that change the session are refused.

    Raises:
        Exception: what it raised.
    """
    if progress is not None:
        with guard.reporting():
            progress(done, total)
