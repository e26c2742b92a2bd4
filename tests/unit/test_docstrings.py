"""Public docstrings say what their functions raise."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import windowkv_edge

#: of ours; whoever calls one can raise
RAISING = {
    "_agree", "_need_cache", "_refuse", "_rows", "_set_states", "_use", "at_least", "check", "check_budget", "cls", "number_of",
    "one_of", "queries", "rows", "share_of", "true_or_false", "use",
}  # fmt: skip


def can_raise(function: Callable[..., Any]) -> bool:
    """Whether its own body raises, or calls what checks; to be overridden is no error."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    called = {
        getattr(node.func, "attr", getattr(node.func, "id", "")) for node in ast.walk(tree) if isinstance(node, ast.Call)
    }
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    return bool(called & RAISING) or any("NotImplementedError" not in ast.unparse(node) for node in raised)


def of_class(cls: type) -> Iterator[tuple[str, str, bool]]:
    """Name, docstring and whether it can raise: of the class (creating it) and of its public members."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("windowkv_edge")]
    written = [vars(base)[name] for base in ours for name in ("__init__", "__post_init__") if name in vars(base)]
    created = [function for function in written if function.__code__.co_filename != "<string>"]  # dataclass's own
    docs = " ".join(inspect.getdoc(base) or "" for base in ours)
    yield cls.__name__, docs, any(map(can_raise, created))
    members = {name: member for base in reversed(ours) for name, member in vars(base).items()}
    for name, member in members.items():
        if not name.startswith("_"):
            parts = [member.fget, member.fset] if isinstance(member, property) else [getattr(member, "__func__", member)]
            functions = [part for part in parts if inspect.isfunction(part)]
            if functions:
                doc = inspect.getdoc(getattr(cls, name)) or ""
                yield f"{cls.__name__}.{name}", doc, any(map(can_raise, functions))


def public() -> Iterator[tuple[str, str, bool]]:
    for thing in (getattr(windowkv_edge, name) for name in windowkv_edge.__all__):
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            yield from of_class(thing)
        elif inspect.isfunction(thing):
            yield thing.__name__, inspect.getdoc(thing) or "", can_raise(thing)


ALL = {name: (doc, raises) for name, doc, raises in public()}


@pytest.mark.parametrize("name", [name for name, (_, raises) in ALL.items() if raises])
def test_raises(name: str) -> None:
    assert "Raises:" in ALL[name][0]


def test_the_rule_finds_them() -> None:
    """It would find nothing if sources were not there."""
    found = {name for name, (_, raises) in ALL.items() if raises}
    assert {"Llama", "Llama.eval", "Llama.kv_budget", "WindowKV", "WindowKV.published", "CacheView.keys", "get_policy"} <= found
