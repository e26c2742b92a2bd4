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
