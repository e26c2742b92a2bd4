"""What a session compacts, and when: at a prompt's end, and where a limit leaves no room."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np

from ._memory import share_on_devices, usable_memory
from .answers import Bound, newest
from .compaction import Comes, n_in_answer
from .errors import UnsupportedCallError
from .limit import N_ASKS, Limit, n_asks, n_observers, n_scores
from .pins import Pins, Range, n_pinned
from .policies import Task
from .prompts import Step
from .repeating import Repeating
from .session import PolicyCache
from .task import prompt_task

__all__ = ["Compacting"]

WORTH_ASKING = 16 << 20
"""Bytes of cells below which nobody asks how much memory is free."""


class Compacting(Repeating):
    """The part of :class:`windowkv_edge.Llama` that compacts; nothing here is called from outside of the package."""

    _kv_pins: Pins
    _kv_asked: Range | None
    _kv_question: Sequence[int] = ()  # of a prompt that is evaluated in pieces
    _kv_asks: list[int]

    if TYPE_CHECKING:  # what Shifting and the class behind it have
        _kv_ahead: tuple[int, int]

        @property
        def _n_positions(self) -> int: ...

    def _task(self, cache: PolicyCache, asks: Sequence[int] = ()) -> Task:
        if not cache.policy.needs_task:
            return "localization"
        ids = [*self.input_ids[: self.n_tokens].tolist(), *asks]
        return prompt_task(ids, lambda part: str(self.detokenize(part).decode("utf-8", "ignore")))

    #
    # the limit
    #

    def _room(self, cache: PolicyCache, n_tokens: int, step: Step) -> int | None:
        """Cells per head that may be held before a batch, None if all of these n_tokens tokens fit there at once."""
        n_all = float(cache.kv.cells().mean()) + n_tokens
        room = self._bound(cache, n_tokens, step)
        return None if room is None or n_all <= room else room

    def _bound(self, cache: PolicyCache, n_tokens: int, step: Step) -> int | None:
        if step not in ("prompt", "piece"):
            bound = self._answer_bound(cache)
            return None if bound is None else bound.n_cells - self._n_beside(cache, bound)
        limit = None if self._kv_limit is None else self._kv_limit.n_cells(cache.kv.stats())
        if self._kv_prefill == "exact":
            return None
        n_least, n_past = 2 * n_asks(cache.bound), self.n_tokens + n_tokens
        if self._kv_prefill == "bounded":
            granted = self._kv_when.granted(n_past, cache.n_cells(self._kv_when.budget, n_tokens), self._kv_settled)
            rooms = [n for n in (limit, None if granted is None else max(granted, n_least)) if n is not None]
            return min(rooms, default=None)
        return limit if limit is not None else self._room_in_memory(cache, n_tokens, n_least)

    def _answer_bound(self, cache: PolicyCache) -> Bound | None:
        """What an answer may hold: the limit; without one what the budget grants and an interval, if there is one."""
        if self._kv_limit is not None:
            n_cells = self._kv_limit.n_cells(cache.kv.stats())
            return Bound(n_cells, min(self._kv_limit.slack(n_cells), max(1, n_cells - 1)))
        if self._kv_interval is None or not self._kv_when.holds(self.n_tokens):
            return None
        return Bound(cache.n_cells(self._kv_when.budget) + self._kv_interval, self._kv_interval)

    def _room_in_memory(self, cache: PolicyCache, n_tokens: int, n_least: int) -> int | None:
        """The same without a limit: as many as memory is free for, None if there is enough for all of them."""
        n_cell = int(cache.kv.stats().bytes_cell)
        if n_tokens * n_cell < WORTH_ASKING:
            return None
        free = usable_memory(share_on_devices(self))
        if n_tokens * n_cell <= free:
            return None
        return max(n_least, int(cache.kv.cells().mean()) + free // n_cell - self.n_batch)

    def _say_bounded(self, cache: PolicyCache, n_tokens: int, room: int) -> None:
        """Nobody asked for a bound: warn that there is one."""
        if self._kv_limit is not None or self._kv_prefill != "auto":
            return
        warnings.warn(
            f"the full cache of these {n_tokens:,} tokens takes {n_tokens * cache.kv.stats().bytes_cell / 2**20:,.0f} "
            f"MiB, and so much is not free: they are read within {room:,} cells per head; set kv_limit for a bound of "
            "your own, or kv_prefill='exact' to read them with the full cache",
            stacklevel=2,
        )

    def _make_room(self, cache: PolicyCache, tokens: Sequence[int], step: Step, room: int) -> int:
        """Before the next of the tokens that are left: compact if there is no room for them; how many are evaluated at
        once. A batch of a prompt comes on top of the room, see :meth:`Limit.next_step`."""
        kv = cache.kv
        n_held, n_most = float(kv.cells().mean()), self._accumulated_at_once(cache)
        if step not in ("prompt", "piece"):
            n, bound = min(len(tokens), n_most), self._answer_bound(cache)
            asks = [] if bound is None else self._asks_of_answer(bound)
            if bound is not None and n_held + n > bound.n_cells - self._n_beside(cache, bound):
                self._keep_before(cache, step)
                target = bound.target(n)
                if cache.bound.replays:  # or it would be due again at once
                    target = max(1, target - self._n_beside(cache, bound))
                    n_at_most = self._n_repeating(bound.n_cells, bound.interval)
                    self._replay(cache, self._n_to_replay(cache, target), target, n_at_most)
                n_fit = max(0, int(bound.n_cells - n_held))  # fewer behind a prompt of the limit's length, and drafts
                self._observe(cache, asks[len(asks) - min(len(asks), n_fit) :])
                self._shrink(cache, target, in_answer=True)
        else:
            asks = self._asks(cache, tokens) if step == "prompt" else []
            goes_on = step == "piece" or self._kv_ahead[1] > 0
            n_asked = n_observers(cache.bound, self.n_batch) if goes_on else len(asks)
            if cache.bound.replays:  # those who repeat need room as well
                n_asked = max(n_asked, self._n_repeating(room + self.n_batch))
            goes_on = goes_on or cache.bound.replays  # behind the last tokens as well
            n_more = n_scores(room + self.n_batch, kv.stats().bytes_cell / kv.cells().size, cache.bound)
            n, n_cells = Limit.next_step(room, self.n_batch, n_held, len(tokens), n_asked, n_most, goes_on, n_more)
            if n_cells is not None:
                self._keep_before(cache, step)
                if cache.bound.replays:
                    self._replay(cache, self.n_tokens, n_cells, self._n_repeating(room + self.n_batch))
                self._observe(cache, asks)
                n_behind = n_asked if goes_on or n < len(tokens) else 0
                self._shrink(cache, n_cells, asks, n_next=n + n_behind)
        if n > 1:
            kv.reserve(n)
        return n

    def _shrink(
        self, cache: PolicyCache, n_cells: int, asks: Sequence[int] = (), in_answer: bool = False, n_next: int = 0
    ) -> None:
        """Compact to n_cells cells per head, for what is asked, and leave room for n_next of a prompt; a policy that
        counts otherwise gets fewer, until these are."""
        n, n_held = n_cells, float(cache.kv.cells().mean())
        for _ in range(4 if n_cells > 0 else 0):
            self._compact(cache, n, asks, "answer" if in_answer else "batch", n_next)
            n_held = float(cache.kv.cells().mean())
            if n_held <= n_cells:
                return
            n = max(1, int(n * n_cells / n_held) - 1)
        whose = "there is" if self._kv_limit is None else f"kv_limit={self._kv_limit.given!r} leaves"
        raise UnsupportedCallError(
            f"kv_policy={cache.policy.name!r} holds {n_held:.0f} cells per head, {whose} room for {n_cells}; choose a "
            "larger kv_limit (or kv_budget) or another policy"
        )

    def _asks(self, cache: PolicyCache, tokens: Sequence[int]) -> list[int]:
        """What a prompt asks, of which ``tokens`` are left: of a chat the end of its last user message, else the
        prompt's last tokens; nothing of a policy that sums up what has attended."""
        n, n_past = n_observers(cache.bound, self.n_batch), self.n_tokens + len(tokens)
        if n == 0:
            return []
        n_room = min(self.n_ctx(), len(self.input_ids)) - self.n_tokens  # they take positions behind what is there
        if self._kv_question:
            return list(self._kv_question[len(self._kv_question) - min(n, n_room) :])
        start, stop = self._kv_asked or (0, n_past)
        if stop > n_past:
            start, stop = 0, n_past
        start = max(start, stop - n, stop - n_room)
        if start >= self.n_tokens:
            return list(tokens[start - self.n_tokens : stop - self.n_tokens])
        return [*self.input_ids[: self.n_tokens].tolist(), *tokens][start:stop]

    def _asks_of_answer(self, bound: Bound) -> list[int]:
        """Of what the prompt asked those tokens that observe where its answer is compacted: fewer if that comes every
        few tokens."""
        n = min(bound.interval // 16, self.n_batch, self._n_positions - self.n_tokens)
        return self._kv_asks[-n:] if n > 0 else []

    def _observe(self, cache: PolicyCache, asks: list[int]) -> None:
        """Have tokens observe what was read so far, as if they came next."""
        if not asks:
            return
        cache.kv.reserve(len(asks))  # without room for more
        cache.kv.watch(False)  # a single one would end a prompt that was evaluated by hand
        try:
            with cache.kv.observing():
                self._batch.set_batch(batch=asks, n_past=self.n_tokens, logits_all=False)
                self._ctx.decode(self._batch)
        finally:
            cache.kv.watch(True)

    def _observe_again(self, cache: PolicyCache) -> None:
        """Where the tokens that were observed are removed, all of them, those before them observe once more."""
        stats = cache.kv.stats()
        if int(stats.n_queries) == 0 and int(stats.n_past) == self.n_tokens > 0:
            n = min(int(stats.n_observed), self.n_batch, self.n_tokens, self._n_positions - self.n_tokens)
            self._requires_eval = True  # the last logits will be theirs
            self._observe(cache, self.input_ids[self.n_tokens - n : self.n_tokens].tolist())

    #
    # what is repeated
    #

    def _n_beside(self, cache: PolicyCache, bound: Bound) -> int:
        """Cells that tokens take for a while where an answer is compacted: those who ask, and those who repeat."""
        n_asks = len(self._asks_of_answer(bound))
        if not cache.bound.replays:
            return n_asks
        return max(n_asks, min(self._n_repeating(bound.n_cells, bound.interval), bound.n_cells // 3))

    def _replay_ahead(self, cache: PolicyCache, n_left: int) -> None:
        """Between two batches of a prompt that is compacted behind n_left more tokens: repeating what was read takes
        less time the fewer cells there are."""
        if not cache.bound.replays:
            return
        is_due, n_cells = self._is_due(cache, n_left)
        if is_due:
            self._replay(cache, min(self.n_tokens, self._n_to_replay(cache, n_cells, self._kv_asked, n_left)), n_cells)

    #
    # attention that is summed up
    #

    def _accumulated_at_once(self, cache: PolicyCache) -> int:
        """Tokens of a batch: no more than the policy's sums can wait for."""
        n_most = int(cache.kv.stats().n_observed) if cache.bound.accumulates else self.n_batch
        return max(1, min(self.n_batch, n_most))

    def _accumulate(self, cache: PolicyCache, n: int) -> None:
        """Before a batch of n tokens that would have others forgotten which are in no sum yet."""
        if not cache.bound.accumulates:
            return
        stats = cache.kv.stats()
        if int(stats.n_past) - int(stats.n_summed) + n > int(stats.n_observed):
            cache.kv.accumulate()

    #
    # the end of a prompt
    #

    def _end_prompt(self, cache: PolicyCache, asked: Range | None = None) -> None:
        """asked: where the question stands, of a chat's prompt that was evaluated just now."""
        self._prompt_ended(cache, asked)
        n = n_in_answer(cache.bound) // 2  # the others are the answer's
        if asked is not None and cache.bound.answer_share > 0 and not cache.bound.accumulates:
            self._kv_asks = self.input_ids[max(asked[0], asked[1] - n) : asked[1]].tolist() if n > 0 else []
        self._keep_logits(cache)
        self._keep_end(cache)

    def _prompt_ended(self, cache: PolicyCache, asked: Range | None = None, can_repeat: bool = True) -> None:
        """Compact if the cache says that it is time; either way the prompt's last queries stay observed.

        Args:
            cache: the cache.
            asked: see :meth:`_end_prompt`.
            can_repeat: tokens can be evaluated now.
        """
        self._kv_prompts.is_open = False
        self._kv_asks = []
        is_due, n_cells = self._is_due(cache)
        if not is_due:
            cache.kv.prompt_done()
            return
        self._keep_before(cache, "prompt")
        try:
            if can_repeat and cache.bound.replays:
                n_limit = None if self._kv_limit is None else self._kv_limit.n_cells(cache.kv.stats())
                n_most = None if n_limit is None else self._n_repeating(n_limit + self.n_batch)
                self._replay(cache, self._n_to_replay(cache, n_cells, asked), n_cells, n_most)
            self._compact(cache, n_cells)
        except BaseException:
            cache.kv.prompt_done()
            raise
        self._kv_when.changed = False
        self._kv_settled = True

    def _is_due(self, cache: PolicyCache, n_left: int = 0) -> tuple[bool, int]:
        """Whether a prompt of which n_left tokens are left is compacted at its end, and to how many cells per head."""
        stats, n_cells = cache.kv.stats(), cache.n_cells(self._kv_when.budget, n_left)
        n_held = float(cache.kv.cells().mean()) + n_left
        # compactions while the first prompt was read do not count
        n_boundary = int(stats.n_boundary) if self._kv_settled else 0
        is_due = self._kv_when.is_due(int(stats.n_past) + n_left, n_boundary, n_held, n_cells)
        if self._kv_limit is not None:
            n_limit = self._kv_limit.n_cells(stats)
            is_due = is_due or n_held > n_limit
            n_most = n_limit - self._kv_limit.slack(n_limit)
            bound = self._answer_bound(cache)
            if cache.bound.replays and bound is not None:  # or an answer would be compacted at once
                n_most -= self._n_beside(cache, bound)
            n_cells = max(1, min(n_cells, n_most))
        return is_due, n_cells

    def _compact(
        self,
        cache: PolicyCache,
        n_cells: int,
        asks: Sequence[int] = (),
        comes: Comes = "answer's start",
        n_next: int = 0,
    ) -> None:
        """Compact to n_cells cells per head.

        Args:
            cache: the cache.
            n_cells: cells that stay.
            asks: tokens of the prompt's end that are not evaluated yet.
            comes: what is evaluated next.
            n_next: tokens of that batch, and of those who observe behind it: cells do not move for them.
        """
        if cache.bound.observes or cache.bound.accumulates:
            self._observe_again(cache)
        within = self._kv_limit.n_free(cache.kv.stats(), cache.bound) if asks and self._kv_limit is not None else None
        ranges = self._kv_pins.for_compaction(n_cells, within)
        if comes == "answer":
            ranges = [*ranges, *newest(cache.bound, self.n_tokens, n_cells - n_pinned(ranges))]
        bound = None if comes == "batch" else self._answer_bound(cache)
        cache.kv.set_room(n_next if bound is None else bound.interval)
        cache.kv.set_pinned(ranges)
        # a question that is shorter than the observation window observes alone; policies that want more than a question
        # can have, such as h2o, see what was read before it as well
        is_short = 0 < len(asks) < cache.bound.n_observed <= N_ASKS
        n_short = len(asks) if is_short else None
        if cache.compact(n_cells, self._task(cache, asks), n_observers=n_short, comes=comes) > 0:
            self._kv_kept_for = cache.bound.query

    def _keep_logits(self, cache: PolicyCache) -> None:
        """Those of the last position, if they are known; without memory for them the prompt is evaluated again."""
        stats = cache.kv.stats()
        if self._requires_eval or not int(stats.n_past) == self.n_tokens == self._kv_known:
            return
        row = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        if row:
            logits = np.ctypeslib.as_array(row, shape=(self._n_vocab,))
            with suppress(MemoryError):
                self._kv_prompts.keep(self.n_tokens, logits, int(stats.n_boundary))
