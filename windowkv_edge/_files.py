"""Files that others may have put there, that a crash may cut off, and that two runs may want at once.

A file of ours (a lock, a part, a record) is never opened through a symbolic link, and nothing is opened that could keep
us waiting: a FIFO, a device. What is written comes to its place whole or not at all. What a run writes over hours is
its own until it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from .errors import WindowKVError

__all__ = [
    "FULL", "FileError", "check_output", "lock", "open_own", "open_regular", "owned", "regular_size", "write_text",
    "writing",
]  # fmt: skip

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors that mean: there is no room for more."""

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_STALE_SECONDS = 24 * 3600  # a part this old belongs to a process that was killed
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a symbolic link"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


class FileError(WindowKVError, RuntimeError):
    """A file that a run is to write cannot be written, or is that of another run."""


def _refuse(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "no file")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file", str(path))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file that somebody named, for reading; links are followed.

    Raises:
        OSError: there is none, it cannot be read, or it is a folder, FIFO, socket or device; ``strerror`` says which.
    """
    file = Path(path)
    _refuse(file, file.stat().st_mode)  # a socket cannot be opened at all, and opening a device may do things
    return _open(file, os.O_RDONLY, "rb")


def regular_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file that can be read.

    Raises:
        OSError: as :func:`open_regular`.
    """
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def open_own(path: Path, flags: int = os.O_RDONLY, mode: str = "rb") -> BinaryIO:
    """Open a file of ours with flags of ``os.open`` and the ``mode`` that fits them; a symbolic link is refused.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    if path.is_symlink():  # O_NOFOLLOW alone says "too many levels of symbolic links"
        _refuse(path, stat.S_IFLNK)
    return _open(path, flags | os.O_NOFOLLOW, mode)


def _open(path: Path, flags: int, mode: str) -> BinaryIO:
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        _refuse(path, os.fstat(handle).st_mode)
        return cast(BinaryIO, open(handle, mode))
    except BaseException:
        os.close(handle)
        raise


#
# whole or not at all
#


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a new, empty file beside ``path``, with its ending; when the block ends, it takes the place of ``path``.

    If the block fails, it goes away and ``path`` stays as it was. Two writers do not meet: the later one stays.

    Raises:
        OSError: the folder or its disk cannot be written, or ``path`` is no regular file.
    """
    target = Path(path)
    if target.exists():
        _refuse(target, target.stat().st_mode)
        target = target.resolve()  # what a link of the user's points to is replaced, not the link
    prefix, suffix = f".{target.stem}.", f".part{target.suffix}"
    for left in target.parent.iterdir():
        if left.name.startswith(prefix) and left.name.endswith(suffix):
            with contextlib.suppress(OSError):
                if time.time() - left.lstat().st_mtime > _STALE_SECONDS:
                    left.unlink()
    part = target.with_name(f"{prefix}{secrets.token_hex(6)}{suffix}")
    try:
        with open_own(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, "wb") as file:
            if target.exists():
                os.fchmod(file.fileno(), target.stat().st_mode & 0o777)
        yield part
        with open_own(part, os.O_RDWR, "r+b") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file, whole or not at all.

    Raises:
        OSError: as :func:`writing`.
    """
    with writing(path) as part:
        part.write_text(text, encoding="utf-8")


#
# locks
#


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, waiting for it; none on a network file system that refuses locks.

    Raises:
        OSError: the file cannot be made, or is a link, FIFO, socket, device or folder.
    """
    with open_own(path, os.O_RDWR | os.O_CREAT, "r+b") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_output(path: Path, option: str, n_bytes: int = 1, *, keeps: Sequence[Path | None] = ()) -> None:
    """See to it that ``path`` can be written with ``n_bytes``, before the work whose results go there.

    Args:
        path: a file that is there, or will be; its folder has to be there.
        option: that the user gave for it, for the message.
        n_bytes: that will be written.
        keeps: files that the run reads or writes beside it.

    Raises:
        FileError: no such folder, one that cannot be written, a full disk, no regular file, or one of those to keep.
    """
    for other in keeps:
        if other is not None and (path.resolve() == other.resolve() or _same(path, other)):
            raise FileError(f"{option} {path} is a file that this run needs itself; give another {option}")
    try:
        folder = path.resolve().parent
        if path.exists():
            _refuse(path, path.stat().st_mode)
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(min(n_bytes, 4096)))
            file.flush()
            os.fsync(file.fileno())
        if (free := shutil.disk_usage(folder).free) < n_bytes:
            raise OSError(errno.ENOSPC, f"{folder} has {free >> 20:,} MiB free, {n_bytes >> 20:,} MiB needed")
    except OSError as error:
        raise _unwritable(path, option, error) from error


def _same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _unwritable(path: Path, option: str, error: OSError) -> FileError:
    folder = path.absolute().parent
    if not folder.is_dir():
        return FileError(f"cannot write {path}: there is no folder {folder}; create it, or give another {option}")
    fix = "make room, or " if error.errno in FULL else "make it writable, or " if error.errno in _FORBIDDEN else ""
    return FileError(f"cannot write {path}: {error.strerror or error}; {fix}give another {option}")


@contextlib.contextmanager
def owned(path: Path, option: str, *, keeps: Sequence[Path | None] = ()) -> Iterator[None]:
    """Be the one run that writes ``path``, until the block ends. Also sees to what :func:`check_output` does.

    The owner is named in ``PATH.lock``, which goes away with it. A lock that a killed process left is held by nobody
    and taken over. On a network file system that refuses locks, nobody is refused.

    Raises:
        FileError: another run is writing it; or it cannot be written.
    """
    check_output(path, option, keeps=keeps)
    target = path.resolve()
    name = target.with_name(target.name + ".lock")
    with contextlib.ExitStack() as stack:
        try:
            file = _take(name, stack)
            if file is None:
                raise FileError(
                    f"another run is writing {path}: {_owner(name)}; wait until it has ended, or give another {option}"
                )
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()} since {since}\n".encode())
            file.flush()
        except OSError as error:
            raise _unwritable(name, option, error) from error
        yield


def _take(name: Path, stack: contextlib.ExitStack) -> BinaryIO | None:
    """Open and lock a file that goes away with the stack; None if it is another's."""
    while True:
        file = stack.enter_context(open_own(name, os.O_RDWR | os.O_CREAT, "r+b"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:
            pass  # no locks here
        # its last owner may have removed the file between our opening and our locking it
        if name.exists() and os.path.samestat(os.fstat(file.fileno()), name.stat()):
            stack.callback(name.unlink, missing_ok=True)
            return file


def _owner(name: Path) -> str:
    with contextlib.suppress(OSError), open_own(name) as file:
        said = file.read(200).decode("utf-8", "replace").strip()
        if re.fullmatch(r"process \d+ on [\w.-]+ since [\d: -]+", said, re.ASCII):
            return said
    return "it does not say which"
