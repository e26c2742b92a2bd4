"""What a policy is: a frozen dataclass that composes a native one, or that selects in Python."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from ..budget import plain
from .parts import Allocation, Parts, Scoring, Selection

if TYPE_CHECKING:
    from .. import _native
    from ..heads import ModelHeads

__all__ = [
    "QUERIES",
    "TASKS",
    "CacheView",
    "KVPolicy",
    "Positions",
    "Query",
    "Scores",
    "Task",
    "at_least",
    "number_of",
    "one_of",
    "share_of",
    "true_or_false",
]

Task = Literal["localization", "aggregation"]
TASKS: tuple[Task, ...] = get_args(Task)

Query = Literal["last", "any", "both"]
"""Which question cells are kept for: the one that the prompt asks, any other, or both."""
QUERIES: tuple[Query, ...] = get_args(Query)

Scores = Sequence[Sequence[npt.NDArray[np.float32]]]
"""Per layer and kv head float32 [cells]."""

Positions = Sequence[Sequence[npt.ArrayLike]]
"""Per layer and kv head integers [cells that stay], each a position that the head holds."""


def at_least(name: str, value: object, low: int) -> None:
    """Raise ValueError unless value is an int of at least low that fits into 32 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
        raise ValueError(f"{name} is {value!r}, expected an int of at least {low} and below 2^31")


def share_of(name: str, value: object, *, over_zero: bool = False) -> None:
    """Raise ValueError unless value is a number of 0 to 1; ``over_zero``: 0 is refused, too."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (over_zero and value == 0):  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}, expected a share {'over 0 and up to' if over_zero else 'of 0 to'} 1")


def number_of(name: str, value: object, low: float) -> None:
    """Raise ValueError unless value is a finite number >= low."""
    # ints are compared exactly, however large
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= sys.float_info.max:
        raise ValueError(f"{name} is {value!r}, expected a finite number of at least {low:g}")


def true_or_false(name: str, value: object) -> None:
    """Raise ValueError unless value is a bool: "no" and "False" are true in Python."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected True or False")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class CacheView:
    """What a policy in Python sees of a cache while it selects; it is valid during that call only.

    Layers are those that policies compress, in their order. Before the first compaction all heads hold all positions.
    Pinned cells (``Llama.kv_pin``) stay anyway: the view, the scores and the budget are about the others.

    Attributes:
        positions: per layer and kv head int32 [cells], ascending.
        n_past: positions that the sequence has seen, evicted ones included.
        n_gqa: query heads per kv head; those of kv head h are ``h * n_gqa`` to ``(h + 1) * n_gqa - 1``.
        cell_types: of K and V, such as ("f16", "f16"). Keys, values and queries of quantised cells are rotated by a
            Hadamard matrix, as llama.cpp does it: products of keys and queries stay, RoPE's pairs of dimensions do not.
        task: the prompt's task, "localization" unless the policy's ``needs_task`` is True.
        n_observed: queries that the policy observes.
    """

    _kv: _native.Context
    positions: Sequence[Sequence[npt.NDArray[np.int32]]]
    n_past: int
    n_gqa: int
    cell_types: tuple[str, str]
    task: Task
    n_observed: int

    @property
    def n_layer(self) -> int:
        return len(self.positions)

    @property
    def n_head_kv(self) -> int:
        return len(self.positions[0])

    def keys(self, layer: int, head: int) -> npt.NDArray[np.float32]:
        """K of one kv head as attention sees it, RoPE included: a copy, float32 [cells, head_dim].

        Raises:
            ValueError: the session has no such layer or head, or the selection is over.
            TypeError: layer or head is no int.
            NativeError: memory ran out.
        """
        return self._rows(layer, head, "k")

    def values(self, layer: int, head: int) -> npt.NDArray[np.float32]:
        """V of one kv head: a copy, float32 [cells, head_dim].

        Raises:
            ValueError, TypeError, NativeError: see :meth:`keys`.
        """
        return self._rows(layer, head, "v")

    def _rows(self, layer: int, head: int, which: Literal["k", "v"]) -> npt.NDArray[np.float32]:
        rows = self._kv.rows(layer, head, which)
        own = self.positions[layer][head]
        return rows if len(rows) == len(own) else rows[np.isin(self._kv.positions(layer, head), own)]

    def queries(self, layer: int, head: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The last queries of one *query* head, RoPE included: positions int32 [observed], a copy float32 [observed,
        head_dim]; as many as the policy's ``n_observed``, or as the sequence has.

        Raises:
            ValueError, TypeError, NativeError: see :meth:`keys`.
        """
        at, rows = self._kv.queries(layer, head)
        seen = at >= self.n_past - self.n_observed
        return at[seen], rows[seen]


class KVPolicy:
    """Decides which cells of a KV cache stay. Subclasses are frozen dataclasses, one file each.

    A subclass either composes what the native code knows (:meth:`scoring`, :meth:`allocation`, :meth:`selection`), as
    most of this package do, or chooses the cells in Python (:meth:`select`) and says how many queries it wants to see
    (:attr:`n_observed`).

    Raises:
        ValueError: an option is out of range, or does not fit the others.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = "-"

    #: what stays, in one line
    keeps: ClassVar[str] = ""

    #: cells of K and V that it prefers, a name of llama.cpp; fractions of a budget then are of the bytes of f16 cells
    cells: ClassVar[str | None] = None

    #: share of the cells that the newest tokens take in any case when an answer is compacted while it grows
    answer_share: ClassVar[float] = 0.5

    #: questions that a session may have it keep cells for, see :meth:`for_query`; () = its own alone
    queries: ClassVar[tuple[Query, ...]] = ()

    #: whether the prompt's text has to be classified before a compaction
    needs_task: bool = False

    #: whether the heads of a layer may hold different numbers of cells
    ragged: bool = False

    def __post_init__(self) -> None:
        """Check the fields after those of the next class: ``super().__post_init__()``, which makes scalars of NumPy
        Python's."""
        for own in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, own.name, plain(getattr(self, own.name)))

    @property
    def n_observed(self) -> int:
        """Tokens at the end of the prompt whose queries are observed, >= 1.

        Policies in Python give it a value (``n_observed: int = 32``), or override it or :meth:`scoring`.
        """
        return max(1, *(self.scoring(task).n_observed for task in TASKS))

    @property
    def accumulates(self) -> bool:
        """Whether scores are sums over the whole sequence, to which a session adds the queries batch by batch."""
        return not self.in_python and self.scoring().reduce == "sum"

    @property
    def replays(self) -> bool:
        """Whether scores come from tokens that repeat what was read, which a session evaluates before a compaction."""
        return not self.in_python and (self.scoring().reduce == "replay" or self.parts().replay_share > 0)

    @property
    def observes(self) -> bool:
        """Whether what a prompt asks scores what was read before it: not where attention is summed up, or comes from
        tokens that repeat the text alone."""
        return self.in_python or self.scoring().reduce not in ("sum", "replay")

    @property
    def query(self) -> Query:
        """Which question it keeps cells for: "any" or "both" where it has the model repeat what was read."""
        return "last" if not self.replays else "both" if self.observes else "any"

    def for_query(self, query: Query) -> KVPolicy:
        """The policy that keeps cells for the prompt's question, for any, or for both.

        Raises:
            ValueError: there is none.
        """
        if query == self.query:
            return self
        raise ValueError(
            f"kv_query={query!r}: {self.name!r} keeps cells for {self.query!r}; leave kv_query out, or choose "
            "kv_policy='auto', which does as it is told"
        )

    @property
    def in_python(self) -> bool:
        """Whether :meth:`select` chooses, and not the native code."""
        return type(self).select is not KVPolicy.select

    def scoring(self, task: Task = "localization") -> Scoring:
        """Who observes a prompt with this task, and how scores are pooled."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} does not say what it observes, expected n_observed or scoring()")

    def allocation(self) -> Allocation:
        """How layers and heads divide the cells; equally, unless a policy says otherwise."""
        return Allocation()

    def selection(self, task: Task = "localization") -> Selection:
        """What stays of a head of a prompt with this task."""
        raise NotImplementedError(f"{type(self).__name__} selects in Python, it has no native selection")

    def parts(self, task: Task = "localization") -> Parts:
        """The native policy for a prompt with this task.

        Raises:
            NotImplementedError: the policy selects in Python.
        """
        selection = self.selection(task)
        return Parts(self.scoring(task), self.allocation(), selection)

    def select(self, scores: Scores, budget: int, ctx: CacheView) -> Positions:
        """Choose the cells that stay; called once per compaction, and only if some head holds more than the budget.

        If it raises, the call that compacted raises the same; nothing is evicted, and the session stays usable.

        Args:
            scores: per layer and kv head float32 [cells]: attention of the last ``n_observed`` tokens, mean over
                these and over the query heads of the kv head (SnapKV, arXiv 2404.14469, section 3). Views of native
                memory, valid during the call; not to be written to.
            budget: cells per (layer, kv head) that may stay on average; every head keeps one at least.
            ctx: positions, and on demand keys, values and queries.

        Returns:
            ``positions[layer][head]``, integers out of ``ctx.positions[layer][head]``, in any order. Heads of a
            layer that hold different numbers of cells need ``ragged = True``.
        """
        raise NotImplementedError

    def check_cells(self, cell_types: tuple[str, str]) -> None:
        """Called when a session gets the policy.

        Args:
            cell_types: of its K and V cells, see :class:`CacheView`.

        Raises:
            ValueError: the policy cannot select among them.
        """

    def bind(self, model: ModelHeads) -> KVPolicy:
        """The policy for one model; head scores, if it needs any, are looked up here.

        Raises:
            MissingProfileError: the policy needs head scores and there are none; says which command makes them.
            ValueError: the scores are those of another model.
        """
        return self
