"""Lets ``import llama_cpp`` find the libraries of windowkv-edge where it has none of its own.

Python runs this file at every start (``windowkv_edge.pth``), so that ``import llama_cpp, windowkv_edge`` works in
either order: it is small, imports nothing more and never raises. A llama_cpp that brings its libraries keeps them.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes its time at every start
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

LLAMA_CPP_PYTHON = "0.3.36"
MODULE, VARIABLE = "llama_cpp.llama_cpp", "LLAMA_CPP_LIB_PATH"


class Finder:
    """Finds one module: the one that loads libllama."""

    @staticmethod
    def find_spec(
        name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != MODULE or VARIABLE in os.environ:
            return None
        try:
            return find(path)
        except Exception:  # stock's own error is the better one
            return None


def has_library(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, f"libllama{suffix}")) for suffix in (".so", ".dylib"))


def find(path: "Sequence[str] | None") -> "ModuleSpec | None":
    """Its spec with a loader that names our folder while the module runs; None where that is not ours to do."""
    from importlib.machinery import PathFinder
    from importlib.metadata import version

    ours = os.path.join(os.path.dirname(os.path.abspath(__file__)), "windowkv_edge", "lib")
    spec = PathFinder.find_spec(MODULE, path)
    if spec is None or spec.loader is None or spec.origin is None or not has_library(ours):
        return None
    if has_library(os.path.join(os.path.dirname(spec.origin), "lib")):
        return None
    if version("llama-cpp-python") != LLAMA_CPP_PYTHON:
        return None
    run = spec.loader.exec_module

    def exec_module(module: "ModuleType") -> None:
        os.environ[VARIABLE] = ours
        try:
            run(module)
        finally:
            os.environ.pop(VARIABLE, None)

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


sys.meta_path.insert(0, Finder)
