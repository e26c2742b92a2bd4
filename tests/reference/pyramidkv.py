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

    The authors' code defines this for more than one layer and a budget over the observation window; otherwise every head
    holds n_cells.
    """
    n_layer, base = len(scores), n_cells - window_size
    room = budgets.alike(sizes(scores))
    own = [n_cells] * n_layer
    if base > 0 and n_layer > 1:
        n_review = max(room) - window_size
        last = int(base // beta)
        first = 2 * base - last
        if first >= n_review:
            first, last = n_review, 2 * base - n_review
        step = max(0, (first - last) // (n_layer - 1))  # they rise where everything stays
        own = [window_size + first - il * step for il in range(n_layer)]
    per_head = [[min(b, have)] * len(layer) for b, have, layer in zip(own, room, scores, strict=True)]
    return keep(rankings(scores, window_size=window_size, kernel_size=kernel_size), per_head)
