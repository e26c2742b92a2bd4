"""What measured best: semantic windows and single tokens, heads that compete for them, q8_0 cells."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from ..errors import MissingProfileError
from ..heads import Kind, ModelHeads
from .base import KVPolicy, Task, at_least, number_of
from .headkv import ByImportance
from .parts import Across, Allocation, Parts
from .windowkv import WindowKV
from .windowkv_adakv import WindowAdaKV

__all__ = ["Auto"]


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
            the prompt's question leaves, whichever heads hold them; under 1. It takes a second reading.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("importance_floor", self.importance_floor, 0)
        number_of("replay_share", self.replay_share, 0)
        if self.replay_share >= 1:
            raise ValueError(
                f"replay_share is {self.replay_share!r}, expected less than 1; 'kvzip' keeps all cells for any question"
            )
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
                f"replay_share={self.replay_share!r} gives heads different numbers of cells, which a device of the "
                "model's layers cannot attend to at once; leave it out, or choose 'kvzip'"
            )
        if not model.has_ragged:
            return WindowKV(**{own.name: getattr(self, own.name) for own in fields(WindowKV)})
        try:
            return super().bind(model)
        except MissingProfileError:
            return self

    def allocation(self) -> Allocation:
        own = replace(super().allocation(), heads="score", importance_floor=self.importance_floor)
        divides = self.shares is not None and self.across == "model"
        return own if divides else replace(own, beta=0.0, importance_floor=0, importance=None)

    def parts(self, task: Task = "localization") -> Parts:
        return super().parts(task)._replace(replay_share=self.replay_share)
