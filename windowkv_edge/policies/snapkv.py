"""SnapKV (arXiv 2404.14469): per kv head the tokens that the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import KVPolicy, Task, at_least

__all__ = ["SnapKV"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(KVPolicy):
    """Best tokens by max-pooled attention of the observation window.

    Args:
        alpha: observation window in tokens; it always stays.
        kernel: width of the max-pool in tokens, odd.
    """

    alpha: int = 32
    kernel: int = 7

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "arXiv 2404.14469"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("alpha", self.alpha, 1)
        at_least("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}, expected an odd number")

    @property
    def window(self) -> int:
        return self.alpha

    def native(self, task: Task = "localization") -> dict[str, Any]:
        return {"kind": 2, "alpha": self.alpha, "suffix": self.alpha, "kernel": self.kernel}
