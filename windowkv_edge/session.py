"""What every session shares: a context whose cache serves a policy, bound to the model, and its compactions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp

from . import _native
from .budget import n_cells
from .compaction import Comes, compact, n_observed
from .errors import NativeError, UnsupportedModelError, WindowKVError
from .guard import Guard, Interrupts
from .heads import ModelHeads
from .policies import KVPolicy, Query, Task
from .stats import cell_types

__all__ = ["AfterPrompt", "PolicyCache", "ragged_cache"]


@contextmanager
def ragged_cache(policy: KVPolicy | None, path: str, cells: str | None) -> Iterator[None]:
    """The llama_context that is created inside gets a cache for the policy; without a policy stock's.

    Args:
        policy: the policy.
        path: the model file, for messages.
        cells: type of the cells where the heads' rows are whole blocks of it; None = the context's types.

    Raises:
        UnsupportedModelError: the cache refused the model, the backend or the parameters, so that what was called
            inside raised ValueError or WindowKVError.
        NativeError: there was no memory for it.
    """
    if policy is None:
        yield
        return
    with _native.pending(n_observed(policy), cells):
        try:
            yield
        except (ValueError, WindowKVError) as error:
            reason = _native.last_error()
            if reason:
                kind = NativeError if _native.out_of_memory() else UnsupportedModelError
                raise kind(f"{path}: {reason}") from error
            raise


@dataclass
class AfterPrompt:
    """When a session compacts: behind the first prompt that its budget does not hold, and behind later ones that made
    the cache grow.

    A budget grants cells for the positions seen, C. After a later prompt a compaction is due if the heads hold more
    than ``growth * C`` cells on average, or, with a fraction, if the sequence has more than ``growth`` times the
    positions that it had at the last compaction. So a session holds no more than ``growth * C`` cells when it begins to
    answer, and short turns do not compact.

    Args:
        budget: see :func:`windowkv_edge.budget.check_budget`.
        min_prompt: with a fraction, sequences of fewer positions are left whole.
        growth: at least 1; 1 compacts behind every prompt.

    Attributes:
        changed: the budget is another one since the last compaction. The next prompt is compacted then, whatever grew.
    """

    budget: float | int
    min_prompt: int
    growth: float = 1.5
    changed: bool = False

    def granted(self, n_past: int, n_cells: int, is_settled: bool) -> int | None:
        """Cells per head that may be held while a prompt is read within its budget; None = any number.

        Args:
            n_past: positions at its end.
            n_cells: those that the budget grants for these positions.
            is_settled: an earlier prompt was compacted; then cells may grow before they are compacted again.
        """
        if not isinstance(self.budget, int) and n_past < self.min_prompt:
            return None
        return int(self.growth * n_cells) if is_settled else n_cells

    def holds(self, n_past: int) -> bool:
        """Whether the budget is owed by a sequence of so many positions."""
        return isinstance(self.budget, int) or (n_past >= self.min_prompt and self.budget < 1.0)

    def is_due(self, n_past: int, n_boundary: int, n_held: float, n_cells: int) -> bool:
        """Whether the end of a prompt is to be compacted.

        Args:
            n_past: positions in the cache.
            n_boundary: positions that were there at the last compaction, 0 if there was none.
            n_held: cells per (layer, kv head) on average.
            n_cells: those that the budget grants for these positions.
        """
        if n_past <= n_boundary:
            return False
        is_share = not isinstance(self.budget, int)
        grew = n_held > self.growth * n_cells or (is_share and n_past > self.growth * n_boundary)
        if n_boundary > 0 and not grew and not self.changed:
            return False
        if is_share:
            return n_past >= self.min_prompt and self.budget < 1.0
        return n_past > self.budget


class PolicyCache:
    """The cache of a llama_context that was created inside :func:`ragged_cache`, and the policy that compacts it.

    Attributes:
        policy: the policy.
        own: the same, bound to the model.
        bound: what compacts: ``own``, or what :meth:`ask` made of it.

    Args:
        ctx: the context, a ctypes pointer that outlives this object.
        policy: the policy.
        path: the model file.
        metadata: the model's string metadata.
        model: the model, a ctypes pointer.
        exact: attend as stock does until something is evicted.
        guard: of the session, if it has one.

    Raises:
        UnsupportedModelError: model and backend do not serve the policy; says why.
        MissingProfileError, OSError, ValueError: see :meth:`ModelHeads.importance`.
    """

    def __init__(
        self,
        ctx: Any,
        policy: KVPolicy,
        *,
        path: str,
        metadata: Mapping[str, str],
        model: Any,
        exact: bool,
        guard: Guard | None = None,
    ) -> None:
        self.kv = _native.Context(ctx)
        self._path, self._metadata, self._model = path, metadata, model
        self._guard = guard or Guard()
        self.policy, self.bound = policy, self.bind(policy)
        self.own = self.bound
        self.kv.set_attention("auto" if exact else "ragged")

    def bind(self, policy: KVPolicy) -> KVPolicy:
        """The policy for this model and its devices. Warns where these are slow with it, or another one stands in.

        Raises:
            UnsupportedModelError, MissingProfileError, OSError, ValueError: see the class.
        """
        self._check_ready(ragged=False)
        stats = self.kv.stats()
        try:
            policy.check_cells(cell_types(stats))
        except ValueError as error:
            raise UnsupportedModelError(f"{self._path}: {error}") from error
        n_layer, n_head_kv = int(llama_cpp.llama_model_n_layer(self._model)), int(stats.n_head_kv)
        n_head = n_head_kv * int(stats.n_gqa)
        layers, has_ragged = self.kv.layers(), self.kv.has_ragged()
        bound = policy.bind(
            ModelHeads(self._path, self._metadata, n_layer, n_head_kv, layers, n_head=n_head, has_ragged=has_ragged)
        )
        self._check_ready(bound.ragged)
        lacks = f"{self._path}: a device of its layers cannot attend to heads of different lengths at once"
        if not has_ragged and bound.name != policy.name:
            text = f"{lacks}, so that kv_policy={policy.name!r} gives all heads equally many cells, as {bound.name!r}"
            warnings.warn(text, stacklevel=5)
        elif bound.ragged and not has_ragged:
            text = (
                f"{lacks}: with kv_policy={policy.name!r} it does so head by head, {n_head_kv} attention operations "
                "per layer and token instead of one; 'auto' and 'windowkv' keep heads equal there"
            )
            warnings.warn(text, stacklevel=5)
        return bound

    def _check_ready(self, ragged: bool) -> None:
        try:
            self.kv.ready(ragged)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self._path}: {error}") from None

    @property
    def name(self) -> str:
        """Of the policy, and of the one that stands in for it on this device."""
        own = self.policy.name
        return own if self.bound.name == own else f"{own}: {self.bound.name}"

    def set_policy(self, policy: KVPolicy, bound: KVPolicy) -> None:
        """Another policy, for an empty cache. If this is interrupted or fails, the old one stays.

        Args:
            policy: the policy.
            bound: what :meth:`bind` made of it.

        Raises:
            NativeError: no memory for the queries that it observes.
        """
        try:
            self.kv.set_observed(n_observed(policy))
            self.policy, self.bound, self.own = policy, bound, bound
        except BaseException:
            if self.policy is not policy:
                self.kv.set_observed(n_observed(self.policy))
            raise

    def for_query(self, query: Query | None) -> KVPolicy:
        """The bound policy that keeps cells for a question of that kind; None = of its own.

        Raises:
            ValueError: there is none; says what else.
            UnsupportedModelError: the one that stands in for the policy on its device has none.
        """
        return self.of_query(self.policy, self.own, query)

    def of_query(self, policy: KVPolicy, bound: KVPolicy, query: Query | None) -> KVPolicy:
        """The same of another policy, and what :meth:`bind` made of it."""
        if query is None:
            return bound
        if bound.name != policy.name and query != bound.query:
            raise UnsupportedModelError(
                f"{self._path}: kv_query={query!r} gives heads different numbers of cells, which a device of its "
                "layers cannot attend to at once; leave it out, or choose kv_policy='kvzip'"
            )
        return bound.for_query(query)

    def ask(self, query: Query | None) -> None:
        """From now on compact with :meth:`for_query`; the cells stay.

        Raises:
            ValueError, UnsupportedModelError: see :meth:`for_query`.
        """
        self.bound = self.for_query(query)

    def n_cells(self, budget: float | int, n_more: int = 0) -> int:
        """Cells per (layer, kv head) that a budget stands for now, or with n_more positions."""
        stats = self.kv.stats()
        types = () if self.policy.cells is None else cell_types(stats)
        return n_cells(budget, int(stats.n_past) + n_more, *types)

    def compact(
        self,
        n_cells: int,
        task: Task = "localization",
        policy: KVPolicy | None = None,
        n_observers: int | None = None,
        comes: Comes = "answer's start",
    ) -> int:
        """Evict all but the cells that a policy chooses.

        Args:
            n_cells: cells per (layer, kv head) that stay on average.
            task: the prompt's task.
            policy: one that :meth:`bind` returned; None = the session's.
            n_observers, comes: see :func:`windowkv_edge.compaction.compact`.

        Returns:
            Cells released over all layers and heads.

        Raises:
            NativeError, Exception: see :func:`windowkv_edge.compaction.compact`.
        """
        chosen = policy or self.bound
        with Interrupts(), self._guard.selecting(chosen.name):
            return compact(self.kv, chosen, n_cells, task, n_observers, comes)
