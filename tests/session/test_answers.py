"""Long answers: what they hold while they grow, which cells stay, and that nothing else changes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp.llama_speculative import LlamaDraftModel
from reference.corm import prominence
from reference.h2o import accumulated
from scripted import OTHERS, TOKENS, Script, answer, decode, once
from test_bounded_prompts import watch_observers
from test_limit import policy_of, watch_cells

from windowkv_edge import (
    CORM,
    H2O,
    POLICIES,
    TOVA,
    AdaKV,
    Auto,
    HeadScores,
    Llama,
    SnapKV,
    StreamingLLM,
    WindowHeadKV,
    WindowKV,
    _native,
)
from windowkv_edge.budget import TYPES
from windowkv_edge.compaction import N_ANSWER, Comes, compact, in_answer, in_prompt
from windowkv_edge.heads import ModelHeads

Open = Callable[..., Llama]

LIMIT, INTERVAL = 136, 16


def n_held(llm: Llama) -> float:
    kv = llm._kv
    assert kv is not None
    return float(kv.cells().mean())


def grow(llm: Llama, prompt: list[int], n: int, **kwargs: Any) -> list[float]:
    """Cells held after every token of an answer."""
    seen = []
    stream = llm.generate(prompt, temp=0.0, **kwargs)
    for _ in range(n):
        next(stream)
        seen.append(n_held(llm))
    stream.close()
    return seen


def logits(llm: Llama) -> npt.NDArray[np.float32]:
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


def n_reused(llm: Llama) -> int:
    """Graphs that llama.cpp did not have to build again."""
    return int(llama_cpp.llama_perf_context(llm.ctx).n_reused)


#
# what is held
#


@pytest.mark.parametrize("name", [*(name for name in POLICIES if name != "full"), "script"])
def test_answers_stay_within_the_limit(tiny: Path, opened: Open, name: str) -> None:
    llm = opened(tiny, kv_policy=policy_of(name), kv_limit=LIMIT, kv_interval=INTERVAL, n_batch=32)
    seen = grow(llm, TOKENS[:60], 600)
    assert max(seen) <= LIMIT
    cache = llm._kv_cache
    assert cache is not None
    bound = llm._answer_bound(cache)
    n_beside = llm._n_beside(cache, bound) if bound is not None and cache.bound.replays else 0  # of those who repeat
    assert n_beside == (24 if name == "kvzip" else 0)
    assert min(seen[100:]) >= LIMIT - INTERVAL - 2 - n_beside  # and it uses what it may
    assert llm.kv_stats().n_past == 60 + 599
    assert abs(llm.kv_stats().n_compactions - (659 - LIMIT + n_beside) / INTERVAL) <= 2


@pytest.mark.parametrize("policy", ["tova", "corm", "h2o", "streamingllm", "snapkv"])
def test_an_interval_is_enough(tiny: Path, opened: Open, policy: str) -> None:
    """Without a limit an answer holds what the budget grants and an interval; without both it grows."""
    llm = opened(tiny, kv_policy=policy, kv_budget=80, kv_interval=20)
    assert max(grow(llm, TOKENS[:200], 300)) == 100
    llm = opened(tiny, kv_policy=policy, kv_budget=80)
    assert max(grow(llm, TOKENS[:200], 300)) == 80 + 299


def test_a_share_grows_with_the_answer(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=0.25, kv_min_prompt=150, kv_interval=10)
    seen = grow(llm, TOKENS[:100], 400)
    assert max(seen[:50]) == 149  # shorter sequences are left whole
    granted = [(100 + i) // 4 for i in range(400)]
    assert all(own <= n + 10 for own, n in zip(seen[60:], granted[60:]))
    assert seen[-1] > 110


def test_the_interval_is_the_limits_slack(tiny: Path, opened: Open) -> None:
    counts = []
    for interval in (None, 30, 60):
        llm = opened(tiny, kv_policy="streamingllm", kv_limit=LIMIT, kv_interval=interval)
        grow(llm, TOKENS[:60], 500)
        counts.append(llm.kv_stats().n_compactions)
    assert counts[0] == pytest.approx((559 - LIMIT) / (LIMIT // 8), abs=2)
    assert counts[1:] == [pytest.approx((559 - LIMIT) / n, abs=2) for n in (30, 60)]


def test_one_token_at_a_time(tiny: Path, opened: Open) -> None:
    """As TOVA's paper evicts; by hand single tokens are an answer, too."""
    llm = opened(tiny, kv_policy="tova", kv_budget=50, kv_interval=1)
    llm.eval(TOKENS[:100])
    for token in OTHERS[:30]:
        llm.eval([token])
        assert n_held(llm) <= 51
    cells = [llm.kv_positions(0, head).tolist() for head in range(2)]
    assert cells[0] == cells[1] and cells[0][-1] == 129


def test_memory_is_flat(tiny: Path, opened: Open) -> None:
    """Cells do not move to larger pools between compactions, and graphs are used again."""
    llm = opened(tiny, kv_policy="snapkv", kv_limit=128, kv_interval=32)
    grow(llm, TOKENS[:60], 200)
    kv = llm._kv
    assert kv is not None
    peak, start, n_compactions = kv.stats().bytes_peak, n_reused(llm), kv.stats().n_compactions
    live = set()
    for token in OTHERS[:320]:
        llm.eval([token])
        live.add(int(kv.stats().bytes_live))
    assert len(live) == 1 and kv.stats().bytes_peak == peak
    assert n_reused(llm) - start >= 320 - (kv.stats().n_compactions - n_compactions)


def test_bad_intervals_are_refused(tiny: Path, opened: Open) -> None:
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="kv_interval is"):
            opened(tiny, kv_policy="snapkv", kv_interval=bad)
    with pytest.raises(ValueError, match="without kv_policy"):
        opened(tiny, kv_interval=10)
    with pytest.raises(ValueError, match="leaves nothing of the 128 cells"):
        opened(tiny, kv_policy="snapkv", kv_limit=128, kv_interval=128)


#
# which cells stay
#


@pytest.mark.parametrize("name", ["snapkv", "auto", "headkv-r2"])
def test_the_newest_tokens_stay(tiny: Path, opened: Open, name: str) -> None:
    """A share of the cells, whatever the last tokens attended to; not behind a prompt."""
    policy = policy_of(name)
    llm = opened(tiny, kv_policy=policy, kv_limit=LIMIT, kv_interval=INTERVAL)
    grow(llm, TOKENS[:60], 300)
    kv = llm._kv
    assert kv is not None
    boundary = int(kv.stats().n_boundary)
    newest = set(range(boundary - int((LIMIT - INTERVAL) * policy.answer_share), llm.n_tokens))
    assert len(newest) > 50
    for il, ih in np.ndindex(3, 2):
        assert newest <= set(llm.kv_positions(il, ih).tolist())


def test_head_scores_divide_answers(tiny: Path, opened: Open) -> None:
    """auto's heads do not compete by the attention of a few tokens: they hold the same cells in every compaction, more of
    them where the model's scores are higher, and with few cells too."""
    rng = np.random.default_rng(0)
    scores = HeadScores({kind: rng.random((3, 4)) ** 3 for kind in ("r", "r2")})
    llm = opened(tiny, kv_policy=Auto(importance=scores), kv_limit=LIMIT, kv_interval=INTERVAL)
    grow(llm, TOKENS[:60], 150)
    assert llm._kv_cache is not None and isinstance(llm._kv_cache.bound, Auto)
    shares = llm._kv_cache.bound.shares
    assert shares is not None
    seen, n = set(), llm.kv_stats().n_compactions
    for token in OTHERS[:300]:
        llm.eval([token])
        if llm.kv_stats().n_compactions > n:
            n = llm.kv_stats().n_compactions
            seen.add(tuple(llm.kv_stats().cells.ravel().tolist()))
    assert len(seen) == 1
    (cells,) = seen
    assert min(cells) < max(cells) and [cells[i] for i in np.argsort(shares.ravel())] == sorted(cells)


def test_what_competes_in_answers() -> None:
    """Heads without scores, and policies whose heads have none, compete as ever."""
    scores = HeadScores({"r2": np.arange(12.0).reshape(3, 4)})
    model = ModelHeads("", {}, 3, 2, (0, 1, 2))
    bound = Auto(importance=scores).bind(model)
    for policy, want in ((bound, "importance"), (Auto(), "score"), (AdaKV(), "score"), (SnapKV(), "equal")):
        parts = in_answer(policy, policy.parts())
        assert parts.allocation.heads == want and parts.scoring.window_size <= N_ANSWER
    # what competition gives where every head is sure of all of its budget
    sure = Auto(importance=scores, alpha_safeguard=1.0, importance_floor=0, window_size=8, token_window_size=8).bind(model)
    rng = np.random.default_rng(1)
    positions = [[np.arange(200, dtype=np.int32)] * 2 for _ in range(3)]
    planes = [[[rng.random(200, dtype=np.float32) for _ in range(2)] for _ in range(3)] for _ in range(2)]
    kept = []
    for parts in (sure.parts(), in_answer(bound, bound.parts())):
        own = _native.budgets(parts, np.full((3, 2), 200), 60, positions, *planes)
        kept.append(np.concatenate(sum(_native.select(parts, own, positions, *planes), [])))
    assert np.array_equal(*kept) and kept[0].sum() == 6 * 60


def test_what_competes_between_batches() -> None:
    """Half as much, where head scores divide; other policies are as ever."""
    scores = HeadScores({"r2": np.arange(12.0).reshape(3, 4)})
    model = ModelHeads("", {}, 3, 2, (0, 1, 2))
    for share, want in ((0.5, 0.75), (0.0, 0.5), (1.0, 1.0)):
        bound = Auto(importance=scores, alpha_safeguard=share).bind(model)
        parts, between = bound.parts(), in_prompt(bound.parts())
        assert between.allocation == replace(parts.allocation, alpha_safeguard=want)
        assert between[0] == parts[0] and between[2] == parts[2]
    for policy in (Auto(), AdaKV(), SnapKV(), WindowHeadKV(importance=scores).bind(model)):
        parts = policy.parts()
        assert in_prompt(parts) is parts


def test_what_compactions_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between batches, behind a prompt, and in an answer."""
    scores, seen = HeadScores({"r2": np.arange(12.0).reshape(3, 4)}), []
    bound = Auto(importance=scores).bind(ModelHeads("", {}, 3, 2, (0, 1, 2)))
    monkeypatch.setattr(_native, "policy_struct", lambda parts: parts.allocation)
    kv: Any = SimpleNamespace(compact=lambda allocation, n: seen.append((allocation.heads, allocation.alpha_safeguard)) or 0)
    for comes in get_args(Comes):
        compact(kv, bound, 60, comes=comes)
    assert seen == [("score", 0.75), ("score", 0.5), ("importance", 0.0)]


#
# what the prompt asked
#


def asked(document: str, question: str) -> list[Any]:
    return [{"role": "user", "content": f"{document}\n{question}"}]


def test_the_question_observes_its_answer(session: Open, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of it, within the limit, in every compaction; of a prompt that is no chat's nothing does."""
    llm = session(kv_policy="auto", kv_limit=256, kv_interval=64, n_batch=64)
    observed, seen = watch_observers(llm, monkeypatch), watch_cells(llm, monkeypatch)
    question = "What did Master Aldous buy?"
    llm.create_chat_completion(asked(document[:600], question), max_tokens=1, temperature=0.0)
    n_prompt, n = llm.n_tokens, llm.kv_stats().n_compactions
    observed.clear()
    seen.clear()
    for token in llm.tokenize(document[600:1500].encode(), add_bos=False)[:200]:
        llm.eval([token])
    n = llm.kv_stats().n_compactions - n
    assert n >= 2 and observed == [llm.tokenize(question.encode(), add_bos=False)[-4:]] * n
    assert llm.n_tokens == llm.kv_stats().n_past == n_prompt + 200
    assert len(seen) == 200 + n and max(seen) <= 256
    llm.create_completion(document[:600], max_tokens=1, temperature=0.0)
    assert llm._kv_asks == []


@pytest.mark.parametrize(
    ("policy", "n"),
    [
        (WindowKV(window_size=4, window_size_aggregation=16), 2),
        (Auto(window_size=4, token_window_size=32), 2),
        (SnapKV(window_size=1), 0),
        (Script(action=lambda: None), 4),
    ],
)
def test_half_of_the_smallest_window_is_the_answers(session: Open, document: str, policy: Any, n: int) -> None:
    llm = session(kv_policy=policy, kv_limit=256, kv_interval=64, n_batch=64)
    llm.create_chat_completion(asked(document[:600], "What did Master Aldous buy?"), max_tokens=1, temperature=0.0)
    assert llm._kv_asks == (llm.tokenize(b"What did Master Aldous buy?", add_bos=False)[-n:] if n else [])


def test_a_prompt_by_hand_is_no_chats(session: Open, document: str) -> None:
    """Whose question stands somewhere else."""
    llm = session(kv_policy="auto", kv_limit=256, kv_interval=64)
    tokens = llm.tokenize(document[:300].encode())
    for end in (llm.sample, lambda: llm.eval(tokens[:1]), lambda: llm.kv_compact(64)):
        llm.create_chat_completion(asked(document[:600], "What did Master Aldous buy?"), max_tokens=1, temperature=0.0)
        assert len(llm._kv_asks) == 4
        llm.eval(tokens)
        end()
        assert llm._kv_asks == []


@pytest.mark.parametrize(("n_prompt", "n_batch"), [(LIMIT, 64), (LIMIT - 2, 64), (60, 2), (60, 1)])
def test_the_question_finds_room(
    tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, n_prompt: int, n_batch: int
) -> None:
    """Behind prompts of the limit's length, and in small batches: then fewer of its tokens observe."""
    llm = opened(tiny, kv_policy="snapkv", kv_limit=LIMIT, kv_interval=64, n_batch=n_batch)
    grow(llm, TOKENS[:n_prompt], 1)
    llm._kv_asks = OTHERS[:4]
    seen, observed = watch_cells(llm, monkeypatch), watch_observers(llm, monkeypatch)
    for token in OTHERS[:150]:
        llm.eval([token])
    assert max(seen) <= LIMIT and len(observed) >= 2
    assert observed[0] == OTHERS[:4][4 - min(4, n_batch, LIMIT - n_prompt) :]
    assert all(own == OTHERS[:4][4 - min(4, n_batch) :] for own in observed[1:])


@pytest.mark.parametrize(("interval", "n"), [(10, 0), (16, 1), (60, 3), (64, 4), (90, 4)])
def test_few_tokens_observe_where_few_are_between(
    tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, interval: int, n: int
) -> None:
    """So that they are no more than a sixteenth of the interval."""
    llm = opened(tiny, kv_policy="snapkv", kv_limit=LIMIT, kv_interval=interval)
    grow(llm, TOKENS[:60], 1)
    observed = watch_observers(llm, monkeypatch)
    llm._kv_asks = OTHERS[:4]
    for token in OTHERS[:200]:
        llm.eval([token])
    assert observed == [OTHERS[:4][4 - n :]] * len(observed) and len(observed) >= 2


@pytest.mark.parametrize("kind", ["llama", "gpt-oss", "lfm2", "granite"])
def test_who_observes_an_answer_leaves_no_trace(models: dict[str, Path], opened: Open, kind: str) -> None:
    """Logits and cells are those without, where a policy does not look at scores."""
    found = []
    for limit, asks in ((132, []), (136, OTHERS[:4])):  # so that both are compacted at the same tokens, to as many cells
        interval = 64 + len(asks)
        llm = opened(models[kind], kv_policy=Script(action=lambda: None), kv_limit=limit, kv_interval=interval)
        grow(llm, TOKENS[:60], 1)
        llm._kv_asks = asks
        rows = []
        for token in OTHERS[:200]:
            llm.eval([token])
            rows.append(logits(llm))
        assert llm.kv_stats().n_compactions == 2 and llm.n_tokens == 260
        found.append((np.array(rows), llm.kv_positions(0, 0).tolist()))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("policy", ["streamingllm", "tova", "corm", "h2o"])
def test_policies_made_for_answers_ask_nothing(session: Open, document: str, policy: str) -> None:
    llm = session(kv_policy=policy, kv_limit=256, kv_interval=64, n_batch=64)
    llm.create_chat_completion(asked(document[:600], "Who?"), max_tokens=1)
    assert llm._kv_asks == []


def test_saved_questions_are_tokens(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_limit=LIMIT, kv_interval=INTERVAL)
    grow(llm, TOKENS[:60], 10)
    state = llm.save_state()
    for wrong in ([llm.n_vocab()], [-1], [1.5], [True], ["a"]):
        state.session["noted"]["asks"] = wrong  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="load_state.*what its prompt asked are no tokens"):
            llm.load_state(state)
    assert llm.n_tokens == 69


def test_pins_stay_in_answers(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_limit=LIMIT, kv_interval=INTERVAL)
    llm.kv_pin(3, 20)
    assert max(grow(llm, TOKENS[:60], 300)) <= LIMIT
    assert set(range(3, 20)) <= set(llm.kv_positions(1, 1).tolist())


def observed(llm: Llama, il: int, ih: int, of: Any) -> npt.NDArray[np.float64]:
    """A definition of the references for the cells of one head, by the queries that are held."""
    kv = llm._kv
    assert kv is not None
    n_gqa = kv.stats().n_gqa
    found = [kv.queries(il, ih * n_gqa + g) for g in range(n_gqa)]
    keys = kv.rows(il, ih, "k")
    pos = kv.positions(il, ih)
    return np.asarray(of(np.stack([rows for _, rows in found]), found[0][0], keys, pos, keys.shape[1] ** -0.5))


@pytest.mark.parametrize("cells", ["f32", "f16", "q8_0"])
def test_corm_keeps_what_stands_out(tiny: Path, opened: Open, cells: str) -> None:
    """By definition, before anything was evicted and behind a compaction."""
    policy = CORM(window_size=24, n_recent=10)
    llm = opened(tiny, kv_policy=policy, kv_budget=1.0, type_k=TYPES[cells], type_v=TYPES[cells])
    llm.eval(TOKENS[:150])
    for n_cells in (60, 40):
        want = {}
        for il, ih in np.ndindex(3, 2):
            score, pos = observed(llm, il, ih, prominence), llm.kv_positions(il, ih)
            order = np.argsort(-score[:-10], kind="stable")
            want[il, ih] = sorted([*pos[order[: n_cells - 10]].tolist(), *pos[-10:].tolist()])
        llm.kv_compact(n_cells)
        same = [len(set(want[at]) & set(llm.kv_positions(*at).tolist())) for at in want]
        assert sum(same) >= 0.98 * n_cells * len(want)  # scores of float accuracy may tie
        for token in OTHERS[:30]:
            llm.eval([token])


def test_h2o_carries_its_sums(tiny: Path, opened: Open) -> None:
    """Over batches of a prompt that are more than the queries held, a compaction, an answer, and another compaction."""
    n_cells = 60
    llm = opened(tiny, kv_policy=H2O(n_observed=32), kv_budget=1.0, n_batch=64, type_k=TYPES["f32"], type_v=TYPES["f32"])
    full = opened(tiny, kv_policy=H2O(n_observed=400), kv_budget=1.0, n_batch=64, type_k=TYPES["f32"], type_v=TYPES["f32"])
    for own in (llm, full):
        own.eval(TOKENS[:150])
    heads = list(np.ndindex(3, 2))
    sums = {at: observed(full, *at, accumulated) for at in heads}

    def chosen(at: tuple[int, int], pos: npt.NDArray[np.int32]) -> list[int]:
        score = sums[at].copy()
        score[-(n_cells // 2) :] = np.inf
        return np.sort(np.argsort(-score, kind="stable")[:n_cells]).tolist()

    same = 0
    for step in range(2):
        before = {at: llm.kv_positions(*at) for at in heads}
        want = {at: chosen(at, before[at]) for at in heads}
        llm.kv_compact(n_cells)
        for at in heads:
            got = llm.kv_positions(*at)
            same += len(set(before[at][want[at]].tolist()) & set(got.tolist()))
            sums[at] = sums[at][np.isin(before[at], got)]
        if step == 0:
            for token in OTHERS[:25]:
                llm.eval([token])
            for at in heads:  # the 25 queries alone, over all cells that they saw
                kv = llm._kv
                assert kv is not None
                carried = np.concatenate([sums[at], np.zeros(25)])
                found = [kv.queries(at[0], 2 * at[1] + g) for g in range(2)]
                new = found[0][0] >= 150
                rows = np.stack([own[new] for _, own in found])
                keys = kv.rows(*at, "k")
                sums[at] = carried + accumulated(rows, found[0][0][new], keys, kv.positions(*at), keys.shape[1] ** -0.5)
    assert same >= 0.99 * 2 * n_cells * len(heads)


def test_a_state_has_the_queries_that_no_sum_has(tiny: Path, opened: Open) -> None:
    """Also those in front of what a policy without sums compacted last; sessions add them up before there are so many."""
    llm, other = (opened(tiny, kv_policy=H2O(n_observed=16), kv_budget=1.0) for _ in range(2))
    cache, loaded = llm._kv_cache, other._kv_cache
    assert cache is not None and loaded is not None
    llm.eval(TOKENS[:50])
    llm.kv_compact(40)
    decode(llm, TOKENS[50:100])
    for token in OTHERS[:16]:
        decode(llm, [token])
    assert cache.kv.stats().n_summed == 50
    assert cache.compact(80, policy=cache.bind(SnapKV(window_size=4))) > 0 and cache.kv.stats().n_boundary == 116

    def state(own: Llama) -> bytes:
        res = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(own.ctx, 0))()
        assert llama_cpp.llama_state_seq_get_data(own.ctx, res, len(res), 0) == len(res)
        return bytes(res)

    saved = (ctypes.c_uint8 * len(state(llm))).from_buffer_copy(state(llm))
    assert llama_cpp.llama_state_seq_set_data(other.ctx, saved, len(saved), 0) == len(saved)
    assert cache.kv.stats().n_queries == loaded.kv.stats().n_queries == 32
    for own in (cache, loaded):
        own.kv.accumulate()
    assert state(llm) == state(other)


def test_sums_move_with_their_cells(tiny: Path, opened: Open) -> None:
    """When positions are given up in front of them (kv_shift)."""
    options: dict[str, Any] = {"kv_budget": 1.0, "n_batch": 64, "type_k": TYPES["f32"], "type_v": TYPES["f32"]}
    llm = opened(tiny, kv_policy=H2O(n_observed=32), **options)
    full = opened(tiny, kv_policy=H2O(n_observed=400), **options)
    for own in (llm, full):
        own.eval(TOKENS[:150])
    heads = list(np.ndindex(3, 2))
    sums = {at: observed(full, *at, accumulated) for at in heads}
    llm.kv_compact(80)
    assert llm._kv_cache is not None
    held = {at: llm.kv_positions(*at) for at in heads}
    llm._move_down(llm._kv_cache, 20, 60)
    assert any(((own >= 20) & (own < 60)).any() for own in held.values())
    same, n_cells = 0, 30
    stays = {at: own[(own < 20) | (own >= 60)] for at, own in held.items()}
    n_left = min(map(len, stays.values()))
    assert n_left > n_cells
    llm.kv_compact(n_cells)
    for at, own in stays.items():
        score = sums[at][own]
        score[-(n_cells // 2) :] = np.inf
        want = own[np.argsort(-score, kind="stable")[:n_cells]]
        same += len(set(np.where(want < 20, want, want - 40).tolist()) & set(llm.kv_positions(*at).tolist()))
    assert same >= 0.99 * n_cells * len(heads)


#
# what else happens in an answer
#


class WrongDraft(LlamaDraftModel):
    """Tokens that are never right twice."""

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        return np.array([(int(input_ids[-1]) + i) % 128 for i in (7, 13, 29)], dtype=np.intc)


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "tova"])
def test_drafts_are_taken_back(tiny: Path, opened: Open, policy: str) -> None:
    """Compactions come before a draft, which can be removed behind them; of what was refused no cell is left."""
    llm = opened(
        tiny, kv_policy=policy, kv_limit=LIMIT, kv_interval=INTERVAL, draft_model=WrongDraft(), logits_all=True,
        type_k=TYPES["f32"], type_v=TYPES["f32"],
    )  # fmt: skip
    assert max(grow(llm, TOKENS[:60], 300)) <= LIMIT
    assert llm.kv_stats().n_compactions > 5
    tokens = llm.input_ids[: llm.n_tokens].tolist()
    fresh = opened(tiny, kv_policy="full", type_k=TYPES["f32"], type_v=TYPES["f32"])
    fresh.eval(tokens)
    assert llm.kv_stats().n_past == llm.n_tokens == len(tokens)
    own, want = llm._kv, fresh._kv
    assert own is not None and want is not None
    for head in range(2):  # keys of the first layer follow from the token and its position alone
        rows = want.rows(0, head, "k")[own.positions(0, head)]
        np.testing.assert_allclose(own.rows(0, head, "k"), rows, atol=1e-4)


@pytest.mark.parametrize(
    ("policy", "interval", "asks"),
    [
        *((policy, INTERVAL, []) for policy in ("snapkv", "h2o", "tova", "corm", "auto")),
        ("auto", 64, OTHERS[:4]),
    ],
)
def test_saved_inside_an_answer(
    tiny: Path, opened: Open, tmp_path: Path, policy: str, interval: int, asks: list[int]
) -> None:
    """Saved, loaded and continued is continued, bit for bit, over further compactions."""
    results = []
    for saves in (False, True):
        llm = opened(tiny, kv_policy=policy, kv_limit=LIMIT, kv_interval=interval)
        grow(llm, TOKENS[:60], 150)
        llm._kv_asks = asks
        if saves:
            llm.kv_save(tmp_path / "answer.session")
            llm = opened(tiny, kv_policy=policy, kv_limit=LIMIT, kv_interval=interval)
            llm.kv_load(tmp_path / "answer.session")
        rows = []
        for token in OTHERS[:100]:
            llm.eval([token])
            rows.append(logits(llm))
        results.append(np.array(rows))
    assert np.array_equal(*results)


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_what_fails_in_an_answer(tiny: Path, opened: Open, error: BaseException) -> None:
    """Nothing is evicted, and the session goes on."""
    llm = opened(tiny, kv_policy=Script(action=once(error)), kv_limit=LIMIT, kv_interval=INTERVAL)
    with pytest.raises(type(error)):
        grow(llm, TOKENS[:60], 200)
    assert llm.kv_stats().n_past == llm.n_tokens == LIMIT == n_held(llm)
    for token in OTHERS[:100]:
        llm.eval([token])
    assert n_held(llm) <= LIMIT
    assert len(answer(llm, TOKENS[:60], 100)) == 100


def test_a_copy_has_the_interval(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy=StreamingLLM(), kv_budget=40, kv_interval=10)
    assert llm.__getstate__()["kv_interval"] == 10
    assert "kv_interval" not in opened(tiny, kv_policy=SnapKV()).__getstate__()


def test_what_the_papers_policies_leave_to_themselves() -> None:
    """They keep the newest tokens that they mean to; all others are given some."""
    own = {name for name, policy in POLICIES.items() if policy.answer_share == 0}
    assert own == {TOVA.name, CORM.name, H2O.name, StreamingLLM.name}
