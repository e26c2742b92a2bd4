"""KVzip (arXiv 2505.23416): the cells that are attended to while the text is repeated."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from . import adakv
from .attention import weights
from .common import Cache, Kept, Ranking, best, keep, sizes, split


def repeated(
    queries: npt.NDArray[np.float32],
    query_pos: npt.NDArray[np.int32],
    keys: npt.NDArray[np.float32],
    key_pos: npt.NDArray[np.int32],
    scale: float,
    piece: tuple[int, int],
    n_sink: int = 4,
    sinks: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float64]:
    """Per cell of a piece of the text the largest attention weight, over the queries that repeat it and the query heads of
    its kv head (section 3.2).

    The softmax is about the cells of the piece, the first n_sink cells, and those of the queries themselves, each up to its
    own: so does the authors' code, whose sinks are the cells of the system prompt.

    Takes what :func:`reference.attention.weights` takes, and the positions [start, stop) that are repeated. All cells of the
    text are there; those of the queries come behind them. Returns [stop - start].
    """
    start, stop = piece
    part = (key_pos < min(n_sink, start)) | ((key_pos >= start) & (key_pos < stop)) | (key_pos >= query_pos[0])
    all_ = weights(queries, query_pos, keys[part], key_pos[part], scale, sinks).max(axis=(0, 1))
    return np.asarray(all_[(key_pos[part] >= start) & (key_pos[part] < stop)])


def rank(score: npt.NDArray[np.float32]) -> Ranking:
    """The newest cell, then the others by their scores."""
    order = best(score[:-1])
    n = len(score) - 1
    return Ranking([n] * (n >= 0) + order, [math.inf] * (n >= 0) + [float(score[i]) for i in order])


def kvzip(scores: Cache, n_cells: int, *, alpha_safeguard: float, n_past: int) -> Kept:
    """All heads of the model compete (section 3.3). Ours: every head keeps its newest cell, and may be sure of a share.

    n_past: cells of a head that has lost none.
    """
    ranked = [[rank(s) for s in layer] for layer in scores]
    have = [n for layer in sizes(scores) for n in layer]
    own, due = adakv.even(have, n_cells), adakv.even(adakv.unevicted(have, n_past), n_cells)
    won = adakv.compete(own, alpha_safeguard, [r for layer in ranked for r in layer], due=due)
    return keep(ranked, split(won, len(scores[0])))


def beside(kept: Kept, scores: Cache, n_cells: int, n_past: int) -> Kept:
    """Ours: cells that others have chosen, and of the rest the best by these scores, up to n_cells per head on average."""
    raised: Cache = [
        [np.where(own, np.float32(3.0), score) for own, score in zip(*layer, strict=True)]
        for layer in zip(kept, scores, strict=True)
    ]
    return kvzip(raised, n_cells, alpha_safeguard=0.0, n_past=n_past)
