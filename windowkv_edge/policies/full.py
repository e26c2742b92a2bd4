"""Keeps every cell: to measure what our layout alone costs or gains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import KVPolicy, Task
from .parts import Scoring, Selection

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(KVPolicy):
    """Evicts nothing; the budget is ignored."""

    name: ClassVar[str] = "full"
    keeps: ClassVar[str] = "every cell"

    def scoring(self, task: Task = "localization") -> Scoring:
        return Scoring()

    def selection(self, task: Task = "localization") -> Selection:
        return Selection(kind="full")
