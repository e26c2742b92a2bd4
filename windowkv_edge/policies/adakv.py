"""AdaKV (arXiv 2407.11550): the heads of a layer compete for its cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .base import KVPolicy, Task, one_of
from .snapkv import SnapKV

__all__ = ["AdaKV", "ByScore"]


@dataclass(frozen=True, kw_only=True)
class ByScore(KVPolicy):
    """Heads that share their layer's budget by score (algorithm 1), for the selection of the class that comes next in
    the bases.

    Every head keeps its best cells up to ``floor`` of an equal budget; the rest of the layer's budget goes to the cells
    with the best scores among all of its heads. (The authors add both parts without counting out the cells that are in
    both; here the budget is spent exactly.)

    Args:
        floor: share of an equal budget that every head is sure of.
        across: the heads that compete: those of a "layer", as published, or all of the "model".
    """

    floor: float = 0.2
    across: Literal["layer", "model"] = "layer"

    ragged = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.floor, bool) or not isinstance(self.floor, (int, float)) or not 0 <= self.floor <= 1:
            raise ValueError(f"floor is {self.floor!r}, expected a share of 0 to 1")
        one_of("across", self.across, ("layer", "model"))

    def native(self, task: Task = "localization") -> dict[str, Any]:
        span = ("layer", "model").index(self.across)
        return {**super().native(task), "heads": 2, "floor_share": self.floor, "span": span}


@dataclass(frozen=True, kw_only=True)
class AdaKV(ByScore, SnapKV):
    """SnapKV (:class:`SnapKV`) whose heads share their layer's budget by score (:class:`ByScore`)."""

    name: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "arXiv 2407.11550"
