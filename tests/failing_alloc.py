"""The allocator of native/failing-alloc.cpp, in a process that LD_PRELOAD gave it to."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

__all__ = ["OWN", "Allocator", "Frames"]

DEPTH = 40


class Stack(ctypes.Structure):
    _fields_ = [("n_bytes", ctypes.c_int64), ("depth", ctypes.c_int64), ("frames", ctypes.c_void_p * DEPTH)]


class Crash(ctypes.Structure):
    _fields_ = [("signal", ctypes.c_int64), ("depth", ctypes.c_int64), ("frames", ctypes.c_void_p * DEPTH)]


Frames = tuple[int, ...]

OWN = re.compile("ragged(?!_decode)|wkv")  # not the one around llama_decode(), which is everywhere
NOWHERE = re.compile(
    r"(.* )?(std::|__gnu_cxx)|operator new|(posix_)?mem|malloc|calloc|realloc|ggml_(malloc|calloc|aligned_malloc)"
)


class Allocator:
    """The one of this process, which LD_PRELOAD put in place of the C library's."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(None)
        self._lib.alloc_arm.argtypes = [ctypes.c_int64]
        self._lib.alloc_disarm.restype = self._lib.alloc_live.restype = ctypes.c_int64
        self._lib.alloc_live.argtypes = [ctypes.POINTER(ctypes.c_int32), ctypes.c_int64]
        self._lib.alloc_stacks.restype = ctypes.POINTER(Stack)
        self._lib.alloc_crashes.restype = ctypes.POINTER(Crash)
        self._lib.alloc_name.restype = ctypes.c_char_p
        self._lib.alloc_name.argtypes = [ctypes.c_void_p]
        self.arm, self.disarm, self.catch_crashes = (
            self._lib.alloc_arm,
            self._lib.alloc_disarm,
            self._lib.alloc_catch_crashes,
        )
        self.depth = self._lib.alloc_depth
        """Frames of every stack that are kept from now on; 0 = all."""
        self._crashes = self._lib.alloc_crashes()
        self._names: dict[int, str] = {}

    def stacks(self, indices: Sequence[int] | range) -> list[tuple[int, Frames]]:
        """Bytes and callers, the innermost first, of allocations since :meth:`arm`."""
        found = self._lib.alloc_stacks()
        return [(int(found[i].n_bytes), self._frames(found[i])) for i in indices]

    def live(self) -> list[int]:
        """Those of them that are still there."""
        indices = (ctypes.c_int32 * 100_000)()
        return list(indices[: self._lib.alloc_live(indices, len(indices))])

    def crash(self, place: int) -> tuple[int, Frames]:
        """Signal and stack of a child that crashed."""
        return int(self._crashes[place].signal), self._frames(self._crashes[place])

    @staticmethod
    def _frames(one: Stack | Crash) -> Frames:
        return tuple(int(frame or 0) for frame in one.frames[: one.depth])

    def name(self, address: int) -> str:
        if address not in self._names:
            self._names[address] = self._lib.alloc_name(address).decode()
        return self._names[address]

    def is_own(self, frames: Frames) -> bool:
        """Whether one of the functions is ours."""
        return self.caller(frames) is not None

    def caller(self, frames: Frames) -> int | None:
        """The innermost address in a function of ours."""
        return next((one for one in frames if OWN.search(self.name(one))), None)

    def where(self, frames: Frames, n: int = 5) -> str:
        """The innermost functions that are neither an allocator's nor a container's."""
        names = [re.sub(r"\(.*", "", self.name(one).replace("(anonymous namespace)::", "")) for one in frames]
        return " < ".join([one for one in names if one and not NOWHERE.match(one)][:n])
