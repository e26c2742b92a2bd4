"""WindowKV (arXiv 2503.17922): semantic windows, omega consecutive tokens each, stay or go as a whole.

What the paper does not have is marked as ours; with the defaults of the arguments it is off.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from . import budgets
from .common import Budgets, Cache, Kept, Ranking, best, keep, newest, sizes, total

Rows = list[npt.NDArray[np.float64]]
Cells = tuple[npt.NDArray[np.int32], Rows]
"""Positions, ascending, [cells], and one or more rows of scores for them: a window scores the mean over the rows."""


#
# one set of cells
#


def mean(rows: Rows) -> npt.NDArray[np.float64]:
    """Mean over rows, summed in their order."""
    res = np.zeros(len(rows[0]))
    for row in rows:
        res += row
    return res / len(rows)


def window_score(score: npt.NDArray[np.float64], omega: int, strategy: str) -> float:
    """Mean of the top-p token scores of a window, p = omega ("average") or omega / 2 ("max"), section 3.2."""
    top_p = omega if strategy == "average" else max(1, omega // 2)
    top = sorted(score.tolist(), reverse=True)[:top_p]
    return total(top) / len(top)


def grid(pos: npt.NDArray[np.int32], omega: int) -> list[list[int]]:
    """The cells of every window: windows stand on a grid of positions, so evicted cells leave shorter ones."""
    windows: dict[int, list[int]] = {}
    for i, at in enumerate(pos.tolist()):
        windows.setdefault(at // omega, []).append(i)
    return list(windows.values())


def n_recent(n: int, budget: int, window_size: int, recent_share: float) -> int:
    """Newest cells that stay of a head with n cells: the observation window, or (ours) the part of it that fits into a
    share of the head's budget."""
    return min(n, window_size, max(1, math.floor(budget * recent_share)))


def carried(pos: npt.NDArray[np.int32], score: npt.NDArray[np.float64], carry: int) -> npt.NDArray[np.float64]:
    """Ours: what follows an attended token is often what the answer needs, so scores reach carry positions further."""
    first = np.searchsorted(pos, pos.astype(np.int64) - carry)
    return np.array([score[first[i] : i + 1].max() for i in range(len(score))])


def rank(
    cells: Cells,
    budget: int,
    *,
    omega: int,
    window_size: int,
    strategy: str = "average",
    recent_share: float = 1.0,
    carry: int = 0,
    protect_first: bool = False,
) -> tuple[Ranking, int]:
    """The recent cells, then windows from the best to the worst, then the rest of the observation window.

    Inside a window the best tokens come first: they stay when the budget ends there. protect_first (ours): the first
    window comes before the others, for attention sinks in it.

    Returns:
        The ranking, and how many of its cells stay if windows stay or go as a whole.
    """
    n = len(cells[0])
    n_review = max(0, n - window_size)
    stays = n_recent(n, budget, window_size, recent_share)
    rows = [carried(cells[0][:n_review], row[:n_review], carry) for row in cells[1]]

    windows = grid(cells[0][:n_review], omega)
    value = [total(window_score(row[w], omega, strategy) for row in rows) / len(rows) for w in windows]
    if protect_first and windows:
        value[0] = math.inf
    by_value = best(np.array(value))

    token = mean(rows)
    order, key = newest(n - stays, n), [math.inf] * stays
    for i in by_value:
        order += [windows[i][j] for j in best(token[windows[i]])]
        key += [value[i]] * len(windows[i])
    rest = newest(n_review, n - stays)
    whole = whole_windows([windows[i] for i in by_value], n_review, budget - stays, omega)
    return Ranking(order + rest, key + [-math.inf] * len(rest)), stays + sum(map(len, whole))


def whole_windows(windows: list[list[int]], n_review: int, budget: int, omega: int) -> list[list[int]]:
    """Of windows, best first, those that stay when the worst are dropped until budget cells are left, or fewer.

    As in the authors' code the last window before the observation window counts omega cells, though it may be shorter.
    """
    too_many = n_review - budget
    stays = list(windows)
    while too_many > 0 and stays:
        last = stays.pop()
        too_many -= omega if n_review - 1 in last else len(last)
    return stays


#
# groups of layers that share their windows
#


def over_layers(sets: list[Cells]) -> Cells:
    """Ours: the cells that any layer holds, scored by the mean over the layers that hold them."""
    found: dict[int, list[float]] = {}
    for pos, (score,) in sets:
        for at, s in zip(pos.tolist(), score.tolist(), strict=True):
            found.setdefault(at, []).append(s)
    pos = sorted(found)
    return np.array(pos, dtype=np.int32), [np.array([total(found[at]) / len(found[at]) for at in pos])]


def translate(ranking: Ranking, shared: npt.NDArray[np.int32], own: npt.NDArray[np.int32]) -> Ranking:
    """A ranking of shared positions for a head that holds its own: what is not shared comes last, newest first."""
    at = {q: i for i, q in enumerate(own.tolist())}
    found = [(at[q], key) for q, key in zip(shared[ranking.order].tolist(), ranking.key, strict=True) if q in at]
    seen = {i for i, _ in found}
    rest = [i for i in newest(0, len(own)) if i not in seen]
    return Ranking([i for i, _ in found] + rest, [key for _, key in found] + [-math.inf] * len(rest))


def shared_rankings(
    positions: Cache,
    scores: Cache,
    own: Budgets,
    *,
    gamma: int = 1,
    share: str = "first",
    scope: str = "head",
    query_heads: str = "mean",
    **windows: Any,
) -> list[list[tuple[Ranking, int, npt.NDArray[np.int32]]]]:
    """Of all heads the results of :func:`rank` and the positions these are about; gamma layers share them (section 3.3).

    Args:
        positions, scores: the cache; scores are [n_gqa, cells] for query_heads = "each".
        own: budgets of all heads; the first layer's count.
        gamma: layers per group, the last may be shorter.
        share: the scores of the group's "first" layer count, or (ours) their "mean".
        scope: one ranking for the heads of a "layer", as in the paper, or (ours) one for each "head".
        query_heads: windows score the mean over "each" query head, as in the authors' code, or their cells' scores are
            the "mean" over the query heads before.
        windows: see :func:`rank`.
    """

    def cells(il: int, head: int) -> Cells:
        of = scores[il] if scope == "layer" else [scores[il][head]]
        rows = [row.astype(np.float64) for score in of for row in np.atleast_2d(score)]
        return positions[il][head], rows if query_heads == "each" else [mean(rows)]

    n_layer, n_head = len(positions), len(positions[0])
    res: list[list[tuple[Ranking, int, npt.NDArray[np.int32]]]] = [[] for _ in range(n_layer)]
    for first in range(0, n_layer, gamma):
        group = range(first, min(n_layer, first + gamma))
        for head in range(n_head):
            chosen = cells(first, head) if share == "first" else over_layers([cells(il, head) for il in group])
            ranking = rank(chosen, own[first][head], **windows)
            for il in group:
                res[il].append((*ranking, chosen[0]))
    return res


def rankings(positions: Cache, scores: Cache, own: Budgets, **windows: Any) -> list[list[Ranking]]:
    """Rankings of all heads over their own cells; windows: see :func:`shared_rankings`."""
    found = shared_rankings(positions, scores, own, **windows)
    return [
        [translate(ranking, shared, pos) for (ranking, _, shared), pos in zip(*layer, strict=True)]
        for layer in zip(found, positions, strict=True)
    ]


#
# budgets
#


def group_budgets(n_layer: int, n_cells: int, gamma: int, lam: float) -> list[int]:
    """Per layer, the same in a group: from 2 C less the last group's down to C gamma / lambda (section 3.4).

    The code's last group: the paper's total / (lambda groups) is the same for groups of equal size. It never exceeds C,
    or budgets would rise.
    """
    n_group = math.ceil(n_layer / gamma)
    if n_group == 1:
        return [n_cells] * n_layer
    last = min(n_cells, math.floor(n_cells * gamma / lam))
    groups = budgets.falling(2 * n_cells - last, last, n_group)
    return [groups[il // gamma] for il in range(n_layer)]


def layer_budgets(
    room: list[int],
    n_cells: int,
    *,
    budget: str,
    gamma: int,
    lam: float,
    window_size: int,
    omega: int,
    accounting: str = "native",
) -> list[int]:
    """Per layer, with the mean n_cells: "arithmetic" as in the paper, or (ours) "flat".

    No layer gets less than the observation window and one semantic window, as far as room and n_cells reach. With
    accounting = "paper" budgets are those of the authors' code, and the observation window comes on top.
    """
    n_layer = len(room)
    if accounting == "paper":
        own = published_budgets(n_layer, n_cells, gamma=gamma, lam=lam) if budget == "arithmetic" else [n_cells] * n_layer
        return [min(b + window_size, have) for b, have in zip(own, room, strict=True)]
    want = group_budgets(n_layer, n_cells, gamma, lam) if budget == "arithmetic" else [n_cells] * n_layer
    return budgets.layers(want, room, n_cells, least=window_size + omega)


def head_budgets(positions: Cache, n_cells: int, **options: Any) -> Budgets:
    """Of all heads, the same in a layer; options: see :func:`layer_budgets`."""
    own = layer_budgets(budgets.alike(sizes(positions)), n_cells, **options)
    return [[b] * len(layer) for b, layer in zip(own, positions, strict=True)]


def windowkv(
    positions: Cache,
    scores: Cache,
    n_cells: int,
    *,
    omega: int,
    window_size: int,
    budget: str = "arithmetic",
    gamma: int = 1,
    lam: float = 14.0,
    accounting: str = "native",
    whole: bool = False,
    **windows: Any,
) -> Kept:
    """WindowKV; windows: see :func:`rank` and :func:`shared_rankings`.

    whole: windows stay or go as a whole, so that a head holds more cells than its budget, or fewer; one that holds nothing
    of what its group keeps has its newest cell.
    """
    size = {"omega": omega, "window_size": window_size, "gamma": gamma}
    own = head_budgets(positions, n_cells, budget=budget, lam=lam, accounting=accounting, **size)
    if not whole:
        return keep(rankings(positions, scores, own, **size, **windows), own)
    found = shared_rankings(positions, scores, own, **size, **windows)
    res = [
        [np.isin(pos, shared[ranking.order[:n]]) for (ranking, n, shared), pos in zip(*layer, strict=True)]
        for layer in zip(found, positions, strict=True)
    ]
    for layer in res:
        for stays in layer:
            stays[-1] |= not stays.any()
    return res


#
# the authors' code
#


def published_budgets(n_layer: int, n_cells: int, *, gamma: int, lam: float) -> list[int]:
    """Per layer, beside the observation window: equal whole steps, and the last group by itself.

    Their code needs gamma to divide the layers and two groups at least; here the last group may be shorter, and one group
    gets n_cells. No group gets more than the one before.
    """
    n_group = math.ceil(n_layer / gamma)
    if n_group == 1:
        return [n_cells] * n_layer
    last = min(n_cells, int(n_cells * gamma // lam))
    first = 2 * n_cells - last
    step = (first - last) // (n_group - 1)
    groups = [*(first - g * step for g in range(n_group - 1)), last]
    return [groups[il // gamma] for il in range(n_layer)]


def published(
    scores: Cache, n_cells: int, *, omega: int, window_size: int, gamma: int, lam: float, strategy: str
) -> Kept:
    """Whole windows go, the worst first, until the rest meets the budget as if no window were shorter.

    The observation window comes on top. A window scores the mean over the heads of what each finds in it. Of the group's
    layers the first chooses; where not even one window fits, only the observation window stays in all of them.

    Args:
        scores: of a whole prompt, per layer and kv head [cells], or [n_gqa, cells] for its query heads.
    """
    n_layer, n = len(scores), scores[0][0].shape[-1]
    n_review = max(0, n - window_size)
    windows = [range(i, min(i + omega, n_review)) for i in range(0, n_review, omega)]
    res: Kept = []
    for il, budget in enumerate(published_budgets(n_layer, n_cells, gamma=gamma, lam=lam)):
        if il % gamma == 0:
            rows = [row.astype(np.float64) for s in scores[il] for row in np.atleast_2d(s)]
            order = best(np.array([total(window_score(r[w], omega, strategy) for r in rows) / len(rows) for w in windows]))
            n_drop = max(0, math.ceil((n_review - budget) / omega))
            stays = np.ones(n, dtype=bool)
            stays[:n_review] = n_drop == 0
            if n_drop * omega < n_review:
                for i in order[: len(windows) - n_drop]:
                    stays[windows[i]] = True
        res.append([stays.copy() for _ in scores[il]])
    return res
