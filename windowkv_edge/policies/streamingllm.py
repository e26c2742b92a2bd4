"""StreamingLLM (arXiv 2309.17453): the first tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import KVPolicy, Task, at_least

__all__ = ["StreamingLLM"]


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(KVPolicy):
    """Keeps ``n_sink`` first tokens, the rest of the budget goes to the last ones.

    Args:
        n_sink: first tokens that always stay (the paper's attention sinks, section 3.2).
    """

    n_sink: int = 4

    name: ClassVar[str] = "streamingllm"
    paper: ClassVar[str] = "arXiv 2309.17453"

    def __post_init__(self) -> None:
        at_least("n_sink", self.n_sink, 0)

    @property
    def window(self) -> int:
        return 1

    def native(self, task: Task = "localization") -> dict[str, Any]:
        return {"kind": 1, "alpha": 1, "n_sink": self.n_sink}
