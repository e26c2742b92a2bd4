"""Files of saved sessions.

A file is, with all numbers little-endian:

==============  ==========================================================================
8 bytes         magic
u32, u32, u64   version, bytes of the header, bytes of the file
header          JSON: what the session was (model, policy, budget), counts, and ``extra``
i32 [n_tokens]  the tokens
f32 [n_scores]  logits of every token, with ``logits_all=True``
bytes           what llama_state_get_data() wrote
u32             CRC-32 of all that stands before
==============  ==========================================================================
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from . import _json
from ._files import FULL, FileError, open_regular, writing
from .errors import FormatError

__all__ = ["MAGIC", "VERSION", "SavedSession", "check_session", "extra_text", "read", "write"]

MAGIC = b"WKVSESS\n"
VERSION = 3

_HEAD, _TAIL = struct.Struct("<8sIIQ"), struct.Struct("<I")
_CHUNK = 4 << 20  # bytes, which a checksum reads from the processor's cache


@dataclass
class SavedSession:
    """A session as it is saved.

    Attributes:
        tokens: int32 [n_tokens].
        scores: float32 [n_tokens or 0, n_vocab].
        seed: of the session.
        native: uint8, what llama_state_get_data() wrote.
        session: model, policy, budget, positions, and what the session noted; see :func:`check_session`.
        extra: whatever its owner wants to keep.
    """

    tokens: npt.NDArray[np.intc]
    scores: npt.NDArray[np.single]
    seed: int
    native: npt.NDArray[np.uint8]
    session: dict[str, Any]
    extra: dict[str, Any]


def extra_text(extra: Mapping[str, Any]) -> str:
    """What a session's owner wants to keep, as JSON.

    Raises:
        TypeError, ValueError: it is no JSON object, is too large or too deep.
    """
    if not isinstance(extra, Mapping):
        raise TypeError(f"extra is {type(extra).__name__}, expected a dict of JSON values")
    text = _json.dumps(dict(extra))
    _json.loads(text, "extra")
    return text


def check_session(session: Any, n_tokens: int, noted: Mapping[str, Any] | None = None) -> None:
    """Raise FormatError unless it has what a saved session says of itself, with values that can be.

    Args:
        session: what was saved.
        n_tokens: tokens that stand beside it.
        noted: what a session of now notes, None if that is not known.
    """
    kinds: dict[str, Any] = {
        "model": str, "policy": str, "budget": (int, float), "n_past": int, "removable": int, "noted": dict,
    }  # fmt: skip
    if not isinstance(session, dict) or set(session) != set(kinds):
        raise FormatError(f"what it says of its session is not complete, expected {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not isinstance(session[name], kind) or isinstance(session[name], bool):
            raise FormatError(f"its {name} is {_json.shown(session[name])}")
    if not n_tokens <= session["n_past"] < 2**31 or not 0 <= session["removable"] <= session["n_past"]:
        raise FormatError(
            f"it holds {n_tokens} tokens and {session['n_past']} positions, of which those from {session['removable']} "
            "on can be removed"
        )
    if noted is not None and {name: type(value) for name, value in session["noted"].items()} != {
        name: type(value) for name, value in noted.items()
    }:
        raise FormatError(f"what its session noted are {sorted(session['noted'])}, expected {sorted(noted)}")


def write(path: str | os.PathLike[str], saved: SavedSession, extra: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        FileError: it cannot be written; what was there stays.
    """
    about = {
        "session": saved.session, "seed": saved.seed, "n_tokens": len(saved.tokens), "n_scores": saved.scores.size,
        "n_native": saved.native.size,
    }  # fmt: skip
    header = f'{{"about": {_json.dumps(about)}, "extra": {extra}}}'.encode()
    arrays = [saved.tokens.astype("<i4"), np.ascontiguousarray(saved.scores, dtype="<f4"), saved.native]
    views = [memoryview(header), *(own.reshape(-1).view(np.uint8).data for own in arrays)]
    n_bytes = _HEAD.size + sum(len(view) for view in views) + _TAIL.size
    views.insert(0, memoryview(_HEAD.pack(MAGIC, VERSION, len(header), n_bytes)))
    try:
        with writing(path) as part, open(part, "wb", buffering=0) as file:
            checksum = 0
            for view in views:
                for i in range(0, len(view), _CHUNK):
                    chunk = view[i : i + _CHUNK]
                    checksum = zlib.crc32(chunk, checksum)
                    _write_all(file, chunk)
            _write_all(file, memoryview(_TAIL.pack(checksum)))
    except OSError as error:
        fix = "make room, or give another path" if error.errno in FULL else "give another path"
        raise FileError(f"cannot write {os.fspath(path)}: {error.strerror or error}; {fix}") from error


def _write_all(file: Any, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def read(path: str | os.PathLike[str]) -> SavedSession:
    """Read a file, and check all of it but what only a session knows.

    Raises:
        OSError: it cannot be read.
        FormatError: it is none, or was cut or changed.
        MemoryError: there is no room for its content.
    """
    what = f"{Path(path)}: not a saved session"
    with open_regular(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD.size)
        if head[: len(MAGIC)] != MAGIC:
            raise FormatError(f"{what}: it does not begin as one")
        if len(head) < _HEAD.size:
            raise FormatError(f"{what}: it was cut after {len(head)} bytes")
        _, version, n_header, n_want = _HEAD.unpack(head)
        if version != VERSION:
            raise FormatError(
                f"{what} that can be read: its version is {version}, expected {VERSION}; use the release of "
                "windowkv-edge that wrote it"
            )
        if n_bytes != n_want:
            raise FormatError(f"{what} that is whole: {n_bytes:,} bytes, expected {n_want:,}")
        data = np.empty(n_bytes - _HEAD.size, dtype=np.uint8)
        checksum, n_read = zlib.crc32(head), 0
        view, source = data.data, cast(BufferedReader, file)
        while n_read < len(view) and (n := source.readinto(view[n_read : n_read + _CHUNK])):
            checksum = zlib.crc32(view[n_read : min(n_read + n, len(view) - _TAIL.size)], checksum)
            n_read += n
    if n_read < len(view) or len(view) < _TAIL.size:
        raise FormatError(f"{what} that is whole: {n_read + _HEAD.size:,} bytes, expected {n_want:,}")
    if (stored := _TAIL.unpack(view[-_TAIL.size :])[0]) != checksum:
        raise FormatError(
            f"{what} that is whole: its bytes have the checksum {checksum:08x}, expected {stored:08x}; it was changed"
        )
    return _parse(data[: -_TAIL.size], n_header, what)


def _parse(data: npt.NDArray[np.uint8], n_header: int, what: str) -> SavedSession:
    if not n_header <= min(data.size, _json.MAX_BYTES):
        raise FormatError(f"{what}: its header has {n_header:,} bytes")
    header = _json.loads(data[:n_header].tobytes(), f"{what}: its header")
    about, extra = (header.get("about"), header.get("extra")) if isinstance(header, dict) else (None, None)
    counts = ("n_tokens", "n_scores", "n_native")
    if not isinstance(about, dict) or not isinstance(extra, dict) or set(about) != {"session", "seed", *counts}:
        raise FormatError(f"{what}: its header is not complete")
    if type(about["seed"]) is not int or not all(type(about[name]) is int and about[name] >= 0 for name in counts):
        raise FormatError(f"{what}: a count or the seed of its header is none")
    n_tokens, n_scores, n_native = (int(about[name]) for name in counts)
    if n_header + 4 * (n_tokens + n_scores) + n_native != data.size or n_tokens >= 2**31:
        raise FormatError(f"{what}: its header does not fit its {data.size:,} bytes")
    if n_scores % n_tokens if n_tokens else n_scores:
        raise FormatError(f"{what}: {n_scores:,} logits are not those of {n_tokens:,} tokens")
    check = about["session"]
    try:
        check_session(check, n_tokens)
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None

    body = data[n_header:]
    tokens = body[: 4 * n_tokens].tobytes()
    scores = body[4 * n_tokens : 4 * (n_tokens + n_scores)].tobytes()
    return SavedSession(
        tokens=np.frombuffer(tokens, dtype="<i4").astype(np.intc),
        scores=np.frombuffer(scores, dtype="<f4").reshape(n_tokens if n_scores else 0, -1 if n_scores else 0),
        seed=about["seed"],
        native=body[4 * (n_tokens + n_scores) :],
        session=check,
        extra=extra,
    )
