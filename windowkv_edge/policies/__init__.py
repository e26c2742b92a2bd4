"""The policies and their registry: one file, one frozen dataclass each."""

from __future__ import annotations

import ast
import warnings
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points

from ..budget import plain
from .adakv import AdaKV
from .auto import Auto
from .base import QUERIES, CacheView, KVPolicy, Positions, Query, Scores, Task, at_least
from .corm import CORM
from .expected_attention import ExpectedAttention
from .full import Full
from .h2o import H2O
from .headkv import HeadKV, HeadKVR2
from .keydiff import KeyDiff
from .kvzip import KVzip
from .pyramidkv import PyramidKV
from .snapkv import SnapKV
from .streamingllm import StreamingLLM
from .tova import TOVA
from .windowkv import WindowKV
from .windowkv_adakv import WindowAdaKV
from .windowkv_headkv import WindowHeadKV
from .windowkv_paper import WindowKVPaper

__all__ = [
    "CORM",
    "ENTRY_POINTS",
    "H2O",
    "POLICIES",
    "QUERIES",
    "TOVA",
    "AdaKV",
    "Auto",
    "CacheView",
    "ExpectedAttention",
    "Full",
    "HeadKV",
    "HeadKVR2",
    "KVPolicy",
    "KVzip",
    "KeyDiff",
    "Positions",
    "PyramidKV",
    "Query",
    "Scores",
    "SnapKV",
    "StreamingLLM",
    "Task",
    "WindowAdaKV",
    "WindowHeadKV",
    "WindowKV",
    "WindowKVPaper",
    "get_policy",
    "policy_names",
]

POLICIES: dict[str, type[KVPolicy]] = {
    cls.name: cls
    for cls in (
        Auto,
        Full,
        StreamingLLM,
        SnapKV,
        PyramidKV,
        AdaKV,
        ExpectedAttention,
        KeyDiff,
        TOVA,
        CORM,
        H2O,
        HeadKV,
        HeadKVR2,
        KVzip,
        WindowKV,
        WindowKVPaper,
        WindowAdaKV,
        WindowHeadKV,
    )  # fmt: skip
}


ENTRY_POINTS = "windowkv_edge.policies"
"""Group of the entry points by which packages bring policies: ``name = "module:Class"``."""

_MAX_SPEC = 2000  # characters; numbers in them stay printable, and Python's parser on its feet


def policy_names() -> list[str]:
    """Names of all policies, those that installed packages bring included."""
    return list(dict.fromkeys([*POLICIES, *sorted(entry_points(group=ENTRY_POINTS).names)]))


def _short(spec: str) -> str:
    """Of what somebody gave, as much as a message should repeat."""
    text = repr(spec)
    return text if len(text) <= 200 else f"{text[:150]}... ({len(spec):,} characters)"


def _policy_class(name: str, given: str) -> type[KVPolicy]:
    if name in POLICIES:
        return POLICIES[name]
    found = list(entry_points(group=ENTRY_POINTS, name=name))
    if not found:
        raise ValueError(f"kv_policy is {_short(given)}, expected one of {', '.join(policy_names())}")
    try:
        cls = found[0].load()
    except Exception as error:  # whatever the package raises
        raise ValueError(
            f"the policy {name!r} ({found[0].value}) cannot be loaded: {error}; "
            "repair or remove the package that brings it"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, KVPolicy)):
        raise ValueError(f"the policy {name!r} ({found[0].value}) is {cls!r}, expected a subclass of KVPolicy")
    return cls


def get_policy(policy: str | KVPolicy) -> KVPolicy:
    """The policy of this name, or the policy itself.

    Args:
        policy: an object, or a name with parameters if wanted: ``"windowkv"``,
            ``"windowkv(omega=8, recent_share=0.5)"``. Policies of other packages are found by their
            entry points (:data:`ENTRY_POINTS`).

    Raises:
        ValueError: unknown name, parameters that cannot be read or that the policy refuses.
        TypeError: neither a name nor a policy.
    """
    if isinstance(policy, KVPolicy):
        if not policy.in_python and type(policy).selection is KVPolicy.selection:
            raise TypeError(f"{type(policy).__name__} defines neither select() nor selection(), expected one of them")
        try:
            at_least(f"{type(policy).__name__}.n_observed", plain(policy.n_observed), 1)
        except (NotImplementedError, ValueError) as error:
            raise TypeError(str(error)) from None
        return policy
    if not isinstance(policy, str):
        raise TypeError(
            f"kv_policy is {policy!r}, expected None, a name or a KVPolicy object such as WindowKV(omega=8)"
        )
    if len(policy) > _MAX_SPEC:
        raise ValueError(f"kv_policy is a text of {len(policy):,} characters, expected at most {_MAX_SPEC:,}")
    name, bracket, rest = policy.partition("(")
    cls = _policy_class(name.strip(), policy)
    expected = "expected parameters such as 'windowkv(omega=8, recent_share=0.5)'"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # about a text that is refused
            call = ast.parse(f"f({rest}" if bracket else "f()", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        names = [word.arg for word in call.keywords]
        if len(set(names)) < len(names):
            expected = "expected every parameter once"
            raise ValueError
        parameters = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # {[]}, brackets and signs by the hundred
        raise ValueError(f"kv_policy is {_short(policy)}, {expected}") from None
    known: list[str] = [own.name for own in fields(cls) if own.init] if is_dataclass(cls) else []
    if not set(parameters) <= set(known):
        takes = f"{name.strip()} takes the parameters {', '.join(known) or 'none'}"
        raise ValueError(f"kv_policy is {_short(policy)}; {takes}")
    try:
        return get_policy(cls(**parameters))
    except TypeError as error:
        raise ValueError(f"kv_policy is {_short(policy)}: {error}") from None
