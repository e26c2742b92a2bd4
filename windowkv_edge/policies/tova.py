"""TOVA (arXiv 2401.06104): the tokens that the newest one attends to, one choice for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import KVPolicy, Task, at_least
from .parts import Scoring, Selection

__all__ = ["TOVA"]


@dataclass(frozen=True, kw_only=True)
class TOVA(KVPolicy):
    """Keeps in each layer the tokens with the most attention of the newest one, averaged over all query heads of the
    layer (section 4); the newest stays, too.

    The paper evicts one token at every step. A session does so with ``kv_interval=1``; with a larger one it evicts as
    many at once, by the attention of the token before that.

    Args:
        window_size: newest tokens whose attention is averaged, which stay; 1 = as published.
    """

    window_size: int = 1

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "arXiv 2401.06104"
    keeps: ClassVar[str] = "per layer the tokens that the newest one attends to"
    answer_share: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("window_size", self.window_size, 1)

    @property
    def n_observed(self) -> int:
        # more than are asked: a draft that is taken back must not take the newest token's query along
        return max(16, self.window_size)

    def scoring(self, task: Task = "localization") -> Scoring:
        return Scoring(window_size=self.window_size, kernel_size=1)

    def selection(self, task: Task = "localization") -> Selection:
        return Selection(
            kind="windows", omega=1, top_p=1, gamma=1, scope="layer", n_recent=self.window_size, recent_share=1.0
        )  # fmt: skip
