"""AdaKV (arXiv 2407.11550): the heads of a layer compete for its cells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from .base import KVPolicy, one_of, share_of
from .parts import Across, Allocation
from .snapkv import SnapKV

__all__ = ["AdaKV", "ByScore"]


@dataclass(frozen=True, kw_only=True)
class ByScore(KVPolicy):
    """Heads that compete for their layer's budget with the scores of their cells (algorithm 1). The class after this
    one in the bases selects inside each head.

    Every head keeps its best cells up to ``alpha_safeguard`` of an equal budget; the rest of the layer's budget goes to
    the cells with the best scores among all of its heads. (The authors add both parts without counting out the cells
    that are in both; here the budget is spent exactly.)

    Args:
        alpha_safeguard: share of an equal budget that every head gets in any case.
        across: the heads that compete: those of a "layer", as published, or all of the "model".
    """

    alpha_safeguard: float = 0.2
    across: Across = "layer"

    ragged = True

    def __post_init__(self) -> None:
        super().__post_init__()
        share_of("alpha_safeguard", self.alpha_safeguard)
        one_of("across", self.across, ("layer", "model"))

    def allocation(self) -> Allocation:
        return replace(
            super().allocation(), heads="score", alpha_safeguard=self.alpha_safeguard, across=self.across
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdaKV(ByScore, SnapKV):
    """SnapKV (:class:`SnapKV`) whose heads share their layer's budget by score (:class:`ByScore`)."""

    name: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "arXiv 2407.11550"
    keeps: ClassVar[str] = "as SnapKV, and heads whose tokens score higher keep more of them"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accounting == "paper" and self.across != "layer":
            raise ValueError(f"{self.name} with accounting='paper' needs across='layer', as published")
