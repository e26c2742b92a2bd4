"""What ``Llama.kv_stats()`` returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["KVStats"]


@dataclass(frozen=True, eq=False)
class KVStats:
    """State of a KV cache. Bytes are those of live buffers.

    Attributes:
        policy: name of the policy, "stock" without one.
        n_past: positions the sequence has seen, evicted ones included.
        cells: int32 [n_layer, n_head_kv], cells held now.
        bytes_live: bytes of the live buffers: K and V pools, and with a policy the observation ring.
        bytes_full: bytes that stock llama.cpp holds for ``n_past`` positions.
        bytes_peak: largest ``bytes_live`` so far, transients of growth and compaction included.
        bytes_released: bytes given back by the last compaction.
        n_compactions: compactions since the context was created.
        t_score_ms: last compaction, scoring, in ms.
        t_compact_ms: last compaction, selection and gather, in ms.
    """

    policy: str
    n_past: int
    cells: npt.NDArray[np.int32]
    bytes_live: int
    bytes_full: int
    bytes_peak: int
    bytes_released: int
    n_compactions: int
    t_score_ms: float
    t_compact_ms: float

    def __str__(self) -> str:
        low, mean, high = self.cells.min(), self.cells.mean(), self.cells.max()
        spread = f"{high}" if low == high else f"{low} to {high}, {mean:.1f} on average"
        return (
            f"{self.policy}: {spread} cells per head for {self.n_past} positions, "
            f"{self.bytes_live / 2**20:.1f} MiB live ({self.bytes_full / 2**20:.1f} MiB in stock llama.cpp), "
            f"{self.bytes_peak / 2**20:.1f} MiB at peak, {self.n_compactions} compactions, "
            f"the last in {self.t_score_ms + self.t_compact_ms:.0f} ms"
        )
