"""Options of policies: checked when one is created, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from windowkv_edge import H2O, AdaKV, ExpectedAttention, HeadKV, KVPolicy, PyramidKV, WindowKV, get_policy


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("snapkv(window_size=2147483648)", r"below 2\^31"),
        ("streamingllm(n_sink=2147483648)", r"below 2\^31"),
        ("windowkv(omega=2147483648)", r"below 2\^31"),
        ("snapkv(window_size=8, window_size=9)", "every parameter once"),
        ("snapkv(window_size=" + "-" * 5000 + "1)", "characters, expected at most 2,000"),
        ("snapkv(" + "(" * 5000 + ")", "characters, expected at most 2,000"),
        ("windowkv(omega=" + "[" * 5000 + "]" * 5000 + ")", "characters, expected at most 2,000"),
        ("snapkv(window_size=" + "9" * 5000 + ")", "characters, expected at most 2,000"),
        ("x" * 5000, "characters, expected at most 2,000"),
        ("snapkv(window_size=" + "-" * 1900 + "1)", "expected parameters such as"),
        ("windowkv(omega=" + "[" * 900 + "]" * 900 + ")", "expected parameters such as"),
        ("x" * 1900, "expected one of auto"),
        ("snapkv(window_size=True)", "window_size is True"),
        ("snapkv(window_size='a')", "window_size is 'a'"),
        ("snapkv(window_size=8.0)", "window_size is 8.0"),
        ("windowkv(protect_first='no')", "protect_first is 'no', expected True or False"),
        ("windowkv(whole_windows=1)", "whole_windows is 1, expected True or False"),
        ("windowkv(lam=1e999)", "lam is inf, expected a finite number"),
        ("windowkv(lam=" + "1" * 400 + ")", "expected a finite number"),
        ("pyramidkv(beta=1e999)", "beta is inf, expected a finite number"),
        ("headkv(importance=5)", "importance is 5, expected HeadScores, a file"),
        ("expected-attention(neox='a')", "neox is 'a', expected True or False"),
        ("expected-attention(freq_base=-1)", "freq_base is -1, expected a finite number"),
    ],
    ids=lambda value: value[:40] if "(" in value else "",
)
def test_parameters_are_checked_where_they_are_given(policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        get_policy(policy)
    assert len(str(caught.value)) < 700  # does not repeat thousands of signs


@pytest.mark.parametrize("bad", [np.float64("nan"), np.float32("inf"), np.bool_(True), np.array("x"), np.array([1]), "0.5", None])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: WindowKV(recent_share=x), lambda x: WindowKV(lam=x), lambda x: AdaKV(alpha_safeguard=x),
        lambda x: PyramidKV(beta=x), lambda x: HeadKV(beta=x), lambda x: H2O(n_observed=x), lambda x: WindowKV(omega=x),
    ],
)  # fmt: skip
def test_what_is_no_number(make: Callable[[Any], KVPolicy], bad: Any) -> None:
    with pytest.raises(ValueError, match=r"is .*, expected"):
        make(bad)


def test_numbers_of_numpy() -> None:
    """They are stored as Python's, so that a policy prints, compares and is copied as if these had been given."""
    given = WindowKV(omega=np.int64(8), recent_share=np.float32(0.5), lam=np.float64(3), protect_first=np.bool_(True))
    assert repr(given) == repr(WindowKV(omega=8, recent_share=0.5, lam=3.0, protect_first=True))
    assert H2O(n_observed=np.uint16(9)).n_observed == 9
    assert ExpectedAttention(freq_base=np.float32(10000)).freq_base == 10000.0

    @dataclass(frozen=True, kw_only=True)
    class Own(KVPolicy):
        size: int = 4
        name = "own"

        @property
        def n_observed(self) -> Any:
            return np.int64(self.size)

        def select(self, scores: Any, budget: int, ctx: Any) -> Any:
            return ctx.positions

    assert get_policy(Own()) == Own()
    for bad in (0, 2**31, True):
        with pytest.raises(TypeError, match=r"Own.n_observed is .*, expected an int of at least 1"):
            get_policy(Own(size=bad) if bad is not True else type("Own", (Own,), {"n_observed": True})())
