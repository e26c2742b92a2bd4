"""What the definitions share: the shape of a cache, and orders of cells of which a budget takes the first ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Cache = list[list[npt.NDArray[Any]]]
"""Per layer and kv head an array [cells]."""

Kept = list[list[npt.NDArray[np.bool_]]]
"""Per layer and kv head bool [cells], True where the cell stays."""

Budgets = list[list[int]]
"""Per layer and kv head the cells that stay."""


class Ranking(NamedTuple):
    """All cells of a head, most important first, and keys by which cells of different heads compare.

    Keys never rise; inf where a cell stays before all others, -inf where it goes before all others.
    """

    order: list[int]
    key: list[float]


def newest(start: int, stop: int) -> list[int]:
    """Cells start to stop - 1, newest first."""
    return list(range(stop - 1, start - 1, -1))


def best(value: npt.NDArray[Any]) -> list[int]:
    """Cells in falling order of their values; of equal ones the earlier first."""
    return sorted(range(len(value)), key=lambda i: -value[i])


def total(values: Iterable[float]) -> float:
    """The sum in the order of the values (Python's own sum compensates rounding since 3.12)."""
    res = 0.0
    for value in values:
        res += value
    return res


def keep(ranked: list[list[Ranking]], budgets: Budgets) -> Kept:
    """The first cells of every ranking, as many as the head's budget."""
    res: Kept = []
    for layer, own in zip(ranked, budgets, strict=True):
        res.append([])
        for (order, _), budget in zip(layer, own, strict=True):
            stays = np.zeros(len(order), dtype=bool)
            stays[order[:budget]] = True
            res[-1].append(stays)
    return res


def sizes(cache: Cache) -> Budgets:
    """Cells that every head holds."""
    return [[len(own) for own in layer] for layer in cache]


def split(flat: list[Any], n_head: int) -> list[list[Any]]:
    """A list over all heads as lists over layers."""
    return [flat[i : i + n_head] for i in range(0, len(flat), n_head)]


def heads(*caches: Cache) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """The heads of all layers, one after another, of several caches at once."""
    for layers in zip(*caches, strict=True):
        yield from zip(*layers, strict=True)
