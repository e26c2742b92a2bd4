"""What a session is given while it lives: another limit, positions that stay, a function that is told how far a prompt
is."""

from __future__ import annotations

import numpy as np

from . import _native
from .errors import UnsupportedCallError
from .limit import Limit, check_limit
from .pins import Range, n_pinned
from .policies.base import one_of
from .progress import KVProgress, check_progress
from .repeating import ASKED_QUERIES, AskedQuery
from .replay import next_to_replay
from .shift import Shift
from .states import SavedStates

__all__ = ["Limited"]


class Limited(SavedStates):
    """The part of :class:`windowkv_edge.Llama` that these attributes belong to."""

    @property
    def kv_limit(self) -> int | str | None:
        """The limit, see the class; setting it takes effect at the next batch or token, and a smaller one compacts
        there. ``kv_budget`` stays what it is.

        Raises:
            UnsupportedCallError: when set, the session has no policy or cannot be used now (see the class).
            TypeError, ValueError: when set, it is no limit, or leaves too few cells for the policy or for the pins; the
                old one stays.
        """
        return None if self._kv_limit is None else self._kv_limit.given

    @kv_limit.setter
    def kv_limit(self, limit: int | str | None) -> None:
        with self._use("setting kv_limit"):
            cache = self._need_cache("setting kv_limit")
            if limit is None:
                self._kv_limit = None
                self._kv_given.pop("kv_limit", None)
                return
            new, stats = Limit(check_limit(limit), self._kv_interval), cache.kv.stats()
            bound = cache.for_query(self._given_query)
            new.check(stats, bound, self._n_repeating_least(bound))
            n, room = n_pinned(self._kv_pins.asked), new.n_free(stats, bound)
            if n >= room:
                raise ValueError(
                    f"kv_limit={new.given!r} leaves {room} cells per head for what stays, and {n} positions are "
                    "pinned; give a larger one, or call kv_unpin()"
                )
            self._kv_limit = new
            self._kv_given["kv_limit"] = new.given
            self._ask_as_given(cache)

    @property
    def kv_query(self) -> AskedQuery:
        """Which question cells are kept for, see the class. Setting it takes effect at the next compaction, and the
        next prompt's end is compacted if cells were kept for another one. If these cannot be repeated any more, because
        they were chosen for the last question alone, the next prompt of :meth:`generate` is evaluated anew as a whole,
        and what goes on behind them keeps cells for that question until then; by hand, call :meth:`reset`.

        Raises:
            UnsupportedCallError: when set, the session has no policy or cannot be used now (see the class).
            ValueError: when set, there is no such kind, or the policy does not keep cells for it, or needs a larger
                ``kv_limit`` for it; the old one stays.
        """
        return self._kv_query

    @kv_query.setter
    def kv_query(self, query: AskedQuery) -> None:
        with self._use("setting kv_query"):
            cache = self._need_cache("setting kv_query")
            one_of("kv_query", query, ASKED_QUERIES)
            bound = cache.for_query(None if query == "auto" else query)
            if self._kv_limit is not None:
                self._kv_limit.check(cache.kv.stats(), bound, self._n_repeating_least(bound))
            self._kv_query = query
            self._kv_given.pop("kv_query", None)
            if query != "auto":
                self._kv_given["kv_query"] = query
            self._kv_is_over = False
            self._ask_as_given(cache)
            if self._suits(self._kv_kept_for):
                return
            kv, stats = cache.kv, cache.kv.stats()
            if cache.bound.replays and next_to_replay(kv, int(stats.n_boundary)) > stats.n_replayed:
                cache.ask("last")  # for what is there
                self._kv_is_over = True
            self._kv_when.changed = self._requires_eval = True
            self._kv_prompts.changed(0)

    @property
    def kv_shift(self) -> Shift:
        """What happens at the end of ``n_ctx``, see the class."""
        return self._kv_shift

    def kv_room(self, n_tokens: int) -> int | None:
        """Cells per (layer, kv head) within which a prompt would be read that goes on behind what is there; None with
        the full cache.

        Args:
            n_tokens: tokens that are not in the cache yet.

        Raises:
            UnsupportedCallError: the session has no policy or cannot be used now (see the class).
            TypeError, ValueError: no number of tokens.
        """
        with self._kv_guard.use("kv_room()", reads=True):
            cache = self._need_cache("kv_room()")
            if (n_tokens := _native.int32("n_tokens", n_tokens)) < 0:
                raise ValueError(f"n_tokens is {n_tokens}, expected at least 0")
            return self._room(cache, n_tokens, "prompt")

    def kv_pin(self, start: int, stop: int) -> None:
        """Positions [start, stop) of the sequence, read or yet to come, stay in every compaction with every policy.

        They count in the budget; the policy chooses the other cells. Pins hold until :meth:`kv_unpin`, also for prompts
        that come after a reset.

        Raises:
            UnsupportedCallError: the session has no policy or cannot be used now (see the class), or some of these
                positions were evicted.
            TypeError, ValueError: no such positions, or all pins together leave nothing of ``kv_budget`` or
                ``kv_limit`` for others. With a fractional budget the compaction raises that, and nothing is evicted.
        """
        with self._use("kv_pin()"):
            cache = self._need_cache("kv_pin()")
            start, stop = _native.int32("start", start), _native.int32("stop", stop)
            if not 0 <= start < stop <= self._n_ctx:
                raise ValueError(f"kv_pin({start}, {stop}): expected 0 <= start < stop <= n_ctx ({self._n_ctx})")
            n = n_pinned([*self._kv_pins.asked, (start, stop)])
            if isinstance(self._kv_when.budget, int) and n >= self._kv_when.budget:
                raise ValueError(
                    f"kv_pin({start}, {stop}): {n} positions would be pinned, and kv_budget={self._kv_when.budget} "
                    "leaves nothing for other cells; pin fewer, or raise it"
                )
            if self._kv_limit is not None and n >= (room := self._kv_limit.n_free(cache.kv.stats(), cache.bound)):
                raise ValueError(
                    f"kv_pin({start}, {stop}): {n} positions would be pinned, and kv_limit={self._kv_limit.given!r} "
                    f"leaves {room} for them and other cells; pin fewer, or create a session with a larger one"
                )
            n_boundary = int(cache.kv.stats().n_boundary)
            for il, ih in np.ndindex(*cache.kv.cells().shape) if start < n_boundary else ():
                held = cache.kv.positions(il, ih)
                if np.count_nonzero((held >= start) & (held < min(stop, n_boundary))) < min(stop, n_boundary) - start:
                    raise UnsupportedCallError(
                        f"kv_pin({start}, {stop}): some of these positions were evicted; pin before the prompt is "
                        "compacted, or call reset() and evaluate it again"
                    )
            self._kv_pins.asked.append((start, stop))

    def kv_unpin(self) -> None:
        """Forget every :meth:`kv_pin`.

        Raises:
            UnsupportedCallError: the session has no policy or cannot be used now (see the class).
        """
        with self._use("kv_unpin()"):
            self._need_cache("kv_unpin()")
            self._kv_pins.asked.clear()

    @property
    def kv_pinned(self) -> tuple[Range, ...]:
        """Positions [start, stop) that are pinned: by :meth:`kv_pin`, then a chat's system prompt, unless the last
        compaction found it too long."""
        return tuple(self._kv_pins.ranges())

    @property
    def kv_progress(self) -> KVProgress | None:
        """The function that is told how far a prompt is, see the class.

        Raises:
            TypeError: when set, neither None nor something to call.
        """
        return self._kv_progress

    @kv_progress.setter
    def kv_progress(self, progress: KVProgress | None) -> None:
        self._kv_progress = check_progress(progress)
