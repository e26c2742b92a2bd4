"""Pinned positions (ours): their cells always stay and count in the budget; a policy chooses among the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .common import Cache, Kept, sizes


class NothingLeftError(ValueError):
    """What is pinned leaves nothing for the other cells."""


def common(positions: Cache) -> set[int]:
    """Positions that every head holds."""
    return set.intersection(*(set(own.tolist()) for layer in positions for own in layer))


def pinned(
    policy: Callable[[Cache, Sequence[Cache], int, int], Kept],
    positions: Cache,
    scores: Sequence[Cache],
    n_cells: int,
    ranges: Sequence[tuple[int, int]],
    n_past: int,
) -> Kept:
    """The cells that stay.

    Args:
        policy: called with the positions and scores of the cells that are not pinned, what is left of n_cells, and as many
            cells as a head that has lost none holds of these.
        positions: the cache.
        scores: one or more planes of scores, [cells] or [n_gqa, cells] per head.
        n_cells: mean cells per head.
        ranges: positions [start, stop); those that some head has lost are as any other.
        n_past: positions that were read.

    Raises:
        NothingLeftError: the pinned cells take all of n_cells, and there are others.
    """
    held = {at for at in common(positions) if any(start <= at < stop for start, stop in ranges)}
    is_pinned = [[np.isin(own, list(held)) for own in layer] for layer in positions]

    def rest(cache: Cache) -> Cache:
        return [
            [own[..., ~stays] for own, stays in zip(layer, marks, strict=True)]
            for layer, marks in zip(cache, is_pinned, strict=True)
        ]

    if held and n_cells <= len(held) and sum(map(sum, sizes(positions))) > n_cells * sum(map(len, positions)):
        raise NothingLeftError
    chosen = policy(rest(positions), [rest(plane) for plane in scores], max(0, n_cells - len(held)), n_past - len(held))
    for layer, marks in zip(chosen, is_pinned, strict=True):
        for own, stays in zip(layer, marks, strict=True):
            stays[~stays] = own
    return is_pinned
