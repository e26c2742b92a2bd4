"""Which question a session keeps cells for, and what its model repeats of what it has read."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, get_args

import llama_cpp
import numpy as np
from llama_cpp.llama_tokenizer import LlamaTokenizer

from .errors import UnsupportedCallError
from .going_back import GoingBack
from .guard import Interrupts
from .limit import N_ASKS, Prefill
from .pins import Range
from .policies import KVPolicy, Query
from .replay import N_LEAST, Wording, n_at_once, n_end, next_to_replay, replay
from .session import PolicyCache

__all__ = ["ASKED_QUERIES", "AskedQuery", "Repeating"]

AskedQuery = Literal["auto", "last", "any", "both"]
ASKED_QUERIES: tuple[AskedQuery, ...] = get_args(AskedQuery)


class Repeating(GoingBack):
    """The part of :class:`windowkv_edge.Llama` that has the model repeat; nothing here is called from outside of the
    package."""

    _kv_query: AskedQuery
    _kv_prefill: Prefill
    _kv_interval: int | None
    _kv_wording: Wording | None

    if TYPE_CHECKING:  # what the classes behind it have
        def _decoding(self, n_tokens: int) -> AbstractContextManager[None]: ...

        def _room_in_memory(self, cache: PolicyCache, n_tokens: int, n_least: int) -> int | None: ...

        @property
        def _n_positions(self) -> int: ...

    def _ask_as_given(self, cache: PolicyCache) -> None:
        """As long as no prompt says what it is.

        Raises:
            ValueError: the policy does not keep cells for the question that ``kv_query`` says.
        """
        cache.ask(None if self._kv_query == "auto" else self._kv_query)

    def _query_of(self, cache: PolicyCache, n_prompt: int, in_chat: bool) -> Query | None:
        """Which question a prompt's compaction keeps cells for; None = as the policy says.

        If the session may choose: in chats any one beside the newest, as others about the same text may come. Not where
        steps and answers are compacted as well, which would all have to be repeated, nor where there is no room for it.

        Args:
            cache: the cache.
            n_prompt: its tokens.
            in_chat: it is a chat's.
        """
        if self._kv_query != "auto":
            return self._kv_query
        plain = cache.plain
        is_bound = self._kv_limit is not None or self._kv_interval is not None or self._kv_prefill == "bounded"
        if not in_chat or is_bound or plain.query != "last" or "both" not in plain.queries:
            return None
        n_new = max(0, n_prompt - self.n_tokens)
        has_room = n_prompt + self._n_repeating_least(plain.for_query("both")) <= self._n_positions
        return "both" if has_room and self._room_in_memory(cache, n_new, 1) is None else None

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

    def _n_to_replay(self, n_cells: int, asked: Range | None = None, n_left: int = 0) -> int:
        """Positions that are repeated before a compaction to n_cells, behind n_left more tokens: not what asks about
        them, which stays.

        Args:
            n_cells: cells that stay.
            asked: where the question of a chat stands, of a prompt that ends there.
            n_left: tokens that are not evaluated yet.
        """
        n_past, n = self.n_tokens + n_left, n_end(n_cells)
        if asked is not None:
            start, stop = asked
            n = max(1, min(n_past - max(start, stop - N_ASKS), n_cells // 2))
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
        kv, wording = cache.kv, self._wording()
        n_past, n_least = int(kv.stats().n_past), wording.size + N_LEAST
        if next_to_replay(kv, n_tokens) >= n_tokens:
            return
        if n_past != self.n_tokens:
            raise UnsupportedCallError(
                f"kv_policy={cache.policy.name!r} has the model repeat what it has read before cells go, and of the "
                f"{n_past} positions that are there this session has evaluated {self.n_tokens}: it does not know what "
                "others decoded; evaluate it with eval(), or choose another policy"
            )
        n_room = self._n_positions - n_past
        if n_room < n_least and n_past - int(kv.stats().n_replayed) <= n_cells // 2:
            return
        if n_room < n_least:
            raise UnsupportedCallError(
                f"kv_policy={cache.policy.name!r} has the model repeat what it has read before cells go, which takes "
                f"{n_least} positions behind the {n_past} that are there, and n_ctx={self.n_ctx()} has {n_room}; give "
                "a larger n_ctx"
            )
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
        finally:
            if is_back and self.n_tokens == n_past:
                self._requires_eval = known
