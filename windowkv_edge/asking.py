"""What a prompt asks: of a chat its last user message, which observes the rest while that is read within a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from .pins import Range, message_text

__all__ = ["asked_text", "find_asked"]

_N_TEXT = 2048
"""Bytes of a message that are looked for: its end."""

_N_LEAST = 4
"""Bytes of a message that is looked for: shorter ones may stand in the template's own words."""

_N_BEHIND = 256
"""Bytes that a template may put behind the last message, such as the beginning of the answer."""


def asked_text(messages: Any) -> str:
    """What a chat's last user message says; "" if there is none."""
    for message in reversed(messages) if isinstance(messages, (list, tuple)) else ():
        if isinstance(message, dict) and message.get("role") == "user":
            return message_text(message)
    return ""


def find_asked(text: str, tokens: Sequence[int], piece: Callable[[int], bytes]) -> Range | None:
    """Where a text stands at the end of a prompt, [start, stop) in tokens, None if it does not; of a long text only the
    end is found.

    Args:
        text: not empty.
        tokens: the prompt.
        piece: bytes of a token.
    """
    want = text.encode()[-_N_TEXT:]
    if len(want) < _N_LEAST:
        return None
    pieces: list[bytes] = []
    n = 0
    for token in reversed(tokens):
        pieces.append(piece(token))
        n += len(pieces[-1])
        if n > len(want) + _N_BEHIND:
            break
    pieces.reverse()
    at = b"".join(pieces).rfind(want)
    if at < 0 or n - at - len(want) > _N_BEHIND:
        return None
    ends = list(accumulate(len(own) for own in pieces))
    first = len(tokens) - len(pieces)
    start = next(i for i, end in enumerate(ends) if end > at)
    stop = next(i for i, end in enumerate(ends, 1) if end >= at + len(want))
    return first + start, first + stop
