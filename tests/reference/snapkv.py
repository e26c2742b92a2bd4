"""SnapKV (arXiv 2404.14469): the cells that the observation window attends to, with their neighbours."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from . import budgets
from .common import Cache, Kept, Ranking, best, keep, newest, sizes


def max_pool(score: npt.NDArray[np.float32], kernel_size: int) -> npt.NDArray[np.float32]:
    """Largest score within kernel_size // 2 cells of each cell (section 4.2, "pooling")."""
    half = kernel_size // 2
    pooled = [score[max(0, i - half) : i + half + 1].max() for i in range(len(score))]
    return np.array(pooled, dtype=np.float32)


def rank(score: npt.NDArray[np.float32], *, window_size: int, kernel_size: int) -> Ranking:
    """The observation window, newest first, then the best of the other cells by their pooled scores."""
    n = len(score)
    n_recent = min(n, window_size)
    pooled = max_pool(score[: n - n_recent], kernel_size)
    order = best(pooled)
    return Ranking(newest(n - n_recent, n) + order, [math.inf] * n_recent + [float(pooled[i]) for i in order])


def rankings(scores: Cache, *, window_size: int, kernel_size: int) -> list[list[Ranking]]:
    return [[rank(s, window_size=window_size, kernel_size=kernel_size) for s in layer] for layer in scores]


def snapkv(scores: Cache, n_cells: int, *, window_size: int, kernel_size: int) -> Kept:
    ranked = rankings(scores, window_size=window_size, kernel_size=kernel_size)
    return keep(ranked, budgets.flat(sizes(scores), n_cells))


def published(scores: Cache, n_cells: int, *, window_size: int, kernel_size: int) -> Kept:
    """n_cells of every head, or all of a layer that holds fewer; the observation window counts."""
    ranked = rankings(scores, window_size=window_size, kernel_size=kernel_size)
    room = budgets.alike(sizes(scores))
    return keep(ranked, [[min(n_cells, have)] * len(layer) for have, layer in zip(room, scores, strict=True)])
