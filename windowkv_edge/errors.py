"""Every error of the package. Each says what was got, what was expected and what to do."""

from __future__ import annotations

__all__ = [
    "LibraryMismatchError",
    "MissingProfileError",
    "ModelFetchError",
    "NativeError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "WindowKVError",
]


class WindowKVError(Exception):
    """Base class."""


class LibraryMismatchError(WindowKVError, ImportError):
    """llama_cpp, our libraries and this package do not belong together."""


class UnsupportedModelError(WindowKVError, ValueError):
    """The model, backend or parameters cannot be served with a policy."""


class UnsupportedCallError(WindowKVError, RuntimeError):
    """The call cannot be served while a policy is on."""


class MissingProfileError(WindowKVError, LookupError):
    """The policy needs head scores and the model has none."""


class NativeError(WindowKVError, RuntimeError):
    """The native library reported a failure."""


class ModelFetchError(WindowKVError, RuntimeError):
    """A model could not be fetched or verified."""
