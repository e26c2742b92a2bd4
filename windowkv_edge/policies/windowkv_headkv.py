"""WindowKV's windows inside HeadKV's budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from ..heads import Kind, ModelHeads
from .base import KVPolicy, Task, one_of
from .headkv import Importance, check_beta
from .windowkv import WindowKV

__all__ = ["WindowHeadKV"]


@dataclass(frozen=True, kw_only=True)
class WindowHeadKV(WindowKV):
    """Window selection (:class:`WindowKV`) inside every head, with budgets by the heads' importance (:class:`HeadKV`).

    Takes the arguments of WindowKV, except that ``scope`` is "head" and budgets follow importance instead of
    ``budget``, and in addition:

    Args:
        beta: 1/beta of all cells is divided by importance, the rest equally.
        importance: head scores, or a file of them; None looks in the model's GGUF metadata, beside its file, and in
            the package.
        kind: scores of retrieval ("r") or of retrieval and reasoning ("r2").
        reduce: how a kv head's score follows from those of its query heads, "mean" or "max".
    """

    beta: float = 2.0
    importance: Importance = field(default=None, hash=False)
    kind: Kind = "r2"
    reduce: Literal["mean", "max"] = "mean"
    shares: npt.NDArray[np.float64] | None = field(default=None, init=False, repr=False, compare=False)

    name: ClassVar[str] = "windowkv+headkv"
    paper: ClassVar[str] = "arXiv 2503.17922 and 2410.19258"
    ragged = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_beta(self.beta)
        one_of("kind", self.kind, ("r", "r2"))
        one_of("reduce", self.reduce, ("mean", "max"))
        if self.scope != "head" or self.budget != "flat" or self.accounting != "native":
            raise ValueError("windowkv+headkv needs scope='head', budget='flat' and accounting='native'")

    def bind(self, model: ModelHeads) -> KVPolicy:
        res = replace(self)
        object.__setattr__(res, "shares", model.importance(self.importance, self.kind, self.reduce))
        return res

    def native(self, task: Task = "localization") -> dict[str, Any]:
        fields = {**super().native(task), "heads": 1, "pool": 1 / self.beta}
        return fields if self.shares is None else {**fields, "importance": self.shares}
