"""Every policy of the package in one table: options to vary, the definition in NumPy that it equals, what it spends.

A new policy gets a row in ``ROWS``; the tests of unit/test_selection.py and their like then run over it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from hypothesis import strategies as st
from reference import adakv, budgets, corm, h2o, headkv, kvzip, ours, pyramidkv, snapkv, streamingllm, tova, windowkv
from reference.common import Cache, Kept, sizes

from windowkv_edge import (
    CORM,
    H2O,
    TOVA,
    AdaKV,
    Auto,
    ExpectedAttention,
    Full,
    HeadKV,
    HeadScores,
    KeyDiff,
    KVPolicy,
    KVzip,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    WindowAdaKV,
    WindowHeadKV,
    WindowKV,
)
from windowkv_edge.heads import ModelHeads
from windowkv_edge.policies import HeadKVR2, Task, WindowKVPaper
from windowkv_edge.policies.headkv import ByImportance

Options = st.SearchStrategy[Any]


class View(NamedTuple):
    """What a definition looks at."""

    positions: Cache
    scores: Cache
    token_scores: Cache | None
    n_cells: int
    task: Task
    n_past: int


Total = Literal["all", "model", "layer", "equal"]


@dataclass(frozen=True)
class Row:
    """A policy of the package.

    Attributes:
        options: objects of the policy, options varied.
        kept: the definition; None where the policy itself is one, in NumPy.
        total: what its budgets sum to: all cells; those of the model; those of every layer; those that the smallest head
            of every layer allows.
    """

    options: Options
    kept: Callable[[Any, View], Kept] | None
    total: Total


#
# options
#

sizes_of_windows = st.one_of(st.integers(1, 12), st.integers(1, 40))
kernels = st.sampled_from([1, 3, 7, 21])
safeguards = st.sampled_from([0.0, 0.2, 0.5, 1.0])

# windows chosen inside each head, and single tokens beside them
head_windows: dict[str, Options] = {
    "omega": sizes_of_windows,
    "window_size": sizes_of_windows,
    "recent_share": st.sampled_from([1.0, 0.25]),
    "carry": st.integers(0, 6),
    "gamma": st.integers(1, 3),
    "share": st.sampled_from(["first", "mean"]),
    "protect_first": st.booleans(),
}
token_windows: dict[str, Options] = {
    **head_windows,
    "gamma": st.just(1),
    "token_share": st.sampled_from([0.3, 0.5, 1.0]),
    "window_floor": st.sampled_from([0, 5, 64]),
}
# windows that are scored in every query head
each_query_head: dict[str, Options] = {
    "carry": st.just(0),
    "share": st.just("first"),
    "query_heads": st.just("each"),
}
layer_windows: dict[str, Options] = {
    "omega": sizes_of_windows,
    "window_size": sizes_of_windows,
    "omega_aggregation": st.sampled_from([None, 1, 16]),
    "window_size_aggregation": st.sampled_from([None, 1, 24]),
    "recent_share": st.sampled_from([1.0, 0.5, 0.25, 0.1]),
    "carry": st.integers(0, 12),
    "localization": st.sampled_from(["average", "max"]),
    "aggregation": st.sampled_from(["average", "max"]),
    "gamma": st.integers(1, 9),
    "share": st.sampled_from(["first", "mean"]),
    "scope": st.sampled_from(["layer", "head"]),
    "budget": st.sampled_from(["arithmetic", "flat"]),
    "lam": st.floats(0.5, 30),
    "accounting": st.sampled_from(["native", "paper"]),
    "protect_first": st.booleans(),
    "whole_windows": st.booleans(),
}
heads_by_score: dict[str, Options] = {"alpha_safeguard": safeguards, "across": st.sampled_from(["layer", "model"])}
betas = st.sampled_from([1.0, 1.005, 1.2, 2.0, 5.0, 10.0])


def with_scores(policy: KVPolicy, n_layer: int, n_head: int, seed: int) -> KVPolicy:
    """The policy with head scores, where it takes some: some heads matter most, many not at all."""
    if not isinstance(policy, ByImportance):
        return policy
    if isinstance(policy, Auto) and (seed % 3 == 0 or policy.across == "layer"):
        return policy  # auto does without scores, too
    rng = np.random.default_rng(seed)
    scores = rng.random((n_layer, n_head)) ** 4 * (rng.random((n_layer, n_head)) < 0.7)
    model = ModelHeads("model", {}, n_layer, n_head, tuple(range(n_layer)))
    return dataclasses.replace(policy, importance=HeadScores({"r": scores, "r2": scores})).bind(model)


#
# definitions
#


def of_windows(p: WindowKV, task: Task) -> dict[str, Any]:
    """The options of a policy's windows under the names of the definitions, for a prompt with this task."""
    omega, window_size, strategy = p.omega, p.window_size, p.localization
    if (task if p.task == "auto" else p.task) == "aggregation":
        strategy = p.aggregation
        omega, window_size = p.omega_aggregation or omega, p.window_size_aggregation or window_size
    same = ("gamma", "share", "scope", "query_heads", "recent_share", "carry", "protect_first")
    return {
        "omega": omega,
        "window_size": window_size,
        "strategy": strategy,
        **{name: getattr(p, name) for name in same},
    }


def of_tokens(p: WindowKV, v: View) -> dict[str, Any]:
    if p.token_share == 0:
        return {}
    return {"token_scores": v.token_scores, "token_share": p.token_share, "window_floor": p.window_floor}


def by_windows(p: WindowKV, v: View) -> Kept:
    options = {"budget": p.budget, "lam": p.lam, "accounting": p.accounting, **of_windows(p, v.task)}
    if p.token_share == 0:
        return windowkv.windowkv(v.positions, v.scores, v.n_cells, whole=p.whole_windows, **options)
    return ours.windowkv_tokens(v.positions, v.scores, n_cells=v.n_cells, **of_tokens(p, v), **options)


def by_windows_and_score(p: WindowAdaKV, v: View) -> Kept:
    options = {"alpha_safeguard": p.alpha_safeguard, "across": p.across, "budget": p.budget, "lam": p.lam, "n_past": v.n_past}
    return ours.window_adakv(v.positions, v.scores, v.n_cells, **options, **of_tokens(p, v), **of_windows(p, v.task))


def by_windows_and_importance(p: WindowHeadKV, v: View) -> Kept:
    options = {"beta": p.beta, "importance": p.shares, **of_tokens(p, v), **of_windows(p, v.task)}
    return ours.window_headkv(v.positions, v.scores, v.n_cells, **options)


def by_all(p: Auto, v: View) -> Kept:
    options = {"beta": p.beta, "importance": p.shares, "importance_floor": p.importance_floor}
    compete = {"alpha_safeguard": p.alpha_safeguard, "across": p.across, "budget": p.budget, "lam": p.lam}
    windows = {**of_tokens(p, v), **of_windows(p, v.task), "n_past": v.n_past}
    return ours.auto(v.positions, v.scores, v.n_cells, **options, **compete, **windows)


def by_scores(p: SnapKV, v: View) -> Kept:
    own = snapkv.published if p.accounting == "paper" else snapkv.snapkv
    return own(v.scores, v.n_cells, window_size=p.window_size, kernel_size=p.kernel_size)


def by_pyramid(p: PyramidKV, v: View) -> Kept:
    own = pyramidkv.published if p.accounting == "paper" else pyramidkv.pyramidkv
    return own(v.scores, v.n_cells, window_size=p.window_size, kernel_size=p.kernel_size, beta=p.beta)


def by_competition(p: AdaKV, v: View) -> Kept:
    options = {"window_size": p.window_size, "kernel_size": p.kernel_size, "alpha_safeguard": p.alpha_safeguard}
    if p.accounting == "paper":
        return adakv.published(v.scores, v.n_cells, **options)
    return adakv.adakv(v.scores, v.n_cells, across=p.across, n_past=v.n_past, **options)


def by_importance(p: HeadKV, v: View) -> Kept:
    own = headkv.published if p.accounting == "paper" else headkv.headkv
    options = {"window_size": p.window_size, "kernel_size": p.kernel_size, "beta": p.beta, "importance": p.shares}
    return own(v.scores, v.n_cells, **options)


#
# the table
#

pooled: dict[str, Options] = {
    "window_size": sizes_of_windows,
    "kernel_size": kernels,
    "accounting": st.sampled_from(["native", "paper"]),
}

ROWS: dict[type[KVPolicy], Row] = {
    Full: Row(st.just(Full()), lambda p, v: [[np.ones(len(s), dtype=bool) for s in layer] for layer in v.positions], "all"),
    StreamingLLM: Row(
        st.builds(StreamingLLM, n_sink=st.integers(0, 8)),
        lambda p, v: streamingllm.streamingllm(v.positions, v.n_cells, n_sink=p.n_sink),
        "equal",
    ),
    SnapKV: Row(st.builds(SnapKV, **pooled), by_scores, "equal"),
    PyramidKV: Row(st.builds(PyramidKV, **pooled, beta=st.floats(1, 40)), by_pyramid, "equal"),
    AdaKV: Row(
        st.one_of(
            st.builds(AdaKV, **pooled, alpha_safeguard=safeguards),
            st.builds(AdaKV, **{**pooled, "accounting": st.just("native")}, **heads_by_score),
        ),
        by_competition,
        "layer",
    ),
    HeadKV: Row(st.builds(HeadKV, **pooled, beta=betas), by_importance, "model"),
    HeadKVR2: Row(st.builds(HeadKVR2, **pooled, beta=betas), by_importance, "model"),
    WindowKV: Row(
        st.one_of(
            st.builds(WindowKV, **layer_windows),
            st.builds(WindowKV, **{**layer_windows, **each_query_head}),
            st.builds(WindowKV, **token_windows, accounting=st.sampled_from(["native", "paper"])),
        ),
        by_windows,
        "equal",
    ),
    WindowKVPaper: Row(st.builds(WindowKVPaper, gamma=st.integers(1, 9)), by_windows, "equal"),
    WindowAdaKV: Row(
        st.one_of(
            st.builds(WindowAdaKV, **head_windows, **heads_by_score),
            st.builds(WindowAdaKV, **{**head_windows, **each_query_head}, **heads_by_score),
            st.builds(WindowAdaKV, **token_windows, **heads_by_score),
        ),
        by_windows_and_score,
        "layer",
    ),
    WindowHeadKV: Row(
        st.one_of(
            st.builds(WindowHeadKV, **head_windows, beta=betas),
            st.builds(WindowHeadKV, **{**head_windows, **each_query_head}, beta=betas),
            st.builds(WindowHeadKV, **token_windows, beta=betas),
        ),
        by_windows_and_importance,
        "model",
    ),
    Auto: Row(
        st.builds(
            Auto,
            **token_windows,
            alpha_safeguard=safeguards,
            beta=betas,
            importance_floor=st.sampled_from([0, 3, 64]),
            across=st.sampled_from(["layer", "model", "model"]),
        ),
        by_all,
        "layer",
    ),
    TOVA: Row(
        st.builds(TOVA, window_size=st.sampled_from([1, 1, 5, 40])),
        lambda p, v: tova.tova(v.positions, v.scores, v.n_cells, window_size=p.window_size),
        "equal",
    ),
    CORM: Row(
        st.builds(CORM, window_size=sizes_of_windows, n_recent=st.sampled_from([0, 1, 20, 200])),
        lambda p, v: corm.corm(v.scores, v.n_cells, n_recent=p.n_recent),
        "equal",
    ),
    H2O: Row(
        st.builds(H2O, recent_share=st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        lambda p, v: h2o.h2o(v.scores, v.n_cells, recent_share=p.recent_share),
        "equal",
    ),
    KVzip: Row(
        st.builds(KVzip, alpha_safeguard=safeguards),
        lambda p, v: kvzip.kvzip(v.scores, v.n_cells, alpha_safeguard=p.alpha_safeguard, n_past=v.n_past),
        "model",
    ),
    KeyDiff: Row(st.builds(KeyDiff), None, "equal"),
    ExpectedAttention: Row(
        st.builds(ExpectedAttention, neox=st.booleans(), freq_base=st.just(1e4), n_sink=st.integers(0, 6)), None, "equal"
    ),
}

NATIVE = st.one_of(*(row.options for row in ROWS.values() if row.kept))
"""Any policy that native code serves."""


def row_of(policy: KVPolicy) -> Row:
    return ROWS[type(policy)]


def kept(
    policy: KVPolicy,
    positions: Cache,
    scores: Cache,
    n_cells: int,
    task: Task = "localization",
    token_scores: Cache | None = None,
    n_past: int | None = None,
) -> Kept:
    """The cells that stay, by definition.

    Args:
        policy: bound to its model.
        positions: per layer and kv head int32 [cells], ascending.
        scores: per layer and kv head float32 [cells], mean attention of the observation window.
        n_cells: average cells per (layer, kv head) that stay.
        task: the prompt's.
        token_scores: the same by the last ``token_window_size`` tokens, for policies with ``token_share``.
        n_past: cells of a head that has lost none; None = as the last position that is held tells.
    """
    own = row_of(policy).kept
    assert own is not None, f"{policy.name} has no definition but its own"
    if n_past is None:
        n_past = 1 + max((int(pos[-1]) for layer in positions for pos in layer if len(pos)), default=-1)
    return own(policy, View(positions, scores, token_scores, n_cells, task, n_past))


def budgets_of(policy: KVPolicy, positions: Cache, n_cells: int, task: Task, stays: Kept) -> list[list[int]]:
    """Budgets, given the cells that stay: their number, unless windows stay or go as a whole."""
    if not isinstance(policy, WindowKV) or not policy.whole_windows:
        return [[int(own.sum()) for own in layer] for layer in stays]
    options = {"budget": policy.budget, "lam": policy.lam, "accounting": policy.accounting}
    size = {name: of_windows(policy, task)[name] for name in ("omega", "window_size", "gamma")}
    return windowkv.head_budgets(positions, n_cells, **options, **size)


def total(policy: KVPolicy, positions: Cache, n_cells: int) -> int | None:
    """Cells that the policy's budgets sum to; None where the authors' rounding decides."""
    cells = np.array(sizes(positions))
    if getattr(policy, "accounting", "native") == "paper":
        return None
    what = row_of(policy).total
    if what == "layer" and getattr(policy, "across", "layer") == "model":
        what = "model"
    if what == "all":
        return int(cells.sum())
    if what == "model":
        return int(min(n_cells * cells.size, cells.sum()))
    if what == "equal":
        return int(min(n_cells * cells.size, cells.min(axis=1).sum() * cells.shape[1]))
    room = budgets.shared(sizes(positions))
    return int(cells.shape[1] * sum(budgets.layers([n_cells] * len(room), room, n_cells)))


