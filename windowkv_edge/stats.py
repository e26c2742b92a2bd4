"""What ``Llama.kv_stats()`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .budget import TYPES

if TYPE_CHECKING:
    from ._native import Context
    from .checkpoints import Checkpoints
    from .prompts import Prompts

__all__ = ["KVStats", "cell_types"]


def cell_types(stats: Any) -> tuple[str, str]:
    """Types of the K and V cells by their names, "?" where stock has another one or none."""
    names = {value: name for name, value in TYPES.items()}
    return names.get(stats.type_k, "?"), names.get(stats.type_v, "?")


@dataclass(frozen=True, eq=False)
class KVStats:
    """State of a KV cache. Bytes are those of live buffers.

    Everything except ``bytes_other`` is about the layers that policies compress, those that attend to all positions. In
    most models these are all layers. Layers with a sliding window or a recurrent state stay as in stock llama.cpp.

    Attributes:
        policy: name of the policy; "stock" without one; "auto: windowkv" where that stands in for it on its device.
        n_past: positions the sequence has seen, evicted ones included.
        layers: indices of these layers in the model.
        cells: int32 [len(layers), n_head_kv], cells held now.
        cell_types: of K and V, such as ("f16", "f16").
        bytes_live: bytes of the live buffers: K and V pools, and with a policy the observed queries and what
            GPUs look up about their heads.
        bytes_full: bytes that stock llama.cpp holds for ``n_past`` positions, in the cells that the session asked for.
        bytes_other: bytes of the window and recurrent layers' caches, which no policy touches; 0 where there are none.
        bytes_peak: largest ``bytes_live`` so far, with buffers that exist only while the cache grows or is compacted.
        bytes_released: bytes given back by the last compaction.
        n_compactions: compactions since the context was created.
        t_score_ms: last compaction, scoring, in ms.
        t_compact_ms: last compaction, selection and gather, in ms.
        n_evaluated, n_reused: tokens of all prompts since the session was created: those that were evaluated, and those
            that the cache held already.
        n_evaluated_last, n_reused_last: the same of the last prompt.
        miss: why tokens of the last prompt that had been read before had to be evaluated again, in words, and the bytes
            of ``kv_checkpoints`` that would have kept them; "" if none had.
        n_checkpoints: states that the session can go back to.
        bytes_checkpoints: their bytes, in host memory; part of nothing else.
        query: which question cells are kept for now, "last", "any" or "both" (``kv_query``); "" without a policy.
        n_replayed: positions before this one were repeated by the model, for policies that go by that.
        n_shifted: positions that were given up at the end of the context in all (``kv_shift``). All other numbers are
            about the ones that are there.
    """

    policy: str
    n_past: int
    layers: tuple[int, ...]
    cells: npt.NDArray[np.int32]
    cell_types: tuple[str, str]
    bytes_live: int
    bytes_full: int
    bytes_other: int
    bytes_peak: int
    bytes_released: int
    n_compactions: int
    t_score_ms: float
    t_compact_ms: float
    n_evaluated: int = 0
    n_reused: int = 0
    n_evaluated_last: int = 0
    n_reused_last: int = 0
    miss: str = ""
    n_checkpoints: int = 0
    bytes_checkpoints: int = 0
    n_shifted: int = 0
    n_replayed: int = 0
    query: str = ""

    @classmethod
    def read(
        cls, ctx: Context, policy: str | None, query: str, prompts: Prompts, checkpoints: Checkpoints
    ) -> KVStats:
        """What a context holds now; policy is None if the context was created without one.

        Raises:
            NativeError: the context has no memory.
        """
        stats = ctx.stats()
        if policy is None:
            cells = np.full((stats.n_layer, stats.n_head_kv), stats.n_past, dtype=np.int32)
        else:
            cells = ctx.cells()
        return cls(
            policy=policy or "stock",
            n_past=stats.n_past,
            layers=ctx.layers(),
            cells=cells,
            cell_types=cell_types(stats),
            bytes_live=stats.bytes_live,
            bytes_full=stats.bytes_full,
            bytes_other=stats.bytes_other,
            bytes_peak=stats.bytes_peak,
            bytes_released=stats.bytes_released,
            n_compactions=stats.n_compactions,
            t_score_ms=stats.t_score_ms,
            t_compact_ms=stats.t_select_ms + stats.t_gather_ms,
            n_evaluated=prompts.n_evaluated,
            n_reused=prompts.n_reused,
            n_evaluated_last=prompts.n_evaluated_last,
            n_reused_last=prompts.n_reused_last,
            miss=prompts.miss,
            n_checkpoints=len(checkpoints.held),
            bytes_checkpoints=checkpoints.n_bytes,
            n_shifted=prompts.n_shifted,
            n_replayed=stats.n_replayed,
            query=query,
        )

    def __str__(self) -> str:
        low, high = self.cells.min(initial=self.n_past), self.cells.max(initial=0)
        spread = f"{high}" if low >= high else f"{low} to {high}, {self.cells.mean():.1f} on average"
        other = f"{self.bytes_other / 2**20:.1f} MiB in window and recurrent layers, " if self.bytes_other else ""
        n_mib = self.bytes_checkpoints / 2**20
        checkpoints = f"{n_mib:.1f} MiB in {self.n_checkpoints} checkpoints, " if self.n_checkpoints else ""
        return (
            f"{self.policy}: {spread} cells per head for {self.n_past} positions, "
            f"{self.bytes_live / 2**20:.1f} MiB live ({self.bytes_full / 2**20:.1f} MiB in stock llama.cpp), "
            f"{self.bytes_peak / 2**20:.1f} MiB at peak, {other}{checkpoints}{self.n_compactions} compactions, "
            f"the last in {self.t_score_ms + self.t_compact_ms:.0f} ms, "
            f"{self.n_reused_last} of {self.n_reused_last + self.n_evaluated_last} tokens of the last prompt reused"
            + (f" ({self.miss})" if self.miss else "")
        )
