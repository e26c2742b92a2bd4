"""What a policy is: a frozen dataclass that fills ``struct wkv_policy``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

__all__ = ["KVPolicy", "Task", "at_least"]

Task = Literal["localization", "aggregation"]


def at_least(name: str, value: object, low: int) -> None:
    """Raise ValueError unless value is an int >= low."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}, expected an int of at least {low}")


class KVPolicy(ABC):
    """Decides which cells of a KV cache stay. Subclasses are frozen dataclasses, one file each."""

    name: ClassVar[str]
    paper: ClassVar[str]

    #: whether the prompt's text has to be classified before a compaction
    needs_task: bool = False

    @property
    @abstractmethod
    def window(self) -> int:
        """Tokens at the end of the prompt whose queries are observed, >= 1."""

    @abstractmethod
    def native(self, task: Task = "localization") -> dict[str, float]:
        """Fields of ``struct wkv_policy`` for a prompt with this task."""
