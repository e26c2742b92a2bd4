"""Attention, budgets and selection in NumPy: the readable truth that the native code equals cell by cell.

Positions and scores of a cache are lists over layers of lists over kv heads of arrays [cells]; positions ascend. Every
selection is an order of cells, most important first, of which a budget takes a prefix. Ties go to the earlier cell.
Sums run in the order in which the arrays list their elements, in float64, so that the results do not depend on the
implementation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .policies import KVPolicy, Task

__all__ = ["apportion", "budgets", "flash_attn_ragged", "observe", "paper_window_budgets", "pour", "select"]

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
Order = list[int]
Cache = list[list[npt.NDArray[Any]]]
# cells and their keys, which never rise; inf where a cell stays, -inf where it goes
Ranking = tuple[Order, list[float]]

FULL, STREAMINGLLM, SNAPKV, PYRAMIDKV, WINDOWKV = range(5)
EQUAL, IMPORTANCE, SCORE = range(3)
LAYER, MODEL = range(2)


def _fields(policy: KVPolicy, task: Task) -> dict[str, Any]:
    """The options of a policy in one table."""
    s, a, sel = policy.parts(task)
    kinds = {"full": FULL, "recent": STREAMINGLLM, "tokens": SNAPKV, "windows": WINDOWKV}
    kind = PYRAMIDKV if a.layers == "pyramid" else kinds[sel.kind]
    return {
        "kind": kind, "alpha": s.window_size, "suffix": sel.n_recent, "n_sink": sel.n_sink, "kernel": s.kernel_size,
        "omega": sel.omega, "top_p": sel.top_p, "gamma": max(1, sel.gamma), "share": int(sel.share == "mean"),
        "scope": int(sel.scope == "head"), "shape": int(a.layers == "arithmetic"),
        "accounting": int(a.accounting == "paper"), "protect_first": sel.protect_first, "carry": s.kernel_size - 1,
        "suffix_share": sel.recent_share, "tokens": sel.token_share, "window_floor": sel.window_floor,
        "slope": a.lam or a.beta, "heads": ("equal", "importance", "score").index(a.heads),
        "span": int(a.across == "model"), "pool": 1 / a.beta if a.beta else 0.0, "pool_floor": a.importance_floor,
        "floor_share": a.alpha_safeguard, "importance": a.importance,
    }  # fmt: skip


#
# attention
#


def flash_attn_ragged(
    q: npt.NDArray[np.float32],
    k: npt.NDArray[np.float32],
    v: npt.NDArray[np.float32],
    ranges: IntArray,
    layer: int,
    scale: float,
    softcap: float = 0.0,
    causal: bool = True,
    sinks: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float64]:
    """Attention of kv heads that each own a region of rows of a pool (ggml_flash_attn_ragged).

    Scaled dot-product attention (Vaswani et al. 2017, equation 1) with the soft cap of Gemma 2 and the sinks of
    gpt-oss: logits per query head that count in the sum of the softmax and have no value. Shapes in NumPy order.

    Args:
        q: [n_head, n_tokens, n_embd_k].
        k: [n_rows, n_embd_k], row = one cell of one kv head.
        v: [n_rows, n_embd_v].
        ranges: [n_layer, n_head_kv, 2], first row and cells; kv heads serve n_head / n_head_kv consecutive query heads.
        layer: plane of ranges.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logit / softcap); 0 is none.
        causal: query t sees the first cells - n_tokens + t + 1 cells of its kv head, otherwise all.
        sinks: [n_head].

    Returns:
        [n_tokens, n_head, n_embd_v], zeros where a query sees no cell.
    """
    n_head, n_tokens, _ = q.shape
    n_gqa = n_head // ranges.shape[1]
    res = np.zeros((n_tokens, n_head, v.shape[1]))
    for head in range(n_head):
        first, cells = (int(x) for x in ranges[layer, head // n_gqa])
        for t in range(n_tokens):
            visible = max(0, cells - n_tokens + t + 1) if causal else cells
            if visible == 0:
                continue
            rows = slice(first, first + visible)
            logits = k[rows].astype(np.float64) @ q[head, t].astype(np.float64) * scale
            if softcap:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits - logits.max())
            total = weights.sum() + (np.exp(sinks[head] - logits.max()) if sinks is not None else 0.0)
            res[t, head] = weights @ v[rows].astype(np.float64) / total
    return res


#
# observation
#


def observe(
    queries: npt.NDArray[np.float32],
    query_pos: IntArray,
    keys: npt.NDArray[np.float32],
    key_pos: IntArray,
    scale: float,
) -> npt.NDArray[np.float64]:
    """Mean attention of observed queries over the cells of one kv head (WindowKV section 3.2, SnapKV section 3).

    Args:
        queries: [n_gqa, observed, head_dim], the query heads that share this kv head.
        query_pos: [observed].
        keys: [cells, head_dim].
        key_pos: [cells], ascending.
        scale: factor on the logits, 1/sqrt(head_dim) for most models.

    Returns:
        [cells], mean over queries and query heads.
    """
    logits = np.einsum("gqd,cd->gqc", queries.astype(np.float64), keys.astype(np.float64)) * scale
    logits = np.where(key_pos[None, None, :] <= query_pos[None, :, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    return np.asarray(weights.mean(axis=(0, 1)))


#
# budgets
#


def apportion(want: list[int], lo: list[int], hi: list[int], total: int) -> list[int]:
    """Integers between lo and hi that sum to total (clamped to the sums of the bounds), near to want.

    What clamping takes from some is given to the others in equal parts, the indivisible rest to the first of them.
    """
    res = [min(max(w, a), b) for w, a, b in zip(want, lo, hi, strict=True)]
    diff = min(max(total, sum(lo)), sum(hi)) - sum(res)
    while diff:
        sign = 1 if diff > 0 else -1
        open_ = [i for i in range(len(res)) if (res[i] < hi[i] if sign > 0 else res[i] > lo[i])]
        share = max(1, sign * diff // len(open_))
        for i in open_:
            room = hi[i] - res[i] if sign > 0 else res[i] - lo[i]
            step = sign * min(share, room, sign * diff)
            res[i] += step
            diff -= step
    return res


def _fall(first: int, last: int, n: int) -> list[int]:
    if n == 1:
        return [(first + last) // 2]
    return [first - (first - last) * i // (n - 1) for i in range(n)]


def paper_window_budgets(n_cells: int, n_layer: int, gamma: int, lam: float) -> list[int]:
    """Window budgets of the groups as in the WindowKV authors' code: equal integer steps, the last group by itself."""
    n_groups = math.ceil(n_layer / gamma)
    if n_groups == 1:
        return [n_cells]
    last = min(n_cells, math.floor(n_cells * gamma / lam))
    first = 2 * n_cells - last
    step = (first - last) // (n_groups - 1)
    return [first - g * step for g in range(n_groups - 1)] + [last]


def _want_windowkv(p: dict[str, float], n_layer: int, n_cells: int) -> list[int]:
    gamma = int(p["gamma"])
    n_groups = math.ceil(n_layer / gamma)
    groups = [n_cells] * n_groups
    if p["shape"] == 1 and n_groups > 1:
        if p["accounting"] == 1:
            groups = paper_window_budgets(n_cells, n_layer, gamma, p["slope"])
        else:
            last = min(n_cells, math.floor(n_cells * gamma / p["slope"]))
            groups = _fall(2 * n_cells - last, last, n_groups)
    return [groups[il // gamma] for il in range(n_layer)]


def _want_pyramidkv(p: dict[str, float], n_layer: int, n_cells: int) -> list[int]:
    suffix = min(int(p["suffix"]), n_cells)
    mean = n_cells - suffix
    last = min(mean, math.floor(mean / p["slope"]))
    return [suffix + b for b in _fall(2 * mean - last, last, n_layer)]


def pour(base: float, weight: list[float], lo: list[int], hi: list[int], total: int) -> list[int]:
    """Integers between lo and hi that sum to total (clamped to the sums of the bounds): base + level * weight.

    The level is that which spends total, so what clamping takes from some is given to the others by weight. Rounding
    favours the largest fractions.
    """

    def at(level: float) -> list[float]:
        return [min(max(base + level * w, float(a)), float(b)) for w, a, b in zip(weight, lo, hi, strict=True)]

    positive = [w for w in weight if w > 0]
    below, above = 0.0, max(map(float, hi), default=0.0) / min(positive) if positive else 0.0
    for _ in range(200):
        mid = 0.5 * (below + above)
        spent = 0.0
        for x in at(mid):
            spent += x
        if spent <= total:
            below = mid
        else:
            above = mid

    exact = at(below)
    res = [math.floor(x) for x in exact]
    part = [x - math.floor(x) for x in exact]
    rest = total - sum(res)
    for i in sorted(range(len(res)), key=lambda i: -part[i]):
        if rest > 0 and part[i] > 0 and res[i] < hi[i]:
            res[i] += 1
            rest -= 1
    return apportion(res, lo, hi, total)


def _layer_budgets(p: dict[str, Any], hi: list[int], n_cells: int) -> list[int]:
    n_layer = len(hi)
    if p["kind"] == WINDOWKV and p["accounting"] == 1:
        return [min(b + int(p["alpha"]), have) for b, have in zip(_want_windowkv(p, n_layer, n_cells), hi, strict=True)]

    want, floor = [n_cells] * n_layer, 1
    if p["kind"] == PYRAMIDKV:
        want, floor = _want_pyramidkv(p, n_layer, n_cells), int(p["suffix"]) + 1
    elif p["kind"] == WINDOWKV:
        want, floor = _want_windowkv(p, n_layer, n_cells), int(p["suffix"] + p["omega"])
    return apportion(want, [min(floor, n_cells, have) for have in hi], hi, n_cells * n_layer)


def _compete(own: list[int], share: float, ranked: list[Ranking]) -> list[int]:
    """AdaKV (arXiv 2407.11550, algorithm 1): of its budget each head is sure of a share, the rest goes to the best."""
    sure = []
    for budget, (_, key) in zip(own, ranked, strict=True):
        stays = min(budget, key.count(math.inf))
        sure.append(min(len(key), stays + math.floor((budget - stays) * share)))
    rest = sum(own) - sum(sure)
    best = sorted((-key[i], i, head) for head, (_, key) in enumerate(ranked) for i in range(sure[head], len(key)))
    for _, _, head in best[:rest]:
        sure[head] += 1
    return sure


def _importance_budgets(p: dict[str, Any], have: IntArray, n_cells: int) -> IntArray:
    """HeadKV (arXiv 2410.19258, section 3.2): a part of the cells is shared equally, the pool by importance."""
    lo = [min(int(p["suffix"]), n_cells, h) for h in have.ravel().tolist()]
    base = float(n_cells) - float(max(0, n_cells - p.get("pool_floor", 0))) * p.get("pool", 0.0)
    weight = [0.0] * have.size
    if p.get("pool", 0.0) > 0 or p["heads"] == IMPORTANCE:
        weight = np.asarray(p["importance"], dtype=np.float64).ravel().tolist()
    own = pour(base, weight, lo, have.ravel().tolist(), n_cells * have.size)
    return np.array(own, dtype=np.int32).reshape(have.shape)


def budgets(
    policy: KVPolicy,
    cells: npt.ArrayLike,
    n_cells: int,
    positions: Cache | None = None,
    scores: Cache | None = None,
    task: Task = "localization",
    token_scores: Cache | None = None,
) -> IntArray:
    """Cells that stay, for every (layer, kv head).

    Args:
        policy: the policy.
        cells: [n_layer, n_head_kv], cells that each head holds now.
        n_cells: average cells per (layer, kv head) that stay, >= 1.
        positions, scores, token_scores: as for :func:`select`; only policies whose heads compete look at them.
        task: the prompt's task.

    Returns:
        int32 [n_layer, n_head_kv]; the mean is n_cells unless the cache holds fewer (or ``accounting="paper"``).
    """
    p = _fields(policy, task)
    have = np.asarray(cells, dtype=np.int32)
    n_head_kv = have.shape[1]
    if p["kind"] == FULL:
        return have.copy()
    heads = p.get("heads", EQUAL)
    if heads == IMPORTANCE:
        return _importance_budgets(p, have, n_cells)
    if heads == SCORE and p.get("span", LAYER) == MODEL:
        assert positions is not None and scores is not None
        own = _importance_budgets(p, have, n_cells)
        every = [r for layer in _rankings(p, own, positions, scores, token_scores) for r in layer]
        won = _compete(own.ravel().tolist(), p["floor_share"], every)
        return np.array(won, dtype=np.int32).reshape(have.shape)

    hi = have.min(axis=1) if heads == EQUAL else have.sum(axis=1) // n_head_kv
    layers = _layer_budgets(p, hi.tolist(), n_cells)
    equal = np.repeat(np.array(layers, dtype=np.int32)[:, None], n_head_kv, axis=1)
    if heads == EQUAL:
        return equal
    assert positions is not None and scores is not None
    ranked = _rankings(p, equal, positions, scores, token_scores)
    shared = [_compete([b] * n_head_kv, p["floor_share"], r) for b, r in zip(layers, ranked, strict=True)]
    return np.array(shared, dtype=np.int32)


#
# selection
#


def _newest(n: int, start: int, stop: int) -> Order:
    """Cell indices start..stop-1 of n, newest first."""
    return list(range(stop - 1, start - 1, -1))


def _ranking(n: int, stays: Order, best: Order, key: list[float], goes: Order) -> Ranking:
    order = stays + best + goes
    assert len(order) == n
    return order, [math.inf] * len(stays) + key + [-math.inf] * len(goes)


def _rank_streamingllm(pos: IntArray, n_sink: int) -> Ranking:
    n = len(pos)
    sinks = [i for i in range(n - 1) if pos[i] < n_sink]
    return _ranking(n, [], [], [], _newest(n, n - 1, n) + sinks + _newest(n, len(sinks), n - 1))


def _rank_snapkv(score: FloatArray, p: dict[str, float]) -> Ranking:
    n, half = len(score), int(p["kernel"]) // 2
    n_review, n_suffix = max(0, n - int(p["alpha"])), min(n, int(p["suffix"]))
    review = score[:n_review]
    pooled = np.array([review[max(0, i - half) : i + half + 1].max() for i in range(n_review)], dtype=np.float32)
    best: Order = np.argsort(-pooled, kind="stable").tolist()
    key = [float(pooled[i]) for i in best]
    return _ranking(n, _newest(n, n - n_suffix, n), best, key, _newest(n, n_review, n - n_suffix))


def _window_score(score: npt.NDArray[np.float64], top_p: int) -> float:
    best = np.sort(score)[::-1][:top_p]
    return float(np.cumsum(best)[-1] / len(best))


def _suffix_of(n: int, p: dict[str, float], budget: int) -> int:
    """Newest cells that stay of a head with n cells and this budget."""
    return min(n, int(p["suffix"]), max(1, math.floor(budget * p["suffix_share"])))


def _rank_windows_and_tokens(
    p: dict[str, Any], own: list[int], pos: list[IntArray], score: list[FloatArray], tokens: list[FloatArray]
) -> list[Ranking]:
    """Windows for a part of the budget, then single tokens by the attention of more queries; heads that compete."""
    windows = [
        _rank_windows(q.astype(np.int64), s.astype(np.float64), p, b) for q, s, b in zip(pos, score, own, strict=True)
    ]
    suffix = [_suffix_of(len(q), p, b) for q, b in zip(pos, own, strict=True)]
    rest = [max(0, b - n) for n, b in zip(suffix, own, strict=True)]
    first = [
        n + max(min(r, int(p["window_floor"])), math.floor(r * (1.0 - p["tokens"])))
        for n, r in zip(suffix, rest, strict=True)
    ]
    if p.get("heads", EQUAL) == SCORE:
        first = _compete(first, p["floor_share"], windows)
    res: list[Ranking] = []
    for (order, _), n, s in zip(windows, first, tokens, strict=True):
        stays = order[: min(len(s), n)]
        best = sorted(set(range(len(s))) - set(stays), key=lambda i: (-s[i], i))
        res.append((stays + best, [math.inf] * len(stays) + [float(s[i]) for i in best]))
    return res


def _rank_windows(
    pos: npt.NDArray[np.int64], score: npt.NDArray[np.float64], p: dict[str, float], budget: int
) -> Ranking:
    n = len(pos)
    n_review = max(0, n - int(p["alpha"]))
    n_suffix = _suffix_of(n, p, budget)
    carry = int(p["carry"])
    score = np.array([score[max(0, i - carry) : i + 1].max() if i < n_review else score[i] for i in range(n)])
    block = pos[:n_review] // int(p["omega"])
    windows = [np.flatnonzero(block == b).tolist() for b in dict.fromkeys(block.tolist())]

    held = windows[:1] if p["protect_first"] else []
    value = {w[0]: _window_score(score[w], int(p["top_p"])) for w in windows}
    rest = sorted(windows[len(held) :], key=lambda w: -value[w[0]])

    order: Order = []
    key: list[float] = []
    for window in held + rest:
        order += sorted(window, key=lambda i: -score[i])
        key += [math.inf if window in held else value[window[0]]] * len(window)
    return _ranking(n, _newest(n, n - n_suffix, n), order, key, _newest(n, n_review, n - n_suffix))


def _cells_of(
    p: dict[str, float], pos: list[IntArray], score: list[FloatArray], head: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    if p["scope"] == 1:
        return pos[head].astype(np.int64), score[head].astype(np.float64)
    total = np.cumsum(np.stack(score).astype(np.float64), axis=0)[-1]
    return pos[0].astype(np.int64), total / len(score)


def _mean_cells(
    sets: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    sums: dict[int, list[float]] = {}
    for pos, score in sets:
        for q, s in zip(pos.tolist(), score.tolist(), strict=True):
            total = sums.setdefault(q, [0.0, 0])
            total[0] += s
            total[1] += 1
    keys = sorted(sums)
    return np.array(keys, dtype=np.int64), np.array([sums[q][0] / sums[q][1] for q in keys], dtype=np.float64)


def _translate(ranking: Ranking, shared: npt.NDArray[np.int64], own: IntArray) -> Ranking:
    """The ranking of a shared set in the indices of a head's own cells; what the set lacks comes last, newest first."""
    index = {int(q): i for i, q in enumerate(own)}
    found = [(index[int(shared[i])], key) for i, key in zip(*ranking, strict=True) if int(shared[i]) in index]
    seen = {i for i, _ in found}
    rest = [i for i in range(len(own) - 1, -1, -1) if i not in seen]
    return [i for i, _ in found] + rest, [key for _, key in found] + [-math.inf] * len(rest)


def _rankings(
    p: dict[str, Any], budget: IntArray, positions: Cache, scores: Cache, token_scores: Cache | None
) -> list[list[Ranking]]:
    """Rankings of all heads; budget is [n_layer, n_head_kv]."""
    if p["kind"] == STREAMINGLLM:
        return [[_rank_streamingllm(q, p["n_sink"]) for q in layer] for layer in positions]
    if p["kind"] in (SNAPKV, PYRAMIDKV):
        return [[_rank_snapkv(s, p) for s in layer] for layer in scores]

    n_layer, n_head_kv, gamma = len(positions), len(positions[0]), int(p["gamma"])
    over_model = p.get("heads", EQUAL) == SCORE and p.get("span", LAYER) == MODEL
    if over_model:  # heads that compete are ranked with what they would hold otherwise
        have = np.array([[len(q) for q in layer] for layer in positions], dtype=np.int32)
        budget = _importance_budgets(p, have, int(budget.sum()) // budget.size)
    elif p.get("heads", EQUAL) == SCORE:
        budget = np.repeat(budget.sum(axis=1, keepdims=True) // n_head_kv, n_head_kv, axis=1)

    if p.get("tokens", 0.0) > 0:
        assert token_scores is not None
        n_group = n_layer if over_model else 1
        ranked: list[list[Ranking]] = []
        for il0 in range(0, n_layer, n_group):
            heads = [(il, ih) for il in range(il0, il0 + n_group) for ih in range(n_head_kv)]
            own = [int(budget[at]) for at in heads]
            parts = ([c[il][ih] for il, ih in heads] for c in (positions, scores, token_scores))
            found = _rank_windows_and_tokens(p, own, *parts)
            ranked += [found[i : i + n_head_kv] for i in range(0, len(found), n_head_kv)]
        return ranked
    res: list[list[Ranking]] = [[([], []) for _ in range(n_head_kv)] for _ in range(n_layer)]
    for il0 in range(0, n_layer, gamma):
        group = range(il0, min(n_layer, il0 + gamma))
        for head in range(n_head_kv):
            sets = [_cells_of(p, positions[il], scores[il], head) for il in group]
            shared, score = _mean_cells(sets) if p["share"] == 1 else sets[0]
            ranking = _rank_windows(shared, score, p, int(budget[il0, head]))
            for il in group:
                res[il][head] = _translate(ranking, shared, positions[il][head])
    return res


def select(
    policy: KVPolicy,
    budget: npt.ArrayLike,
    positions: Cache,
    scores: Cache,
    task: Task = "localization",
    token_scores: Cache | None = None,
) -> list[list[npt.NDArray[np.bool_]]]:
    """Which cells stay.

    Args:
        policy: the policy.
        budget: [n_layer, n_head_kv], cells that stay.
        positions: per layer and kv head int32 [cells], ascending.
        scores: per layer and kv head float32 [cells], mean attention of the observation window.
        task: the prompt's task.
        token_scores: the same by the last ``token_alpha`` tokens, for policies with ``tokens``.

    Returns:
        Per layer and kv head bool [cells].
    """
    p = _fields(policy, task)
    if p["kind"] == FULL:
        return [[np.ones(q.shape, dtype=bool) for q in layer] for layer in positions]

    own = np.asarray(budget, dtype=np.int32)
    res = [[np.zeros(q.shape, dtype=bool) for q in layer] for layer in positions]
    for il, layer in enumerate(_rankings(p, own, positions, scores, token_scores)):
        for head, (order, _) in enumerate(layer):
            res[il][head][order[: own[il, head]]] = True
    return res
