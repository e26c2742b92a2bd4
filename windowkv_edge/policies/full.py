"""Keeps every cell: the runtime without eviction, to measure what the cache layout alone costs or gains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import KVPolicy, Task

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(KVPolicy):
    """Evicts nothing; the budget is ignored."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "-"

    @property
    def window(self) -> int:
        return 1

    def native(self, task: Task = "localization") -> dict[str, Any]:
        return {"kind": 0}
