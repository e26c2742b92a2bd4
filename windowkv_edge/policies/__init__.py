"""The policies and their registry: one file, one frozen dataclass each."""

from __future__ import annotations

from .adakv import AdaKV
from .base import KVPolicy, Task
from .full import Full
from .headkv import HeadKV, HeadKVR2
from .pyramidkv import PyramidKV
from .snapkv import SnapKV
from .streamingllm import StreamingLLM
from .windowkv import WindowKV
from .windowkv_adakv import WindowAdaKV
from .windowkv_headkv import WindowHeadKV

__all__ = [
    "POLICIES",
    "AdaKV",
    "Full",
    "HeadKV",
    "HeadKVR2",
    "KVPolicy",
    "PyramidKV",
    "SnapKV",
    "StreamingLLM",
    "Task",
    "WindowAdaKV",
    "WindowHeadKV",
    "WindowKV",
    "get_policy",
]

POLICIES: dict[str, type[KVPolicy]] = {
    cls.name: cls
    for cls in (
        Full,
        StreamingLLM,
        SnapKV,
        PyramidKV,
        AdaKV,
        HeadKV,
        HeadKVR2,
        WindowKV,
        WindowAdaKV,
        WindowHeadKV,
    )  # fmt: skip
}


def get_policy(policy: str | KVPolicy) -> KVPolicy:
    """The policy of this name with its defaults, or the policy itself.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a policy.
    """
    if isinstance(policy, KVPolicy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(
            f"kv_policy is {policy!r}, expected None, a name or a KVPolicy object such as WindowKV(omega=8)"
        )
    if policy not in POLICIES:
        raise ValueError(f"kv_policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    return POLICIES[policy]()
