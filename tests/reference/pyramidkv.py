"""PyramidKV (arXiv 2406.02069): SnapKV's cells under budgets that fall from the first layer to the last."""

from __future__ import annotations

import math

from . import budgets
from .common import Cache, Kept, keep, sizes
from .snapkv import rankings


def pyramid(n_layer: int, n_cells: int, *, window_size: int, beta: float) -> list[int]:
    """Cells per head of each layer: an arithmetic sequence beside the observation window.

    The last layer gets k_total / (beta m), the first 2 k_total / m less that (equation 5), m layers and k_total = m times
    what the window leaves of n_cells.
    """
    n_window = min(window_size, n_cells)
    mean = n_cells - n_window
    last = min(mean, math.floor(mean / beta))
    return [n_window + b for b in budgets.falling(2 * mean - last, last, n_layer)]


def pyramidkv(scores: Cache, n_cells: int, *, window_size: int, kernel_size: int, beta: float) -> Kept:
    want = pyramid(len(scores), n_cells, window_size=window_size, beta=beta)
    own = budgets.layers(want, budgets.alike(sizes(scores)), n_cells, least=window_size + 1)
    ranked = rankings(scores, window_size=window_size, kernel_size=kernel_size)
    return keep(ranked, [[b] * len(layer) for b, layer in zip(own, scores, strict=True)])


def published(scores: Cache, n_cells: int, *, window_size: int, kernel_size: int, beta: float) -> Kept:
    """The first layer's budget is cut to the prompt, the last layers get what is cut; steps are whole cells.

    All layers hold the same prompt. Of a single layer, whose budget the authors' code does not define, n_cells stay.
    """
    n_layer, n_review = len(scores), max(0, len(scores[0][0]) - window_size)
    base = n_cells - window_size
    last = int(base // beta)
    first = 2 * base - last
    if first >= n_review:
        first, last = n_review, 2 * base - n_review
    step = (first - last) // (n_layer - 1) if n_layer > 1 else 0
    own = [window_size + (first - il * step if n_layer > 1 else base) for il in range(n_layer)]
    ranked = rankings(scores, window_size=window_size, kernel_size=kernel_size)
    return keep(ranked, [[b] * len(layer) for b, layer in zip(own, scores, strict=True)])
