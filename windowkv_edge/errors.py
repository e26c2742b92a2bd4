"""Every error of the package. Each says what was got, what was expected and what to do."""

from __future__ import annotations

__all__ = [
    "FormatError",
    "HeadScoresError",
    "LibraryMismatchError",
    "MissingProfileError",
    "ModelFetchError",
    "NativeArgumentError",
    "NativeCallError",
    "NativeError",
    "NativeModelError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "WindowKVError",
]


class WindowKVError(Exception):
    """Base class of all errors of this package."""


class LibraryMismatchError(WindowKVError, ImportError):
    """The installed llama_cpp, the libraries of this package and the package itself do not belong together."""


class UnsupportedModelError(WindowKVError, ValueError):
    """The model, backend or parameters cannot be served with a policy."""


class UnsupportedCallError(WindowKVError, RuntimeError):
    """The session cannot serve this call: because of its policy, or because it is closed, full or in use elsewhere."""


class MissingProfileError(WindowKVError, LookupError):
    """The policy needs head scores and the model has none."""


class FormatError(WindowKVError, ValueError):
    """A file or a text from outside does not hold what was expected."""


class HeadScoresError(FormatError):
    """A text that should hold head scores holds none that can be used."""


class NativeError(WindowKVError, RuntimeError):
    """The native library reported a failure: a computation failed or memory ran out, unless a subclass says more."""


class NativeArgumentError(NativeError, ValueError):
    """The native library refused an argument."""


class NativeModelError(NativeError, UnsupportedModelError):
    """The native library cannot serve the model, the backend or these parameters."""


class NativeCallError(NativeError, UnsupportedCallError):
    """The native library cannot serve the call: the context has no policy."""


class ModelFetchError(WindowKVError, RuntimeError):
    """A model could not be fetched or verified."""
