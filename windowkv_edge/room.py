"""What a session compacts, and when: at a prompt's end, and where a limit leaves no room."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import llama_cpp
import numpy as np

from .errors import UnsupportedCallError
from .going_back import GoingBack
from .limit import Prefill, n_asks
from .pins import Pins
from .policies import Task
from .prompts import Step
from .session import PolicyCache
from .task import prompt_task

__all__ = ["Compacting"]


class Compacting(GoingBack):
    """The part of :class:`windowkv_edge.Llama` that compacts; nothing here is called from outside of the package."""

    _kv_prefill: Prefill
    _kv_pins: Pins

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
        limit = self._kv_limit
        if limit is None or (step in ("prompt", "piece") and self._kv_prefill == "exact"):
            return True
        return float(cache.kv.cells().mean()) + len(tokens) <= limit.n_cells(cache.kv.stats())

    def _make_room(self, cache: PolicyCache, tokens: Sequence[int], n: int, step: Step) -> None:
        """Before n tokens, the first of those that are left: compact if the limit has no room for them. A batch of a
        prompt comes on top of the limit."""
        limit = self._kv_limit
        assert limit is not None
        kv, n_cells = cache.kv, limit.n_cells(cache.kv.stats())
        n_held = float(kv.cells().mean())
        if step not in ("prompt", "piece"):
            if n_held + n > n_cells:
                self._keep_before(cache, step)
                self._shrink(cache, n_cells - max(n, limit.slack(n_cells)))
        else:
            asks = self._asks(cache, tokens) if step == "prompt" else []
            n_cells -= len(asks)  # they need room beside the last batch
            if n_held > n_cells:
                self._keep_before(cache, step)
                self._observe(cache, asks)
                # small batches are not worth a compaction each
                self._shrink(cache, n_cells - max(0, limit.slack(n_cells) - self.n_batch), asks)
        if n > 1:
            kv.reserve(n)

    def _shrink(self, cache: PolicyCache, n_cells: int, asks: Sequence[int] = ()) -> None:
        """Compact to n_cells cells per head, for what is asked; a policy that counts otherwise gets fewer, until these
        are."""
        n, n_held = n_cells, float(cache.kv.cells().mean())
        for _ in range(4 if n_cells > 0 else 0):
            self._compact(cache, n, asks)
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
        """Of the tokens of a prompt that are left the last ones: what is asked."""
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
    # the end of a prompt
    #

    def _end_prompt(self, cache: PolicyCache) -> None:
        self._prompt_ended(cache)
        self._keep_logits(cache)
        self._keep_end(cache)

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
        self._keep_before(cache, "prompt")
        try:
            self._compact(cache, n_cells)
        except BaseException:
            cache.kv.prompt_done()
            raise
        self._kv_when.changed = False
        self._kv_settled = True

    def _compact(self, cache: PolicyCache, n_cells: int, asks: Sequence[int] = ()) -> None:
        """Compact to n_cells cells per head; asks: tokens of the prompt's end that are not evaluated yet."""
        n = n_cells if self._kv_limit is None else self._kv_limit.n_free(cache.kv.stats(), cache.bound)
        cache.kv.set_pinned(self._kv_pins.ranges(max(n, n_cells) if asks else n_cells))
        cache.compact(n_cells, self._task(cache, asks))

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
