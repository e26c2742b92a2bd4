"""Memory that this process takes: of the host, and of GPUs."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

import psutil
from llama_cpp import llama_cpp

__all__ = ["device_memory", "rss"]

_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU; the memory of integrated ones is the host's


def rss() -> int:
    """Resident bytes of this process, after freed memory has gone back to the system."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def device_memory() -> int:
    """Bytes in use, by any process, on all GPUs with memory of their own; 0 without such a GPU."""
    lib = llama_cpp._lib
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    lib.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    lib.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]
    res = 0
    for i in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(i)
        if lib.ggml_backend_dev_type(device) == _GPU:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            res += total.value - free.value
    return res
