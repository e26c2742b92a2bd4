"""Pinned positions: they survive every policy, count in its budget, and leave it the choice of the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_table import kept
from reference.common import Cache, Kept
from reference.pinned import NothingLeftError, pinned
from scripted import OTHERS, TOKENS, Script, answer, evaluate, positions

from windowkv_edge import (
    POLICIES,
    AdaKV,
    Auto,
    CacheView,
    HeadKV,
    HeadScores,
    KVPolicy,
    Llama,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    UnsupportedCallError,
    WindowAdaKV,
    WindowHeadKV,
    WindowKV,
    _native,
)
from windowkv_edge.pins import Pins, n_pinned, n_system, system_text

Open = Callable[..., Llama]

RNG = np.random.default_rng(0)
SCORES = HeadScores({kind: RNG.random((3, 4)) ** 3 for kind in ("r", "r2")})
NATIVE: dict[str, KVPolicy] = {
    "windows": WindowKV(window_size=6, omega=4),
    "shared": WindowKV(window_size=6, omega=4, gamma=2, scope="layer", budget="arithmetic", recent_share=1.0, carry=0),
    "mean": WindowKV(window_size=6, omega=4, gamma=2, share="mean"),
    "each": WindowKV(window_size=1, omega=4, query_heads="each", carry=0),
    "snapkv": SnapKV(window_size=5, kernel_size=3),
    "pyramidkv": PyramidKV(window_size=5, kernel_size=3, beta=4.0),
    "streamingllm": StreamingLLM(n_sink=9),
    "adakv": AdaKV(window_size=5, kernel_size=3, alpha_safeguard=0.1),
    "windowkv+adakv": WindowAdaKV(window_size=6, omega=4, alpha_safeguard=0.1),
    "headkv": HeadKV(window_size=5, kernel_size=3, beta=1.1, importance=SCORES),
    "windowkv+headkv": WindowHeadKV(window_size=6, omega=4, beta=1.1, importance=SCORES),
    "auto": Auto(importance=SCORES, beta=2.0, omega=4, window_size=12, token_window_size=8),
}
RANGES = ((0, 9), (60, 75), (70, 80), (198, 5000))
N_PINNED = 9 + 20 + 2


def definition(llm: Llama, n_cells: int) -> list[list[int]]:
    """Positions that stay of what the session holds."""
    kv, bound = llm._kv, llm._kv_bound
    assert kv is not None
    held = [[llm.kv_positions(il, ih) for ih in range(2)] for il in range(3)]
    scoring = bound.parts().scoring
    sizes = [scoring.window_size, *([scoring.token_window_size] if scoring.token_window_size else [])]
    nothing = [[np.zeros(own.size, dtype=np.float32) for own in layer] for layer in held]  # by positions alone
    planes: list[Cache] = [
        [kv.attention(il) for il in range(3)]  # of the last token, which is the observation window there
        if scoring.query_heads == "each"
        else [kv.scores(il, size, among=bound.n_observed) for il in range(3)] if size else nothing for size in sizes
    ]

    def policy(positions: Cache, scores: Any, n: int, n_past: int) -> Kept:
        return kept(bound, positions, scores[0], n, token_scores=scores[1] if len(scores) > 1 else None, n_past=n_past)

    keep = pinned(policy, held, planes, n_cells, RANGES, llm.n_tokens)
    return [own[stays].tolist() for layer, marks in zip(held, keep) for own, stays in zip(layer, marks)]


@pytest.mark.parametrize("name", NATIVE)
def test_native_policies_equal_the_reference(tiny: Path, opened: Open, name: str) -> None:
    """On a prompt, and again on what that left, with more behind it."""
    llm = opened(tiny, kv_policy=NATIVE[name], kv_budget=1.0)
    for start, stop in RANGES[:3]:
        llm.kv_pin(start, stop)
    llm.kv_pin(198, 2048)
    assert llm.kv_pinned == (*RANGES[:3], (198, 2048))
    for tokens, n_cells, n in ((TOKENS[:200], 70, N_PINNED), (OTHERS[:20], 65, N_PINNED + 20)):
        llm.eval(tokens)
        want = definition(llm, n_cells)
        stats = llm.kv_compact(n_cells)
        assert positions(llm) == want and stats.cells.sum() == n_cells * 6
        for own in positions(llm):
            assert sum(any(a <= at < b for a, b in RANGES) for at in own) == n


def test_every_policy_of_the_package(smollm2: Path, opened: Open, document: str) -> None:
    llm = opened(smollm2, n_ctx=256, kv_policy="full", kv_budget=60)
    llm.kv_pin(50, 70)
    for name in POLICIES:
        llm.kv_policy = name  # type: ignore[assignment]
        evaluate(llm, llm.tokenize(document.encode())[:150])
        assert llm.kv_stats().cells.mean() == (60 if name != "full" else 150)
        for own in positions(llm):
            assert set(range(50, 70)) < set(own)


def test_a_policy_in_python_sees_the_others(tiny: Path, opened: Open) -> None:
    seen: list[Any] = []

    class Looks(Script):
        def select(self, scores: Any, budget: int, ctx: CacheView) -> Any:
            seen.append((budget, ctx.positions[0][0].tolist(), scores[2][1].size, ctx.keys(1, 0), ctx.values(2, 1).shape))
            return [[own[-budget:] for own in layer] for layer in ctx.positions]

    llm = opened(tiny, kv_policy=Looks(action=lambda: None), kv_budget=60)
    kv = llm._kv
    assert kv is not None
    llm.kv_pin(10, 30)
    llm.eval(TOKENS)
    rows = kv.rows(1, 0, "k")
    llm.sample(temp=0.0)
    budget, own, n_scores, keys, shape = seen[0]
    assert (budget, own, n_scores, shape) == (40, [*range(10), *range(30, 400)], 380, (380, 32))
    assert np.array_equal(keys, np.delete(rows, np.arange(10, 30), axis=0))
    assert positions(llm) == [[*range(10, 30), *range(360, 400)]] * 6


@pytest.mark.parametrize("policy", ["snapkv", Script(action=lambda: None)], ids=["native", "python"])
def test_pins_beyond_the_budget(tiny: Path, opened: Open, policy: Any) -> None:
    """Refused at once where it is known, else by the compaction, which evicts nothing."""
    llm = opened(tiny, kv_policy=policy, kv_budget=60)
    with pytest.raises(ValueError, match=r"kv_pin\(0, 60\): 60 positions would be pinned, and kv_budget=60 leaves nothing"):
        llm.kv_pin(0, 60)
    llm.kv_pin(0, 40)
    with pytest.raises(ValueError, match="60 positions would be pinned"):
        llm.kv_pin(30, 60)
    llm.kv_budget = 0.1
    with pytest.raises(ValueError, match="40 positions are pinned and the budget is 40 cells per head, which leaves nothing"):
        answer(llm, TOKENS)
    assert (llm.kv_stats().cells == 400).all() and llm.n_tokens == 400
    llm.kv_compact(41)
    assert positions(llm) == [[*range(40), 399]] * 6
    assert (llm.kv_compact(41).cells == 41).all()  # nothing to evict
    llm.eval([5])
    with pytest.raises(ValueError, match="40 positions are pinned"):
        llm.kv_compact(40)
    llm.kv_unpin()
    assert llm.kv_pinned == () and (llm.kv_compact(20).cells == 20).all()


def test_what_was_evicted_cannot_be_pinned(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="streamingllm", kv_budget=60)
    evaluate(llm, TOKENS)
    with pytest.raises(UnsupportedCallError, match=r"kv_pin\(0, 5\): some of these positions were evicted"):
        llm.kv_pin(0, 5)
    llm.kv_pin(0, 4)
    llm.kv_pin(395, 410)
    llm.reset()  # pins stay
    evaluate(llm, OTHERS)
    assert positions(llm) == [[*range(4), *range(344, 400)]] * 6
    for bad in ((-1, 5), (5, 5), (7, 5), (0, 2049)):
        with pytest.raises(ValueError, match="expected 0 <= start < stop <= n_ctx"):
            llm.kv_pin(*bad)
    with pytest.raises(TypeError, match="expected an int"):
        llm.kv_pin(0.5, 3)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedCallError, match="needs a session with a policy"):
        opened(tiny).kv_pin(0, 3)


def test_positions_that_a_head_lost_are_as_any_other(tiny: Path, opened: Open) -> None:
    """Below the class nobody refuses that: heads would hold different numbers of cells for it."""
    llm = opened(tiny, kv_policy=NATIVE["snapkv"], kv_budget=60)
    evaluate(llm, TOKENS)
    kv = llm._kv
    assert kv is not None
    kv.set_pinned([(0, 400)])
    held = [set(own) for own in positions(llm)]
    stays = set.intersection(*held)
    assert 5 <= len(stays) < 50
    kv.compact(_native.policy_struct(llm._kv_bound.parts()), 50)
    assert (llm.kv_stats().cells == 50).all()
    assert all(stays <= set(own) for own in positions(llm))
    with pytest.raises(ValueError, match="range 1 is positions 7 to 7, expected"):
        kv.set_pinned([(1, 2), (7, 7)])


def test_memory_of_a_compaction_with_pins_is_counted(tiny: Path, opened: Open) -> None:
    peaks = []
    for pin in (False, True):
        llm = opened(tiny, n_ctx=4096, kv_policy="streamingllm", kv_budget=1.0)
        llm.eval(TOKENS * 10)
        if pin:
            llm.kv_pin(0, 100)
        before = llm.kv_stats().bytes_peak
        llm.kv_compact(3000)
        peaks.append(llm.kv_stats().bytes_peak - before)
    assert peaks[1] - peaks[0] >= 4 * 4000 * 6  # a position of every cell


#
# system prompts
#

SYSTEM = "Answer in one short sentence. The password of the archive is bluebird."


def test_a_system_prompt_stays(session: Open, document: str) -> None:
    messages: list[Any] = [
        {"role": "system", "content": f"  {SYSTEM}\n"},
        {"role": "user", "content": document[:1200] + "\n\nWhat is this about?"},
    ]
    llm, free = (session(kv_policy="streamingllm", kv_budget=0.2, kv_pin_system=own) for own in (True, False))
    for own in (llm, free):
        own.create_chat_completion(messages, max_tokens=2, temperature=0.0)
    ((start, stop),) = llm.kv_pinned
    text = llm.detokenize(llm.input_ids[:stop].tolist(), special=True).decode()
    assert start == 0 and text.rstrip().endswith(SYSTEM) and stop < 40
    for own in positions(llm):
        assert own[:stop] == list(range(stop))
    assert free.kv_pinned == () and not set(range(4, stop)) & set(free.kv_positions(0, 0).tolist())
    assert llm.kv_stats().cells.tolist() == free.kv_stats().cells.tolist()

    # the next turn keeps it, another prompt has none
    messages += [{"role": "assistant", "content": "A text."}, {"role": "user", "content": document[1200:2400]}]
    llm.create_chat_completion(messages, max_tokens=2, temperature=0.0)
    assert llm.kv_stats().n_compactions == 2 and llm.kv_pinned == ((0, stop),)
    assert llm.kv_positions(7, 1)[:stop].tolist() == list(range(stop))
    answer(llm, llm.tokenize(document.encode())[:300])
    assert llm.kv_pinned == () and llm.kv_positions(0, 0)[:5].tolist() != list(range(5))


def test_a_long_system_prompt_is_not_pinned(session: Open, document: str) -> None:
    messages: list[Any] = [{"role": "system", "content": document[:1500]}, {"role": "user", "content": "What is this?"}]
    llm = session(kv_policy="snapkv", kv_budget=0.2)
    with pytest.warns(UserWarning, match=r"the system prompt is not pinned: with what else is, it would take \d+ of \d+ cells"):
        llm.create_chat_completion(messages, max_tokens=2, temperature=0.0)
    assert llm.kv_stats().cells.mean() == int(0.2 * llm._kv.stats().n_boundary) + 1  # type: ignore[union-attr]
    messages[1]["content"] = "Who wrote it?"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        llm.create_chat_completion(messages, max_tokens=2, temperature=0.0)


def test_where_a_system_prompt_stands() -> None:
    pieces = [b"<s>", b"sys", b"tem\n", b"Be", b" \xc3", b"\xa4r", b".\n", b"user"]
    tokens = list(range(8))
    assert n_system("Be är.", tokens, pieces.__getitem__) == 7
    assert n_system("Be", tokens, pieces.__getitem__) == 4
    assert n_system("Be?", tokens, pieces.__getitem__) == 0
    assert n_system("late", list(range(5000)), lambda i: b"late" if i > 4200 else b"x") == 0
    for messages in ([], None, "text", [{}], [{"role": "user", "content": "a"}], [{"role": "system", "content": None}]):
        assert system_text(messages) == ""
    assert system_text([{"role": "developer", "content": " a "}]) == "a"
    assert system_text([{"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]) == "a"
    assert n_pinned([]) == 0 and n_pinned([(5, 9), (0, 3), (2, 6), (7, 8)]) == 9


def test_the_reference_refuses_what_leaves_nothing() -> None:
    """As the session does; where all cells fit nothing has to be left."""
    cells = [[np.arange(6), np.arange(6)]]
    scores = [[np.zeros(6), np.zeros(6)]]

    def all_of_it(own: Cache, planes: Any, n_cells: int, n_past: int) -> Kept:
        assert n_cells >= 0
        assert n_past == len(own[0][0])
        return [[np.ones(head.size, dtype=bool) for head in layer] for layer in own]

    for n_cells in (2, 3):
        with pytest.raises(NothingLeftError):
            pinned(all_of_it, cells, [scores], n_cells, [(1, 4)], 6)
    assert all(own.all() for own in pinned(all_of_it, cells, [scores], 6, [(0, 6)], 6)[0])


def test_what_is_sure_to_stay_decides_about_system_prompts() -> None:
    """While a prompt is read, compactions leave more, or fewer, than the one at its end."""
    pins = Pins()
    pins.system = (0, 500)
    assert pins.for_compaction(300, 1000) == [(0, 500)]
    with pytest.warns(UserWarning, match="500 of 900 cells per head"):
        assert pins.for_compaction(1344, 900) == []
    assert pins.for_compaction(1000) == [(0, 500)]
