"""A session's memory: how many cells there may be at any moment, and when that asks for a compaction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .budget import plain
from .policies import KVPolicy

__all__ = [
    "PREFILLS",
    "Limit",
    "Prefill",
    "check_interval",
    "check_limit",
    "n_asks",
    "n_bytes",
    "n_observers",
    "n_scores",
    "slack",
]

Prefill = Literal["exact", "bounded", "auto"]
PREFILLS: tuple[Prefill, ...] = get_args(Prefill)

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def check_limit(limit: Any) -> int | str:
    """Return a valid limit: an int >= 1 counts cells per head, a text such as "512MiB" bytes.

    Raises:
        TypeError: neither an int nor a text.
        ValueError: out of range, or no number of bytes.
    """
    limit = plain(limit)
    expected = 'expected a number of cells per head (4096), or of bytes ("512MiB")'
    if isinstance(limit, bool) or not isinstance(limit, (int, str)):
        raise TypeError(f"kv_limit is {limit!r}, {expected}")
    if isinstance(limit, int):
        if not 1 <= limit < 2**31:
            raise ValueError(f"kv_limit is {limit} cells, expected at least 1 and less than 2^31")
        return limit
    n_bytes("kv_limit", limit, "for cells per head give an int")
    return limit


def n_bytes(name: str, text: str, other: str) -> int:
    """The bytes that a text such as "512MiB" means.

    Args:
        name: of the argument, for the message.
        text: the text.
        other: what could be given instead, for the message.

    Raises:
        ValueError: it means none.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmg]?i?b)\s*", text, re.ASCII | re.IGNORECASE)
    unit = found and _UNITS.get(found[2].lower())
    if not found or not unit:
        raise ValueError(f"{name} is {text!r}, expected bytes such as 512MiB or 1.5GiB; {other}")
    return int(float(found[1]) * unit)


SPARE = 12
"""A compaction takes up to one part in so many of the cells' bytes for a while: q8_0 cells of 64 values, 30 layers, of
which one may hold three times the mean where heads of the model compete in every step (SmolLM2, 7,543 tokens, limit
1,024)."""

SCORES = 16
"""Bytes that a cell has beside it in a compaction where scores come from tokens that repeat it: its own number, once
more among the cells that stay, and two planes of scores."""

N_ASKS = 64
"""Tokens that are taken for what a prompt asks, at most."""


def n_asks(policy: KVPolicy) -> int:
    """The same with a policy: no more than it observes; one where nothing asks: where it sums up what has attended, or
    has the model repeat what it has read."""
    return min(int(policy.n_observed), N_ASKS) if policy.observes else 1


def n_observers(policy: KVPolicy, n_batch: int) -> int:
    """Tokens of what a prompt asks that observe at once, at most; none where nothing asks."""
    return min(n_asks(policy), n_batch) if policy.observes else 0


def n_scores(n_cells: int, n_bytes_cell: float, policy: KVPolicy) -> int:
    """Cells' worth of what a policy's numbers take beside n_cells cells, of n_bytes_cell bytes in one head."""
    return round(n_cells * SCORES / n_bytes_cell) if policy.replays else 0


def check_interval(interval: int | None, policy: KVPolicy) -> None:
    """Raise ValueError if answers are to be compacted with a policy that never does."""
    if interval is not None and policy.name == "full":
        raise ValueError("kv_policy='full' keeps every cell, which kv_interval does not allow; leave one of them out")


def slack(n_cells: int) -> int:
    """Cells of room that a compaction makes, so that one is not due for every token."""
    return max(1, n_cells // 8)


@dataclass(frozen=True)
class Limit:
    """What the cells of a session may take.

    Behind a prompt, and while an answer grows, the heads hold at most :meth:`n_cells` cells on average; while a prompt
    is read, as many and a batch (:meth:`next_step`). Pools come in pieces of 32 cells, and before the first compaction
    of 256, as stock's attention reads them: a limit in bytes is exceeded by up to 255 cells until then, if the limit
    and a batch are no multiple of 256 cells.

    Args:
        given: what :func:`check_limit` returned.
        interval: see :meth:`slack`; None = an eighth of the cells.
    """

    given: int | str
    interval: int | None = None

    def n_cells(self, stats: Any) -> int:
        """Cells per (layer, kv head) on average.

        Args:
            stats: the native statistics: bytes of a cell, and of what lies beside the cells.
        """
        if isinstance(self.given, int):
            return self.given
        beside = int(stats.bytes_live) - int(stats.bytes_pool)
        # pools have free rows, a 64th of a compressed cache
        return max(0, (n_bytes("kv_limit", self.given, "") - beside) * 64 // (65 * int(stats.bytes_cell)))

    def check(self, stats: Any, policy: KVPolicy, n_repeating: int = 0) -> None:
        """Raise ValueError if that is less than a policy needs: twice :func:`n_asks`, or three times as many as repeat
        what was read at once.

        Args:
            stats: see :meth:`n_cells`.
            policy: the policy.
            n_repeating: tokens that repeat others at least, 0 where none do.
        """
        if policy.name == "full":
            raise ValueError("kv_policy='full' keeps every cell, which kv_limit does not allow; leave one of them out")
        n, n_least = self.n_cells(stats), max(2 * n_asks(policy), 3 * n_repeating)
        if self.interval is not None and self.interval >= (n if n_repeating == 0 else n - n // 3):
            raise ValueError(
                f"kv_interval={self.interval} leaves nothing of the {n} cells per head that kv_limit={self.given!r} "
                "holds; give a smaller one"
            )
        if n < n_least:
            beside = int(stats.bytes_live) - int(stats.bytes_pool)
            least = (n_least * int(stats.bytes_cell) * 65 // 64 + beside) / 2**20
            raise ValueError(
                f"kv_limit={self.given!r} holds {n} cells per head, expected at least {n_least} ({least:.1f} MiB), "
                f"{policy.name!r} would have nothing to choose from"
            )

    def n_free(self, stats: Any, policy: KVPolicy) -> int:
        """Cells per head that every compaction within the limit leaves."""
        n = self.n_cells(stats)
        return n - max(n_asks(policy), self.slack(n)) - (n // 3 if policy.replays else 0)

    @staticmethod
    def next_step(
        n_cells: int,
        n_batch: int,
        n_held: float,
        n_left: int,
        n_observers: int,
        n_most: int | None = None,
        goes_on: bool = False,
        n_scores: int = 0,
    ) -> tuple[int, int | None]:
        """How a prompt is read on within n_cells and a batch.

        Where cells have to go, fewer tokens are evaluated at once, and what a batch would have taken holds cells: the
        fewer are evicted at a time, the more of a prompt is found again. No fewer than a quarter of a batch, as every
        step costs a compaction, and no fewer than are worth one.

        Args:
            n_cells: cells per head.
            n_batch: tokens of a batch.
            n_held: cells per head now.
            n_left: tokens that are left, at least 1.
            n_observers: tokens that observe between two steps.
            n_most: tokens that may be evaluated at once, if that is less than a batch.
            goes_on: behind the tokens that are left there may be more of the prompt.
            n_scores: cells' worth of what lies beside them while a compaction chooses, see :func:`n_scores`.

        Returns:
            The number of tokens that come next, and the cells that a compaction leaves before them, None if they find
            room as it is.
        """

        def may_hold(n: int) -> int:
            # behind them the next observers need room, and then a compaction, for scores of all cells and a layer twice
            behind = max(n_observers if goes_on or n < n_left else 0, (n_cells + n_batch) // SPARE + n_scores)
            return n_cells + n_batch - n - behind

        n = min(n_left, n_batch if n_most is None else n_most)
        if n_held <= may_hold(n):
            return n, None
        n = min(n, max(1, n_batch // 4, slack(n_cells)))
        room = may_hold(n)
        if n_held <= room:
            return n, None
        # one compaction for several small steps, if there are several
        n_ahead = slack(room) if goes_on else min(slack(room), n_left)
        return n, room - n * max(0, n_ahead // n - 1)

    def slack(self, n_cells: int) -> int:
        """Cells of room that a compaction makes while an answer grows, so that one is not due for every token."""
        return slack(n_cells) if self.interval is None else self.interval
