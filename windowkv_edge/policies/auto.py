"""What measured best: windows that compete across heads, single tokens beside them, q8_0 cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .windowkv_adakv import WindowAdaKV

__all__ = ["Auto"]


@dataclass(frozen=True, kw_only=True)
class Auto(WindowAdaKV):
    """Windows (:class:`WindowKV`) for half of the budget, single tokens for the other half, both shared by the heads of
    a layer by score (:class:`ByScore`), in q8_0 cells.

    Windows find answers, tokens keep the distribution of the text, and q8_0 holds 1.9 cells for the bytes of one f16
    cell. A session's fraction of a budget is one of the bytes that f16 cells would take. README, Accuracy, has the
    measurements; the session chooses other cells where ``type_k`` or ``type_v`` say so.
    """

    omega: int = 2
    tokens: float = 0.5

    name: ClassVar[str] = "auto"
    paper: ClassVar[str] = "arXiv 2503.17922 and 2407.11550"
    cells: ClassVar[str | None] = "q8_0"
