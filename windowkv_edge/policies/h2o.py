"""H2O (arXiv 2306.14048) in NumPy: the tokens that the whole prompt attended to, and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .base import CacheView, KVPolicy, Positions, Scores, at_least, share_of

__all__ = ["H2O"]


@dataclass(frozen=True, kw_only=True)
class H2O(KVPolicy):
    """Keeps in each kv head the last tokens (half of the budget) and those with the most accumulated attention.

    Attention is accumulated over the queries of the whole prompt (section 4), which a session keeps for it: memory and
    a compaction that grow with the prompt make this a baseline. The authors evict while the prompt is evaluated; here
    it is evaluated with the full cache, as for every policy.

    Args:
        recent_share: share of the budget that the last tokens take.
        n_observed: queries that are kept; of longer prompts the last ones count.
    """

    recent_share: float = 0.5
    n_observed: int = 4096

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "arXiv 2306.14048"
    keeps: ClassVar[str] = "per head the newest tokens and those that the whole prompt attends to"

    def __post_init__(self) -> None:
        super().__post_init__()
        share_of("recent_share", self.recent_share)
        at_least("n_observed", self.n_observed, 1)

    def select(self, scores: Scores, budget: int, ctx: CacheView) -> Positions:
        return [
            [self._best(score, positions, budget) for score, positions in zip(*layer, strict=True)]
            for layer in zip(scores, ctx.positions, strict=True)
        ]

    def _best(
        self, score: npt.NDArray[np.float32], positions: npt.NDArray[np.int32], budget: int
    ) -> npt.NDArray[np.int32]:
        value = score.astype(np.float64)  # a mean over the queries: in the order of their sum
        value[len(value) - max(1, int(budget * self.recent_share)) :] = np.inf
        return np.sort(positions[np.argsort(-value, kind="stable")[:budget]])
