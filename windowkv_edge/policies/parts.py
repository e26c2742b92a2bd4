"""What a native policy is composed of: a scoring, an allocation and a selection.

Fields, choices and defaults are those of the structs in ``windowkv-policy.h``: a choice such as ``layers="pyramid"`` is
``WKV_LAYERS_PYRAMID`` there. What a choice does not use stays at its default; the native code refuses anything else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Accounting", "Across", "Allocation", "Parts", "Scope", "Scoring", "Selection", "Share"]

Accounting = Literal["native", "paper"]
Across = Literal["layer", "model"]
Scope = Literal["layer", "head"]
Share = Literal["first", "mean"]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Who observes, and how scores are pooled. A score is the mean attention of the observing tokens to a cell.

    Args:
        window_size: the observation window: the last tokens, which score the others; 0 = positions alone decide.
        token_window_size: a second observation window, whose scores choose single tokens beside windows; 0 = none.
        pooling: max-pooling of the scores before the observation window. "max" = centred (SnapKV), "carry" = a token
            takes the best score of itself and of the positions before it.
        kernel_size: tokens that pooling spans, for "carry" positions, 1 = none; odd for "max". 0 where positions alone
            decide.
        query_heads: what is scored where several query heads share a kv head: their "mean", or "each" by itself;
            windows are then scored in each and averaged (WindowKV's code).
        reduce: what the attention weights of a cell become, over the observing tokens and the query heads: their
            "mean"; the largest of weight times cells that the query sees, "max" (CORM); or their "sum" over the tokens
            of the whole sequence, which stays with the cell in compactions (H2O). These two are of kind "best".
            "replay" = the largest one of tokens that repeat the cell's (KVzip); nobody else observes then.
    """

    window_size: int = 0
    token_window_size: int = 0
    pooling: Literal["max", "carry"] = "max"
    kernel_size: int = 0
    query_heads: Literal["mean", "each"] = "mean"
    reduce: Literal["mean", "max", "sum", "replay"] = "mean"

    @property
    def n_observed(self) -> int:
        """Tokens whose queries are needed."""
        return max(self.window_size, self.token_window_size)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How layers and heads divide the cells; C is the mean budget of a (layer, kv head).

    Args:
        layers: "flat" = C for every layer, "pyramid" = falling to C/beta at the last layer (PyramidKV), "arithmetic" =
            falling over groups of gamma layers to C*gamma/lam (WindowKV).
        heads: "equal", by "importance" (HeadKV), or competing by "score" (AdaKV).
        across: heads that compete: those of a "layer", or all of the "model".
        accounting: "native" = every cell counts and the mean is exact; "paper" = rounded and cut as by the authors.
        lam: WindowKV's lambda.
        beta: PyramidKV's beta, or HeadKV's: 1/beta of all cells is divided by importance; 0 = nothing is.
        alpha_safeguard: AdaKV's: the share of its budget that every competing head is sure of; compacted again, of what
            it would hold had it lost nothing, as far as it still has so many.
        importance_floor: cells of each head that are not divided by importance.
        importance: float64 [n_layer, n_head_kv], at least 0, of any scale; where beta divides by it.
    """

    layers: Literal["flat", "pyramid", "arithmetic"] = "flat"
    heads: Literal["equal", "importance", "score"] = "equal"
    across: Across = "layer"
    accounting: Accounting = "native"
    lam: float = 0.0
    beta: float = 0.0
    alpha_safeguard: float = 0.0
    importance_floor: int = 0
    importance: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What stays of a head, given its budget.

    Args:
        kind: "full" = every cell, "recent" = the first and the newest tokens (StreamingLLM), "tokens" = the newest and
            the best ones (SnapKV), "windows" = windows of consecutive tokens (WindowKV), "best" = the newest and of all
            others, observing ones too, the best ones (H2O, CORM).
        n_sink: of "recent", the first tokens that always stay.
        n_recent: of "tokens" and "windows", the newest tokens that always stay, at most the observation window; of
            "best" any number.
        omega: tokens per window; this and all below are of "windows", but recent_share of "best" as well.
        top_p: a window scores the mean of its top_p best tokens.
        gamma: consecutive layers that share one set of indices.
        share: whose scores choose for such a group: its "first" layer's, or the "mean" over its layers.
        scope: heads that hold the same windows: all of a "layer", or each "head" its own.
        protect_first: the first window always stays.
        whole_windows: windows are dropped whole, so that a layer holds up to omega - 1 cells more than its budget or
            fewer; otherwise the last one keeps its best tokens.
        recent_share: n_recent takes at most this share of a budget; of "best", the newest tokens take this share in
            place of n_recent, 0 = n_recent.
        token_share: of the rest single tokens take this share.
        window_floor: with token_share, cells that windows get before single tokens get any.
    """

    kind: Literal["full", "recent", "tokens", "windows", "best"]
    n_sink: int = 0
    n_recent: int = 0
    omega: int = 0
    top_p: int = 0
    gamma: int = 0
    share: Share = "first"
    scope: Scope = "layer"
    protect_first: bool = False
    whole_windows: bool = False
    recent_share: float = 0.0
    token_share: float = 0.0
    window_floor: int = 0


class Parts(NamedTuple):
    """A native policy for one task.

    Attributes:
        scoring, allocation, selection: its parts.
        replay_share: of the cells that stay, the share that scores by replay choose among those that these leave,
            whichever heads hold them, 0 to under 1; 0 = none.
    """

    scoring: Scoring
    allocation: Allocation
    selection: Selection
    replay_share: float = 0.0

    def observed_by(self, n: int) -> Parts:
        """The same with observation windows of the last n tokens at most, n >= 1."""
        own = self.scoring
        sizes = {name: min(n, getattr(own, name)) for name in ("window_size", "token_window_size")}
        n_recent = self.selection.n_recent if own.window_size == 0 else min(n, self.selection.n_recent)
        return self._replace(scoring=replace(own, **sizes), selection=replace(self.selection, n_recent=n_recent))
