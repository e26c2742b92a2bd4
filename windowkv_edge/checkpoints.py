"""States of a session to go back to, in host memory: what they are, how many bytes they may take, which goes first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .budget import plain
from .limit import n_bytes
from .prompts import n_reused

__all__ = ["AUTO", "Checkpoint", "Checkpoints", "check_checkpoints"]

Tokens = npt.NDArray[np.intc]

AUTO = 4
"""Of "auto": bytes of all checkpoints, in those that the session takes at that moment. A model with windows or
recurrent layers has two for every turn. The others have one for every compaction: with a limit of 1,024 cells and short
messages, what fits reaches five turns back at least (tests/measure/chat_limit.py)."""

N_MISSED = 4  # checkpoints that are not there, to tell what more bytes would have saved


def check_checkpoints(given: Any, policy: Any) -> str | int:
    """Return what bounds the checkpoints: "auto", or bytes; 0 = there are none.

    Args:
        given: "auto", a text such as "256MiB", 0 or None.
        policy: ``kv_policy``.

    Raises:
        TypeError: none of these.
        ValueError: no number of bytes, or there is no policy.
    """
    given = plain(given)
    if policy is None and given not in ("auto", None, 0):
        raise ValueError(
            f"kv_checkpoints={given!r} without kv_policy has no effect; name a policy, e.g. kv_policy='auto'"
        )
    if given is None or (given == 0 and isinstance(given, (int, float))):
        return 0
    if not isinstance(given, str):
        raise TypeError(f'kv_checkpoints is {given!r}, expected "auto", a number of bytes ("256MiB"), or 0 for none')
    if given.strip().lower() == "auto":
        return "auto"
    return n_bytes("kv_checkpoints", given, 'or "auto", or 0 for none')


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A session as it was.

    Attributes:
        tokens: int32 [n_tokens], those that it held.
        removable: positions from here on can be removed from it.
        budget: ``kv_budget`` then.
        noted: what else the session notes of itself, see ``_kv_noted``.
        native: uint8, see :mod:`windowkv_edge.native_state`.
        logits: those that are known, see :class:`windowkv_edge.prompts.Prompts`.
        is_whole: it holds cells that a compaction evicted.
        n_cells: cells per (layer, kv head) on average.
    """

    tokens: Tokens
    removable: int
    budget: float | int
    noted: dict[str, Any]
    native: npt.NDArray[np.uint8]
    logits: Mapping[int, npt.NDArray[np.float32]]
    is_whole: bool = False
    n_cells: float = 0.0

    @property
    def n_bytes(self) -> int:
        return self.native.nbytes + self.tokens.nbytes + sum(own.nbytes for own in self.logits.values())

    def saves(self, prompt: Tokens, can_know: bool) -> int:
        """Tokens of a prompt that need not be evaluated from here.

        Args:
            prompt: the prompt.
            can_know: the logits can be used.
        """
        return n_reused(self.tokens, self.removable, prompt, self.logits if can_know else ())


@dataclass(frozen=True, eq=False)
class _Missed:
    """A checkpoint for which there was no room."""

    tokens: Tokens
    removable: int
    known: frozenset[int]
    n_bytes: int


@dataclass
class Checkpoints:
    """The checkpoints of one session; the least recently used one goes first.

    Args:
        given: what :func:`check_checkpoints` returned.

    Attributes:
        held: the least recently used one first.
    """

    given: str | int
    held: list[Checkpoint] = field(default_factory=list)
    _missed: list[_Missed] = field(default_factory=list)

    @property
    def is_auto(self) -> bool:
        return self.given == "auto"

    @property
    def n_bytes(self) -> int:
        """Bytes of host memory; logits that several have are one array, and count once."""
        logits = {id(row): row.nbytes for own in self.held for row in own.logits.values()}
        return sum(own.native.nbytes + own.tokens.nbytes for own in self.held) + sum(logits.values())

    def bound(self, n_live: int) -> int:
        """Bytes that they may take, if the session takes n_live."""
        return AUTO * n_live if isinstance(self.given, str) else self.given

    def make_room(self, n: int, n_live: int) -> bool:
        """Drop checkpoints until n more bytes fit, if they can.

        Args:
            n: bytes.
            n_live: those of the session.
        """
        bound = self.bound(n_live)
        while n <= bound and self.held and self.n_bytes + n > bound:
            own = self.held.pop(0)
            self.miss(own.tokens, own.removable, own.logits, own.n_bytes)
        return n <= bound

    def of(self, tokens: Tokens, is_whole: bool) -> Checkpoint | None:
        """The one that holds these tokens."""
        same = (own for own in self.held if own.is_whole == is_whole and np.array_equal(own.tokens, tokens))
        return next(same, None)

    def add(self, own: Checkpoint) -> None:
        """Keep one for which there is room."""
        self.held = [*self.held, own]

    def drop(self, own: Checkpoint) -> None:
        """Another one is to take its place."""
        self.held = [other for other in self.held if other is not own]

    def best(
        self, saves: Callable[[Checkpoint], int], n_live: int, n_prompt: int, n_observed: int
    ) -> Checkpoint | None:
        """The one that saves most of a prompt, if it is more than the session itself does.

        Args:
            saves: tokens that a checkpoint saves.
            n_live: those that the session saves.
            n_prompt: tokens of the prompt.
            n_observed: queries that a compaction looks at. Where whole cells are trimmed, those in front of that place
                are gone, so that another checkpoint is better that saves a little less.
        """
        found, most = None, -1
        for own in reversed(self.held):
            if (n := saves(own)) > n_live:
                rank = n - n_observed * (own.is_whole and n < min(n_prompt, len(own.tokens)))
                if rank > most:
                    found, most = own, rank
        return found

    def used(self, own: Checkpoint) -> None:
        """It is the last that would be dropped."""
        self.held = [*(other for other in self.held if other is not own), own]

    def clear(self) -> None:
        """Drop all of them, and forget what there was no room for."""
        self.held, self._missed = [], []

    #
    # what there was no room for
    #

    def miss(self, tokens: Tokens, removable: int, known: Iterable[int], n_bytes: int) -> None:
        """Note a checkpoint that is not there."""
        self._missed = [*self._missed[1 - N_MISSED :], _Missed(tokens, removable, frozenset(known), n_bytes)]

    def remedy(self, prompt: Tokens, n: int) -> tuple[int, str]:
        """Whether more bytes would have saved more than n tokens of a prompt: how many tokens, and how many bytes in
        words; (n, "") if they would not."""
        found = None
        for i, own in enumerate(self._missed):
            if (n_own := n_reused(own.tokens, own.removable, prompt, own.known)) > n:
                found, n = i, n_own
        if found is None:
            return n, ""
        # so that those that came later do not push it out
        need = self.n_bytes + sum(own.n_bytes for own in self._missed[found:])
        return n, f'kv_checkpoints="{-(-need >> 20)}MiB" would have kept {n} tokens of it'
