"""Positions whose cells stay in every compaction: those that were asked for, and a chat's system prompt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Pins", "Range", "message_text", "n_pinned", "n_system", "system_text"]

Range = tuple[int, int]
"""Positions [start, stop)."""

_SLACK = 4096
"""Bytes that a template may put in front of a system prompt."""


def system_text(messages: Any) -> str:
    """What a chat's first message says, if it is the system's; "" if there is none."""
    first = messages[0] if isinstance(messages, (list, tuple)) and messages else {}
    if not isinstance(first, dict) or first.get("role") not in ("system", "developer"):
        return ""
    return message_text(first)


def message_text(message: dict[Any, Any]) -> str:
    """The text of a chat's message, without blanks around it; templates strip them, too."""
    content = message.get("content")
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
    """

    def __init__(self) -> None:
        self.asked: list[Range] = []
        self.text = ""
        self._system: Range | None = None
        self._is_too_long = False
        self._has_warned = False

    @property
    def system(self) -> Range | None:
        """Where the system prompt stands in the prompt, from the first position on; None if nowhere."""
        return self._system

    @system.setter
    def system(self, system: Range | None) -> None:
        if system != self._system:
            self._is_too_long = False
        self._system = system

    def ranges(self) -> list[Range]:
        """What is pinned: what was asked for, and the system prompt unless the last compaction found it too long."""
        return [*self.asked, *([self._system] if self._system and not self._is_too_long else [])]

    def moved(self, close: Callable[[int], int]) -> None:
        """Positions moved; close: from where the end of a range was to where it is."""
        moved = [(close(start), close(stop)) for start, stop in self.asked]
        self.asked = [(start, stop) for start, stop in moved if start < stop]
        if self._system is not None:
            self._system = close(self._system[0]), close(self._system[1])

    def n_free(self, n_cells: int, n_past: int) -> int:
        """Of n_cells cells per head those that a compaction chooses, at least 1, where n_past positions are there."""

        def pinned(ranges: Sequence[Range]) -> int:
            return n_pinned([(start, min(stop, n_past)) for start, stop in ranges])

        system = [] if self._system is None else [self._system]
        is_too_long = 2 * n_pinned([*self.asked, *system]) > n_cells
        return max(1, n_cells - pinned([*self.asked, *([] if is_too_long else system)]))

    def for_compaction(self, n_cells: int, n_within: int | None = None) -> list[Range]:
        """What stays in a compaction. Where all of it takes more than half of the cells, the system prompt is not
        pinned, and a warning says so.

        Args:
            n_cells: cells per head that stay.
            n_within: while a prompt is read within a bound, the cells per head that are sure to stay when it was read:
                what a compaction on the way leaves is no reason to lose the system prompt, or to pin one that would be
                lost at the end.
        """
        if self._system is None:
            return list(self.asked)
        n, n_of = n_pinned([*self.asked, self._system]), n_cells if n_within is None else n_within
        self._is_too_long = 2 * n > n_of
        if self._is_too_long and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the system prompt is not pinned: with what else is, it would take {n} of {n_of} cells per head; "
                "raise kv_budget (or kv_limit), or pass kv_pin_system=False to say that it may be evicted",
                stacklevel=2,
            )
        return self.ranges()


def n_pinned(ranges: Sequence[Range]) -> int:
    """Positions in at least one of the ranges."""
    res = end = 0
    for start, stop in sorted(ranges):
        res += max(0, stop - max(start, end))
        end = max(end, stop)
    return res
