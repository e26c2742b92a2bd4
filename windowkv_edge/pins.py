"""Positions whose cells stay in every compaction: those that were asked for, and a chat's system prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Pins", "Range", "n_pinned", "n_system", "system_text"]

Range = tuple[int, int]
"""Positions [start, stop)."""

_SLACK = 4096
"""Bytes that a template may put in front of a system prompt."""


def system_text(messages: Any) -> str:
    """What a chat's first message says, if it is the system's; "" if there is none."""
    first = messages[0] if isinstance(messages, (list, tuple)) and messages else {}
    if not isinstance(first, dict) or first.get("role") not in ("system", "developer"):
        return ""
    content = first.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content.strip() if isinstance(content, str) else ""


def n_system(text: str, tokens: Sequence[int], piece: Callable[[int], bytes]) -> int:
    """Tokens from a prompt's beginning to the end of a text that stands there; 0 if it does not.

    Args:
        text: not empty.
        tokens: the prompt.
        piece: bytes of a token.
    """
    want = text.encode()
    ends, got = [], b""
    for token in tokens:
        got += piece(token)
        ends.append(len(got))
        if len(got) > len(want) + _SLACK:
            break
    at = got.find(want)
    return 0 if at < 0 else next(i for i, end in enumerate(ends, 1) if end >= at + len(want))


class Pins:
    """What a session pins.

    Attributes:
        asked: ranges that were asked for.
        text: the system prompt of the last chat, "" without one.
        system: where it stands in the prompt, from the first position on; None if nowhere.
    """

    def __init__(self) -> None:
        self.asked: list[Range] = []
        self.text = ""
        self.system: Range | None = None
        self._has_warned = False

    def moved(self, close: Callable[[int], int]) -> None:
        """Positions moved; close: from where the end of a range was to where it is."""
        self.asked = [(close(start), close(stop)) for start, stop in self.asked]
        if self.system is not None:
            self.system = close(self.system[0]), close(self.system[1])

    def ranges(self, n_cells: int | None = None) -> list[Range]:
        """What stays with so many cells per head; None = any number. Where all of it takes more than half of them, the
        system prompt is not pinned, and a warning says so."""
        if self.system is None:
            return list(self.asked)
        res = [*self.asked, self.system]
        n = n_pinned(res)
        if n_cells is None or 2 * n <= n_cells:
            return res
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the system prompt is not pinned: with what else is, it would take {n} of {n_cells} cells per head; "
                "raise kv_budget (or kv_limit), or pass kv_pin_system=False to say that it may be evicted",
                stacklevel=2,
            )
        return list(self.asked)


def n_pinned(ranges: Sequence[Range]) -> int:
    """Positions in at least one of the ranges."""
    res = end = 0
    for start, stop in sorted(ranges):
        res += max(0, stop - max(start, end))
        end = max(end, stop)
    return res
