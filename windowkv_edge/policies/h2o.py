"""H2O (arXiv 2306.14048): the tokens that everything so far attended to, and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import KVPolicy, Task, at_least, share_of
from .parts import Scoring, Selection

__all__ = ["H2O"]


@dataclass(frozen=True, kw_only=True)
class H2O(KVPolicy):
    """Keeps in each kv head the last tokens (half of the budget) and those with the most accumulated attention.

    Attention is accumulated over the queries of the whole sequence (section 4): every cell has a sum, which stays with
    it in compactions, so that no query has to be kept. Of what a session evaluates, ``n_observed`` tokens at a time are
    added to the sums, which asks every query of a prompt a second time. What others decode on ``ctx`` counts as far as
    it is observed. Tokens that are taken back stay in the sums if others were evaluated behind them that did not fit
    beside them. The authors evict while the prompt is evaluated; here it is evaluated with the full cache, as for every
    policy.

    Args:
        recent_share: share of the budget that the last tokens take.
        n_observed: queries that wait to be added, and tokens that a prompt is evaluated in at a time.
    """

    recent_share: float = 0.5
    n_observed: int = 128

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "arXiv 2306.14048"
    keeps: ClassVar[str] = "per head the newest tokens and those that everything so far attended to"
    answer_share: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        share_of("recent_share", self.recent_share)
        at_least("n_observed", self.n_observed, 1)

    def scoring(self, task: Task = "localization") -> Scoring:
        return Scoring(window_size=self.n_observed, kernel_size=1, reduce="sum")

    def selection(self, task: Task = "localization") -> Selection:
        return Selection(kind="best", recent_share=self.recent_share)
