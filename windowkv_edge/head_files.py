"""Head scores as text. Files and metadata come from strangers: sizes are checked before anything is allocated."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _json
from ._json import shown
from .errors import HeadScoresError

__all__ = ["FORMAT", "KINDS", "MAX_SCORE", "VERSION", "parse", "read"]

KINDS = ("r", "r2")

FORMAT = "windowkv-edge head scores"
VERSION = 1

MAX_LAYERS, MAX_HEADS = 512, 1024
"""llama.cpp holds models of up to 512 layers (LLAMA_MAX_LAYERS); 128 query heads are the most in use."""

MAX_SCORE = 1e100
"""Sums over heads and layers stay finite."""

Array = npt.NDArray[np.float64]


def read(path: str | os.PathLike[str]) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        HeadScoresError: it is too large, or not UTF-8.
    """
    try:
        return _json.read_bytes(path, _json.MAX_BYTES, HeadScoresError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HeadScoresError(f"{os.fspath(path)}: not a file of head scores: {error}") from None


def parse(text: str, source: str) -> tuple[dict[str, Array], Mapping[str, Any]]:
    """Scores [n_layer, n_head] by kind and what is known of them, from our JSON or the authors' one line
    ``{"layer-head": [scores], ...}``, which serves as every kind.

    Args:
        text: the text.
        source: where it comes from, for messages.

    Raises:
        HeadScoresError: the text is neither.
    """
    data = _json.loads(text, f"{source}: not a file of head scores", HeadScoresError)
    if not isinstance(data, dict):
        raise HeadScoresError(f"{source}: not a file of head scores: expected a JSON object, got {type(data).__name__}")
    if data.get("format") != FORMAT:
        return dict.fromkeys(KINDS, _parse_authors(data, source)), {"format": "HeadKV authors"}

    version, scores, about = data.get("version"), data.get("scores"), data.get("about", {})
    if type(version) is not int or version != VERSION:
        raise HeadScoresError(f"{source}: version {shown(version)} of the format, expected {VERSION}")
    if not isinstance(scores, dict) or not isinstance(about, dict):
        raise HeadScoresError(f"{source}: expected 'scores' by kind and 'about' as JSON objects")
    if not scores or not set(scores) <= set(KINDS):
        kinds = ", ".join(map(shown, sorted(scores)[:4]))
        raise HeadScoresError(f"{source}: kinds of scores are {kinds or 'none'}, expected 'r', 'r2' or both")
    return {kind: _parse_rows(rows, f"{source}, scores of kind {shown(kind)}") for kind, rows in scores.items()}, about


def _parse_rows(rows: object, what: str) -> Array:
    expected = "expected one list per layer, all of equally many scores: [n_layer, n_head]"
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise HeadScoresError(f"{what}: {expected}")
    widths = {len(row) for row in rows}
    if len(widths) != 1:
        raise HeadScoresError(f"{what}: {len(rows)} layers of {sorted(widths)[:4]} scores, {expected}")
    n_layer, n_head = _bounded(len(rows), widths.pop(), what)
    return np.array([_numbers(row, f"{what}, layer {il}") for il, row in enumerate(rows)]).reshape(n_layer, n_head)


def _parse_authors(data: dict[str, Any], source: str) -> Array:
    keys = {key: re.fullmatch("([0-9]{1,9})-([0-9]{1,9})", key) for key in data}
    at = {(int(match[1]), int(match[2])): key for key, match in keys.items() if match}
    if not at or len(at) != len(data):
        odd = next((key for key, match in keys.items() if not match), None)
        got = "no key" if not keys else "the same head twice" if odd is None else f"the key {shown(odd)}"
        raise HeadScoresError(
            f"{source}: not a file of head scores: got {got}, expected keys such as '0-0' (layer-head) with lists of "
            f'scores, or "format": "{FORMAT}"'
        )
    n_layer, n_head = _bounded(1 + max(il for il, _ in at), 1 + max(ih for _, ih in at), source)
    if len(at) != n_layer * n_head:
        missing = next((il, ih) for il in range(n_layer) for ih in range(n_head) if (il, ih) not in at)
        raise HeadScoresError(f"{source}: {n_layer} layers x {n_head} heads, but head {missing} has no scores")
    res = np.zeros((n_layer, n_head))
    for index, key in at.items():
        value = data[key]
        scores = _numbers(value if isinstance(value, list) else [value], f"{source}, key {key!r}")
        if not scores.size:
            raise HeadScoresError(f"{source}, key {key!r}: an empty list, expected scores")
        res[index] = scores.mean()
    return res


def _bounded(n_layer: int, n_head: int, what: str) -> tuple[int, int]:
    if not (1 <= n_layer <= MAX_LAYERS and 1 <= n_head <= MAX_HEADS):
        raise HeadScoresError(
            f"{what}: scores of {n_layer} layers x {n_head} heads, expected 1 to {MAX_LAYERS} layers of 1 to "
            f"{MAX_HEADS} heads"
        )
    return n_layer, n_head


def _numbers(values: list[Any], what: str) -> Array:
    """float64 [n] of numbers from 0 to 1e100."""
    for value in values:
        if type(value) not in (int, float) or not 0 <= value <= MAX_SCORE:
            raise HeadScoresError(f"{what}: scores are negative or not numbers, or above {MAX_SCORE:g}: {shown(value)}")
    return np.array(values, dtype=np.float64)
