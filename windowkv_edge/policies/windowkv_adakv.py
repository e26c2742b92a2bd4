"""Windows of consecutive tokens (WindowKV) that compete across the heads of a layer (AdaKV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .adakv import ByScore
from .windowkv import WindowKV

__all__ = ["WindowAdaKV"]


@dataclass(frozen=True, kw_only=True)
class WindowAdaKV(ByScore, WindowKV):
    """Window selection (:class:`WindowKV`) whose heads share their layer's budget by score (:class:`ByScore`): a head
    that looks at many windows holds more of them. Needs no head scores of the model.

    Takes the arguments of both; ``scope`` is "head" and every cell counts, so that ``scope``, ``accounting`` and
    ``whole_windows`` keep their defaults.
    """

    name: ClassVar[str] = "windowkv+adakv"
    paper: ClassVar[str] = "arXiv 2503.17922 and 2407.11550"
    keeps: ClassVar[str] = "as WindowKV, and heads whose passages score higher keep more of them"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "head" or self.accounting != "native" or self.whole_windows:
            raise ValueError(f"{self.name} needs scope='head', accounting='native' and whole_windows=False")
        if self.across == "model" and self.budget != "flat":
            raise ValueError(f"{self.name} with across='model' needs budget='flat': scores decide what layers hold")
