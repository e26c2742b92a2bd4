"""CORM (arXiv 2404.15949): the tokens that some of the last queries attended to more than evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import KVPolicy, Task, at_least
from .parts import Scoring, Selection

__all__ = ["CORM"]


@dataclass(frozen=True, kw_only=True)
class CORM(KVPolicy):
    """Keeps the last tokens, and those that at least one of the last queries paid more than an even share of its
    attention.

    A key is minor to a query that sees t cells if its weight is below 1/t; the paper evicts the keys that are minor to
    all of the last ``window_size`` queries (section 4.2), in every query head by itself. Here the query heads of a kv
    head count together, and a budget decides how many stay: the cells with the largest weight times t, over the
    queries and query heads. So minor keys stay only where there is room for more, and where more than the budget are
    not minor, those stay that stand out most.

    Args:
        window_size: last queries that are asked (the paper's w).
        n_recent: last tokens that stay (the paper's r).
    """

    window_size: int = 32
    n_recent: int = 64

    name: ClassVar[str] = "corm"
    paper: ClassVar[str] = "arXiv 2404.15949"
    keeps: ClassVar[str] = "per head the newest tokens and those that any of the last queries attended to"
    answer_share: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("window_size", self.window_size, 1)
        at_least("n_recent", self.n_recent, 0)

    def scoring(self, task: Task = "localization") -> Scoring:
        return Scoring(window_size=self.window_size, kernel_size=1, reduce="max")

    def selection(self, task: Task = "localization") -> Selection:
        return Selection(kind="best", n_recent=self.n_recent)
