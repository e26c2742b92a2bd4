"""SnapKV (arXiv 2404.14469): per kv head the tokens that the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .base import KVPolicy, Task, at_least, one_of
from .parts import Accounting, Allocation, Scoring, Selection

__all__ = ["SnapKV"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(KVPolicy):
    """Keeps the tokens with the most max-pooled attention of the observation window.

    Args:
        window_size: observation window in tokens; it always stays.
        kernel_size: width of the max-pool in tokens, odd.
        accounting: "native" spends the budget exactly; "paper" rounds and cuts as the authors' code does.
    """

    window_size: int = 32
    kernel_size: int = 7
    accounting: Accounting = "native"

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "arXiv 2404.14469"
    keeps: ClassVar[str] = "per head the tokens that the prompt's end attends to, and their neighbours"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("window_size", self.window_size, 1)
        at_least("kernel_size", self.kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}, expected an odd number")
        one_of("accounting", self.accounting, ("native", "paper"))

    @classmethod
    def published(cls, **options: Any) -> SnapKV:
        """The policy that keeps the cells of its authors' code, totals included; the options are the policy's own.

        Raises:
            ValueError: an option is out of range, or does not fit ``accounting="paper"``.
            TypeError: there is no such option, or it is ``accounting``.
        """
        return cls(accounting="paper", **options)

    def scoring(self, task: Task = "localization") -> Scoring:
        return Scoring(window_size=self.window_size, kernel_size=self.kernel_size)

    def allocation(self) -> Allocation:
        return replace(super().allocation(), accounting=self.accounting)

    def selection(self, task: Task = "localization") -> Selection:
        return Selection(kind="tokens", n_recent=self.window_size)
