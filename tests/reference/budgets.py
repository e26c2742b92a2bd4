"""Budgets: whole cells between bounds, with a sum that is met exactly.

A budget counts every cell that stays, those of the observation window included.
"""

from __future__ import annotations

import math

from .common import Budgets
from .common import total as add


def apportion(want: list[int], lo: list[int], hi: list[int], total: int) -> list[int]:
    """Integers between lo and hi that sum to total (clamped to the sums of the bounds), near to want.

    What clamping takes from some is given to the others in equal parts, the indivisible rest to the first of them.
    """
    res = [min(max(w, a), b) for w, a, b in zip(want, lo, hi, strict=True)]
    diff = min(max(total, sum(lo)), sum(hi)) - sum(res)
    while diff:
        sign = 1 if diff > 0 else -1
        open_ = [i for i in range(len(res)) if (res[i] < hi[i] if sign > 0 else res[i] > lo[i])]
        share = max(1, sign * diff // len(open_))
        for i in open_:
            room = hi[i] - res[i] if sign > 0 else res[i] - lo[i]
            step = sign * min(share, room, sign * diff)
            res[i] += step
            diff -= step
    return res


def water_fill(base: float, weight: list[float], lo: list[int], hi: list[int], total: int) -> list[int]:
    """Integers between lo and hi that sum to total (clamped to the sums of the bounds): base + level * weight.

    The level is the highest that does not overspend, so what clamping takes from some is given to the others by weight.
    Cells that rounding leaves go to the largest fractions.
    """

    def at(level: float) -> list[float]:
        return [min(max(base + level * w, float(a)), float(b)) for w, a, b in zip(weight, lo, hi, strict=True)]

    positive = [w for w in weight if w > 0]
    below, above = 0.0, max(map(float, hi), default=0.0) / min(positive) if positive else 0.0
    for _ in range(200):  # doubles have no more places
        level = 0.5 * (below + above)
        if add(at(level)) <= total:
            below = level
        else:
            above = level

    exact = at(below)
    res = [math.floor(x) for x in exact]
    part = [x - math.floor(x) for x in exact]
    rest = total - sum(res)
    for i in sorted(range(len(res)), key=lambda i: -part[i]):
        if rest > 0 and part[i] > 0 and res[i] < hi[i]:
            res[i] += 1
            rest -= 1
    return apportion(res, lo, hi, total)


def falling(first: int, last: int, n: int) -> list[int]:
    """n integers from first down to last on a line."""
    if n == 1:
        return [(first + last) // 2]
    return [first - (first - last) * i // (n - 1) for i in range(n)]


def layers(want: list[int], room: list[int], n_cells: int, least: int = 1) -> list[int]:
    """Budgets of a head of each layer with the mean n_cells.

    Args:
        want: per layer what the paper gives a head.
        room: per layer what its heads can take.
        n_cells: average cells per head.
        least: cells that every layer gets, as far as room and n_cells reach.
    """
    return apportion(want, [min(least, n_cells, have) for have in room], room, n_cells * len(room))


def alike(cells: Budgets) -> list[int]:
    """Room of heads that hold equally many cells: the smallest head's."""
    return [min(layer) for layer in cells]


def shared(cells: Budgets) -> list[int]:
    """Room of heads that share their layer's cells."""
    return [sum(layer) // len(layer) for layer in cells]


def flat(cells: Budgets, n_cells: int) -> Budgets:
    """n_cells for every head; what small layers cannot take goes to the others."""
    own = layers([n_cells] * len(cells), alike(cells), n_cells)
    return [[budget] * len(layer) for budget, layer in zip(own, cells, strict=True)]
