"""Memory that this process takes, and that is free: of the host, and of GPUs."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from llama_cpp import llama_cpp

__all__ = ["device_memory", "free_memory", "rss", "share_on_devices", "usable_memory"]

_FOLDER = Path("/sys/fs/cgroup")

# of a container, in both versions of Linux's control groups: limit, what is used, and which of that are cached files
_CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)

_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU; the memory of integrated ones is the host's


def rss() -> int:
    """Resident bytes of this process, after freed memory has gone back to the system."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def _devices() -> Iterator[tuple[int, int]]:
    """Free and all bytes of every GPU with memory of its own."""
    lib = llama_cpp._lib
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    lib.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    lib.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]
    for i in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(i)
        if lib.ggml_backend_dev_type(device) == _GPU:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            yield free.value, total.value


def device_memory() -> int:
    """Bytes in use, by any process, on all GPUs with memory of their own; 0 without such a GPU."""
    return sum(total - free for free, total in _devices())


def free_memory() -> tuple[int, int]:
    """Free bytes of the host, as far as this process may take them, and of all GPUs with memory of their own."""
    host = int(psutil.virtual_memory().available)
    for names in _CGROUPS:
        left = _cgroup_free(*names)
        host = host if left is None else min(host, left)
    return host, sum(free for free, _ in _devices())


def _cgroup_free(limit: str, used: str, cached: str) -> int | None:
    """What a container leaves of its memory; None if it has no limit. Cached files count as free."""
    try:
        n_limit, n_used = (int((_FOLDER / name).read_text()) for name in (limit, used))
        lines = (_FOLDER / limit).with_name("memory.stat").read_text().splitlines()
        return max(0, n_limit - n_used + sum(int(line.split()[1]) for line in lines if line.split()[0] == cached))
    except (OSError, ValueError, IndexError):  # no such hierarchy, or "max"
        return None


def share_on_devices(llm: Any) -> float:
    """Of the cells of a ``llama_cpp.Llama`` those in the memory of GPUs, as a share: llama.cpp gives these the last
    layers."""
    if not llm.context_params.offload_kqv:
        return 0.0
    n_layer = max(1, int(llama_cpp.llama_model_n_layer(llm._model.model)))
    return min(1.0, max(0, int(llm.model_params.n_gpu_layers)) / n_layer)


def usable_memory(share: float) -> int:
    """Bytes of cells that there is room for, beside what moving and scoring them takes: three quarters of what is free.

    Args:
        share: see :func:`share_on_devices`.
    """
    host, devices = free_memory()
    if devices == 0:
        share = 0.0
    rooms = [own / part for own, part in ((host, 1 - share), (devices, share)) if part > 0]
    return int(0.75 * min(rooms))
