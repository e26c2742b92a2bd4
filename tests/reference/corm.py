"""CORM (arXiv 2404.15949): cells that some of the last queries attended to more than evenly."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from . import budgets
from .attention import weights
from .common import Cache, Kept, Ranking, best, keep, newest, sizes


def prominence(
    queries: npt.NDArray[np.float32],
    query_pos: npt.NDArray[np.int32],
    keys: npt.NDArray[np.float32],
    key_pos: npt.NDArray[np.int32],
    scale: float,
) -> npt.NDArray[np.float64]:
    """Per cell the largest of attention weight times t, over queries and query heads, where t is the number of cells that
    the query sees. A key is minor for a query where that is below 1 (section 4.1).

    Takes what :func:`reference.attention.weights` takes, and returns [cells].
    """
    n_seen = (key_pos[None, :] <= query_pos[:, None]).sum(axis=1)
    return np.asarray((weights(queries, query_pos, keys, key_pos, scale) * n_seen[None, :, None]).max(axis=(0, 1)))


def rank(score: npt.NDArray[np.float32], n_recent: int) -> Ranking:
    """The last n_recent cells, and at least the newest, then the others by their prominence (section 4.2)."""
    n = len(score)
    first = n - min(n, max(1, n_recent))
    return Ranking(newest(first, n) + best(score[:first]), [-math.inf] * n)


def corm(scores: Cache, n_cells: int, *, n_recent: int) -> Kept:
    ranked = [[rank(s, n_recent) for s in layer] for layer in scores]
    return keep(ranked, budgets.flat(sizes(scores), n_cells))
