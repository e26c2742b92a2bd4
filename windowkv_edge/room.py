"""What a session compacts, and when: at a prompt's end, and where a limit leaves no room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import llama_cpp
import numpy as np

from .answers import Bound, newest
from .errors import UnsupportedCallError
from .limit import Limit, Prefill, n_asks
from .pins import Pins, n_pinned
from .policies import Task
from .prompts import Prompts, Step
from .session import AfterPrompt, PolicyCache
from .task import prompt_task

__all__ = ["Compacting"]

Comes = Literal["batch", "answer's start", "answer"]


class Compacting(llama_cpp.Llama):
    """The part of :class:`windowkv_edge.Llama` that compacts; nothing here is called from outside of the package."""

    _kv_when: AfterPrompt
    _kv_limit: Limit | None
    _kv_prefill: Prefill
    _kv_interval: int | None
    _kv_prompts: Prompts
    _kv_pins: Pins
    _kv_known: int
    _kv_settled: bool

    def _task(self, cache: PolicyCache, asks: Sequence[int] = ()) -> Task:
        if not cache.policy.needs_task:
            return "localization"
        ids = [*self.input_ids[: self.n_tokens].tolist(), *asks]
        return prompt_task(ids, lambda part: str(self.detokenize(part).decode("utf-8", "ignore")))

    #
    # the limit
    #

    def _fits(self, cache: PolicyCache, tokens: Sequence[int], step: Step) -> bool:
        """Whether tokens can be evaluated at once: with the full cache, or within the limit."""
        if step not in ("prompt", "piece"):
            bound = self._answer_bound(cache)
            return bound is None or float(cache.kv.cells().mean()) + len(tokens) <= bound.n_cells
        limit = self._kv_limit
        if limit is None or self._kv_prefill == "exact":
            return True
        return float(cache.kv.cells().mean()) + len(tokens) <= limit.n_cells(cache.kv.stats())

    def _answer_bound(self, cache: PolicyCache) -> Bound | None:
        """What an answer may hold: the limit; without one what the budget grants and an interval, if there is one."""
        if self._kv_limit is not None:
            n_cells = self._kv_limit.n_cells(cache.kv.stats())
            return Bound(n_cells, min(self._kv_limit.slack(n_cells), max(1, n_cells - 1)))
        if self._kv_interval is None or not self._kv_when.holds(self.n_tokens):
            return None
        return Bound(cache.n_cells(self._kv_when.budget) + self._kv_interval, self._kv_interval)

    def _make_room(self, cache: PolicyCache, tokens: Sequence[int], n: int, step: Step) -> None:
        """Before n tokens, the first of those that are left: compact if the limit has no room for them. A batch of a
        prompt comes on top of the limit."""
        kv = cache.kv
        n_held = float(kv.cells().mean())
        if step not in ("prompt", "piece"):
            bound = self._answer_bound(cache)
            if bound is not None and n_held + n > bound.n_cells:
                self._shrink(cache, bound.target(n), in_answer=True)
        else:
            limit = self._kv_limit
            assert limit is not None
            n_cells = limit.n_cells(kv.stats())
            asks = self._asks(cache, tokens) if step == "prompt" else []
            n_cells -= len(asks)  # they need room beside the last batch
            if n_held > n_cells:
                self._observe(cache, asks)
                # small batches are not worth a compaction each
                self._shrink(cache, n_cells - max(0, limit.slack(n_cells) - self.n_batch), asks)
        if n > 1:
            kv.reserve(n)

    def _shrink(self, cache: PolicyCache, n_cells: int, asks: Sequence[int] = (), in_answer: bool = False) -> None:
        """Compact to n_cells cells per head, for what is asked; a policy that counts otherwise gets fewer, until these
        are."""
        n, n_held = n_cells, float(cache.kv.cells().mean())
        for _ in range(4 if n_cells > 0 else 0):
            self._compact(cache, n, asks, "answer" if in_answer else "batch")
            n_held = float(cache.kv.cells().mean())
            if n_held <= n_cells:
                return
            n = max(1, int(n * n_cells / n_held) - 1)
        given = self._kv_limit and self._kv_limit.given
        raise UnsupportedCallError(
            f"kv_policy={cache.policy.name!r} holds {n_held:.0f} cells per head, kv_limit={given!r} leaves room for "
            f"{n_cells}; choose a larger limit or another policy"
        )

    def _asks(self, cache: PolicyCache, tokens: Sequence[int]) -> list[int]:
        """Of the tokens of a prompt that are left the last ones: what is asked; not of a policy that sums up what has
        attended."""
        if cache.bound.accumulates:
            return []
        return list(tokens[-min(n_asks(cache.bound), self.n_batch) :])

    def _observe(self, cache: PolicyCache, asks: list[int]) -> None:
        """Have tokens observe what was read so far, as if they came next."""
        if not asks:
            return
        cache.kv.watch(False)  # a single one would end a prompt that was evaluated by hand
        with cache.kv.observing():
            self._batch.set_batch(batch=asks, n_past=self.n_tokens, logits_all=False)
            self._ctx.decode(self._batch)

    #
    # attention that is summed up
    #

    def _accumulated_at_once(self, cache: PolicyCache) -> int:
        """Tokens of a batch: no more than the policy's sums can wait for."""
        return min(self.n_batch, int(cache.kv.stats().n_observed)) if cache.bound.accumulates else self.n_batch

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

    def _end_prompt(self, cache: PolicyCache) -> None:
        self._prompt_ended(cache)
        self._keep_logits(cache)

    def _prompt_ended(self, cache: PolicyCache) -> None:
        """Compact if the cache says that it is time; either way the prompt's last queries stay observed."""
        self._kv_prompts.is_open = False
        stats, n_cells = cache.kv.stats(), cache.n_cells(self._kv_when.budget)
        n_held = float(cache.kv.cells().mean())
        # compactions while the first prompt was read do not count
        n_boundary = int(stats.n_boundary) if self._kv_settled else 0
        is_due = self._kv_when.is_due(int(stats.n_past), n_boundary, n_held, n_cells)
        if self._kv_limit is not None:
            n_limit = self._kv_limit.n_cells(stats)
            is_due = is_due or n_held > n_limit
            n_cells = max(1, min(n_cells, n_limit - self._kv_limit.slack(n_limit)))
        if not is_due:
            cache.kv.prompt_done()
            return
        try:
            self._compact(cache, n_cells)
        except BaseException:
            cache.kv.prompt_done()
            raise
        self._kv_when.changed = False
        self._kv_settled = True

    def _compact(
        self, cache: PolicyCache, n_cells: int, asks: Sequence[int] = (), comes: Comes = "answer's start"
    ) -> None:
        """Compact to n_cells cells per head.

        Args:
            cache: the cache.
            n_cells: cells that stay.
            asks: tokens of the prompt's end that are not evaluated yet.
            comes: what is evaluated next: another batch of the prompt, an answer's first tokens, or more of it.
        """
        n = n_cells if self._kv_limit is None else self._kv_limit.n_free(cache.kv.stats(), cache.bound)
        ranges = self._kv_pins.ranges(max(n, n_cells) if asks else n_cells)
        if comes == "answer":
            ranges += newest(cache.bound, self.n_tokens, n_cells - n_pinned(ranges))
        bound = None if comes == "batch" else self._answer_bound(cache)
        cache.kv.set_room(0 if bound is None else bound.interval)
        cache.kv.set_pinned(ranges)
        cache.compact(n_cells, self._task(cache, asks), answers=comes == "answer")

    def _keep_logits(self, cache: PolicyCache) -> None:
        """Those of the last position, if it ends what was compacted and they are known."""
        stats = cache.kv.stats()
        if self._requires_eval or not stats.n_boundary == stats.n_past == self.n_tokens == self._kv_known:
            return
        row = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        if row:
            self._kv_prompts.keep(self.n_tokens, np.ctypeslib.as_array(row, shape=(self._n_vocab,)))
