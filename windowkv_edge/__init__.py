"""llama.cpp sessions whose KV cache keeps only the cells that matter.

>>> from windowkv_edge import Llama
>>> llm = Llama("model.gguf", n_ctx=32768, kv_policy="windowkv", kv_budget=0.12)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib.metadata import version as _version

from . import _libs

_libs.load_llama_cpp()

from . import _native  # noqa: E402

_native.check_stamp()

from .errors import (  # noqa: E402
    FormatError,
    HeadScoresError,
    LibraryMismatchError,
    MissingProfileError,
    ModelFetchError,
    NativeError,
    UnsupportedCallError,
    UnsupportedModelError,
    WindowKVError,
)
from .heads import HeadScores  # noqa: E402
from .llama import Llama  # noqa: E402
from . import policies  # noqa: E402
from .policies import *  # noqa: E402, F403 (what its __all__ lists: a new policy is added there alone)
from .stats import KVStats  # noqa: E402

__all__ = [
    "FormatError",
    "HeadScores",
    "HeadScoresError",
    "KVStats",
    "LibraryMismatchError",
    "Llama",
    "MissingProfileError",
    "ModelFetchError",
    "NativeError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "WindowKVError",
]
__all__ += policies.__all__

__version__ = _version("windowkv-edge")
