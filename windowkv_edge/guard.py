"""Who may use a session: one call at a time, in the process that created it, and no function that it calls."""

from __future__ import annotations

import _thread
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import UnsupportedCallError

__all__ = ["Closed", "Guard", "Interrupts", "interrupt_soon"]

CLOSED = "this session was closed, create a new one"


class Closed:
    """Stands for the model and the context of a closed session, whose memory is gone."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedCallError(CLOSED)

    def close(self) -> None:
        """Nothing is left to free."""


def _runs(thread: int, files: frozenset[str]) -> bool:
    """Whether a thread is inside a function of one of these files."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename in files:
            return True
        frame = frame.f_back
    return False


_FOLDER = os.path.dirname(__file__)

# who enters: the public calls, and what calls functions of others
_CALLERS = frozenset(
    os.path.join(_FOLDER, name) for name in ("llama.py", "limited.py", "evaluation.py", "states.py", "shift.py")
)
_SELECTORS = frozenset(os.path.join(_FOLDER, name) for name in ("session.py", "compaction.py", "progress.py"))


class _Hook:
    """``sys.unraisablehook`` inside of an :class:`Interrupts`."""

    def __init__(self, owner: Interrupts, before: Any) -> None:
        self.owner, self.before = weakref.ref(owner), before

    def __call__(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            Interrupts._caught = True
        else:
            self.before(unraisable)


class Interrupts:
    """Ctrl-C that meets a callback of llama.cpp, such as the one for its log lines: ctypes prints and forgets it there.
    Leaving this context manager raises it instead."""

    _caught = False  # of all of them: one that Ctrl-C left behind half way may be the one that gets the next

    def __enter__(self) -> Interrupts:
        self._before: Any = None
        if threading.get_ident() == threading.main_thread().ident:  # signals are raised nowhere else
            hook = sys.unraisablehook
            while isinstance(hook, _Hook) and hook.owner() is None:
                hook = hook.before  # left behind by a Ctrl-C while its owner was leaving
            self._before, sys.unraisablehook = hook, _Hook(self, hook)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            sys.unraisablehook = self._before
        self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was one."""
        if self._before is not None and Interrupts._caught:
            Interrupts._caught = False
            raise KeyboardInterrupt


def interrupt_soon() -> None:
    """Raise KeyboardInterrupt in the main thread, for callers that no exception gets out of: an interrupt at once would
    meet them, and be printed and forgotten."""
    threading.Timer(0.005, _thread.interrupt_main).start()


class Guard:
    """Refuses calls that would crash or hang: in another thread, after a fork, after close(), from inside select() or
    ``kv_progress``.

    A call inside another one of the same thread is fine, and so is a thread that comes after another one.
    """

    def __init__(self) -> None:
        self.closed = False
        self._pid = os.getpid()
        self._selecting: str | None = None
        # the one entry is the thread that is inside: setdefault() tests and sets at once, and what it set says who did
        self._inside: dict[int, int] = {}
        self._call = ""

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that created the session."""
        return os.getpid() != self._pid

    @property
    def is_inside(self) -> bool:
        """Whether a thread is inside a call."""
        return bool(self._inside)

    def use(self, call: str, *, reads: bool = False, closes: bool = False) -> _Use:
        """Context manager around one call.

        Args:
            call: its name, for messages.
            reads: it changes nothing, so that a policy may call it while it selects.
            closes: it goes on with closing what Ctrl-C left half closed.

        Raises:
            UnsupportedCallError: on entering, if the session cannot be used now; says why.
        """
        return _Use(self, call, reads, closes)

    @contextmanager
    def selecting(self, policy: str) -> Iterator[None]:
        """While a policy selects, calls that change its session are refused."""
        with self._calling(f"kv_policy={policy!r} selects; a policy chooses cells and leaves its session alone"):
            yield

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """The same while a session says how far it is."""
        with self._calling("kv_progress runs; it says how far a prompt is and leaves its session alone"):
            yield

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        before, self._selecting = self._selecting, what
        try:
            yield
        finally:
            self._selecting = before

    def check(self, call: str, reads: bool, closes: bool) -> None:
        """Raise UnsupportedCallError for what does not depend on other threads."""
        if self.forked:
            raise UnsupportedCallError(
                f"{call}: this session was created in process {self._pid} and this is its child {os.getpid()}, where "
                "its threads do not exist, nor do llama.cpp's; start the child with multiprocessing's 'spawn', "
                "and create a session there"
            )
        if self.closed and not closes:
            raise UnsupportedCallError(f"{call}: {CLOSED}")
        if self._selecting is not None and not _runs(threading.get_ident(), _SELECTORS):
            self._selecting = None  # left behind by a Ctrl-C while it was reset
        if self._selecting is not None and not reads and self._inside.get(0) == threading.get_ident():
            raise UnsupportedCallError(f"{call} was called while {self._selecting}")


class _Use:
    __slots__ = ("before", "call", "closes", "guard", "nested", "reads")

    def __init__(self, guard: Guard, call: str, reads: bool, closes: bool) -> None:
        self.guard, self.call, self.reads, self.closes = guard, call, reads, closes
        self.nested = guard._inside.get(0) == threading.get_ident()
        self.before = guard._call

    def __enter__(self) -> None:
        guard = self.guard
        try:
            guard.check(self.call, self.reads, self.closes)
            owner = guard._inside.get(0)
            if owner not in (None, threading.get_ident()) and not _runs(owner, _CALLERS):
                guard._inside.pop(0, None)  # left behind by a Ctrl-C while it was leaving
            if guard._inside.setdefault(0, threading.get_ident()) != threading.get_ident():
                raise UnsupportedCallError(
                    f"{self.call}: another thread is inside {guard._call} of this session; let one call end before the "
                    "next begins (threading.Lock), or give every thread a session of its own"
                )
            guard._call = self.call
        except BaseException:  # Ctrl-C too
            self._leave()
            raise

    def __exit__(self, *exc: object) -> None:
        self._leave()

    def _leave(self) -> None:
        guard = self.guard
        if guard._inside.get(0) == threading.get_ident():
            guard._call = self.before
            if not self.nested:
                guard._inside.pop(0, None)
