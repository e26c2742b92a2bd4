"""Which question a session keeps cells for, and what its model repeats of what it has read."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, get_args

import llama_cpp
import numpy as np
from llama_cpp.llama_tokenizer import LlamaTokenizer

from .errors import NativeError, UnsupportedCallError
from .going_back import GoingBack
from .guard import Interrupts
from .limit import N_ASKS, Prefill
from .pins import Pins, Range
from .policies import KVPolicy, Query
from .prompts import Step
from .replay import N_LEAST, Wording, n_at_once, n_end, n_for_any, next_to_replay, replay
from .session import PolicyCache

__all__ = ["ASKED_QUERIES", "AskedQuery", "Repeating"]

AskedQuery = Literal["auto", "last", "any", "both"]
ASKED_QUERIES: tuple[AskedQuery, ...] = get_args(AskedQuery)


class Repeating(GoingBack):
    """The part of :class:`windowkv_edge.Llama` that chooses which question cells are kept for, and has the model
    repeat; nothing here is called from outside of the package."""

    _kv_query: AskedQuery
    _kv_is_chat: bool = False  # the prompt that begins
    _kv_kept_for: Query | Literal[""]  # of the last compaction
    _kv_is_over: bool  # cells are there for another question, and cannot be repeated: the next prompt begins anew
    _kv_prefill: Prefill
    _kv_interval: int | None
    _kv_wording: Wording | None
    _kv_pins: Pins

    if TYPE_CHECKING:  # what the classes behind it have
        def _decoding(self, n_tokens: int) -> AbstractContextManager[None]: ...

        def _room(self, cache: PolicyCache, n_tokens: int, step: Step) -> int | None: ...

        @property
        def _n_positions(self) -> int: ...

    @property
    def _given_query(self) -> Query | None:
        """What ``kv_query`` says; None if the session may choose."""
        return None if self._kv_query == "auto" else self._kv_query

    def _ask_as_given(self, cache: PolicyCache) -> None:
        """As long as no prompt says what it is; where the next one begins anew, cells are kept for what they were."""
        if not self._kv_is_over:
            cache.ask(self._given_query)

    def _suits(self, kept_for: str) -> bool:
        """Whether cells that were kept for a question, "" for none, are what the session keeps cells for; any are for
        one that does not say."""
        cache = self._kv_cache
        if cache is None or kept_for == "" or (self._given_query is None and cache.own.query == "last"):
            return True
        return cache.for_query(self._given_query).query == kept_for

    def _may_ask(self, cache: PolicyCache, query: Query) -> bool:
        """Whether the session may choose to keep cells for a question of that kind: not where steps and answers are
        compacted as well, which would all have to be repeated."""
        is_bound = self._kv_limit is not None or self._kv_interval is not None or self._kv_prefill == "bounded"
        return self._kv_query == "auto" and not is_bound and cache.own.query == "last" and query in cache.own.queries

    def _ask(self, cache: PolicyCache, n_prompt: int, n_same: int) -> None:
        """A prompt begins: if the session may choose, cells of a chat are kept for any question beside the newest, as
        others about the same text may come. Not where the prompt is not read with the full cache, nor where there is
        no room to repeat it, nor where cells went before that nobody repeated.

        Args:
            cache: the cache.
            n_prompt: its tokens.
            n_same: of these, the first ones that the session keeps; 0 = it begins anew.
        """
        if self._kv_is_over:
            return
        self._ask_as_given(cache)
        if not self._kv_is_chat or not self._may_ask(cache, "both"):
            return
        stats, n_least = cache.kv.stats(), self._n_repeating_least(cache.for_query("both"))
        has_room = n_prompt + n_least <= self._n_positions and self._room(cache, n_prompt - n_same, "prompt") is None
        if has_room and (n_same == 0 or next_to_replay(cache.kv, int(stats.n_boundary)) <= int(stats.n_replayed)):
            cache.ask("both")

    def _chose(self, cache: PolicyCache) -> bool:
        """Whether the session itself chose to have the model repeat what it has read."""
        return self._given_query is None and cache.bound.replays and not cache.own.replays

    def _can_repeat(self, cache: PolicyCache, n_tokens: int, n_cells: int) -> bool:
        """Whether what was read up to a position can be repeated before a compaction to n_cells. If the session chose
        to, and it cannot, cells are kept for the last question after all.

        Raises:
            UnsupportedCallError: it cannot, and was told to; says why.
        """
        why = self._why_not(cache, n_tokens, n_cells)
        if why and self._chose(cache):
            self._ask_as_given(cache)
            return False
        if why:
            raise UnsupportedCallError(
                f"kv_policy={cache.policy.name!r} has the model repeat what it has read before cells go, {why}"
            )
        return True

    def _why_not(self, cache: PolicyCache, n_tokens: int, n_cells: int) -> str:
        kv, n_least = cache.kv, self._wording().size + N_LEAST
        stats = kv.stats()
        n_past, n_replayed = int(stats.n_past), int(stats.n_replayed)
        if next_to_replay(kv, n_tokens) >= n_tokens:
            if n_past - n_replayed <= n_cells:
                return ""
            return "and heads have lost some of it already; call reset() and evaluate the prompt again"
        if n_past != self.n_tokens:
            return (
                f"and of the {n_past} positions that are there this session has evaluated {self.n_tokens}: it does not "
                "know what others decoded; evaluate it with eval(), or choose another policy"
            )
        n_room = self._n_positions - n_past
        n_any = n_for_any(cache.bound, self._kv_pins.n_free(n_cells, n_past))
        if n_room < n_least and n_past - n_replayed > n_any // 2:
            return (
                f"which takes {n_least} positions behind the {n_past} that are there, and n_ctx={self.n_ctx()} has "
                f"{n_room}; give a larger n_ctx"
            )
        return ""

    def _wording(self) -> Wording:
        if self._kv_wording is None:
            own = isinstance(self.tokenizer_, LlamaTokenizer)  # llama.cpp aborts without a vocabulary
            has_text = not own or self._model.vocab_type() != llama_cpp.LLAMA_VOCAB_TYPE_NONE
            self._kv_wording = (
                Wording.of(lambda text: self.tokenize(text.encode(), add_bos=False, special=False))
                if has_text
                else Wording((), ())
            )
        return self._kv_wording

    def _n_repeating_least(self, policy: KVPolicy) -> int:
        """Tokens that repeat others with a policy, at least; 0 if none do."""
        return self._wording().size + N_LEAST if policy.replays else 0

    def _n_repeating(self, n_room: int, n_new: int | None = None) -> int:
        """Tokens that repeat others at once, where n_room cells per head hold them too: no more than n_new of these,
        if that is given, and a third of the room where that is enough for any."""
        wording = self._wording()
        n = n_at_once(wording, self.n_batch)
        if n_new is not None:
            n = min(n, wording.size + max(N_LEAST, n_new))
        return min(n, max(wording.size + N_LEAST, n_room // 3))

    def _n_to_replay(self, cache: PolicyCache, n_cells: int, asked: Range | None = None, n_left: int = 0) -> int:
        """Positions that are repeated before a compaction to n_cells, behind n_left more tokens: not what asks about
        them, which stays.

        Args:
            cache: the cache.
            n_cells: cells that stay, pinned ones included.
            asked: where the question of a chat stands, of a prompt that ends there.
            n_left: tokens that are not evaluated yet.
        """
        n_past = self.n_tokens + n_left
        n_free = self._kv_pins.n_free(n_cells, n_past)
        n = n_end(cache.bound, n_free)
        if asked is not None:
            start, stop = asked
            n = max(1, min(n_past - max(start, stop - N_ASKS), n_for_any(cache.bound, n_free) // 2))
        return max(0, n_past - n)

    def _replay(self, cache: PolicyCache, n_tokens: int, n_cells: int, n_most: int | None = None) -> None:
        """Have the model repeat what it has read up to a position; the logits of the last token stay.

        Args:
            cache: the cache.
            n_tokens: the position.
            n_cells: cells that stay in the compaction that follows. Where the context ends, what was not repeated stays
                as it is, if it is half of these at most.
            n_most: tokens at once; None = as many as are worth it.
        """
        if not self._can_repeat(cache, n_tokens, n_cells):
            return
        kv, wording = cache.kv, self._wording()
        n_past = int(kv.stats().n_past)
        n_room = self._n_positions - n_past
        if n_room < wording.size + N_LEAST or next_to_replay(kv, n_tokens) >= n_tokens:
            return
        row, known = llama_cpp.llama_get_logits_ith(self.ctx, -1), self._requires_eval
        logits = np.ctypeslib.as_array(row, shape=(self._n_vocab,)).copy() if row else None

        def decode(tokens: list[int]) -> None:
            for i in range(0, len(tokens), self.n_batch):
                self._batch.set_batch(batch=tokens[i : i + self.n_batch], n_past=n_past + i, logits_all=False)
                self._ctx.decode(self._batch)

        tokens = self.input_ids[:n_tokens].tolist()
        n_most = min(n_most or n_at_once(wording, self.n_batch), n_room)
        self._requires_eval, is_back = True, False
        try:
            with self._aligned(), self._decoding(n_most), Interrupts() as interrupts:
                kv.watch(False)
                try:
                    for _ in replay(kv, tokens, n_tokens, wording, n_most, decode):
                        interrupts.check()
                finally:
                    kv.watch(True)
                    own = llama_cpp.llama_get_logits_ith(self.ctx, -1)
                    if logits is not None and own:  # after an error, too: somebody may sample behind the prompt
                        ctypes.memmove(own, logits.ctypes.data, logits.nbytes)
                        is_back = True
        except NativeError:  # such as no memory for it: nothing was lost
            if not self._chose(cache) or self.n_tokens != n_past:
                raise
            self._ask_as_given(cache)
        finally:
            if is_back and self.n_tokens == n_past:
                self._requires_eval = known
