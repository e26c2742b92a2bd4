"""WindowKV (arXiv 2503.17922): windows of consecutive tokens compete as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .base import KVPolicy, Task, at_least, one_of

__all__ = ["WindowKV"]

Strategy = Literal["average", "max"]


@dataclass(frozen=True, kw_only=True)
class WindowKV(KVPolicy):
    """Keeps the windows that the end of the prompt attends to most.

    The last ``alpha`` tokens observe; the tokens before them are cut into windows of ``omega`` tokens. A window scores
    the mean of its best tokens: all of them ("average") or the better half ("max").

    Args:
        omega: tokens per window (section 3.2).
        alpha: observation window in tokens (section 3.2).
        omega_aggregation: omega for aggregation tasks; None = omega.
        alpha_aggregation: alpha for aggregation tasks; None = alpha.
        suffix: share of a layer's budget that the observation window may take, its last tokens first; 1.0 = as
            published, it always stays.
        carry: a token's score carries over to this many tokens behind it; 0 = as published.
        tokens: after the windows, single tokens get this share of the budget (the suffix left out); 0 = as published.
            Windows keep an answer whole, tokens what the text attends to. Needs ``scope="head"`` and ``gamma=1``.
        window_floor: cells of a head that windows get before single tokens get any.
        token_alpha: the last tokens whose attention scores single tokens.
        localization: strategy for tasks whose answer sits in one place (questions).
        aggregation: strategy for tasks that need the whole text (summaries, few-shot, counting, code).
        task: which of the two; "auto" classifies the prompt's text (:mod:`windowkv_edge.task`).
        gamma: consecutive layers that share one set of indices (section 3.3); 1 = none share.
        share: whose scores choose for a group: its "first" layer, as published, or the "mean" over its layers.
        scope: "layer" = one set for all heads of a layer, as published; "head" = each kv head chooses its own.
        budget: "arithmetic" = falling over the groups (section 3.4), "flat" = equal.
        lam: lambda; the last group's budget is C * gamma / lam.
        accounting: "native" counts every cell that stays; "paper" repeats the authors' arithmetic: the observation
            window comes on top and clamping is not given back.
        protect_first: the first window always stays (it holds the attention sink).
    """

    omega: int = 4
    alpha: int = 16
    omega_aggregation: int | None = None
    alpha_aggregation: int | None = None
    suffix: float = 0.25
    carry: int = 7
    tokens: float = 0.0
    window_floor: int = 64
    token_alpha: int = 32
    localization: Strategy = "average"
    aggregation: Strategy = "average"
    task: Literal["localization", "aggregation", "auto"] = "auto"
    gamma: int = 1
    share: Literal["first", "mean"] = "first"
    scope: Literal["layer", "head"] = "head"
    budget: Literal["arithmetic", "flat"] = "flat"
    lam: float = 14.0
    accounting: Literal["native", "paper"] = "native"
    protect_first: bool = False

    name: ClassVar[str] = "windowkv"
    paper: ClassVar[str] = "arXiv 2503.17922"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("omega", "alpha", "gamma"):
            at_least(field, getattr(self, field), 1)
        for field in ("omega_aggregation", "alpha_aggregation"):
            if getattr(self, field) is not None:
                at_least(field, getattr(self, field), 1)
        at_least("carry", self.carry, 0)
        at_least("window_floor", self.window_floor, 0)
        at_least("token_alpha", self.token_alpha, 1)
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, (int, float)) or not 0 <= self.tokens <= 1:
            raise ValueError(f"tokens is {self.tokens!r}, expected a share of 0 to 1")
        if self.tokens > 0 and (self.scope != "head" or self.gamma != 1):
            got = f"got {self.scope!r} and {self.gamma}"
            raise ValueError(f"tokens={self.tokens} needs scope='head' and gamma=1, {got}")
        if not 0 < self.suffix <= 1:
            raise ValueError(f"suffix is {self.suffix!r}, expected a share over 0 and up to 1")
        one_of("localization", self.localization, ("average", "max"))
        one_of("aggregation", self.aggregation, ("average", "max"))
        one_of("task", self.task, ("localization", "aggregation", "auto"))
        one_of("share", self.share, ("first", "mean"))
        one_of("scope", self.scope, ("layer", "head"))
        one_of("budget", self.budget, ("arithmetic", "flat"))
        one_of("accounting", self.accounting, ("native", "paper"))
        if not self.lam > 0:
            raise ValueError(f"lam is {self.lam!r}, expected a positive number")

    @classmethod
    def published(cls, model: Literal["qwen2.5-1.5b", "llama3-8b"] = "qwen2.5-1.5b") -> WindowKV:
        """The paper's settings (section 4.1) for one of its two models."""
        one_of("model", model, ("qwen2.5-1.5b", "llama3-8b"))
        common = dict(
            localization="max", aggregation="average", share="first", scope="layer", budget="arithmetic", lam=14.0,
            suffix=1.0, carry=0,
        )  # fmt: skip
        if model == "qwen2.5-1.5b":
            return cls(omega=32, alpha=4, alpha_aggregation=16, gamma=7, **common)  # type: ignore[arg-type]
        return cls(omega=8, omega_aggregation=16, alpha=16, alpha_aggregation=32, gamma=8, **common)  # type: ignore[arg-type]

    @property
    def needs_task(self) -> bool:  # type: ignore[override]
        return self.task == "auto" and self._fields("localization") != self._fields("aggregation")

    @property
    def window(self) -> int:
        return max(self.alpha, self.alpha_aggregation or 0, self.token_alpha if self.tokens > 0 else 0)

    def _fields(self, task: Task) -> dict[str, float]:
        if task == "localization":
            strategy, omega, alpha = self.localization, self.omega, self.alpha
        else:
            strategy = self.aggregation
            omega, alpha = self.omega_aggregation or self.omega, self.alpha_aggregation or self.alpha
        return {
            "alpha": alpha,
            "suffix": alpha,
            "omega": omega,
            "top_p": omega if strategy == "average" else max(1, omega // 2),
        }

    def native(self, task: Task = "localization") -> dict[str, Any]:
        return {
            "kind": 4,
            **self._fields(task if self.task == "auto" else self.task),
            "gamma": self.gamma,
            "share": ("first", "mean").index(self.share),
            "scope": ("layer", "head").index(self.scope),
            "shape": ("flat", "arithmetic").index(self.budget),
            "slope": self.lam,
            "accounting": ("native", "paper").index(self.accounting),
            "protect_first": int(self.protect_first),
            "carry": self.carry,
            "tokens": self.tokens,
            "window_floor": self.window_floor,
            "token_alpha": self.token_alpha,
            "suffix_share": self.suffix,
        }
