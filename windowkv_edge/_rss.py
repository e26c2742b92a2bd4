"""Resident memory of this process."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

import psutil

__all__ = ["rss"]


def rss() -> int:
    """Bytes; what was freed has gone back to the system."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)
