"""Keeps every cell: the runtime without eviction, to measure what the cache layout alone costs or gains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .base import KVPolicy, Task

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(KVPolicy):
    """Evicts nothing; the budget is ignored.

    Args:
        exact: stock's attention, whose logits it gives bit for bit (f16 and f32 cells); False = the faster kernel of the
            ragged cache where the device has it, which rounds differently.
    """

    exact: bool = True

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "-"

    @property
    def window(self) -> int:
        return 1

    @property
    def attention(self) -> Literal["auto", "ragged"]:  # type: ignore[override]
        return "auto" if self.exact else "ragged"

    def native(self, task: Task = "localization") -> dict[str, Any]:
        return {"kind": 0}
