"""How long answers stay in a bounded cache: when one is compacted while it grows, and which of its tokens stay."""

from __future__ import annotations

from dataclasses import dataclass

from .pins import Range
from .policies import KVPolicy, Task
from .session import PolicyCache

__all__ = ["Bound", "make_room", "newest"]


@dataclass(frozen=True)
class Bound:
    """What the heads hold at most while an answer grows.

    Args:
        n_cells: cells per (layer, kv head) on average.
        interval: tokens between two compactions; each leaves ``n_cells - interval`` cells.
    """

    n_cells: int
    interval: int

    def target(self, n_tokens: int) -> int:
        """Cells per head that a compaction leaves before n_tokens that are evaluated at once."""
        return self.n_cells - max(n_tokens, self.interval)


def newest(policy: KVPolicy, n_past: int, n_free: int) -> list[Range]:
    """Positions that stay while an answer is compacted, whatever the policy chooses: the newest ones.

    A policy that goes by the attention of a few last tokens loses the text that the next ones continue. Of n_free
    cells they take the policy's ``answer_share``.

    Args:
        policy: the policy.
        n_past: positions in the cache.
        n_free: cells per head that are not pinned otherwise.
    """
    n = min(n_past, int(max(0, n_free) * policy.answer_share))
    return [(n_past - n, n_past)] if n > 0 else []


def make_room(cache: PolicyCache, bound: Bound, n_tokens: int, task: Task = "localization") -> bool:
    """Before n_tokens more tokens of an answer: compact, if the cache would hold more than it may. Says whether it did.

    Raises:
        WindowKVError, Exception: see :meth:`PolicyCache.compact`.
    """
    kv, n_past = cache.kv, int(cache.kv.stats().n_past)
    if cache.bound.accumulates and n_past - int(kv.stats().n_summed) + n_tokens > int(kv.stats().n_observed):
        kv.accumulate()
    if float(kv.cells().mean()) + n_tokens <= bound.n_cells:
        return False
    n_cells = bound.target(n_tokens)
    kv.set_room(bound.interval)
    kv.set_pinned(newest(cache.bound, n_past, n_cells))
    cache.compact(n_cells, task, comes="answer")
    return True
