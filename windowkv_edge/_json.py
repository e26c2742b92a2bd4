"""JSON that others wrote, checked as a whole before anything uses it; and JSON that others can read."""

from __future__ import annotations

import json
import math
import os
import re
from itertools import chain, count
from pathlib import Path
from typing import Any

from ._files import open_regular
from .errors import FormatError, WindowKVError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "dumps", "loads", "read_bytes", "shown"]

MAX_BYTES = 16 << 20
"""Of one JSON text: the largest file of head scores in use takes 6 MiB, a line of LongBench 1 MiB."""

MAX_DEPTH = 32

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_bytes(path: str | os.PathLike[str], max_bytes: int, error: type[WindowKVError] = FormatError) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        FormatError, or the class given: it is larger than max_bytes, or the path is none.
    """
    try:
        opened = open_regular(path)
    except ValueError as fault:  # a path with a zero byte, or of halves of characters
        raise error(f"{os.fspath(path)!r} is no path: {fault}") from None
    with opened as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes > max_bytes:
            raise error(f"{Path(path)}: {n_bytes:,} bytes, expected at most {max_bytes:,}")
        return file.read(n_bytes)  # a file that grows meanwhile cannot go beyond the bound


def loads(text: str | bytes, what: str, error: type[WindowKVError] = FormatError) -> Any:
    """The value of a JSON text.

    Numbers are finite and integers fit into 64 bits, text can be encoded, objects hold every key once, and nothing is
    nested more than :data:`MAX_DEPTH` deep.

    Args:
        text: at most :data:`MAX_BYTES` long; bytes are UTF-8, with or without a byte order mark.
        what: begins the message: the place (file and line) and what the text is not.
        error: class of the error.

    Raises:
        FormatError, or the class given.
    """
    if len(text) > MAX_BYTES:
        raise error(f"{what}: {len(text):,} characters, expected at most {MAX_BYTES:,}")
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded.removeprefix("\ufeff"), object_pairs_hook=_object, parse_constant=_constant)
        _check(value)
    except RecursionError:
        raise error(f"{what}: it is nested too deeply, expected at most {MAX_DEPTH} levels") from None
    except ValueError as fault:  # also numbers of more than 4,300 digits, and what is not UTF-8
        raise error(f"{what}: {fault}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    res = dict(pairs)
    if len(res) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} twice in one object")
    return res


def _constant(name: str) -> None:
    raise ValueError(f"the number {name}, expected finite ones")


def _check(value: Any) -> None:
    """Level by level, as the text may hold millions of values."""
    level = [value]
    for depth in count(1):
        for item in level:
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number beyond float64, expected finite ones")
            if isinstance(item, int) and not -(2**63) <= item < 2**64:
                raise ValueError("an integer beyond 64 bits")
            if isinstance(item, str) and _SURROGATE.search(item):
                raise ValueError(f"half of a character (a lone surrogate) in {shown(item)}")
        boxes = [item for item in level if isinstance(item, (dict, list))]
        if not boxes:
            return
        if depth > MAX_DEPTH:
            raise RecursionError
        inner = (chain(box, box.values()) if isinstance(box, dict) else box for box in boxes)
        level = list(chain.from_iterable(inner))


def shown(value: object) -> str:
    """A value from outside for a message: short; what holds other values is named by its type."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "…")
    if isinstance(value, (float, bool, type(None))) or (isinstance(value, int) and abs(value) < 10**20):
        return repr(value)
    return f"({type(value).__name__})"


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text that every reader takes, ours too: what is not finite becomes null, and bytes of a file's name that are
    no text are written out (``\\udcff``)."""
    return json.dumps(_common(value), indent=indent, allow_nan=False)


def _common(value: Any) -> Any:
    if isinstance(value, dict):
        return {_common(key): _common(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_common(item) for item in value]
    if isinstance(value, str):
        return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):x}", value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
