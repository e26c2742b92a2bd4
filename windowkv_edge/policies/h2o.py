"""H2O (arXiv 2306.14048) in NumPy: the tokens that the whole prompt attended to, and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .base import CacheView, KVPolicy, Positions, Scores, at_least

__all__ = ["H2O"]


@dataclass(frozen=True, kw_only=True)
class H2O(KVPolicy):
    """Per kv head the last tokens for one half of the budget, for the other those with the most accumulated attention.

    Attention is accumulated over the queries of the whole prompt (section 4), which a session keeps for it: memory and
    a compaction that grow with the prompt make this a baseline. The authors evict while the prompt is evaluated; here
    it is evaluated with the full cache, as for every policy.

    Args:
        recent: share of the budget that the last tokens take.
        n_queries: queries that are kept; of longer prompts the last ones count.
    """

    recent: float = 0.5
    n_queries: int = 4096

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "arXiv 2306.14048"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.recent, bool) or not isinstance(self.recent, (int, float)) or not 0 <= self.recent <= 1:
            raise ValueError(f"recent is {self.recent!r}, expected a share of 0 to 1")
        at_least("n_queries", self.n_queries, 1)

    @property
    def window(self) -> int:
        return self.n_queries

    def select(self, scores: Scores, budget: int, ctx: CacheView) -> Positions:
        return [
            [self._best(score, positions, budget) for score, positions in zip(*layer, strict=True)]
            for layer in zip(scores, ctx.positions, strict=True)
        ]

    def _best(
        self, score: npt.NDArray[np.float32], positions: npt.NDArray[np.int32], budget: int
    ) -> npt.NDArray[np.int32]:
        value = score.astype(np.float64)  # a mean over the queries: in the order of their sum
        value[len(value) - max(1, int(budget * self.recent)) :] = np.inf
        return np.sort(positions[np.argsort(-value, kind="stable")[:budget]])
