"""PyramidKV (arXiv 2406.02069): SnapKV's scores, budgets that fall from the first layer to the last."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from .base import number_of
from .parts import Allocation
from .snapkv import SnapKV

__all__ = ["PyramidKV"]


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV (:class:`SnapKV`) under an arithmetic sequence of layer budgets with the same mean.

    Takes SnapKV's arguments, and:

    Args:
        beta: the last layer gets 1/beta of the mean (the paper's beta, eq. 5).
    """

    beta: float = 20.0

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "arXiv 2406.02069"
    keeps: ClassVar[str] = "as SnapKV, more in the first layers and fewer in the last"

    def __post_init__(self) -> None:
        super().__post_init__()
        number_of("beta", self.beta, 1)

    def allocation(self) -> Allocation:
        return replace(super().allocation(), layers="pyramid", beta=self.beta)
