"""Next-token distributions, and how far one is from another."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["divergence", "log_softmax"]


def log_softmax(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Natural logarithms of probabilities: float64 [n, n_vocab], as the logits."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def divergence(
    want: npt.NDArray[np.floating[Any]], got: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.float64]:
    """KL divergence of distributions from those that are wanted, in nats: float64 [n], of logits [n, n_vocab]."""
    p, q = log_softmax(want), log_softmax(got)
    seen = np.isfinite(p)  # tokens that a model masks have no share in it
    res: npt.NDArray[np.float64] = (np.exp(p) * np.subtract(p, q, out=np.zeros_like(p), where=seen)).sum(axis=1)
    return res
