"""WindowKV (arXiv 2503.17922): windows of consecutive tokens compete as a whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from .base import KVPolicy, Task, at_least, number_of, one_of, share_of, true_or_false
from .parts import Accounting, Allocation, Scope, Scoring, Selection, Share

__all__ = ["WindowKV"]

Strategy = Literal["average", "max"]


@dataclass(frozen=True, kw_only=True)
class WindowKV(KVPolicy):
    """Keeps the semantic windows that the end of the prompt attends to most.

    The last ``window_size`` tokens observe; the tokens before them are cut into windows of ``omega`` tokens. A window
    scores the mean of all its tokens ("average") or of their better half ("max").

    Args:
        omega: tokens per semantic window (section 3.2).
        window_size: observation window in tokens (section 3.2; the paper's alpha).
        omega_aggregation: omega for aggregation tasks; None = omega.
        window_size_aggregation: window_size for aggregation tasks; None = window_size.
        recent_share: share of a layer's budget that the observation window may take, its last tokens first; 1.0 = as
            published, it always stays.
        carry: a token takes the best score of itself and of this many positions before it, whose cells may be gone; 0 =
            as published.
        token_share: after the windows, single tokens get this share of the budget (recent tokens left out); 0 = as
            published. Windows keep an answer whole, single tokens keep what the text goes on with. Needs
            ``scope="head"`` and ``gamma=1``.
        window_floor: cells of a head that windows get before single tokens get any.
        token_window_size: the last tokens whose attention scores single tokens.
        localization: "average" or "max", for tasks whose answer sits in one place (questions).
        aggregation: the same for tasks that need the whole text (summaries, few-shot, counting, code).
        task: which of the two; "auto" classifies the prompt's text (:mod:`windowkv_edge.task`).
        gamma: consecutive layers that share one set of indices (section 3.3); 1 = none share.
        share: whose scores choose for a group: its "first" layer, as published, or the "mean" over its layers.
        scope: "layer" = one set for all heads of a layer, as published; "head" = each kv head chooses its own.
        budget: "arithmetic" = falling over the groups (section 3.4), "flat" = equal.
        lam: lambda; the last group's budget is C * gamma / lam.
        accounting: "native" counts every cell that stays; "paper" repeats the authors' arithmetic: the observation
            window comes on top and clamping is not given back.
        protect_first: the first window always stays (it holds the attention sink).
        whole_windows: windows are dropped whole until the budget is met, as by the authors' code; False = the last one
            that does not fit keeps its best tokens, and the budget is spent exactly.
        query_heads: "mean" = a token's score is the mean over the query heads of a kv head; "each" = windows are scored
            in each query head and averaged, as by the authors' code, which differs for "max".
    """

    omega: int = 4
    window_size: int = 16
    omega_aggregation: int | None = None
    window_size_aggregation: int | None = None
    recent_share: float = 0.25
    carry: int = 7
    token_share: float = 0.0
    window_floor: int = 64
    token_window_size: int = 32
    localization: Strategy = "average"
    aggregation: Strategy = "average"
    task: Literal["localization", "aggregation", "auto"] = "auto"
    gamma: int = 1
    share: Share = "first"
    scope: Scope = "head"
    budget: Literal["arithmetic", "flat"] = "flat"
    lam: float = 14.0
    accounting: Accounting = "native"
    protect_first: bool = False
    whole_windows: bool = False
    query_heads: Literal["mean", "each"] = "mean"

    name: ClassVar[str] = "windowkv"
    paper: ClassVar[str] = "arXiv 2503.17922"
    keeps: ClassVar[str] = "per head the short passages that the prompt's end attends to"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("omega", "window_size", "gamma", "token_window_size"):
            at_least(field, getattr(self, field), 1)
        for field in ("omega_aggregation", "window_size_aggregation"):
            if getattr(self, field) is not None:
                at_least(field, getattr(self, field), 1)
        at_least("carry", self.carry, 0)
        at_least("window_floor", self.window_floor, 0)
        share_of("token_share", self.token_share)
        share_of("recent_share", self.recent_share, over_zero=True)
        one_of("localization", self.localization, ("average", "max"))
        one_of("aggregation", self.aggregation, ("average", "max"))
        one_of("task", self.task, ("localization", "aggregation", "auto"))
        one_of("share", self.share, ("first", "mean"))
        one_of("scope", self.scope, ("layer", "head"))
        one_of("budget", self.budget, ("arithmetic", "flat"))
        one_of("accounting", self.accounting, ("native", "paper"))
        one_of("query_heads", self.query_heads, ("mean", "each"))
        true_or_false("protect_first", self.protect_first)
        true_or_false("whole_windows", self.whole_windows)
        number_of("lam", self.lam, 0)
        if not self.lam > 0:
            raise ValueError(f"lam is {self.lam!r}, expected a positive number")
        if self.token_share > 0 and (self.scope != "head" or self.gamma != 1):
            got = f"got {self.scope!r} and {self.gamma}"
            raise ValueError(f"token_share={self.token_share} needs scope='head' and gamma=1, {got}")
        if self.token_share > 0 and self.whole_windows:
            raise ValueError("whole_windows=True leaves no cells for single tokens, expected token_share=0")
        if self.query_heads == "each" and (self.carry != 0 or self.share != "first" or self.token_share > 0):
            raise ValueError("query_heads='each' needs carry=0, share='first' and token_share=0")

    @classmethod
    def published(
        cls,
        model: Literal["qwen2.5-1.5b", "llama3-8b"] = "qwen2.5-1.5b",
        accounting: Accounting = "paper",
        **options: Any,
    ) -> WindowKV:
        """The paper's settings (section 4.1) for one of its two models.

        Args:
            model: which of them.
            accounting: "paper" keeps the cells of the authors' code: the observation window on top of the budget,
                windows whole, scored in every query head. "native" has the settings alone, under a budget that counts
                every cell.
            options: of the policy, in place of the paper's settings.

        Raises:
            ValueError: there is no such model, or an option is out of range or does not fit the others.
            TypeError: there is no such option.
        """
        one_of("model", model, ("qwen2.5-1.5b", "llama3-8b"))
        settings: dict[str, Any] = dict(
            localization="max", aggregation="average", share="first", scope="layer", budget="arithmetic", lam=14.0,
            recent_share=1.0, carry=0,
        )  # fmt: skip
        if model == "qwen2.5-1.5b":
            settings.update(omega=32, window_size=4, window_size_aggregation=16, gamma=7)
        else:
            settings.update(omega=8, omega_aggregation=16, window_size=16, window_size_aggregation=32, gamma=8)
        if accounting == "paper":
            settings.update(whole_windows=True, query_heads="each")
        return cls(accounting=accounting, **{**settings, **options})

    @property
    def needs_task(self) -> bool:  # type: ignore[override]
        return self.task == "auto" and self.parts("localization") != self.parts("aggregation")

    def _of_task(self, task: Task) -> tuple[Strategy, int, int]:
        """Strategy, omega and observation window."""
        if (task if self.task == "auto" else self.task) == "localization":
            return self.localization, self.omega, self.window_size
        return self.aggregation, self.omega_aggregation or self.omega, self.window_size_aggregation or self.window_size

    def scoring(self, task: Task = "localization") -> Scoring:
        return Scoring(
            window_size=self._of_task(task)[2],
            token_window_size=self.token_window_size if self.token_share > 0 else 0,
            pooling="carry",
            kernel_size=self.carry + 1,
            query_heads=self.query_heads,
        )

    def allocation(self) -> Allocation:
        falls = self.budget == "arithmetic"
        return replace(
            super().allocation(),
            layers=self.budget,
            lam=self.lam if falls else 0.0,
            accounting=self.accounting,
        )

    def selection(self, task: Task = "localization") -> Selection:
        strategy, omega, window_size = self._of_task(task)
        return Selection(
            kind="windows",
            n_recent=window_size,
            omega=omega,
            top_p=omega if strategy == "average" else max(1, omega // 2),
            gamma=self.gamma,
            share=self.share,
            scope=self.scope,
            protect_first=self.protect_first,
            whole_windows=self.whole_windows,
            recent_share=self.recent_share,
            token_share=self.token_share,
            window_floor=self.window_floor if self.token_share > 0 else 0,
        )
