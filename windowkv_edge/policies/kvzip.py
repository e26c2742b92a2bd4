"""KVzip (arXiv 2505.23416): the cells that the model needs to repeat what it has read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import KVPolicy, Task, share_of
from .parts import Allocation, Scoring, Selection

__all__ = ["KVzip"]


@dataclass(frozen=True, kw_only=True)
class KVzip(KVPolicy):
    """Keeps the cells that get the most attention while the model repeats its text, whatever will be asked about it.

    Before a compaction the session has the model repeat what was read since the last one, piece by piece
    (:mod:`windowkv_edge.replay`); the tokens that do so are taken back. The score of a cell is the largest attention
    that they and the query heads of its kv head pay it (section 3.2). All heads of the model compete under one
    threshold (section 3.3); the first four tokens stay, and those that were not repeated: the question behind a text.

    The tokens that repeat a piece attend to its own cells, the first four, and each other; the authors' code has such
    an approximation, too. Where a piece is repeated again, the larger score stays.

    Args:
        alpha_safeguard: share of an equal budget that every head gets in any case.
    """

    alpha_safeguard: float = 0.0

    name: ClassVar[str] = "kvzip"
    paper: ClassVar[str] = "arXiv 2505.23416"
    keeps: ClassVar[str] = "the tokens that the model needs to repeat the text, for any question about it"

    ragged = True

    def __post_init__(self) -> None:
        super().__post_init__()
        share_of("alpha_safeguard", self.alpha_safeguard)

    def scoring(self, task: Task = "localization") -> Scoring:
        return Scoring(window_size=1, kernel_size=1, reduce="replay")

    def allocation(self) -> Allocation:
        return Allocation(heads="score", across="model", alpha_safeguard=self.alpha_safeguard)

    def selection(self, task: Task = "localization") -> Selection:
        return Selection(kind="tokens", n_recent=1)
