"""What measured best: windows that compete across heads, single tokens beside them, q8_0 cells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import MissingProfileError
from ..heads import Kind, ModelHeads
from .base import KVPolicy, at_least
from .headkv import ByImportance
from .parts import Across, Allocation
from .windowkv_adakv import WindowAdaKV

__all__ = ["Auto"]


@dataclass(frozen=True, kw_only=True)
class Auto(ByImportance, WindowAdaKV):
    """Windows (:class:`WindowKV`) for half of the budget, single tokens for the other half, in q8_0 cells. All heads of
    the model compete for both (:class:`ByScore`); where the model has head scores, what a head is sure of follows from
    its importance (:class:`ByImportance`).

    Windows find answers, tokens keep the distribution of the text, heads that copy need more than attention to the
    prompt's end shows, and q8_0 holds 1.9 cells for the bytes of one f16 cell. A session's fraction of a budget is one
    of the bytes that f16 cells would take. README, Accuracy, has the measurements; the session chooses other cells
    where ``type_k`` or ``type_v`` say so.

    Takes the arguments of all three, and:

    Args:
        importance_floor: cells of each head that are not divided by importance: small budgets have none to give away.
    """

    omega: int = 2
    token_share: float = 0.5
    alpha_safeguard: float = 0.5
    across: Across = "model"
    kind: Kind = "r2"
    importance_floor: int = 64

    name: ClassVar[str] = "auto"
    paper: ClassVar[str] = "arXiv 2503.17922, 2407.11550 and 2410.19258"
    keeps: ClassVar[str] = "passages and single tokens, all heads of the model compete for both; q8_0 cells"
    cells: ClassVar[str | None] = "q8_0"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("importance_floor", self.importance_floor, 0)
        if self.importance is not None and self.across != "model":
            raise ValueError("auto divides by importance with across='model' only; leave importance or across out")

    def bind(self, model: ModelHeads) -> KVPolicy:
        """With the model's head scores where it has some, without them otherwise."""
        try:
            return super().bind(model)
        except MissingProfileError:
            return self

    def allocation(self) -> Allocation:
        own = replace(super().allocation(), heads="score", importance_floor=self.importance_floor)
        divides = self.shares is not None and self.across == "model"
        return own if divides else replace(own, beta=0.0, importance_floor=0, importance=None)
