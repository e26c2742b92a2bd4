"""StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import KVPolicy, Task, at_least
from .parts import Scoring, Selection

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(KVPolicy):
    """Keeps the first ``n_sink`` tokens and spends the rest of the budget on the last ones.

    Args:
        n_sink: first tokens that always stay (the paper's attention sinks, section 3.2).
    """

    n_sink: int = 4

    name: ClassVar[str] = "streamingllm"
    paper: ClassVar[str] = "arXiv 2309.17453"
    keeps: ClassVar[str] = "the first tokens and the newest ones"
    answer_share: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_sink", self.n_sink, 0)

    def scoring(self, task: Task = "localization") -> Scoring:
        return Scoring()

    def selection(self, task: Task = "localization") -> Selection:
        return Selection(kind="recent", n_sink=self.n_sink)
