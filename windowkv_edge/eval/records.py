"""Results as JSON lines: a header, then a line per prompt with all of its results. Runs go on where they stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .. import _json
from .._json import shown
from .case import EvalError

__all__ = ["Records", "read_records"]

FORMAT = "windowkv-edge eval"
VERSION = 1
MAX_BYTES = 1 << 30


def _parse(path: Path, data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Header, rows, and the length of the whole lines; a last line that was cut off is left out."""
    end = data.rfind(b"\n") + 1
    rows: list[dict[str, Any]] = []
    for i, line in enumerate(data[:end].splitlines(), 1):
        try:
            row = _json.loads(line, f"{path}: line {i} is not a JSON object", EvalError)
            if not isinstance(row, dict):
                raise EvalError(f"{path}: line {i} is not a JSON object: got a {type(row).__name__}")
            if rows and not isinstance(row.get("case"), str):
                raise EvalError(f"{path}: line {i} is not the result of a prompt: 'case' is {shown(row.get('case'))}")
        except EvalError as error:
            raise EvalError(f"{error}; give another --out, or delete the file") from None
        rows.append(row)
    if rows and rows[0].get("format") != FORMAT:
        raise EvalError(f"{path} is not a results file of windowkv-edge eval; give another --out")
    if rows and rows[0].get("version") != VERSION:
        got = shown(rows[0].get("version"))
        raise EvalError(f"{path} has version {got}, expected {VERSION}; run the evaluation again")
    return (rows[0], rows[1:], end) if rows else ({}, [], 0)


def read_records(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a results file.

    Raises:
        EvalError: it cannot be read, is empty or is something else.
    """
    try:
        header, rows, _ = _parse(path, _json.read_bytes(path, MAX_BYTES, EvalError))
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}; give a file written by windowkv-edge eval") from error
    if not header:
        raise EvalError(f"{path} is empty; run windowkv-edge eval with --out {path} first")
    return header, rows


class Records:
    """The results file of one run.

    A line is written when its prompt is done. If the file exists, it has to belong to the same run, which its header
    tells; its lines are kept, except a last one that a crash cut off.

    Args:
        path: the file.
        header: what the run is about. To go on, all of it has to agree, except the keys in ``free``.
        free: keys of the header that may differ.

    Raises:
        EvalError: the file is that of another run, or cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], free: Sequence[str] = ()) -> None:
        self.path = path
        full = {"format": FORMAT, "version": VERSION, **header}
        line = _json.dumps(full)
        full = _json.loads(line, f"{path}: the header")  # tuples become lists, as they are read
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        except OSError as error:
            raise EvalError(f"cannot write {path}: {error.strerror or error}; give another --out") from error
        try:
            data = self._file.read()
            old, self.rows, self._end = _parse(path, data)
            if not old and not (line + "\n").encode().startswith(data):
                raise EvalError(f"{path} is not a results file of windowkv-edge eval; give another --out")
            if not self.rows:
                old, self._end = {}, 0  # a run that stopped before its first prompt
            changed = [key for key in {**old, **full} if key not in free and old.get(key) != full.get(key)]
            if old and changed:
                raise EvalError(
                    f"{path} holds another run: {', '.join(sorted(changed))} differ; "
                    "give another --out, or delete the file"
                )
            self._file.truncate(self._end)
            self._file.seek(self._end)
            self.n_old = len(self.rows)
            self._done = {row["case"] for row in self.rows}
            if not old:
                self._write(full)
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, case: str) -> bool:
        """Whether the prompt with this key is done."""
        return case in self._done

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the results of one prompt.

        Raises:
            EvalError: the disk is full or gone; what was written before is whole.
        """
        self._write(row)
        self.rows.append(dict(row))
        self._done.add(row["case"])

    def _write(self, row: Mapping[str, Any]) -> None:
        data = (_json.dumps(row) + "\n").encode()
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            # what is buffered would be written again when the file is closed
            self._file = _discard(self._file, self.path, self._end)
            raise EvalError(
                f"cannot write {self.path}: {error.strerror}; "
                "make room and run the same command again, it goes on from there"
            ) from error
        self._end += len(data)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _discard(file: BinaryIO, path: Path, end: int) -> BinaryIO:
    """Close a file that could not be written, and cut off what was written of the last line."""
    try:
        file.close()
    except OSError:
        pass
    try:
        os.truncate(path, end)
    except OSError:
        pass
    return open(os.devnull, "w+b")  # noqa: SIM115
