"""What a policy is: a frozen dataclass that fills ``struct wkv_policy``, or that selects in Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .. import _native
    from ..heads import ModelHeads

__all__ = ["CacheView", "KVPolicy", "Positions", "Scores", "Task", "at_least", "one_of"]

Task = Literal["localization", "aggregation"]

Scores = Sequence[Sequence[npt.NDArray[np.float32]]]
"""Per layer and kv head float32 [cells]."""

Positions = Sequence[Sequence[npt.ArrayLike]]
"""Per layer and kv head integers [cells that stay], each a position that the head holds."""


def at_least(name: str, value: object, low: int) -> None:
    """Raise ValueError unless value is an int >= low."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}, expected an int of at least {low}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class CacheView:
    """What a policy in Python sees of a cache while it selects; nothing of it may be kept afterwards.

    Layers are those that policies compress, in their order. Before the first compaction all heads hold all positions.

    Attributes:
        positions: per layer and kv head int32 [cells], ascending.
        n_past: positions that the sequence has seen, evicted ones included.
        n_gqa: query heads per kv head; those of kv head h are ``h * n_gqa`` to ``(h + 1) * n_gqa - 1``.
        cell_types: of K and V, such as ("f16", "f16"). Keys, values and queries of quantised cells are rotated by a
            Hadamard matrix, as llama.cpp does it: their products are what they were, the pairs that RoPE turns are not.
        task: the prompt's task, "localization" unless the policy's ``needs_task`` is True.
        window: the policy's.
    """

    _kv: _native.Context
    positions: Sequence[Sequence[npt.NDArray[np.int32]]]
    n_past: int
    n_gqa: int
    cell_types: tuple[str, str]
    task: Task
    window: int

    @property
    def n_layer(self) -> int:
        return len(self.positions)

    @property
    def n_head_kv(self) -> int:
        return len(self.positions[0])

    def keys(self, layer: int, head: int) -> npt.NDArray[np.float32]:
        """K of one kv head as attention sees it, RoPE included: a copy, float32 [cells, head_dim]."""
        return self._kv.rows(layer, head, "k")

    def values(self, layer: int, head: int) -> npt.NDArray[np.float32]:
        """V of one kv head: a copy, float32 [cells, head_dim]."""
        return self._kv.rows(layer, head, "v")

    def queries(self, layer: int, head: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The last queries of one *query* head, RoPE included: positions int32 [observed], a copy float32 [observed,
        head_dim]; as many as the policy's ``window``, or as the sequence has."""
        at, rows = self._kv.queries(layer, head)
        seen = at >= self.n_past - self.window
        return at[seen], rows[seen]


class KVPolicy(ABC):
    """Decides which cells of a KV cache stay. Subclasses are frozen dataclasses, one file each.

    A subclass either fills ``struct wkv_policy`` (:meth:`native`), as those of this package do, or chooses the cells in
    Python (:meth:`select`).
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "-"

    #: cells of K and V that it prefers, a name of llama.cpp; fractions of a budget then are of the bytes of f16 cells
    cells: ClassVar[str | None] = None

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

    @property
    def in_python(self) -> bool:
        """Whether :meth:`select` chooses, and not the native code."""
        return type(self).select is not KVPolicy.select

    def native(self, task: Task = "localization") -> dict[str, Any]:
        """Fields of ``struct wkv_policy`` for a prompt with this task."""
        raise NotImplementedError(f"{type(self).__name__} selects in Python, it has no native fields")

    def select(self, scores: Scores, budget: int, ctx: CacheView) -> Positions:
        """Choose the cells that stay; called once per compaction, and only if some head holds more than the budget.

        What it raises surfaces at the call that compacted; nothing is evicted then and the session stays usable.

        Args:
            scores: per layer and kv head float32 [cells]: attention of the last ``window`` tokens, mean over these and
                over the query heads of the kv head (SnapKV, arXiv 2404.14469, section 3). Views of native memory, valid
                during the call; not to be written to.
            budget: cells per (layer, kv head) that may stay on average; every head keeps one at least.
            ctx: positions, and on demand keys, values and queries.

        Returns:
            ``positions[layer][head]``. Heads of a layer that hold different numbers of cells need ``ragged = True``.
        """
        raise NotImplementedError

    def bind(self, model: ModelHeads) -> KVPolicy:
        """The policy for one model: what it takes from a profile of the model's heads is looked up.

        Raises:
            MissingProfileError: the policy needs head scores and there are none; says which command makes them.
            ValueError: the scores are those of another model.
        """
        return self
