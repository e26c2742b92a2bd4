"""Replay: before a compaction the model repeats what it has read; the cells that it needs for that have scores then.

Whoever repeats a text needs of every place what any question about it may need (KVzip, arXiv 2505.23416).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from . import _native
from .errors import UnsupportedCallError
from .pins import Range
from .policies import KVPolicy

__all__ = ["N_LEAST", "N_ROOM", "Wording", "n_at_once", "n_end", "n_for_any", "next_to_replay", "replay"]

PIECE = 256
"""Positions that are repeated at once, at most."""

N_ROOM = PIECE + 64
"""Positions behind a text in which it can be repeated in pieces of that size, whatever the tokenizer."""

N_LEAST = 8
"""Positions that are repeated at once at least, where the context ends behind them; 32 in small batches."""

N_END = 16
"""Positions at the end that nobody repeats where a question is not told from a text: they stay."""

N_BEFORE = 8
"""Tokens in front of a piece that say where it begins (the authors' code takes as many)."""


@dataclass(frozen=True)
class Wording:
    """What asks the model to repeat a text, in tokens. Without a tokenizer it is not asked, and repeats all the same.

    Args:
        first: in front of its beginning.
        later: in front of the last tokens before another piece, and that piece.
    """

    first: Sequence[int]
    later: Sequence[int]

    @classmethod
    def of(cls, tokenize: Callable[[str], Sequence[int]]) -> Wording:
        """The same in a model's tokens, without special ones."""
        return cls(
            tokenize("\n\nThe text above, word by word, from its beginning:\n"),
            tokenize("\n\nThe text above, word by word, going on behind these words:\n"),
        )

    @property
    def size(self) -> int:
        """Tokens in front of a piece, at most."""
        return max(len(self.first), len(self.later) + N_BEFORE)


def n_at_once(wording: Wording, n_batch: int) -> int:
    """Tokens that are evaluated behind what is there: half of a batch, where that is worth it."""
    return min(wording.size + PIECE, max(wording.size + 4 * N_LEAST, n_batch // 2))


def n_for_any(policy: KVPolicy, n_cells: int) -> int:
    """Of n_cells cells those that scores by replay choose: all of them, or the policy's ``replay_share``."""
    share = policy.parts().replay_share
    return int(n_cells * share) if share > 0 else n_cells


def n_end(policy: KVPolicy, n_cells: int) -> int:
    """Positions at the end that are not repeated before a compaction to n_cells cells per head, as they stay:
    :data:`N_END`, but no more than a quarter of :func:`n_for_any`."""
    return max(1, min(N_END, n_for_any(policy, n_cells) // 4))


def next_to_replay(kv: _native.Context, stop: int) -> int:
    """The first position in front of ``stop`` from which nothing was repeated, and no head has lost a cell."""
    stats = kv.stats()
    start = int(stats.n_replayed)
    if start < min(stop, int(stats.n_boundary)):
        for layer in range(int(stats.n_layer)):
            for head in range(int(stats.n_head_kv)):
                lost = np.setdiff1d(np.arange(start, stop), kv.positions(layer, head), assume_unique=True)
                start = max(start, int(lost[-1]) + 1 if lost.size else 0)
    return start


def replay(
    kv: _native.Context,
    tokens: Sequence[int],
    stop: int,
    wording: Wording,
    n_most: int,
    decode: Callable[[list[int]], None],
) -> Iterator[Range]:
    """Repeat the positions up to ``stop`` that were not repeated yet, piece by piece.

    Args:
        kv: the cache.
        tokens: those of its positions.
        stop: behind the last position that is repeated.
        wording: what asks for it.
        n_most: tokens behind the cells that are there, at most; at least ``wording.size`` and :data:`N_LEAST`.
        decode: evaluates tokens.

    Yields:
        A piece, [start, stop), behind its replay.

    Raises:
        UnsupportedCallError: n_most is too small.
        NativeError: memory ran out. The pieces before have their scores.
        Exception: what ``decode`` raises.
    """
    start = next_to_replay(kv, stop)
    if start >= stop:
        return
    if n_most < wording.size + N_LEAST:
        raise UnsupportedCallError(
            f"repeating a text takes {wording.size + N_LEAST} positions behind it, and {n_most} are left; "
            "give a larger n_ctx"
        )
    size = n_most - wording.size
    n_pieces = -(-(stop - start) // size)
    while start < stop:
        end = start + -(-(stop - start) // n_pieces)  # pieces of one size
        before = list(tokens[max(0, start - N_BEFORE) : start])
        own = [*(wording.later if start > 0 else wording.first), *before, *tokens[start:end]]
        kv.reserve(len(own))
        with kv.observing((start, end), len(own)):
            decode(own)
        yield start, end
        start, n_pieces = end, n_pieces - 1
