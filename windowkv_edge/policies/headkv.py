"""HeadKV and HeadKV-R2 (arXiv 2410.19258): heads that retrieve answers from the text hold more cells."""

from __future__ import annotations

import os
import reprlib
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from ..heads import HeadScores, Kind, ModelHeads
from .base import KVPolicy, number_of, one_of
from .parts import Allocation
from .snapkv import SnapKV

__all__ = ["ByImportance", "HeadKV", "HeadKVR2"]


@dataclass(frozen=True, kw_only=True)
class ByImportance(KVPolicy):
    """Budgets by the heads' importance. The class after this one in the bases selects inside each head.

    A (layer, kv head) gets ``b - b/beta + share * (b/beta) * heads``, where b is the mean budget, share its importance
    and heads their number in the model (section 3.2). What exceeds the prompt is given to the other heads by their
    importance, so that the mean stays b.

    Args:
        beta: 1/beta of all cells is divided by importance, the rest equally.
        importance: head scores, or a file of them; None looks in the model's GGUF metadata, beside its file, and in
            the package.
        kind: scores of retrieval ("r") or of retrieval and reasoning ("r2").
        reduce: how a kv head's score follows from those of its query heads, "mean" or "max".
    """

    beta: float = 2.0
    importance: HeadScores | str | os.PathLike[str] | None = field(default=None, hash=False)
    kind: Kind = "r"
    reduce: Literal["mean", "max"] = "mean"
    shares: npt.NDArray[np.float64] | None = field(default=None, init=False, repr=False, compare=False)

    ragged = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number_of("beta", self.beta, 1)
        if not isinstance(self.importance, (HeadScores, str, os.PathLike, type(None))):
            got = reprlib.repr(self.importance)
            raise ValueError(f"importance is {got}, expected HeadScores, a file of them, or None")
        one_of("kind", self.kind, ("r", "r2"))
        one_of("reduce", self.reduce, ("mean", "max"))

    def bind(self, model: ModelHeads) -> KVPolicy:
        res = replace(self)
        object.__setattr__(res, "shares", model.importance(self.importance, self.kind, self.reduce))
        return res

    def allocation(self) -> Allocation:
        return replace(super().allocation(), heads="importance", beta=self.beta, importance=self.shares)


@dataclass(frozen=True, kw_only=True)
class HeadKV(ByImportance, SnapKV):
    """SnapKV (:class:`SnapKV`) inside every head, with budgets by retrieval scores (:class:`ByImportance`)."""

    window_size: int = 8

    name: ClassVar[str] = "headkv"
    paper: ClassVar[str] = "arXiv 2410.19258"
    keeps: ClassVar[str] = "as SnapKV, and heads that retrieve answers keep more (needs head scores of the model)"


@dataclass(frozen=True, kw_only=True)
class HeadKVR2(HeadKV):
    """HeadKV with retrieval-and-reasoning scores (section 3.1, R2)."""

    kind: Kind = field(default="r2", init=False)

    name: ClassVar[str] = "headkv-r2"
    keeps: ClassVar[str] = "as HeadKV, with head scores of retrieval and reasoning"
