"""What measured best: semantic windows and single tokens, heads that compete for them, q8_0 cells."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from ..errors import MissingProfileError
from ..heads import Kind, ModelHeads
from .base import QUERIES, KVPolicy, Query, Task, at_least, share_of
from .headkv import ByImportance
from .kvzip import KVzip
from .parts import Across, Allocation, Parts, Scoring, Selection
from .windowkv import WindowKV
from .windowkv_adakv import WindowAdaKV

__all__ = ["Auto"]

BOTH_SHARE = 0.5
"""Share of the cells that are kept for any question beside the prompt's."""

_ANY = KVzip()


@dataclass(frozen=True, kw_only=True)
class Auto(ByImportance, WindowAdaKV):
    """Half of the budget for windows (:class:`WindowKV`), half for single tokens, in q8_0 cells. All heads of
    the model compete for both (:class:`ByScore`); where the model has head scores, what a head is sure of follows from
    its importance (:class:`ByImportance`).

    Semantic windows keep an answer whole, single tokens keep what the text goes on with, and head scores protect heads
    that copy from the text, which need more cells than the attention of the prompt's end shows. The bytes of one f16
    cell hold 1.9 cells in q8_0; a fractional budget is a share of the bytes that f16 cells would take. The measurements
    are in windowkv_edge/eval/README.md. ``type_k`` and ``type_v`` override q8_0.

    While an answer grows, head scores alone divide, if there are any (:func:`windowkv_edge.compaction.in_answer`);
    between the batches of a prompt heads compete for half as much (:func:`windowkv_edge.compaction.in_prompt`).

    On a device that cannot attend to heads of different lengths at once it is the same selection with equal heads
    (:class:`WindowKV` with these options), in the same cells.

    Takes the arguments of all three, and:

    Args:
        importance_floor: cells that each head gets before importance divides the rest; a small budget is not divided.
        replay_share: share of the cells that are kept for any question, as :class:`KVzip` chooses them: of those that
            the prompt's question leaves, whichever heads hold them. It takes a second reading; 1 = all of them. What
            ``kv_query`` of a session sets.
    """

    omega: int = 2
    token_share: float = 0.5
    alpha_safeguard: float = 0.5
    across: Across = "model"
    kind: Kind = "r2"
    importance_floor: int = 64
    replay_share: float = 0.0

    name: ClassVar[str] = "auto"
    paper: ClassVar[str] = "arXiv 2503.17922, 2407.11550 and 2410.19258"
    keeps: ClassVar[str] = "passages and single tokens, all heads of the model compete for both; q8_0 cells"
    cells: ClassVar[str | None] = "q8_0"
    queries: ClassVar[tuple[Query, ...]] = QUERIES

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("importance_floor", self.importance_floor, 0)
        share_of("replay_share", self.replay_share)
        if self.importance is not None and self.across != "model":
            raise ValueError("auto divides by importance with across='model' only; leave importance or across out")

    def bind(self, model: ModelHeads) -> KVPolicy:
        """The policy for one model: with its head scores if it has any, else without; with equal heads where its device
        is slow with others.

        Raises:
            ValueError: the head scores are those of another model, or replay_share is given on such a device.
        """
        if not model.has_ragged and self.replay_share > 0:
            raise ValueError(
                f"replay_share={self.replay_share!r} gives heads different numbers of cells, "
                "which a device of the model's layers cannot attend to at once; leave it out, or choose 'kvzip'"
            )
        if not model.has_ragged:
            return WindowKV(**{own.name: getattr(self, own.name) for own in fields(WindowKV)})
        try:
            return super().bind(model)
        except MissingProfileError:
            return self

    def for_query(self, query: Query) -> KVPolicy:
        """The same policy with that share of cells for any question: none, half of them, or all; a ``replay_share`` of
        both kinds stays."""
        if query == self.query:
            return self
        res = replace(self, replay_share={"last": 0.0, "both": BOTH_SHARE, "any": 1.0}[query])
        object.__setattr__(res, "shares", self.shares)  # those of the model, if it is bound
        return res

    def scoring(self, task: Task = "localization") -> Scoring:
        return super().scoring(task) if self.replay_share < 1 else _ANY.scoring(task)

    def allocation(self) -> Allocation:
        if self.replay_share == 1:
            return _ANY.allocation()
        own = replace(super().allocation(), heads="score", importance_floor=self.importance_floor)
        divides = self.shares is not None and self.across == "model"
        return own if divides else replace(own, beta=0.0, importance_floor=0, importance=None)

    def selection(self, task: Task = "localization") -> Selection:
        return super().selection(task) if self.replay_share < 1 else _ANY.selection(task)

    def parts(self, task: Task = "localization") -> Parts:
        return super().parts(task)._replace(replay_share=self.replay_share if self.replay_share < 1 else 0.0)
