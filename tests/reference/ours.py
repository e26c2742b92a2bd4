"""What is ours: semantic windows whose heads compete or differ in importance, single tokens beside them, ``auto``.

Windows are :mod:`reference.windowkv`'s, competition is :mod:`reference.adakv`'s, importance :mod:`reference.headkv`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from . import windowkv
from .adakv import compete, even, unevicted
from .budgets import shared
from .common import Budgets, Cache, Kept, Ranking, best, heads, keep, sizes, split
from .headkv import by_importance


def window_part(own: int, n: int, *, window_size: int, recent_share: float, window_floor: int, token_share: float) -> int:
    """Cells of a head's budget that are spent on windows, recent cells included: all but token_share of what the recent
    cells leave, and at least window_floor."""
    recent = windowkv.n_recent(n, own, window_size, recent_share)
    rest = max(0, own - recent)
    return recent + max(min(rest, window_floor), math.floor(rest * (1.0 - token_share)))


def then_tokens(ranking: Ranking, n_windows: int, score: npt.NDArray[np.float32]) -> Ranking:
    """The first n_windows cells of a ranking by windows, then single cells by their own scores."""
    stays = ranking.order[:n_windows]
    rest = sorted(set(range(len(score))) - set(stays))
    order = [rest[i] for i in best(score[rest])]
    return Ranking(stays + order, [math.inf] * len(stays) + [float(score[i]) for i in order])


def windows_and_tokens(
    positions: Cache,
    scores: Cache,
    token_scores: Cache,
    own: Budgets,
    *,
    token_share: float,
    window_floor: int,
    recent_share: float,
    window_size: int,
    alpha_safeguard: float | None = None,
    across: str = "layer",
    due: Budgets | None = None,
    **windows: Any,
) -> list[list[Ranking]]:
    """Windows for a part of every budget, single tokens by the attention of more queries behind them.

    Windows keep an answer whole, tokens what the text as a whole attends to. With alpha_safeguard the heads of a layer, or
    of the model, compete for the windows as well (due: see :func:`won`).
    """
    n_head = len(positions[0])
    share = {"window_size": window_size, "recent_share": recent_share}
    ranked = windowkv.rankings(positions, scores, own, **share, **windows)

    def part_of(whole: Budgets) -> Budgets:
        return [
            [
                window_part(b, len(pos), window_floor=window_floor, token_share=token_share, **share)
                for b, pos in zip(*layer, strict=True)
            ]
            for layer in zip(whole, positions, strict=True)
        ]

    part = part_of(own)
    if alpha_safeguard is not None:
        part = won(part, ranked, alpha_safeguard, across, part_of(due or own))
    flat = zip([r for layer in ranked for r in layer], [b for layer in part for b in layer], heads(token_scores))
    return split([then_tokens(r, b, score) for r, b, (score,) in flat], n_head)


def won(own: Budgets, ranked: list[list[Ranking]], alpha_safeguard: float, across: str, due: Budgets | None) -> Budgets:
    """Budgets after the heads of each layer, or of the model, have competed.

    due: what heads would hold if none of their cells had been evicted, at least own; None = own.
    """
    whole = due or own
    if across == "layer":
        return [compete(b, alpha_safeguard, r, due=d) for b, r, d in zip(own, ranked, whole, strict=True)]
    flat, of_all = ([b for layer in cells for b in layer] for cells in (own, whole))
    return split(compete(flat, alpha_safeguard, [r for layer in ranked for r in layer], due=of_all), len(own[0]))


def rankings(
    positions: Cache,
    scores: Cache,
    own: Budgets,
    token_scores: Cache | None,
    token_share: float,
    window_floor: int,
    competition: dict[str, Any],
    **windows: Any,
) -> list[list[Ranking]]:
    """By windows alone, or by windows and tokens where these have a share."""
    if token_share == 0:
        return windowkv.rankings(positions, scores, own, **windows)
    assert token_scores is not None
    part = {"token_share": token_share, "window_floor": window_floor, **competition}
    return windows_and_tokens(positions, scores, token_scores, own, **part, **windows)


def windowkv_tokens(
    positions: Cache,
    scores: Cache,
    token_scores: Cache,
    n_cells: int,
    *,
    token_share: float,
    window_floor: int,
    budget: str = "flat",
    lam: float = 14.0,
    accounting: str = "native",
    **windows: Any,
) -> Kept:
    """WindowKV with single tokens beside the windows, the same number of cells for the heads of a layer."""
    size = {name: windows[name] for name in ("omega", "window_size", "gamma")}
    own = windowkv.head_budgets(positions, n_cells, budget=budget, lam=lam, accounting=accounting, **size)
    return keep(rankings(positions, scores, own, token_scores, token_share, window_floor, {}, **windows), own)


def window_headkv(
    positions: Cache,
    scores: Cache,
    n_cells: int,
    *,
    beta: float,
    importance: npt.NDArray[np.float64],
    token_scores: Cache | None = None,
    token_share: float = 0.0,
    window_floor: int = 0,
    **windows: Any,
) -> Kept:
    """Windows inside every head, with HeadKV's budgets."""
    have = [n for layer in sizes(positions) for n in layer]
    flat = by_importance(
        have, n_cells, beta=beta, importance=importance, least=windows["window_size"]
    )
    own = split(flat, len(positions[0]))
    return keep(rankings(positions, scores, own, token_scores, token_share, window_floor, {}, **windows), own)


def window_adakv(
    positions: Cache,
    scores: Cache,
    n_cells: int,
    *,
    alpha_safeguard: float,
    across: str,
    token_scores: Cache | None = None,
    token_share: float = 0.0,
    window_floor: int = 0,
    budget: str = "flat",
    lam: float = 14.0,
    divide: Callable[[list[int]], list[int]] | None = None,
    n_past: int,
    **windows: Any,
) -> Kept:
    """Windows for which the heads of a "layer", or of the "model", compete.

    divide: what each head of the model would hold without competition, of heads that hold so many cells; all the same if
        None.
    n_past: cells of a head that has lost none.
    """
    n_head, due = len(positions[0]), None
    if across == "model":
        divide = divide or (lambda have: even(have, n_cells))
        have = [n for layer in sizes(positions) for n in layer]
        own = divide(have)
        per_head = split(own, n_head)
        due = split(list(map(max, own, divide(unevicted(have, n_past)))), n_head)
    else:
        size = {name: windows[name] for name in ("omega", "window_size", "gamma")}
        layers = windowkv.layer_budgets(shared(sizes(positions)), n_cells, budget=budget, lam=lam, **size)
        per_head = [[b] * n_head for b in layers]
    competition = {"alpha_safeguard": alpha_safeguard, "across": across, "due": due}
    ranked = rankings(
        positions, scores, per_head, token_scores, token_share, window_floor, competition, **windows
    )
    return keep(ranked, won(per_head, ranked, **competition))


def auto(
    positions: Cache,
    scores: Cache,
    n_cells: int,
    *,
    beta: float,
    importance: npt.NDArray[np.float64] | None,
    importance_floor: int,
    **options: Any,
) -> Kept:
    """Windows and tokens for which all heads of the model compete; what a head is sure of follows from its importance.

    options: of :func:`window_adakv`. Without importance, or with competition inside layers, all heads count the same.
    """
    divide = None
    if importance is not None and options["across"] == "model":
        divide = partial(
            by_importance,
            n_cells=n_cells,
            beta=beta,
            importance=importance,
            least=options["window_size"],
            importance_floor=importance_floor,
        )
    return window_adakv(positions, scores, n_cells, divide=divide, **options)
