"""One compaction with a policy: the native selection, or that of a policy written in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from . import _native
from .policies import CacheView, KVPolicy, Task
from .policies.parts import Parts
from .stats import cell_types

__all__ = ["Comes", "compact", "in_answer", "in_prompt", "n_in_answer", "n_observed"]

Comes = Literal["batch", "answer's start", "answer"]
"""What is evaluated behind a compaction: another batch of the prompt, an answer's first tokens, or more of it."""


def n_observed(policy: KVPolicy) -> int:
    """Queries at the end of the prompt that the cache keeps for a policy, whichever question it keeps cells for."""
    return max(int(own.n_observed) for own in (policy, *map(policy.for_query, policy.queries)))


N_ANSWER = 8
"""Queries that observe where an answer is compacted while it grows. 32 of them take nearly three times as long: with
512 cells of SmolLM2 and one thread 3.5 % of the time of 64 tokens, 8 take 1.3 %."""


def n_in_answer(policy: KVPolicy) -> int:
    """Queries that observe at least where an answer is compacted while it grows: the smaller window of two has as
    many, whatever the task."""
    if policy.in_python:
        return min(n_observed(policy), N_ANSWER)
    scorings = [policy.parts(task).scoring for task in get_args(Task)]
    sizes = [size for own in scorings for size in (own.window_size, own.token_window_size) if size > 0]
    return min([*sizes, N_ANSWER]) if sizes else 0


def in_prompt(parts: Parts) -> Parts:
    """The policy between two batches of a prompt.

    Where heads compete and head scores divide cells too (``auto``), heads compete for half of what they compete for
    otherwise: what the question attends to is not all that the next batch needs, which copies from this one.
    windowkv_edge/eval/README.md says what that gains.
    """
    own = parts.allocation
    if own.heads != "score" or own.importance is None:
        return parts
    return parts._replace(allocation=replace(own, alpha_safeguard=0.5 + 0.5 * own.alpha_safeguard))


def in_answer(policy: KVPolicy, parts: Parts) -> Parts:
    """The policy while an answer grows: with few observing tokens, unless it is made for that.

    Where heads compete and head scores divide cells too (``auto``), these alone divide, whatever the budget: the
    attention of a few tokens says less about a head. windowkv_edge/eval/README.md says what that gains.
    """
    if policy.answer_share == 0:
        return parts
    scoring, allocation, selection = parts.scoring, parts.allocation, parts.selection
    n, n_tokens = min(scoring.window_size, N_ANSWER), min(scoring.token_window_size, N_ANSWER)
    if allocation.heads == "score" and allocation.importance is not None:
        allocation = replace(
            allocation, heads="importance", across="layer", alpha_safeguard=0.0, importance_floor=0
        )
    return parts._replace(
        scoring=replace(scoring, window_size=n, token_window_size=n_tokens),
        allocation=allocation,
        selection=replace(selection, n_recent=min(selection.n_recent, n)),
    )


def compact(
    kv: _native.Context,
    policy: KVPolicy,
    n_cells: int,
    task: Task = "localization",
    n_observers: int | None = None,
    comes: Comes = "answer's start",
) -> int:
    """Evict all but the cells that the policy chooses.

    Args:
        kv: the cache.
        policy: bound to the model.
        n_cells: cells per (layer, kv head) that stay on average.
        task: the prompt's task.
        n_observers: tokens that score at most, the last ones; None = as many as the policy asks for.
        comes: what is evaluated next, see :func:`in_prompt` and :func:`in_answer`, which change native policies alone.

    Returns:
        Cells released over all layers and heads.

    Raises:
        NativeError: the policy does not fit the cache, a graph failed or memory ran out; nothing was evicted unless it
            says so. :class:`NativeArgumentError` is a ValueError too.
        KeyboardInterrupt: Ctrl-C, also while the policy's ``select`` runs; nothing was evicted then.
        Exception: whatever the policy's ``select`` raised, and ValueError or TypeError if its answer cannot be used;
            nothing was evicted.
    """
    if not policy.in_python:
        parts = policy.parts(task)
        if comes == "batch":
            parts = in_prompt(parts)
        elif comes == "answer":
            parts = in_answer(policy, parts)
        return kv.compact(
            _native.policy_struct(parts if n_observers is None else parts.observed_by(n_observers)), n_cells
        )

    stats = kv.stats()
    if int(kv.cells().max(initial=0)) <= n_cells:
        kv.prompt_done()
        return 0

    def choose(budget: int, positions: _native.Cache, scores: _native.Cache, keep: _native.Cache) -> None:
        n_past, n_gqa = int(stats.n_past), int(stats.n_gqa)
        own = kv.copy()
        view = CacheView(own, positions, n_past, n_gqa, cell_types(stats), task, n_observed(policy))
        try:
            _mark(policy, policy.select(scores, budget, view), positions, keep)
        finally:
            own.close()  # whoever keeps the view

    return kv.compact_custom(min(n_observed(policy), n_observers or n_observed(policy)), n_cells, choose)


def _mark(
    policy: KVPolicy,
    chosen: Sequence[Sequence[npt.ArrayLike]],
    positions: _native.Cache,
    keep: _native.Cache,
) -> None:
    """Set keep to 1 at the chosen positions."""
    what = f"{type(policy).__name__}.select()"
    n_layer, n_head_kv = len(positions), len(positions[0])
    try:
        got = len(chosen), sorted({len(layer) for layer in chosen})
    except TypeError:
        raise TypeError(
            f"{what} returned {type(chosen).__name__}, "
            f"expected positions[layer][head]: {n_layer} layers of {n_head_kv} arrays"
        ) from None
    if got != (n_layer, [n_head_kv]):
        raise ValueError(
            f"{what} returned {got[0]} layers of {', '.join(map(str, got[1])) or 0} kv heads, "
            f"expected {n_layer} of {n_head_kv}"
        )
    for il, layer in enumerate(chosen):
        for head, own in enumerate(layer):
            want, have = np.asarray(own), positions[il][head]
            if want.ndim != 1 or not (want.size == 0 or np.issubdtype(want.dtype, np.integer)):
                raise TypeError(
                    f"{what}: layer {il}, kv head {head}: an array of {want.dtype} with the shape {want.shape}, "
                    "expected integer positions [cells]"
                )
            at = np.searchsorted(have, want)
            wrong = (at == have.size) | (have[np.minimum(at, have.size - 1)] != want)
            if wrong.any():
                raise ValueError(
                    f"{what}: layer {il}, kv head {head} does not hold the position {want[wrong][0]}; "
                    "choose from ctx.positions[layer][head]"
                )
            if (n_twice := at.size - np.unique(at).size) > 0:
                raise ValueError(
                    f"{what}: layer {il}, kv head {head} returned {n_twice} of its {at.size} positions more than once, "
                    "expected each at most once"
                )
            keep[il][head][at] = 1
        counts = [int(own.sum()) for own in keep[il]]
        # a head that lost more cells than others in a shift cannot keep as many
        short = [n for n, have in zip(counts, positions[il], strict=True) if n < min(have.size, max(counts))]
        if not policy.ragged and short:
            raise ValueError(
                f"{what}: the heads of layer {il} keep {counts} cells, expected equally many; "
                "set ragged = True in the policy"
            )
