"""H2O (arXiv 2306.14048): heavy hitters, the cells with the most accumulated attention, and the last ones."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from . import budgets
from .attention import weights
from .common import Cache, Kept, Ranking, best, keep, newest, sizes


def accumulated(
    queries: npt.NDArray[np.float32],
    query_pos: npt.NDArray[np.int32],
    keys: npt.NDArray[np.float32],
    key_pos: npt.NDArray[np.int32],
    scale: float,
) -> npt.NDArray[np.float64]:
    """Per cell the sum of the attention weights over the queries (section 4.2), mean over the query heads.

    Takes what :func:`reference.attention.weights` takes, and returns [cells].
    """
    return np.asarray(weights(queries, query_pos, keys, key_pos, scale).sum(axis=1).mean(axis=0))


def rank(score: npt.NDArray[np.float32], budget: int, recent_share: float) -> Ranking:
    """The last cells, a share of the budget and at least the newest, then the others by their sums (algorithm 1)."""
    n = len(score)
    first = n - min(n, max(1, int(budget * recent_share)))
    return Ranking(newest(first, n) + best(score[:first]), [-math.inf] * n)


def h2o(scores: Cache, n_cells: int, *, recent_share: float) -> Kept:
    own = budgets.flat(sizes(scores), n_cells)
    ranked = [
        [rank(s, b, recent_share) for s, b in zip(layer, row, strict=True)] for layer, row in zip(scores, own, strict=True)
    ]
    return keep(ranked, own)
