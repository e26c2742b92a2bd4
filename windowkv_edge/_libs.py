"""Points llama-cpp-python at the patched libraries inside this package, before it loads any other."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

from .errors import LibraryMismatchError

__all__ = ["BUILT", "LIB_DIR", "LLAMA_CPP_PYTHON", "llama_library", "load_llama_cpp"]

LLAMA_CPP_PYTHON = "0.3.36"


def _built() -> Path:
    """Folder with what the build made: this package, or the installed one when Python runs in a source folder."""
    here = Path(__file__).resolve().parent
    if not (here / "lib").exists():
        try:
            installed = Path(str(importlib.metadata.distribution("windowkv-edge").locate_file("windowkv_edge")))
        except importlib.metadata.PackageNotFoundError:
            return here
        if (installed / "lib").exists():
            return installed.resolve()
    return here


BUILT = _built()
LIB_DIR = BUILT / "lib"

_REINSTALL = 'reinstall with: CMAKE_ARGS="-DLLAMA_BUILD=OFF" pip install --force-reinstall .'


def llama_library() -> Path:
    """Path of our libllama.

    Raises:
        LibraryMismatchError: the package was installed without its libraries.
    """
    for suffix in (".so", ".dylib"):
        path = LIB_DIR / f"libllama{suffix}"
        if path.exists():
            return path
    raise LibraryMismatchError(
        f"no libllama in {LIB_DIR} and no installed windowkv-edge that has one; {_REINSTALL}"
    )


def load_llama_cpp() -> None:
    """Import llama_cpp so that it uses our libraries.

    Raises:
        LibraryMismatchError: llama_cpp is missing, has another version, or was imported before with other libraries.
    """
    library = llama_library()

    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != LLAMA_CPP_PYTHON:
        raise LibraryMismatchError(
            f"llama-cpp-python {version} is installed, expected {LLAMA_CPP_PYTHON}; "
            f'install it with: CMAKE_ARGS="-DLLAMA_BUILD=OFF" pip install llama-cpp-python=={LLAMA_CPP_PYTHON}'
        )

    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is None:
        before = os.environ.get("LLAMA_CPP_LIB_PATH")
        os.environ["LLAMA_CPP_LIB_PATH"] = str(LIB_DIR)
        try:
            import llama_cpp.llama_cpp as loaded
        finally:
            if before is None:
                del os.environ["LLAMA_CPP_LIB_PATH"]
            else:
                os.environ["LLAMA_CPP_LIB_PATH"] = before

    path = Path(vars(loaded)["_lib"]._name).resolve()
    if path != library.resolve():
        raise LibraryMismatchError(
            f"llama_cpp was imported before windowkv_edge and loaded {path}, expected {library}; "
            "import windowkv_edge first (it makes llama_cpp use its libraries, with no policy they behave like stock)"
        )
