"""WindowKV as published (arXiv 2503.17922, section 4.1, the settings for LLaMA3-8B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .windowkv import Strategy, WindowKV

__all__ = ["WindowKVPaper"]


@dataclass(frozen=True, kw_only=True)
class WindowKVPaper(WindowKV):
    """:class:`WindowKV` with the paper's settings: one set of windows for all heads of a layer, indices shared by
    groups of layers, budgets that fall over the groups, no carrying over, the whole observation window stays."""

    omega: int = 8
    omega_aggregation: int | None = 16
    alpha: int = 16
    alpha_aggregation: int | None = 32
    suffix: float = 1.0
    carry: int = 0
    localization: Strategy = "max"
    gamma: int = 8
    scope: Literal["layer", "head"] = "layer"
    budget: Literal["arithmetic", "flat"] = "arithmetic"

    name: ClassVar[str] = "windowkv-paper"
