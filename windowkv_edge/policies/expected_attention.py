"""ExpectedAttention (arXiv 2510.00636) in NumPy: what future queries are expected to attend to.

A baseline, and an example of a policy that selects in Python. It is good at free text and bad at finding facts,
because it does not look at the question.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from .base import CacheView, KVPolicy, Positions, Scores, at_least, number_of, true_or_false

if TYPE_CHECKING:
    from ..heads import ModelHeads

__all__ = ["ExpectedAttention"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(KVPolicy):
    """Keeps in each kv head the cells with the largest product of expected attention and norm of the value.

    The queries of the prompt's end are taken as normally distributed. They are turned back to position 0, and from
    there by the mean rotation of the next positions; m and C are their mean and covariance then. A key k gets weight
    ``exp(m k / sqrt(d) + k C k / (2 d))`` (section 3.2), normalised over the cells, mean over the query heads.

    Args:
        freq_base: of the model's RoPE; None = ``rope.freq_base`` of its metadata, or 10,000.
        neox: RoPE pairs the halves of a head (Qwen, Gemma, Phi), not neighbours (Llama); None = neighbours, for models
            of the architecture "llama" only.
        n_observed: queries of the prompt's end that are observed.
        n_future: positions ahead over which the rotation is averaged.
        n_sink: first cells that always stay.
    """

    freq_base: float | None = None
    neox: bool | None = None
    n_observed: int = 512
    n_future: int = 512
    n_sink: int = 4

    name: ClassVar[str] = "expected-attention"
    paper: ClassVar[str] = "arXiv 2510.00636"
    keeps: ClassVar[str] = "per head the tokens that later queries are expected to attend to"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_observed", self.n_observed, 2)
        at_least("n_future", self.n_future, 1)
        at_least("n_sink", self.n_sink, 0)
        if self.neox is not None:
            true_or_false("neox", self.neox)
        if self.freq_base is not None:
            number_of("freq_base", self.freq_base, 1)

    def bind(self, model: ModelHeads) -> KVPolicy:
        """The policy for one model: what the arguments leave open about RoPE comes from its metadata.

        Raises:
            ValueError: the metadata do not say how RoPE pairs dimensions.
        """
        arch = model.metadata.get("general.architecture", "")
        if self.neox is None and arch != "llama":
            raise ValueError(
                f"{self.name}: how RoPE pairs dimensions is known for the architecture 'llama', not for {arch!r}; "
                "give neox=True (halves) or neox=False (neighbours)"
            )
        base = float(model.metadata.get(f"{arch}.rope.freq_base", 10000.0))
        return replace(self, freq_base=self.freq_base or base, neox=bool(self.neox))

    def check_cells(self, cell_types: tuple[str, str]) -> None:
        if not set(cell_types) <= {"f32", "f16", "bf16"}:
            raise ValueError(f"{self.name} needs cells that are not rotated, got {cell_types}; use f16 cells")

    def select(self, scores: Scores, budget: int, ctx: CacheView) -> Positions:
        self.check_cells(ctx.cell_types)
        return [[self._best(budget, layer, head, ctx) for head in range(ctx.n_head_kv)] for layer in range(ctx.n_layer)]

    def _best(self, budget: int, layer: int, head: int, ctx: CacheView) -> npt.NDArray[np.int32]:
        positions = ctx.positions[layer][head]
        keys = ctx.keys(layer, head).astype(np.float64)
        heads = range(head * ctx.n_gqa, (head + 1) * ctx.n_gqa)
        weight = np.mean([self._expected(keys, *ctx.queries(layer, g), ctx.n_past) for g in heads], axis=0)
        value = weight * np.linalg.norm(ctx.values(layer, head), axis=1)
        value[: self.n_sink] = np.finfo(np.float64).max
        value[-1] = np.inf  # the next token follows it: before the sinks, where the budget is smaller than they are
        return np.sort(positions[np.argsort(-value, kind="stable")[:budget]])

    def _expected(self, keys: Array, at: npt.NDArray[np.int32], queries: npt.NDArray[np.float32], n_past: int) -> Array:
        d = keys.shape[1]
        origin = self._turn(queries.astype(np.float64), -at.astype(np.float64))
        mean, covariance = origin.mean(axis=0), np.cov(origin, rowvar=False)
        rotation = self._mean_rotation(d, n_past + np.arange(self.n_future, dtype=np.float64))
        mean, covariance = rotation @ mean, rotation @ covariance @ rotation.T
        logits = keys @ mean / np.sqrt(d) + ((keys @ covariance) * keys).sum(axis=1) / (2 * d)
        weight = np.exp(logits - logits.max())
        return np.asarray(weight / weight.sum())

    def _pairs(self, d: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Dimensions that RoPE turns together."""
        i = np.arange(d // 2)
        return (i, i + d // 2) if self.neox else (2 * i, 2 * i + 1)

    def _angles(self, d: int, positions: Array) -> Array:
        return positions[:, None] * (self.freq_base or 10000.0) ** (-2.0 * np.arange(d // 2) / d)

    def _turn(self, rows: Array, positions: Array) -> Array:
        """Rows [n, d] turned by RoPE at their positions."""
        a, b = self._pairs(rows.shape[1])
        angle = self._angles(rows.shape[1], positions)
        res = np.empty_like(rows)
        res[:, a] = rows[:, a] * np.cos(angle) - rows[:, b] * np.sin(angle)
        res[:, b] = rows[:, a] * np.sin(angle) + rows[:, b] * np.cos(angle)
        return res

    def _mean_rotation(self, d: int, positions: Array) -> Array:
        """Mean of RoPE's matrices over positions."""
        a, b = self._pairs(d)
        angle = self._angles(d, positions)
        cos, sin = np.cos(angle).mean(axis=0), np.sin(angle).mean(axis=0)
        res = np.zeros((d, d))
        res[a, a], res[a, b], res[b, a], res[b, b] = cos, -sin, sin, cos
        return res
