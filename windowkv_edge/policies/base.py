"""What a policy is: a frozen dataclass that fills ``struct wkv_policy``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from ..heads import ModelHeads

__all__ = ["KVPolicy", "Task", "at_least", "one_of"]

Task = Literal["localization", "aggregation"]


def at_least(name: str, value: object, low: int) -> None:
    """Raise ValueError unless value is an int >= low."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}, expected an int of at least {low}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


class KVPolicy(ABC):
    """Decides which cells of a KV cache stay. Subclasses are frozen dataclasses, one file each."""

    name: ClassVar[str]
    paper: ClassVar[str]

    #: whether the prompt's text has to be classified before a compaction
    needs_task: bool = False

    #: whether the heads of a layer may hold different numbers of cells
    ragged: bool = False

    def __post_init__(self) -> None:  # noqa: B027 (nothing to check here)
        """Check the fields, then those of the next class: ``super().__post_init__()``."""

    @property
    @abstractmethod
    def window(self) -> int:
        """Tokens at the end of the prompt whose queries are observed, >= 1."""

    @abstractmethod
    def native(self, task: Task = "localization") -> dict[str, Any]:
        """Fields of ``struct wkv_policy`` for a prompt with this task."""

    def bind(self, model: ModelHeads) -> KVPolicy:
        """The policy for one model: what it takes from a profile of the model's heads is looked up.

        Raises:
            MissingProfileError: the policy needs head scores and there are none; says which command makes them.
            ValueError: the scores are those of another model.
        """
        return self
