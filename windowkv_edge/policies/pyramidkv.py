"""PyramidKV (arXiv 2406.02069): SnapKV's scores, budgets that fall from the first layer to the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import Task
from .snapkv import SnapKV

__all__ = ["PyramidKV"]


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV under an arithmetic sequence of layer budgets with the same mean.

    Args:
        alpha: observation window in tokens; it always stays.
        kernel: width of the max-pool in tokens, odd.
        beta: the last layer gets 1/beta of the mean (the paper's beta, eq. 5).
    """

    beta: float = 20.0

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "arXiv 2406.02069"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"beta is {self.beta!r}, expected a number of at least 1")

    def native(self, task: Task = "localization") -> dict[str, Any]:
        return {**super().native(task), "kind": 3, "slope": self.beta}
