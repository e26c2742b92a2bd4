"""What a session within a limit will hold, from the header of a model file alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .budget import bits
from .compaction import n_observed
from .gguf_info import GGUFInfo
from .limit import Limit, check_limit, n_observers, n_scores, slack
from .policies import KVPolicy
from .replay import Wording, n_at_once

__all__ = ["Forecast", "forecast"]

N_BATCH = 512
"""Tokens of a batch by default."""


N_WORDS = 16
"""Tokens that ask a model to repeat a text: about as many with every tokenizer."""


class _Stats(NamedTuple):
    """What :class:`Limit` reads of the native statistics."""

    bytes_cell: int
    bytes_live: int
    bytes_pool: int = 0


@dataclass(frozen=True)
class Forecast:
    """Of a prompt that is read within a limit, and its answer. Cells are per (layer, kv head) on average, bytes those
    of ``kv_stats()``: pools and observed queries. A session may hold a twentieth more for a moment, where cells move,
    and its pools have free rows: up to 31 per head where all are equally long, else a fiftieth.

    Attributes:
        n_tokens: tokens of the prompt.
        n_limit: cells that the limit is.
        cells_peak, bytes_peak: while the prompt is read.
        cells_after, bytes_after: when the answer begins.
        cells_most, bytes_most: while the answer grows, however long.
        bytes_full: of the full cache of the prompt, in the same cells.
    """

    n_tokens: int
    n_limit: int
    cells_peak: int
    bytes_peak: int
    cells_after: int
    bytes_after: int
    cells_most: int
    bytes_most: int
    bytes_full: int


def forecast(info: GGUFInfo, limit: int | str, n_tokens: int, policy: KVPolicy, n_batch: int = N_BATCH) -> Forecast:
    """What ``Llama(..., kv_policy=policy, kv_limit=limit)`` will hold.

    Args:
        info: the model, one that policies support.
        limit: see :class:`windowkv_edge.Llama`.
        n_tokens: tokens of the prompt.
        policy: with its options.
        n_batch: tokens of a batch.

    Raises:
        TypeError, ValueError: it is no limit, or holds too few cells for the policy.
    """
    layers = info.compressed_layers
    cell = sum(info.layer_bytes(il) for il in layers)
    dims = (info.head_dim_k, info.head_dim_v)
    if policy.cells is not None and not any(dim % 32 for dim in dims):
        cell = round(cell * bits(policy.cells) / 16)
    queries = 2 * sum(info.n_head[il] for il in layers) * info.head_dim_k * n_observed(policy) * 2
    stats = _Stats(cell, queries)
    own = Limit(check_limit(limit))
    own.check(stats, policy)
    n = own.n_cells(stats)
    fits = n_tokens <= n
    if fits:
        peak, peak_rows, after = n_tokens, _rows(n_tokens), n_tokens
    else:
        n_more = n_scores(n + n_batch, cell / sum(info.n_head_kv[il] for il in layers), policy)
        peak, peak_rows, after = _read(n_tokens, n, n_batch, policy, n_more)
    cells = {"peak": peak, "after": after, "most": n}
    figures = {f"cells_{name}": value for name, value in cells.items()}
    rows = {"peak": peak_rows, "after": _rows(after) if fits else after, "most": n}
    if not fits and after == n - slack(n):
        rows["after"] = n  # a compaction behind the prompt leaves room for the answer
    figures |= {f"bytes_{name}": value * cell + queries for name, value in rows.items()}
    return Forecast(n_tokens, n, **figures, bytes_full=n_tokens * cell + queries)


def _rows(n_cells: int) -> int:
    """Of pools, as long as nothing was compacted: pieces that stock's attention reads."""
    return -(-n_cells // 256) * 256


def _read(n_tokens: int, limit: int, n_batch: int, policy: KVPolicy, n_more: int) -> tuple[int, int, int]:
    """Cells and rows at the peak of a prompt that does not fit, observers included, and cells behind it."""
    n_asked = n_observers(policy, n_batch)
    if policy.replays:
        n_asked = max(n_asked, n_at_once(Wording([0] * N_WORDS, [0] * N_WORDS), n_batch))
    n_most = min(n_batch, policy.n_observed) if policy.accumulates else n_batch
    held = peak = rows = n_read = 0
    is_whole = True
    while n_read < n_tokens:
        n, n_cells = Limit.next_step(limit, n_batch, held, n_tokens - n_read, n_asked, n_most, policy.replays, n_more)
        if n_cells is not None:
            peak = max(peak, held + n_asked)
            rows = max(rows, _rows(peak) if is_whole else peak)
            held, is_whole = n_cells, False
        held += n
        n_read += n
        peak = max(peak, held)
        rows = max(rows, _rows(held) if is_whole else held)
    if policy.replays:  # behind the last tokens as well
        peak, rows = max(peak, held + n_asked), max(rows, held + n_asked)
    return peak, rows, held if held <= limit else limit - slack(limit)
