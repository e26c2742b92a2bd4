"""When a session keeps a checkpoint, and when it goes back to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from .budget import is_same
from .checkpoints import Checkpoint, Checkpoints
from .errors import NativeError, UnsupportedCallError
from .limit import Limit, n_asks
from .native_state import get_state, refusal, set_state, state_size
from .prompts import Prompts, Step, n_reused
from .session import AfterPrompt, PolicyCache

__all__ = ["GoingBack"]

Tokens = npt.NDArray[np.intc]


class GoingBack(llama_cpp.Llama):
    """The part of :class:`windowkv_edge.Llama` that keeps checkpoints; nothing here is called from outside of the
    package.

    A checkpoint is kept where positions can no longer be removed one by one:

    - at a prompt's beginning, if the prompt may be compacted: its message can be edited, its turn undone;
    - while an answer grows, before the first compaction that a limit asks for: the answer can be given again;
    - with windows or recurrent layers, whose states move on with every token, at the beginning and at the end of every
      prompt;
    - before the first compaction of a prompt, with all of its cells, if a number of bytes was given for checkpoints:
      another question about the same text costs the question.
    """

    _kv_when: AfterPrompt
    _kv_limit: Limit | None
    _kv_prompts: Prompts
    _kv_checkpoints: Checkpoints
    _kv_cache: PolicyCache | None
    _kv_taken: set[str]  # of the current prompt and its answer
    _kv_back: tuple[int, bool] | None  # tokens of the prompt that a checkpoint saved, and whether it was a whole one
    _kv_known: int
    _kv_settled: bool

    if TYPE_CHECKING:

        def _kv_noted(self) -> dict[str, Any]: ...
        def _kv_note(self, noted: dict[str, Any]) -> None: ...
        def _clear(self) -> None: ...
        def _aligned(self) -> AbstractContextManager[None]: ...
        def _room(self, cache: PolicyCache, n_tokens: int, step: Step) -> int | None: ...

        def _suits(self, kept_for: str) -> bool: ...

    #
    # keeping
    #

    def _keep_beginning(self, cache: PolicyCache, n: int, step: Step) -> None:
        """Before n tokens of a prompt are evaluated."""
        if step not in ("prompt", "piece"):
            return
        if not self._kv_prompts.is_open:
            self._kv_taken.clear()
            if step == "piece":
                self._kv_back = None
        # to where it came from the session can go back again
        is_kept = "beginning" in self._kv_taken or self._kv_back is not None
        if n > 0 and not is_kept and (self._moves_on(cache) or self._may_compact(cache, n)):
            self._kv_taken.add("beginning")
            self._keep_checkpoint(cache)

    def _keep_before(self, cache: PolicyCache, step: Step) -> None:
        """Before a compaction."""
        if step in ("prompt", "piece"):
            if "whole" not in self._kv_taken:
                self._kv_taken.add("whole")
                # no second one for a question behind the same text
                n_saved = self._kv_back[0] if self._kv_back is not None and self._kv_back[1] else -1
                is_kept = n_saved >= 0 and self.n_tokens - n_saved <= n_asks(cache.bound)
                if not is_kept and cache.kv.removable() < self.n_tokens:
                    self._keep_checkpoint(cache, is_whole=True)
        elif "answer" not in self._kv_taken:
            self._kv_taken.add("answer")
            if not self._moves_on(cache) and not self._can_ask_again():
                self._keep_checkpoint(cache)

    def _keep_end(self, cache: PolicyCache) -> None:
        """Behind a prompt and its compaction."""
        if self._moves_on(cache) and not self._can_ask_again():
            self._keep_checkpoint(cache)
        self._bound_checkpoints(cache)

    def _bound_checkpoints(self, cache: PolicyCache) -> None:
        """The session takes less now."""
        self._kv_checkpoints.make_room(0, _n_live(cache))

    def _can_ask_again(self) -> bool:
        """Whether a checkpoint saves all of the last prompt."""
        prompt = self.input_ids[: max(self._kv_prompts.kept, default=0)]
        return len(prompt) > 0 and self._n_kept(prompt) == len(prompt)

    def _moves_on(self, cache: PolicyCache) -> bool:
        """Whether there are windows or recurrent states, which cannot go back as far as cells can."""
        return int(cache.kv.stats().bytes_other) > 0

    def _may_compact(self, cache: PolicyCache, n: int) -> bool:
        """Whether a prompt with n tokens to come can end in a compaction, or need one before."""
        if self._room(cache, n, "prompt") is not None:
            return True
        stats, n_held = cache.kv.stats(), float(cache.kv.cells().mean()) + n
        n_cells = cache.n_cells(self._kv_when.budget, n)
        n_boundary = int(stats.n_boundary) if self._kv_settled else 0
        return self._kv_when.is_due(int(stats.n_past) + n, n_boundary, n_held, n_cells)

    def _keep_checkpoint(self, cache: PolicyCache, *, is_whole: bool = False) -> None:
        """Keep the session as it is, if there is room; one that cannot be kept is not.

        Args:
            cache: of the session.
            is_whole: it holds cells that a compaction is about to evict.
        """
        store, prompts, stats = self._kv_checkpoints, self._kv_prompts, cache.kv.stats()
        # with logits_all=True those of all tokens would have to be kept
        if self.n_tokens == 0 or self._logits_all or int(stats.n_past) != self.n_tokens:
            return
        with suppress(MemoryError, NativeError, UnsupportedCallError):
            tokens = np.array(self.input_ids[: self.n_tokens], dtype=np.intc)
            logits = {at: row for at, row in prompts.kept.items() if at <= self.n_tokens}
            if (own := store.of(tokens, is_whole)) is not None:
                if self._is_usable(own) and set(logits) <= set(own.logits):
                    store.used(own)
                    return
                store.drop(own)
            removable = cache.kv.removable()
            n = state_size(self._ctx.ctx) + tokens.nbytes + sum(row.nbytes for row in logits.values())
            if (is_whole and store.is_auto) or not store.make_room(n, _n_live(cache)):
                store.miss(tokens, removable, logits, n)
                return
            native = get_state(self._ctx.ctx, "a checkpoint")
            budget, noted = self._kv_when.budget, self._kv_noted()
            n_cells = float(cache.kv.cells().mean())
            store.add(Checkpoint(tokens, removable, budget, noted, native, logits, is_whole, n_cells))

    #
    # going back
    #

    def _n_live(self, cache: PolicyCache, prompt: Tokens) -> int:
        """Tokens of a prompt that the session as it is need not evaluate."""
        known = {-1 if self._requires_eval else self.n_tokens}
        if self._kv_prompts.kept and self._has_logits():
            known.update(self._kv_prompts.kept)
        return n_reused(self._input_ids, cache.kv.removable(), prompt, known)

    def _n_kept(self, prompt: Tokens) -> int:
        """Tokens of a prompt that a checkpoint saves."""
        saves = self._saving()
        return max((saves(own, prompt) for own in self._kv_checkpoints.held), default=0)

    def _saving(self) -> Callable[[Checkpoint, Tokens], int]:
        """What tells how many tokens of a prompt a checkpoint saves."""
        can_know = bool(self._kv_checkpoints.held) and self._has_logits()
        return lambda own, prompt: own.saves(prompt, can_know) if self._is_usable(own) else 0

    def _is_usable(self, own: Checkpoint) -> bool:
        """Whether it was compacted for this budget and question and with these pins, and the limit holds it."""
        cache = self._kv_cache
        if self._kv_limit is not None and cache is not None:
            n_most = self._kv_limit.n_cells(cache.kv.stats()) + self.n_batch
            if own.n_cells > n_most:
                return False
        if not self._suits(own.noted["kept_for"]):
            return False
        return bool(is_same(own.budget, self._kv_when.budget) and own.noted["pins"] == self._kv_noted()["pins"])

    def _has_logits(self) -> bool:
        """Whether the context has logits of a last token, in whose place kept ones can be put."""
        return bool(llama_cpp.llama_get_logits_ith(self.ctx, -1))

    def _go_back(self, cache: PolicyCache, tokens: Sequence[int]) -> tuple[int, int, str]:
        """Before a prompt: go back to the checkpoint that saves most, if it saves more than the session as it is.

        Returns:
            Tokens of the prompt that are saved, those that could have been, and in words what was in the way.
        """
        store, prompt = self._kv_checkpoints, np.array(tokens, dtype=np.intc)
        self._kv_back = None
        saves, n = self._saving(), self._n_live(cache, prompt)
        found = store.best(lambda own: saves(own, prompt), n, len(prompt), int(cache.kv.stats().n_observed))
        if found is not None:
            n = saves(found, prompt)
            if why := self._become(found):
                return 0, n, why
            self._kv_back = n, found.is_whole
        return n, *store.remedy(prompt, n)

    def _become(self, own: Checkpoint) -> str:
        """Go back to a checkpoint; after an error or Ctrl-C the session is empty.

        Returns:
            Why it could not be read, "" if it could.
        """
        self._kv_checkpoints.used(own)
        with self._aligned():
            try:
                self._clear()  # the cells of both would be more than a limit allows
                if set_state(self._ctx.ctx, own.native) != own.native.size:
                    why = str(refusal(f"a checkpoint of {len(own.tokens)} tokens could not be read"))
                    self._clear()
                    return why
                self.input_ids[: len(own.tokens)] = own.tokens
                self.n_tokens = len(own.tokens)
                self._kv_note(own.noted)
                self._kv_prompts.kept = dict(own.logits)
            except BaseException:
                self._clear()
                raise
        return ""


def _n_live(cache: PolicyCache) -> int:
    stats = cache.kv.stats()
    return int(stats.bytes_live) + int(stats.bytes_other)
