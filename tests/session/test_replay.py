"""What a session has repeated before cells go: the scores, what stays as it was, and what is said where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_model
from kinds import WRITERS, logits
from policy_table import kept
from reference.kvzip import beside, repeated
from reference.pinned import pinned
from scripted import OTHERS, TOKENS, answer, decode, evaluate, positions

from windowkv_edge import Auto, KVzip, Llama, NativeError, UnsupportedCallError, _native
from windowkv_edge.replay import N_BEFORE, N_END, N_LEAST, Wording, n_at_once

Open = Callable[..., Llama]

WIDE = {"n_batch": 256, "n_ctx": 700}


def kv_of(llm: Llama) -> _native.Context:
    assert llm._kv is not None
    return llm._kv


def repeat(llm: Llama, start: int, stop: int, tokens: list[int] | None = None) -> None:
    """The tokens of a piece, or others in their place."""
    with kv_of(llm).observing((start, stop)):
        assert decode(llm, TOKENS[start:stop] if tokens is None else tokens) == 0


def by_reference(llm: Llama, start: int, stop: int) -> list[list[np.ndarray]]:
    """Scores of a piece, from the queries and keys of the same tokens, per layer and kv head."""
    kv, n_past = kv_of(llm), llm.n_tokens
    n_layer, n_head_kv = llm.kv_stats().cells.shape
    n_gqa = int(kv.stats().n_gqa)
    weights = {own.name: own.data for own in gguf.GGUFReader(llm.model_path).tensors}
    res: list[list[np.ndarray]] = []
    with kv.observing():
        assert decode(llm, TOKENS[start:stop]) == 0
        for il in range(n_layer):
            res.append([])
            sinks = weights.get(f"blk.{llm.kv_stats().layers[il]}.attn_sinks.weight")
            for ih in range(n_head_kv):
                found = [kv.queries(il, ih * n_gqa + g) for g in range(n_gqa)]
                new = found[0][0] >= n_past
                queries, keys = np.stack([own[new] for _, own in found]), kv.rows(il, ih, "k")
                at = kv.positions(il, ih)
                own = None if sinks is None else sinks[ih * n_gqa : (ih + 1) * n_gqa]
                scale = tiny_scale(llm, keys.shape[1])
                res[-1].append(repeated(queries, found[0][0][new], keys, at, scale, (start, stop), sinks=own))
    kv.end_observing()  # their queries are forgotten
    return res


def tiny_scale(llm: Llama, head_dim: int) -> float:
    return float(llm.metadata.get("granitehybrid.attention.scale", head_dim**-0.5))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("cells", ["f16", "q8_0"])
def test_scores_are_the_reference_s(tmp_path: Path, opened: Open, kind: str, cells: str) -> None:
    """A prompt of 300 tokens, of which pieces are repeated: the first one, one behind it, and one of them again."""
    types = {"f16": 1, "q8_0": 8}[cells]
    path = WRITERS[kind](tmp_path / "tiny.gguf")
    llm = opened(path, kv_policy="snapkv(window_size=100)", kv_budget=1.0, type_k=types, type_v=types, **WIDE)
    llm.eval(TOKENS[:300])
    kv = kv_of(llm)
    assert llm.kv_stats().cell_types == (cells, cells)
    want = [by_reference(llm, 0, 90), by_reference(llm, 90, 180)]
    repeat(llm, 0, 90)
    repeat(llm, 90, 180)
    assert kv.stats().n_replayed == 180 and kv.stats().n_past == 300
    for il in range(len(want[0])):
        for ih, got in enumerate(kv.replayed(il)):
            # queries of the reference are rounded to f16
            np.testing.assert_allclose(got[4:90], want[0][il][ih][4:], rtol=3e-2, atol=1e-5)
            np.testing.assert_allclose(got[90:180], want[1][il][ih], rtol=3e-2, atol=1e-5)
            assert (got[:4] == 2).all() and (got[180:] == 2).all()

    before = [kv.replayed(il) for il in range(len(want[0]))]
    repeat(llm, 50, 120, OTHERS[:70])
    grew = 0
    for il, layer in enumerate(before):
        for old, new in zip(layer, kv.replayed(il), strict=True):
            assert (new >= old).all() and (new[120:] == old[120:]).all() and (new[:50] == old[:50]).all()
            grew += int((new > old).sum())
    assert grew > 0 and kv.stats().n_replayed == 180


def test_scores_do_not_depend_on_batches(tiny: Path, opened: Open) -> None:
    """The largest of several ubatches is that of one."""
    found = []
    for n_ubatch in (256, 24):
        llm = opened(tiny, kv_policy="kvzip", kv_budget=1.0, n_ubatch=n_ubatch, **WIDE)
        llm.eval(TOKENS[:300])
        repeat(llm, 40, 240)
        found.append([own for il in range(3) for own in kv_of(llm).replayed(il)])
    for one, several in zip(*found, strict=True):
        np.testing.assert_allclose(one, several, rtol=5e-2)  # sums of the attention in between
        assert (one[:40] == [2] * 4 + [0] * 36).all()  # nobody repeated them, and they are behind what was


@pytest.mark.parametrize("kind", WRITERS)
def test_what_repeats_leaves_nothing_behind(tmp_path: Path, opened: Open, kind: str) -> None:
    """Cells, observed queries, windows, recurrent states: the session goes on as one that repeated nothing."""
    path = WRITERS[kind](tmp_path / "tiny.gguf")
    llm, other = (opened(path, kv_policy="snapkv(window_size=8)", kv_budget=60, **WIDE) for _ in range(2))
    for own in (llm, other):
        own.eval(TOKENS[:300])
    repeat(llm, 0, 150)
    repeat(llm, 150, 290)
    for own in (llm, other):
        own.kv_compact()
        own.eval([OTHERS[0]])
    assert positions(llm) == positions(other)
    assert np.array_equal(logits(llm), logits(other))


@pytest.mark.parametrize(
    ("start", "stop", "what"),
    [
        (-1, 10, "positions -1 to 9 cannot be replayed, expected some of the 300 that there are"),
        (20, 20, "positions 20 to 19 cannot be replayed"),
        (290, 301, "positions 290 to 300 cannot be replayed"),
    ],
)
def test_ranges_that_are_refused(tiny: Path, opened: Open, start: int, stop: int, what: str) -> None:
    llm = opened(tiny, kv_policy="kvzip", kv_budget=1.0, **WIDE)
    llm.eval(TOKENS[:300])
    with pytest.raises(ValueError, match=what), kv_of(llm).observing((start, stop)):
        pass
    assert kv_of(llm).stats().n_replayed == 0
    repeat(llm, 0, 100)  # it can be used


def test_evicted_positions_are_refused(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="kvzip", kv_budget=60, **WIDE)
    evaluate(llm, TOKENS[:300])
    with pytest.raises(ValueError, match="has lost cells of the positions 0 to 99"), kv_of(llm).observing((0, 100)):
        pass


def test_what_was_not_evaluated_has_no_score(tiny: Path, opened: Open) -> None:
    """Nothing, less than the piece, or a batch that fails: the piece can be repeated then."""
    llm = opened(tiny, kv_policy="kvzip", kv_budget=1.0, **WIDE)
    llm.eval(TOKENS[:300])
    kv = kv_of(llm)
    with kv.observing((0, 100)):
        pass
    repeat(llm, 0, 100, TOKENS[:99])
    with kv.observing((0, 100)):
        assert decode(llm, TOKENS[:100]) == 0
        assert decode(llm, [tiny_model.N_VOCAB + 7]) != 0
    with pytest.raises(ZeroDivisionError), kv.observing((0, 32), 40):
        assert decode(llm, TOKENS[:36]) == 0  # enough for the piece, without the words in front of it
        raise ZeroDivisionError
    assert kv.stats().n_replayed == 0 and kv.stats().n_past == 300
    assert all((own == 2).all() for own in kv.replayed(1))
    repeat(llm, 0, 100)
    assert kv.stats().n_replayed == 100


#
# sessions
#


@pytest.mark.parametrize("n_batch", [16, 256])
def test_a_session_repeats_before_it_compacts(tiny: Path, opened: Open, n_batch: int) -> None:
    """All but the end, once; what stays is what the definition keeps, and the next token is the full cache's."""
    policy = KVzip(alpha_safeguard=0.1)
    llm, full = (opened(tiny, kv_policy=policy, kv_budget=n, n_ctx=700, n_batch=n_batch) for n in (60, 700))
    llm.kv_budget = 700
    for own in (llm, full):
        own.eval(TOKENS[:300])
    kv, n_decoded = kv_of(llm), 0
    seen: dict[str, Any] = {}
    native, decoded = llm._kv_cache.compact, llm._ctx.decode  # type: ignore[union-attr]

    def compact(*args: Any, **kwargs: Any) -> int:
        seen["scores"] = [kv.replayed(il) for il in range(3)]
        return native(*args, **kwargs)

    def count(batch: Any) -> None:
        nonlocal n_decoded
        n_decoded += batch.n_tokens()
        decoded(batch)

    llm._kv_cache.compact, llm._ctx.decode = compact, count  # type: ignore[method-assign, union-attr]
    llm.kv_budget = 60
    assert answer(llm, TOKENS[:300]) == answer(full, TOKENS[:300])
    n_end = min(N_END, 60 // 4)
    size = n_at_once(Wording((), ()), n_batch) - Wording((), ()).size

    def n_repeating(start: int, stop: int) -> int:
        n_pieces = -(-(stop - start) // size)
        return stop - start + N_BEFORE * (n_pieces - (start == 0))

    assert n_decoded == n_repeating(0, 300 - n_end)
    assert kv.stats().n_replayed == 300 - n_end and llm.kv_stats().n_replayed == 300 - n_end
    whole = [[np.arange(300, dtype=np.int32)] * 2] * 3
    keep = kept(policy, whole, seen["scores"], 60)
    assert positions(llm) == [np.flatnonzero(own).tolist() for layer in keep for own in layer]
    assert all(own[-n_end:] == list(range(300 - n_end, 300)) and own[:4] == [0, 1, 2, 3] for own in positions(llm))

    n_decoded = 0
    assert answer(llm, TOKENS[:300]) == answer(full, TOKENS[:300]) and n_decoded == 0
    llm.eval(OTHERS[:60])
    llm.kv_compact(70)
    assert n_decoded == 60 + n_repeating(300 - n_end, 360 - N_END)  # what is new, and the end that was left
    assert kv.stats().n_replayed == 360 - N_END


@pytest.mark.parametrize("pins", [[], [(20, 30)]])
def test_half_for_the_question_and_half_for_any(tiny: Path, opened: Open, pins: list[tuple[int, int]]) -> None:
    """What the prompt's end chooses with half of the cells, and beside it what a replay chooses."""
    policy = Auto(replay_share=0.5, window_size=8, token_window_size=8)
    llm = opened(tiny, kv_policy=policy, kv_budget=700, type_k=1, type_v=1, **WIDE)
    llm.eval(TOKENS[:300])
    kv = kv_of(llm)
    asked = [kv.scores(il, 8) for il in range(3)]
    for start, stop in pins:
        llm.kv_pin(start, stop)
    seen = []
    native = llm._kv_cache.compact  # type: ignore[union-attr]

    def compact(*args: Any, **kwargs: Any) -> int:
        seen.append([kv.replayed(il) for il in range(3)])
        after = [kv.scores(il, 8) for il in range(3)]
        assert all(np.array_equal(a, b) for one, other in zip(asked, after, strict=True) for a, b in zip(one, other, strict=True))
        return native(*args, **kwargs)

    llm._kv_cache.compact = compact  # type: ignore[method-assign, union-attr]
    llm.kv_compact(60)
    first = replace(policy, replay_share=0.0)
    whole = [[np.arange(300, dtype=np.int32)] * 2] * 3

    def choose(own: Any, planes: Any, n: int, n_past: int) -> Any:
        half = kept(first, own, planes[0], n - n // 2, token_scores=planes[0], n_past=n_past)
        return beside(half, planes[1], n, n_past)

    keep = pinned(choose, whole, [asked, seen[0]], 60, pins, 300)
    assert positions(llm) == [np.flatnonzero(own).tolist() for layer in keep for own in layer]
    assert llm.kv_stats().cells.mean() == 60


@pytest.mark.parametrize("policy", ["kvzip", "auto(replay_share=0.5)"])
def test_a_limit_holds_while_pieces_are_repeated(tiny: Path, opened: Open, policy: str) -> None:
    """The peak of a prompt is the limit and a batch; an answer stays within the limit."""
    llm = opened(tiny, kv_policy=policy, kv_limit=160, n_batch=128, n_ctx=700, kv_interval=16)
    most = 0.0
    kv, reserve = kv_of(llm), kv_of(llm).reserve

    def watch(n: int) -> None:
        nonlocal most
        most = max(most, float(kv.cells().mean()) + n)
        reserve(n)

    kv.reserve = watch  # type: ignore[method-assign]
    tokens = (TOKENS * 2)[:500]
    answer(llm, tokens, 1)
    assert 200 < most <= 160 + 128
    most, n_compactions = 0.0, llm.kv_stats().n_compactions
    assert len(answer(llm, tokens, 80)) == 80
    assert 120 < most <= 160
    assert 3 <= llm.kv_stats().n_compactions - n_compactions <= 6  # every 16 tokens
    assert llm.kv_stats().cells.mean() <= 160 and kv.stats().n_replayed >= 490


def test_the_end_of_the_context(tiny: Path, opened: Open) -> None:
    """Who repeats needs positions; where there are none, it is said, and the session goes on."""
    llm = opened(tiny, kv_policy="kvzip", kv_budget=60, n_ctx=320, n_batch=256)
    llm.eval(TOKENS[:310])
    with pytest.raises(UnsupportedCallError, match=r"takes \d+ positions behind the 310 that are there.*larger n_ctx"):
        llm.sample()
    assert llm.n_tokens == 310 and (llm.kv_stats().cells == 310).all()
    llm.n_tokens = 320 - 8 - N_LEAST
    llm.eval([OTHERS[0]] * 0)
    llm.kv_compact()
    assert llm.kv_stats().cells.mean() == 60


def test_ctrl_c_between_two_pieces(tiny: Path, opened: Open) -> None:
    """What was repeated has its scores, the logits are those of the prompt, and the next call repeats the rest."""
    llm, other = (opened(tiny, kv_policy="kvzip", kv_budget=60, n_ctx=700, n_batch=64) for _ in range(2))
    for own in (llm, other):
        own.eval(TOKENS[:300])
    want = logits(llm)
    decoded, n = llm._ctx.decode, 0

    def interrupted(batch: Any) -> None:
        nonlocal n
        n += 1
        decoded(batch)
        if n == 3:
            raise KeyboardInterrupt

    llm._ctx.decode = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.sample(temp=0.0)
    assert np.array_equal(logits(llm), want) and llm.n_tokens == 300
    assert 0 < kv_of(llm).stats().n_replayed < 200 and (llm.kv_stats().cells == 300).all()
    assert llm.sample(temp=0.0) == other.sample(temp=0.0) == int(want.argmax())
    llm.kv_compact()
    assert positions(llm) == positions(other)


@pytest.mark.parametrize("known", [True, False])
def test_the_logits_are_those_of_the_prompt(tiny: Path, opened: Open, known: bool) -> None:
    """Whatever the session knows of them, and where tokens before the last one had some as well."""
    llm = opened(tiny, kv_policy="kvzip", kv_budget=60, logits_all=not known, **WIDE)
    llm.eval(TOKENS[:300])
    want = logits(llm)
    llm._requires_eval = not known
    if not known:
        with pytest.raises(UnsupportedCallError, match="no logits at idx=297"):
            llm.sample(idx=297)
    assert llm.sample(temp=0.0) == int(want.argmax()) and np.array_equal(logits(llm), want)
    assert llm._requires_eval == (not known) and llm.kv_stats().cells.mean() == 60


def test_limits_that_are_too_small_to_repeat_in(tiny: Path, smollm2: Path, opened: Open) -> None:
    with pytest.raises(ValueError, match=r"kv_limit=40 holds 40 cells per head, expected at least 48"):
        opened(tiny, kv_policy="kvzip", kv_limit=40, **WIDE)
    with pytest.raises(ValueError, match="kv_interval=70 leaves nothing of the 100 cells"):
        opened(tiny, kv_policy="kvzip", kv_limit=100, kv_interval=70, **WIDE)
    with pytest.raises(ValueError, match="expected at least"):
        opened(smollm2, kv_policy="auto(replay_share=0.5)", kv_limit=70, **WIDE)
    llm = opened(tiny, kv_policy="kvzip", kv_limit=48, n_batch=16, n_ctx=700)
    answer(llm, TOKENS[:300], 60)
    assert llm.kv_stats().cells.mean() <= 48


def test_a_question_of_an_earlier_chat_is_no_reason(tiny: Path, opened: Open) -> None:
    """What is evaluated by hand behind it is repeated but for its end."""
    llm = opened(tiny, kv_policy="kvzip", kv_budget=60, **WIDE)
    llm._kv_asked = (20, 60)
    evaluate(llm, TOKENS[:300])
    assert kv_of(llm).stats().n_replayed == 300 - 60 // 4


def test_an_answer_goes_on_to_the_end_of_the_context(tiny: Path, opened: Open) -> None:
    """Where those who repeat find no positions, the newest tokens stay."""
    for policy in ("kvzip", "auto(replay_share=0.5)"):
        llm = opened(tiny, kv_policy=policy, kv_limit=100, n_ctx=256, n_batch=64, kv_interval=8)
        assert len(answer(llm, TOKENS[:150], 100)) == 100
        assert llm.n_tokens == 249 and llm.kv_stats().cells.mean() <= 100


def test_what_others_decode_is_not_compacted_blindly(tiny: Path, opened: Open) -> None:
    """Inside llama_decode nothing can be repeated: the full cache stays, with a warning."""
    llm = opened(tiny, kv_policy="kvzip", kv_budget=60, **WIDE)
    decode(llm, TOKENS[:200])
    with pytest.warns(UserWarning, match="200 of the 200 positions were not replayed, more than the 60 cells"):
        decode(llm, [OTHERS[0]])
    with pytest.raises(NativeError, match="were not replayed"):
        llm.eval([OTHERS[1]])


def test_the_question_of_a_chat_is_not_repeated(smollm2: Path, opened: Open) -> None:
    """It stays as it is, and what comes before it is repeated."""
    llm = opened(smollm2, kv_policy="kvzip", kv_budget=0.3, n_ctx=1024)
    text = (Path(__file__).parents[2] / "windowkv_edge/data/document.txt").read_text()[:2000]
    messages = [{"role": "user", "content": f"{text}\n\nWho is it about, and where do they live?"}]
    llm.create_chat_completion(messages, max_tokens=2, temperature=0.0)
    asked = llm._kv_asked
    assert asked is not None
    n_replayed = kv_of(llm).stats().n_replayed
    assert n_replayed == asked[1] - 64
    for layer in (0, 29):
        assert set(range(n_replayed, asked[1])) <= set(llm.kv_positions(layer, 1).tolist())
