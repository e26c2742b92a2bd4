"""Attention over heads that hold their own cells, and what observed queries pay to each cell."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def flash_attn_ragged(
    q: npt.NDArray[np.float32],
    k: npt.NDArray[np.float32],
    v: npt.NDArray[np.float32],
    ranges: npt.NDArray[np.int32],
    layer: int,
    scale: float,
    softcap: float = 0.0,
    causal: bool = True,
    sinks: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float64]:
    """Attention of kv heads that each own a region of rows of a pool (ggml_flash_attn_ragged).

    Scaled dot-product attention (Vaswani et al. 2017, equation 1) with the soft cap of Gemma 2 and the sinks of
    gpt-oss: logits per query head that count in the sum of the softmax and have no value. Shapes in NumPy order.

    Args:
        q: [n_head, n_tokens, n_embd_k].
        k: [n_rows, n_embd_k], row = one cell of one kv head.
        v: [n_rows, n_embd_v].
        ranges: [n_layer, n_head_kv, 2], first row and cells; kv heads serve n_head / n_head_kv consecutive query heads.
        layer: plane of ranges.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logit / softcap); 0 is none.
        causal: query t sees the first cells - n_tokens + t + 1 cells of its kv head, otherwise all.
        sinks: [n_head].

    Returns:
        [n_tokens, n_head, n_embd_v], zeros where a query sees no cell.
    """
    n_head, n_tokens, _ = q.shape
    n_gqa = n_head // ranges.shape[1]
    res = np.zeros((n_tokens, n_head, v.shape[1]))
    for head in range(n_head):
        first, cells = (int(x) for x in ranges[layer, head // n_gqa])
        for t in range(n_tokens):
            visible = max(0, cells - n_tokens + t + 1) if causal else cells
            if visible == 0:
                continue
            rows = slice(first, first + visible)
            logits = k[rows].astype(np.float64) @ q[head, t].astype(np.float64) * scale
            if softcap:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits - logits.max())
            total = weights.sum() + (np.exp(sinks[head] - logits.max()) if sinks is not None else 0.0)
            res[t, head] = weights @ v[rows].astype(np.float64) / total
    return res


def weights(
    queries: npt.NDArray[np.float32],
    query_pos: npt.NDArray[np.int32],
    keys: npt.NDArray[np.float32],
    key_pos: npt.NDArray[np.int32],
    scale: float,
    sinks: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float64]:
    """Attention of observed queries over the cells of one kv head, each over those at its position and before.

    Args:
        queries: [n_gqa, observed, head_dim], the query heads that share this kv head.
        query_pos: [observed].
        keys: [cells, head_dim].
        key_pos: [cells], ascending.
        scale: factor on the logits, 1/sqrt(head_dim) for most models.
        sinks: [n_gqa], logits that count in the sum of the softmax and have no cell.

    Returns:
        [n_gqa, observed, cells].
    """
    logits = np.einsum("gqd,cd->gqc", queries.astype(np.float64), keys.astype(np.float64)) * scale
    logits = np.where(key_pos[None, None, :] <= query_pos[None, :, None], logits, -np.inf)
    most = logits.max(axis=2, keepdims=True)
    res = np.exp(logits - most)
    beside = 0.0 if sinks is None else np.exp(sinks.astype(np.float64)[:, None, None] - most)
    return np.asarray(res / (res.sum(axis=2, keepdims=True) + beside))


def observe(
    queries: npt.NDArray[np.float32],
    query_pos: npt.NDArray[np.int32],
    keys: npt.NDArray[np.float32],
    key_pos: npt.NDArray[np.int32],
    scale: float,
) -> npt.NDArray[np.float64]:
    """Mean of :func:`weights` over queries and query heads (WindowKV section 3.2, SnapKV section 3): [cells]."""
    return np.asarray(weights(queries, query_pos, keys, key_pos, scale).mean(axis=(0, 1)))
