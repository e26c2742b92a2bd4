"""WindowKV as published (arXiv 2503.17922, section 4.1, the settings for LLaMA3-8B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .parts import Scope
from .windowkv import Strategy, WindowKV

__all__ = ["WindowKVPaper"]


@dataclass(frozen=True, kw_only=True)
class WindowKVPaper(WindowKV):
    """:class:`WindowKV` with the paper's settings: one set of windows for all heads of a layer, indices shared by
    groups of layers, budgets that fall over the groups, no carrying over, the whole observation window stays. A budget
    counts every cell, as for all policies; :meth:`WindowKV.published` keeps the cells of the authors' code."""

    omega: int = 8
    omega_aggregation: int | None = 16
    window_size: int = 16
    window_size_aggregation: int | None = 32
    recent_share: float = 1.0
    carry: int = 0
    localization: Strategy = "max"
    gamma: int = 8
    scope: Scope = "layer"
    budget: Literal["arithmetic", "flat"] = "arithmetic"

    name: ClassVar[str] = "windowkv-paper"
    keeps: ClassVar[str] = "passages, one set for all heads of a group of layers, as published"
