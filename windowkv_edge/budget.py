"""What a budget means: cells per (layer, kv head) on average, observation window included."""

from __future__ import annotations

import math
import warnings
from typing import Any

import gguf
import numpy as np

__all__ = ["TYPES", "bits", "check_budget", "is_same", "n_cells", "plain"]

FEW_CELLS = 16
"""A whole number below this is more likely to be meant as a share: observation windows alone are larger."""

TYPES = {name: int(gguf.GGMLQuantizationType[name.upper()]) for name in ("f32", "f16", "bf16", "q8_0", "q4_0")}
"""Cells of K and V by the names of llama.cpp."""


def bits(*cells: str) -> float:
    """Bits of a value, scales of its block included; the mean over several types."""
    sizes = [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(TYPES[name])] for name in cells]
    return sum(8 * size / values for values, size in sizes) / len(sizes)


def plain(value: Any) -> Any:
    """A scalar of NumPy, or an array of one, as the Python object of its value: all are checked and stored alike."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0 else value


def check_budget(budget: float | int) -> float | int:
    """Return a valid budget: a float in (0, 1] is a fraction of the positions seen, an int >= 1 counts cells.

    Numbers of NumPy come back as Python's. Warns of fewer than 16 cells.

    Raises:
        TypeError: neither an int nor a float.
        ValueError: out of range.
    """
    budget = plain(budget)
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(
            f"kv_budget is {budget!r}, expected a fraction of the prompt (0.12) or a number of cells per head (512)"
        )
    if isinstance(budget, int) and not 1 <= budget < 2**31:
        raise ValueError(f"kv_budget is {budget} cells, expected at least 1 and less than 2^31")
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise ValueError(f"kv_budget is {budget}, expected a fraction over 0 and up to 1.0, or an int for cells")
    if isinstance(budget, int) and budget < FEW_CELLS:
        warnings.warn(
            f"kv_budget={budget} keeps {budget} cell{'s' * (budget > 1)} per head, whatever the prompt; an int counts "
            "cells, a float is a fraction: 1.0 keeps all of them, 0.12 keeps 12 %",
            stacklevel=3,
        )
    return budget


def is_same(budget: float | int, other: float | int) -> bool:
    """Whether two budgets mean the same: 1 is a cell, 1.0 all of them."""
    return (type(budget), budget) == (type(other), other)


def n_cells(budget: float | int, n_past: int, *cells: str) -> int:
    """Cells per (layer, kv head) for a sequence of n_past positions: floor(fraction * n_past), at least 1.

    Products that miss an integer by rounding only (0.29 * 100) count as that integer.

    Args:
        budget: a fraction, or a number of cells.
        n_past: positions.
        cells: types of the K and V cells. If they are given, a fraction is a share of the bytes that f16 cells of all
            positions take, so that there are more of smaller cells; if not, it is a share of the positions.
    """
    if isinstance(budget, int):
        return budget
    return max(1, math.floor(min(1.0, budget * (16 / bits(*cells) if cells else 1)) * n_past + 1e-6))
