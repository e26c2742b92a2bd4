"""StreamingLLM (arXiv 2309.17453): the first tokens, where attention sinks, and the most recent ones."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from . import budgets
from .common import Cache, Kept, Ranking, keep, newest, sizes


def rank(pos: npt.NDArray[np.int32], n_sink: int) -> Ranking:
    """The newest cell, which the next token follows, the first n_sink positions (section 3.2), the recent ones."""
    n = len(pos)
    sinks = [i for i in range(n - 1) if pos[i] < n_sink]
    return Ranking(newest(n - 1, n) + sinks + newest(len(sinks), n - 1), [-math.inf] * n)


def streamingllm(positions: Cache, n_cells: int, *, n_sink: int) -> Kept:
    ranked = [[rank(pos, n_sink) for pos in layer] for layer in positions]
    return keep(ranked, budgets.flat(sizes(positions), n_cells))
