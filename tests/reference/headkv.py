"""HeadKV (arXiv 2410.19258): heads that matter more to retrieval hold more cells."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import budgets
from .common import Cache, Kept, keep, sizes, split, total
from .snapkv import rankings


def by_importance(
    have: list[int],
    n_cells: int,
    *,
    beta: float,
    importance: npt.NDArray[np.float64],
    least: int,
    importance_floor: int = 0,
) -> list[int]:
    """Cells of all heads: (b - b/beta) + S_h (b/beta) L H (section 3.2), within what a head holds.

    What exceeds a head's cells goes to the others by importance, so that the mean stays b = n_cells.

    Args:
        have: what every head holds.
        n_cells: average cells per head.
        beta: 1/beta of the cells is divided by importance.
        importance: [n_layer, n_head_kv].
        least: cells that every head gets, as far as its cells and n_cells reach.
        importance_floor: cells of each head that are not divided (ours; 0 in the paper).
    """
    base = n_cells - max(0, n_cells - importance_floor) * (1 / beta)
    lo = [min(least, n_cells, n) for n in have]
    return budgets.water_fill(base, importance.ravel().tolist(), lo, have, n_cells * len(have))


def headkv(
    scores: Cache,
    n_cells: int,
    *,
    window_size: int,
    kernel_size: int,
    beta: float,
    importance: npt.NDArray[np.float64],
) -> Kept:
    """SnapKV's cells inside every head."""
    have = [n for layer in sizes(scores) for n in layer]
    own = by_importance(have, n_cells, beta=beta, importance=importance, least=window_size)
    ranked = rankings(scores, window_size=window_size, kernel_size=kernel_size)
    return keep(ranked, split(own, len(scores[0])))


def published(
    scores: Cache,
    n_cells: int,
    *,
    window_size: int,
    kernel_size: int,
    beta: float,
    importance: npt.NDArray[np.float64],
) -> Kept:
    """The equation's budgets beside the observation window, rounded (halves to even); what exceeds a head is lost.

    Where the observation window takes the budget, or nothing has importance, every head holds n_cells.
    """
    base = n_cells - window_size
    have = [n for layer in sizes(scores) for n in layer]
    own = [n_cells] * len(have)
    if base > 0 and importance.sum() > 0 and any(n >= n_cells for n in have):
        share = importance.ravel() / total(importance.ravel())
        divided = base // beta
        own = [window_size + round(s * (divided * len(have)) + (base - divided)) for s in share.tolist()]
    ranked = rankings(scores, window_size=window_size, kernel_size=kernel_size)
    return keep(ranked, split(own, len(scores[0])))
