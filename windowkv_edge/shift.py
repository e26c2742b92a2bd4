"""The end of ``n_ctx``: the oldest positions are given up, the others move down, and what a prompt calls its history is
mapped onto what is left of it."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from . import _native
from .errors import FormatError, UnsupportedCallError, UnsupportedModelError
from .guard import Interrupts
from .limit import N_ASKS
from .prompts import n_shared, why_missed
from .room import Compacting
from .session import PolicyCache

__all__ = ["SHIFTS", "GivenUp", "Shift", "Shifting"]

Shift = Literal["refuse", "shift"]
SHIFTS: tuple[Shift, ...] = get_args(Shift)

N_SINKS = 4
"""Positions at the beginning that are never given up: attention sinks (arXiv 2309.17453, table 2)."""

_NO_BOUND = 2**31 - 1


Piece = tuple[int, str]
"""Tokens that were given up: their number and digest, so that a chat without an end takes no more memory."""


def _piece(tokens: Sequence[int]) -> Piece:
    data = np.asarray(tokens, dtype="<i4").tobytes()
    return len(tokens), hashlib.blake2b(data, digest_size=16).hexdigest()


class GivenUp:
    """Tokens that a session read and gave up, and where they stood. With what the cache holds they make up the history
    that a chat sends at every turn.

    Args:
        parts: position in the cache and the pieces that were given up before it, ascending.
    """

    def __init__(self, parts: Sequence[tuple[int, Sequence[Piece]]] = ()) -> None:
        self.parts = [(at, list(pieces)) for at, pieces in parts]

    def closed(self, p0: int, tokens: Sequence[int]) -> GivenUp:
        """The same after the tokens of the positions from p0 on were given up and the later ones moved down."""
        p1 = p0 + len(tokens)
        before = [part for part in self.parts if part[0] < p0]
        after = [(at - len(tokens), own) for at, own in self.parts if at > p1]
        here: list[Piece] = []
        n_seen = 0
        for at, own in self.parts:
            if p0 <= at <= p1:
                here += [_piece(tokens[n_seen : at - p0])] * (at - p0 > n_seen)
                here += own
                n_seen = at - p0
        here += [_piece(tokens[n_seen:])] * (len(tokens) > n_seen)
        return GivenUp([*before, (p0, here), *after])

    def cut(self, n_tokens: int) -> None:
        """The cache forgets the positions from n_tokens on."""
        if self.parts and self.parts[-1][0] > n_tokens:
            self.parts = [(at, own) for at, own in self.parts if at <= n_tokens]

    def held(self, prompt: Sequence[int], cached: npt.NDArray[np.intc]) -> tuple[int, list[int], str]:
        """A prompt as the cache is to see it: without the parts that were given up, as far as it begins with them.

        Args:
            prompt: its tokens.
            cached: those of the positions in the cache.

        Returns:
            How many of the parts it contains; its other tokens; and why it contains no more of them, in words, if
            tokens that were read and given up may have to be evaluated again.
        """
        i = j = k = 0
        why = ""
        for at, own in self.parts:
            n = at - j
            is_part = n_shared(prompt[i : i + n], cached[j:at]) == n
            end = i + n
            for piece in own if is_part else ():
                if not (is_part := _piece(prompt[end : end + piece[0]]) == piece):
                    where = f"behind token {end} of {len(prompt)}"
                    why = f"the prompt differs {where}, inside of what was given up (kv_shift)"
                    break
                end += piece[0]
            if not is_part:
                break
            i, j, k = end, at, k + 1
        if k == 0 or n_shared(prompt, cached) > j + n_shared(prompt[i:], cached[j:]):
            return 0, list(prompt), why if k == 0 else ""  # it says what the cache holds, word by word
        return k, [*cached[:j].tolist(), *prompt[i:]], why

    def noted(self) -> list[Any]:
        """Values of JSON."""
        return [[at, [list(piece) for piece in own]] for at, own in self.parts]

    @classmethod
    def of(cls, noted: Any) -> GivenUp:
        """What :meth:`noted` returned.

        Raises:
            FormatError: it is something else.
        """
        res: list[tuple[int, list[Piece]]] = []
        for part in noted:
            if not (isinstance(part, list) and len(part) == 2 and type(part[0]) is int and isinstance(part[1], list)):
                raise FormatError("what its session gave up is not positions and pieces")
            if not (res[-1][0] if res else -1) < part[0] < 2**31:
                raise FormatError(f"what its session gave up stood at position {part[0]}")
            for one in part[1]:
                if not (isinstance(one, list) and [*map(type, one)] == [int, str] and 0 < one[0] < 2**31):
                    raise FormatError(f"what its session gave up at position {part[0]} is not tokens and their digest")
            res.append((part[0], [(one[0], one[1]) for one in part[1]]))
        return cls(res)


def close(position: int, p0: int, n: int) -> int:
    """Where a position, or the end of a range, is after the positions [p0, p0 + n) were given up."""
    return position if position <= p0 else max(p0, position - n)


class Shifting(Compacting):
    """The part of :class:`windowkv_edge.Llama` that makes room for positions."""

    _kv_cache: PolicyCache | None
    _kv_shift: Shift = "refuse"
    _kv_lost: GivenUp
    _kv_step: Any
    _kv_wants = 0  # tokens of an answer that a completion asks for
    _kv_miss = ""  # why the prompt that is about to begin cannot be mapped
    _kv_n_read = 0  # tokens of it that were evaluated ahead
    _kv_ahead = (0, 0)  # of what is evaluated in pieces, tokens in front of this piece and behind it
    _kv_lifts = False  # a completion asks whether its prompt fits: what does not is shifted
    _kv_as_is = False  # this completion is about positions
    _kv_sampler: Any = None  # that of an answer which goes on
    _kv_moving: tuple[int, dict[str, Any]] | None = None  # positions after a move, and what the session is then

    @property
    def _n_positions(self) -> int:
        """Those that a session with a policy can have: llama.cpp rounds ``n_ctx`` up, and stock's class has room for as
        many tokens as were asked for."""
        n, ids = int(self.__dict__["_n_ctx"]), self.__dict__.get("input_ids")
        return n if self._kv_cache is None or ids is None else min(n, len(ids))

    @property
    def _n_ctx(self) -> int:
        return _NO_BOUND if self._kv_lifts else self._n_positions

    @_n_ctx.setter
    def _n_ctx(self, n_ctx: int) -> None:
        self.__dict__["_n_ctx"] = n_ctx

    if TYPE_CHECKING:  # what PolicyEvaluation has

        def _sync_positions(self) -> None: ...
        def _find_messages(self, tokens: Sequence[int]) -> None: ...
        def _evaluate(self, cache: PolicyCache, tokens: Sequence[int], step: Any) -> None: ...

    def _check_shift(self, cache: PolicyCache) -> None:
        """Raise UnsupportedModelError where ``kv_shift="shift"`` is asked for and the model has no such positions."""
        if self._kv_shift == "shift" and not cache.kv.can_shift():
            raise UnsupportedModelError(
                f"{self.model_path}: kv_shift='shift' is not possible, the model's positions cannot be moved; "
                "leave it out"
            )

    @property
    def _shifts(self) -> bool:
        return self._kv_shift == "shift" and self._kv_cache is not None and not self._kv_as_is

    #
    # giving up
    #

    def _free_positions(self) -> npt.NDArray[np.int64]:
        """Those that can be given up, the oldest first."""
        free = np.ones(max(0, self.n_tokens - 1), dtype=bool)  # the last one stays
        free[:N_SINKS] = False
        for start, stop in self._kv_pins.ranges():
            free[start:stop] = False
        return np.flatnonzero(free)

    def _make_positions(self, cache: PolicyCache, n: int, n_wanted: int = 0) -> int:
        """Before n tokens are evaluated behind what is there, and if it can be n_wanted more: room for as many of the
        first ones as there can be. Returns how many these are, at least one.

        Raises:
            UnsupportedCallError, NativeError: see :meth:`_give_up`.
        """
        while (n_over := self.n_tokens + n + n_wanted - self._n_ctx) > 0:
            n_room = self._n_ctx - self.n_tokens
            if n_over <= self._free_positions().size:
                self._give_up(cache, n_over)
            elif n_room > 0:
                return min(n, n_room)
            else:
                self._give_up(cache, 1)
        return n

    def _pieces(self, cache: PolicyCache, tokens: Sequence[int]) -> Generator[Sequence[int], None, None]:
        """Tokens that are evaluated by hand, in pieces that find room."""
        if not self._shifts or self._kv_step is not None or self.n_tokens + len(tokens) <= self._n_ctx:
            yield tokens
            return
        n_done = 0
        try:
            while len(tokens) > 0:
                n = self._make_positions(cache, len(tokens))
                self._kv_ahead = n_done, len(tokens) - n
                yield tokens[:n]
                tokens, n_done = tokens[n:], n_done + n
        finally:
            self._kv_ahead = 0, 0

    def _make_answer_room(self, at: int, n: int) -> int:
        """Before n tokens of an answer from a position on that is behind the last one; returns where they go.

        Raises:
            UnsupportedCallError, NativeError: see :meth:`_give_up`.
        """
        assert self._kv_cache is not None
        self.n_tokens = min(self.n_tokens, at)  # without drafts
        if (n_over := self.n_tokens + n - self._n_ctx) > 0:
            self._give_up(self._kv_cache, n_over)
        return self.n_tokens

    def _give_up(self, cache: PolicyCache, n_least: int) -> None:
        """Give up the oldest positions, half of those that can go and at least so many; the others move down.

        Raises:
            UnsupportedCallError: there are not so many.
            NativeError: memory ran out.
        """
        free = self._free_positions()
        if n_least > free.size:
            raise UnsupportedCallError(
                f"kv_shift: {n_least} of {self.n_tokens} positions would have to be given up for what comes, and "
                f"{free.size} can be; pin fewer (kv_unpin, kv_pin_system=False), or choose a larger n_ctx"
            )
        free = free[: max(n_least, free.size // 2)]
        runs = np.split(free, np.flatnonzero(np.diff(free) > 1) + 1)
        with self._aligned(), Interrupts():
            for run in reversed(runs):  # what is before stays where it is
                self._move_down(cache, int(run[0]), int(run[-1]) + 1)

    def _move_down(self, cache: PolicyCache, p0: int, p1: int) -> None:
        end, n = self.n_tokens, p1 - p0
        ids, prompts, pins = self.input_ids.copy(), copy.copy(self._kv_prompts), copy.copy(self._kv_pins)
        ids[p0 : end - n] = self.input_ids[p1:end]
        prompts.moved(p0, n)
        pins.moved(lambda at: close(at, p0, n))
        # all that a session says of its positions, to take effect at once
        new: dict[str, Any] = {
            "input_ids": ids, "n_tokens": end - n, "_kv_known": end - n, "_kv_prompts": prompts, "_kv_pins": pins,
            "_kv_lost": self._kv_lost.closed(p0, self.input_ids[p0:p1].tolist()), "_kv_moving": None,
        }  # fmt: skip
        if self._logits_all:
            new["scores"] = self.scores.copy()
            new["scores"][p0 : end - n] = self.scores[p1:end]
        self._kv_moving = end - n, new
        cache.kv.shift(p0, n)
        self._finish_move()
        self._shifted()

    def _finish_move(self) -> None:
        """What a Ctrl-C may have kept from taking effect: the cache tells whether it moved."""
        if self._kv_moving is not None:
            n_past, new = self._kv_moving
            if int(_native.Context(self._ctx.ctx).stats().n_past) == n_past:
                self.__dict__.update(new)
            self._kv_moving = None

    def _shifted(self) -> None:
        """Positions were given up and the later ones moved down: checkpoints are about others."""
        self._kv_checkpoints.clear()

    #
    # prompts
    #

    def _fit_prompt(self, tokens: list[int], reset: bool) -> list[int]:
        """Before ``generate`` evaluates a prompt: its tokens as the cache is to see them, for which there is room then.

        What is longer than the context is read in pieces, and given up again piece by piece.

        Args:
            tokens: the prompt.
            reset: it is a whole one; else it goes on behind what is there.
        """
        wants, self._kv_wants, self._kv_lifts, self._kv_miss, self._kv_n_read = self._kv_wants, 0, False, "", 0
        cache, self._kv_asked, self._kv_ahead = self._kv_cache, None, (0, 0)
        if self._kv_is_over and reset:
            with self._aligned():
                self._clear()
            self._kv_miss = "kv_query was changed, and cells were kept for the last question alone"
        if cache is not None:
            self._ask_as_given(cache)  # until it begins
        if cache is None or not self._shifts:
            if reset:
                self._kv_lost = GivenUp()
            return tokens
        if reset:
            n_parts, mapped, self._kv_miss = self._kv_lost.held(tokens, self.input_ids[: self.n_tokens])
            held = np.array(mapped, dtype=np.intc)
            if n_parts > 0 and max(self._n_live(cache, held), self._n_kept(held)) == 0:
                # if nothing of it can be kept, then all of it is read again, with what was given up
                n_same, stats = n_shared(mapped, self.input_ids[: self.n_tokens]), cache.kv.stats()
                self._kv_miss = why_missed(
                    len(mapped), n_same, int(stats.n_past), int(stats.n_boundary), self._kv_when.changed
                )
                n_parts, mapped = 0, tokens
            tokens, self._kv_lost = mapped, GivenUp(self._kv_lost.parts[:n_parts])
        n_wanted = max(min(wants, self._n_ctx // 8), self._n_repeating_least(cache.bound))
        if len(tokens) + n_wanted + (0 if reset else self.n_tokens) <= self._n_ctx:
            return tokens

        if reset:
            self._go_back(cache, tokens)
            rest = self._keep_shared(cache, tokens)
            self._find_messages(tokens)  # before anything is given up, what is pinned has to be known
        else:
            rest = list(tokens)
            self._sync_positions()
        start, stop = self._kv_asked or (max(0, len(tokens) - N_ASKS), len(tokens))
        question = list(tokens[start:stop])
        while (n := self._make_positions(cache, len(rest), n_wanted)) < len(rest):
            self._kv_ahead = self._kv_n_read, len(rest) - n
            self._read(cache, rest[:n], question)
            rest = rest[n:]
        self._kv_ahead = self._kv_n_read, 0
        return [*self.input_ids[: self.n_tokens].tolist(), *rest] if reset else rest

    def _keep_shared(self, cache: PolicyCache, tokens: list[int]) -> list[int]:
        """Of what is there keep what a prompt begins with; returns its other tokens."""
        n_same, n_past = n_shared(tokens, self.input_ids[: self.n_tokens]), int(cache.kv.stats().n_past)
        if n_same == self.n_tokens == n_past:
            return tokens[n_same:]
        self._requires_eval = True
        if n_same > 0 and self._ctx.kv_cache_seq_rm(-1, n_same, -1):
            self.n_tokens = self._kv_known = n_same
            return tokens[n_same:]
        if n_same > 0 and not self._kv_miss:
            n_boundary = int(cache.kv.stats().n_boundary)
            self._kv_miss = why_missed(len(tokens), n_same, n_past, n_boundary, self._kv_when.changed)
        with self._aligned():
            self._clear()
        return tokens

    def _read(self, cache: PolicyCache, tokens: Sequence[int], question: list[int]) -> None:
        """Evaluate a piece of a prompt ahead, for the question at the prompt's end."""
        before, self._kv_step, self._kv_question = self._kv_step, "prompt", question
        try:
            self._evaluate(cache, tokens, "prompt")
        finally:
            self._kv_step, self._kv_question = before, []
        self._kv_n_read += len(tokens)

    #
    # completions
    #

    def _create_completion(self, *args: Any, **kwargs: Any) -> Any:
        if not self._shifts:
            return super()._create_completion(*args, **kwargs)
        own = inspect.signature(super()._create_completion).bind(*args, **kwargs).arguments
        is_about_positions = own.get("logprobs") is not None
        n_wanted = own.get("max_tokens", 16)
        if not is_about_positions and (n_wanted is None or n_wanted <= 0):
            own["max_tokens"] = n_wanted = self._n_ctx
        return self._beginning(super()._create_completion(**own), n_wanted or 0, is_about_positions)

    def _beginning(self, own: Any, n_wanted: int, as_is: bool) -> Generator[Any, None, None]:
        """A completion whose prompt may be longer than the context. One that asks for logprobs is about positions, and
        is evaluated as it is."""
        lifts = not as_is
        try:
            while True:
                self._kv_lifts, self._kv_wants, self._kv_as_is = lifts, n_wanted if lifts else 0, as_is
                try:
                    chunk = next(own)
                except StopIteration:
                    return
                finally:
                    self._kv_lifts, self._kv_wants, self._kv_as_is = False, 0, False
                lifts = False
                yield chunk
        finally:
            own.close()
