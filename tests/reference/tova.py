"""TOVA (arXiv 2401.06104): the cells of a layer that the newest token attends to, the same for all of its heads."""

from __future__ import annotations

import math

import numpy as np

from . import budgets
from .common import Cache, Kept, Ranking, best, keep, newest, sizes


def tova(positions: Cache, scores: Cache, n_cells: int, *, window_size: int) -> Kept:
    """The newest window_size cells, newest first, then the others by the mean over the heads of the layer (section 4)."""
    ranked = []
    for pos, layer in zip(positions, scores, strict=True):
        n = len(pos[0])
        first = max(0, n - window_size)
        mean = np.zeros(n)
        for score in layer:
            mean += score.astype(np.float64)
        mean /= len(layer)
        order = newest(first, n) + best(mean[:first])
        ranked.append([Ranking(order, [-math.inf] * n)] * len(layer))
    return keep(ranked, budgets.flat(sizes(positions), n_cells))
