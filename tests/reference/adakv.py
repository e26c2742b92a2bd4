"""AdaKV (arXiv 2407.11550): the heads of a layer compete for its cells."""

from __future__ import annotations

import math

import numpy as np

from . import budgets
from .common import Cache, Kept, Ranking, keep, sizes, split
from .snapkv import rankings


def compete(
    own: list[int], alpha_safeguard: float, ranked: list[Ranking], least: int = 1, due: list[int] | None = None
) -> list[int]:
    """Cells of heads that share the sum of their budgets (algorithm 1).

    Each is sure of the cells that stay, and of the share alpha_safeguard of the rest of its own budget, but (ours) of
    least cells in any case; what is left goes to the best cells, whoever holds them. Of equal keys the one further ahead
    in its head's ranking wins, then the earlier head.

    due: ours, what heads would hold of these cells if none of theirs had been evicted yet. The share that a head is sure
    of is one of that, as far as its own budget reaches.
    """
    due = due or own
    sure = []
    for budget, whole, (_, key) in zip(own, map(max, due, own), ranked, strict=True):
        stays = min(budget, key.count(math.inf))
        share = min(budget, stays + math.floor((whole - stays) * alpha_safeguard))
        sure.append(min(len(key), max(share, min(budget, least))))
    rest = sum(own) - sum(sure)
    open_ = sorted((-key[i], i, head) for head, (_, key) in enumerate(ranked) for i in range(sure[head], len(key)))
    for _, _, head in open_[:rest]:
        sure[head] += 1
    return sure


def unevicted(have: list[int], n_past: int) -> list[int]:
    """Cells that heads would hold if none had been evicted, n_past of each."""
    return [max(n, n_past) for n in have]


def even(have: list[int], n_cells: int) -> list[int]:
    """Own budgets of all heads of the model: n_cells, what small heads cannot take goes to the others."""
    return budgets.apportion([n_cells] * len(have), [0] * len(have), have, n_cells * len(have))


def adakv(
    scores: Cache,
    n_cells: int,
    *,
    window_size: int,
    kernel_size: int,
    alpha_safeguard: float,
    across: str = "layer",
    n_past: int,
) -> Kept:
    """SnapKV's cells; the heads of a "layer" compete, as in the paper, or all of the "model".

    n_past: cells of a head that has lost none.
    """
    ranked = rankings(scores, window_size=window_size, kernel_size=kernel_size)
    n_head = len(scores[0])
    if across == "model":
        have = [n for layer in sizes(scores) for n in layer]
        own, due = even(have, n_cells), even(unevicted(have, n_past), n_cells)
        won = compete(own, alpha_safeguard, [r for layer in ranked for r in layer], due=due)
        return keep(ranked, split(won, n_head))
    layers = budgets.layers([n_cells] * len(scores), budgets.shared(sizes(scores)), n_cells)
    return keep(ranked, [compete([b] * n_head, alpha_safeguard, r) for b, r in zip(layers, ranked, strict=True)])


def published(scores: Cache, n_cells: int, *, window_size: int, kernel_size: int, alpha_safeguard: float) -> Kept:
    """A head's budget is the mean of what it wins if all cells compete, and of an equal budget.

    Both beside the observation window; alpha_safeguard weighs the equal budget. The mean is rounded as float32, halves to
    even, so that a layer's total can be off. Where the observation window takes the budget, every head holds n_cells.
    """
    base = n_cells - window_size
    sure, weight = np.float32(int(base * alpha_safeguard)), np.float32(1 - alpha_safeguard)
    ranked = rankings(scores, window_size=window_size, kernel_size=kernel_size)
    res = []
    for layer in ranked:
        review = [Ranking(order[window_size:], key[window_size:]) for order, key in layer]
        if base <= 0 or base > max(len(order) for order, _ in review):
            res.append([n_cells] * len(layer))
        else:
            won = compete([base] * len(layer), 0.0, review, least=0)
            res.append([window_size + int(np.rint(np.float32(n) * weight + sure)) for n in won])
    return keep(ranked, res)
