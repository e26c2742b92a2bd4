"""KeyDiff (arXiv 2504.15364) in NumPy: the keys that differ most from the others. A baseline that looks at no query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .base import CacheView, KVPolicy, Positions, Scores

__all__ = ["KeyDiff"]


@dataclass(frozen=True, kw_only=True)
class KeyDiff(KVPolicy):
    """Keeps in each kv head the cells whose keys are least alike the mean of its keys, each of length 1: those with the
    smallest cosine (section 3.2). Of cells with the same one the earlier stays; the newest always does.

    Keys are as attention sees them, RoPE included. The rotation of quantised cells changes no cosine.
    """

    n_observed: ClassVar[int] = 1

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "arXiv 2504.15364"
    keeps: ClassVar[str] = "per head the tokens whose keys differ most from the others"

    def select(self, scores: Scores, budget: int, ctx: CacheView) -> Positions:
        return [[self._best(budget, layer, head, ctx) for head in range(ctx.n_head_kv)] for layer in range(ctx.n_layer)]

    def _best(self, budget: int, layer: int, head: int, ctx: CacheView) -> npt.NDArray[np.int32]:
        positions, keys = ctx.positions[layer][head], ctx.keys(layer, head).astype(np.float64)
        keys /= np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        likeness = keys @ keys.mean(axis=0)  # the anchor's length changes no order
        likeness[-1] = -np.inf  # the next token follows it
        return np.sort(positions[np.argsort(likeness, kind="stable")[:budget]])
