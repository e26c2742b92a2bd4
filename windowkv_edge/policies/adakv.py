"""AdaKV (arXiv 2407.11550): the heads of a layer compete for its cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Task
from .snapkv import SnapKV

__all__ = ["AdaKV", "check_floor"]


def check_floor(floor: float) -> None:
    """Raise ValueError unless floor is a share."""
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor!r}, expected a share of 0 to 1")


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV whose heads share their layer's budget by score (algorithm 1).

    Every head keeps its best cells up to ``floor`` of an equal budget; the rest of the layer's budget goes to the cells
    with the best scores among all of its heads. (The authors add both parts without counting out the cells that are in
    both; here the budget is spent exactly.)

    Args:
        alpha: observation window in tokens; it always stays.
        kernel: width of the max-pool in tokens, odd.
        floor: share of an equal budget that every head is sure of.
    """

    floor: float = 0.2

    name: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "arXiv 2407.11550"
    ragged = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_floor(self.floor)

    def native(self, task: Task = "localization") -> dict[str, Any]:
        return {**super().native(task), "heads": 2, "floor_share": self.floor}
