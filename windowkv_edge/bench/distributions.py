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


def divergence(want: npt.NDArray[np.float64], got: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """KL divergence of distributions from those that are wanted, in nats: float64 [n], of :func:`log_softmax`."""
    seen = np.isfinite(want)  # tokens that a model masks have no share in it
    apart = np.subtract(want, got, out=np.zeros_like(want), where=seen)
    res: npt.NDArray[np.float64] = (np.exp(want) * apart).sum(axis=1)
    return res
