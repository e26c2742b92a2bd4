"""The state of a context as bytes: what ``llama_state_get_data()`` writes, windows and recurrent states included."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from . import _native
from .errors import NativeError, UnsupportedCallError
from .guard import Interrupts

__all__ = ["get_state", "refusal", "set_state", "state_size"]


def state_size(ctx: Any) -> int:
    """Bytes of the state; 0 where it cannot be saved, :func:`refusal` says why.

    Args:
        ctx: the context, a ctypes pointer.
    """
    _native.clear_error()
    with Interrupts():
        return int(llama_cpp.llama_state_get_size(ctx))


def get_state(ctx: Any, call: str) -> npt.NDArray[np.uint8]:
    """A copy of the state, uint8 [bytes].

    Args:
        ctx: see :func:`state_size`.
        call: who asks, for messages.

    Raises:
        MemoryError, NativeError: there is no memory for it.
        UnsupportedCallError: it cannot be saved; says why.
    """
    size = state_size(ctx)
    if size == 0:
        raise refusal(call)
    data = np.empty(size, dtype=np.uint8)
    with Interrupts():
        n = int(llama_cpp.llama_state_get_data(ctx, _pointer(data), size))
    if n != size:
        raise refusal(call)
    return data


def set_state(ctx: Any, data: npt.NDArray[np.uint8]) -> int:
    """Give a context a state. What is refused changes nothing.

    Args:
        ctx: see :func:`state_size`.
        data: uint8 [bytes].

    Returns:
        Bytes of it that were read; 0 if it was refused, :func:`refusal` says why.
    """
    _native.clear_error()
    with Interrupts():
        return int(llama_cpp.llama_state_set_data(ctx, _pointer(data), data.size))


def refusal(call: str) -> Exception:
    """What to raise for the last of these calls that failed."""
    if not (reason := _native.last_error()):  # before the memory was asked; the model is known to be the same
        return NativeError(f"{call}: host memory ran out, or what llama.cpp's log says (verbose=True)")
    return (NativeError if _native.out_of_memory() else UnsupportedCallError)(f"{call}: {reason}")


def _pointer(data: npt.NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
