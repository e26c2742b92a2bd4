"""KeyDiff, from the paper: equation of the anchor and of its cosine (section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        math.fsum(x * x for x in a) * math.fsum(y * y for y in b)
    )


def keydiff(keys: Array, n_cells: int) -> list[int]:
    """Which of the keys [cells, head_dim] stay, ascending; the last does."""
    rows = [[float(x) for x in row] for row in keys]
    lengths = [math.sqrt(math.fsum(x * x for x in row)) for row in rows]
    n = len(rows)
    anchor = [math.fsum(rows[i][d] / lengths[i] for i in range(n)) / n for d in range(len(rows[0]))]
    order = sorted(range(n), key=lambda i: (i < n - 1, cosine(rows[i], anchor), i))
    return sorted(order[:n_cells])
