"""The parts of a policy in Python are those of windowkv-policy.h: options, choices and their order, defaults."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from windowkv_edge import _native, get_policy
from windowkv_edge.policies.parts import Allocation, Parts, Scoring, Selection

HEADER = _native.HEADERS[0].read_text(encoding="utf-8")
ENUMS = re.findall(r"^enum wkv_(\w+) \{", HEADER, re.MULTILINE)
NUMBERS = {int: "int32_t", bool: "int32_t", float: "double"}

parts = pytest.mark.parametrize("part", [Scoring, Allocation, Selection])


def choices(enum: str) -> list[str]:
    """Of an enum of the header, in the order of their values."""
    of_c = _native.ffi.typeof(f"enum wkv_{enum}").relements
    names = sorted(of_c, key=of_c.__getitem__)
    assert [of_c[name] for name in names] == list(range(len(names)))
    assert names.pop() == f"WKV_{enum}_COUNT".upper()
    return [name.removeprefix(f"WKV_{enum}_".upper()).lower() for name in names]


@parts
def test_options_are_those_of_the_struct(part: Any) -> None:
    of_c = {name: field.type.cname for name, field in _native.ffi.typeof(f"struct wkv_{part.__name__.lower()}").fields}
    hints = get_type_hints(part)
    if part is Allocation:  # an array in Python
        assert (of_c.pop("importance"), of_c.pop("n_importance")) == ("double *", "int64_t")
        del hints["importance"]
    assert list(hints) == list(of_c)
    for name, hint in hints.items():
        assert of_c[name] == NUMBERS.get(hint, "int32_t"), name
        assert (hint in NUMBERS) == (name not in ENUMS), name


@parts
def test_choices_are_those_of_the_enum(part: Any) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(part)}
    for name, hint in get_type_hints(part).items():
        if name in ENUMS:
            assert list(get_args(hint)) == choices(name), name
            assert defaults[name] in (choices(name)[0], dataclasses.MISSING), name
        elif name != "importance" or defaults[name] is not None:
            assert defaults[name] == 0, name


def test_every_enum_is_an_option() -> None:
    assert len(ENUMS) >= 9
    assert set(ENUMS) <= {field.name for part in (Scoring, Allocation, Selection) for field in dataclasses.fields(part)}


@pytest.mark.parametrize("name", ENUMS)
def test_a_value_that_no_choice_has_is_refused(name: str) -> None:
    """Before anything looks at it."""
    for value in (-1, len(choices(name)), 2**31 - 1, -(2**31)):
        policy = _native.policy_struct(Parts(Scoring(), Allocation(), Selection(kind="full")))
        part = next(own for own in (policy.scoring, policy.allocation, policy.selection) if hasattr(own, name))
        setattr(part, name, value)
        shapes, budget = _native.ffi.new("struct wkv_shapes *"), _native.ffi.new("int32_t *")
        with pytest.raises(
            _native.NativeArgumentError, match=f"{name} is {value}, expected a value of enum wkv_{name}"
        ):
            _native.check(_native.lib.wkv_budgets(policy, shapes, 1, _native.ffi.NULL, _native.ffi.NULL, budget))


def test_native_policies_need_no_other_header() -> None:
    """native/policy knows what a policy is and nothing of llama.cpp or of the C interface around it."""
    root = Path(__file__).parent.parent.parent / "native"
    for path in sorted(root.glob("policy/*")):
        for name in re.findall(r'#include "(.*)"', path.read_text(encoding="utf-8")):
            assert name == "windowkv-policy.h" or (root / "policy" / name).exists(), f"{path.name} includes {name}"
    inner = [
        path for folder in ("policy", "llama") for path in root.glob(f"{folder}/*.h") if path.name != "windowkv-capi.h"
    ]
    assert len(inner) > 15
    for path in inner:
        assert '#include "windowkv.h"' not in path.read_text(encoding="utf-8"), path.name


def test_fewer_observers() -> None:
    """Windows shrink to them, and with these the tokens that always stay; what scores nothing stays as it is."""
    parts = get_policy("auto").parts()
    own = parts.observed_by(5)
    assert (own.scoring.window_size, own.scoring.token_window_size, own.selection.n_recent) == (5, 5, 5)
    assert own.allocation == parts.allocation and parts.observed_by(1000) == parts
    streaming = get_policy("streamingllm").parts()
    assert streaming.observed_by(5) == streaming
