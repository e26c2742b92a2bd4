"""What a budget means: cells per (layer, kv head) on average, observation window included."""

from __future__ import annotations

import math

__all__ = ["check_budget", "n_cells"]


def check_budget(budget: float | int) -> float | int:
    """Return a valid budget, raise TypeError or ValueError otherwise.

    A float in (0, 1] is a fraction of the positions seen, an int >= 1 counts cells.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(
            f"kv_budget is {budget!r}, expected a fraction of the prompt (0.12) or a number of cells per head (512)"
        )
    if isinstance(budget, int) and budget < 1:
        raise ValueError(f"kv_budget is {budget} cells, expected at least 1")
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise ValueError(f"kv_budget is {budget}, expected a fraction over 0 and up to 1.0, or an int for cells")
    return budget


def n_cells(budget: float | int, n_past: int) -> int:
    """Cells per (layer, kv head) for a sequence of n_past positions: floor(fraction * n_past), at least 1.

    Products that miss an integer by rounding only (0.29 * 100) count as that integer.
    """
    return budget if isinstance(budget, int) else max(1, math.floor(budget * n_past + 1e-6))
