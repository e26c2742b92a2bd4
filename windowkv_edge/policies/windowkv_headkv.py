"""WindowKV's windows inside HeadKV's budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..heads import Kind
from .headkv import ByImportance
from .windowkv import WindowKV

__all__ = ["WindowHeadKV"]


@dataclass(frozen=True, kw_only=True)
class WindowHeadKV(ByImportance, WindowKV):
    """Window selection (:class:`WindowKV`) inside every head, with budgets by importance (:class:`ByImportance`).

    Takes the arguments of both; ``scope`` is "head" and budgets follow importance, so that ``scope``, ``budget``,
    ``accounting`` and ``whole_windows`` keep their defaults.
    """

    kind: Kind = "r2"

    name: ClassVar[str] = "windowkv+headkv"
    paper: ClassVar[str] = "arXiv 2503.17922 and 2410.19258"
    keeps: ClassVar[str] = "as WindowKV, and heads that retrieve answers keep more (needs head scores of the model)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "head" or self.budget != "flat" or self.accounting != "native" or self.whole_windows:
            raise ValueError(
                "windowkv+headkv needs scope='head', budget='flat', accounting='native' and whole_windows=False"
            )
