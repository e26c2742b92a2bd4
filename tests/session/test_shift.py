"""The end of ``n_ctx``: what stays of the cells, and sessions whose chats go on behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import tiny_model
from scripted import OTHERS, TOKENS, answer, evaluate, positions

from windowkv_edge import POLICIES, Llama, NativeError, UnsupportedCallError, UnsupportedModelError
from windowkv_edge.heads import HeadScores
from windowkv_edge.shift import GivenUp

Open = Callable[..., Llama]

N_CTX = 256
RNG = np.random.default_rng(3)
LONG_TEXT = RNG.integers(0, tiny_model.N_VOCAB, 3000).tolist()


def counted(llm: Llama) -> list[int]:
    """Gets the size of every batch that the session decodes from now on."""
    res: list[int] = []
    own = llm._ctx.decode
    llm._ctx.decode = lambda batch: (res.append(batch.n_tokens()), own(batch))[1]  # type: ignore[method-assign]
    return res


def keys(llm: Llama) -> list[npt.NDArray[np.float32]]:
    """Per (layer, kv head) [cells, head_dim]."""
    kv = llm._kv
    assert kv is not None
    n_layer, n_head_kv = kv.cells().shape
    return [kv.rows(il, ih, "k") for il in range(n_layer) for ih in range(n_head_kv)]


def logits(llm: Llama) -> npt.NDArray[np.float32]:
    row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).copy()


#
# cells
#


def turned(rows: npt.NDArray[np.float32], by: int, *, neox: bool = False) -> npt.NDArray[np.float64]:
    """Keys at positions ``by`` further: RoFormer (arXiv 2104.09864), eq. 34; neox: pairs are half a head apart.

    Args:
        rows: [cells, head_dim].
        by: positions.
        neox: how dimensions are paired.
    """
    d = rows.shape[1]
    theta = by * 10000.0 ** (-np.arange(d // 2) * 2 / d)
    x, y = (rows[:, : d // 2], rows[:, d // 2 :]) if neox else (rows[:, ::2], rows[:, 1::2])
    both = x * np.cos(theta) - y * np.sin(theta), x * np.sin(theta) + y * np.cos(theta)
    return np.concatenate(both, axis=1) if neox else np.stack(both, axis=2).reshape(rows.shape)


def hadamard(n: int) -> npt.NDArray[np.float64]:
    """[n, n], its own inverse: Sylvester's."""
    res = np.ones((1, 1))
    while len(res) < n:
        res = np.block([[res, res], [res, -res]])
    return res / np.sqrt(n)


MODELS: dict[str, Callable[..., Path]] = {
    "llama": tiny_model.write_llama,
    "exaone": lambda path: tiny_model.write_llama(path, arch="exaone"),  # neox
    "lfm2": tiny_model.write_lfm2,
    "granitehybrid": tiny_model.write_granite_hybrid,
    "gpt-oss": tiny_model.write_gpt_oss,
}


@pytest.mark.parametrize("kind", [0, 1], ids=["f32", "f16"])
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_stocks(tmp_path: Path, opened: Open, model: str, kind: int) -> None:
    """Without a compaction: the same hole, by llama.cpp's own two calls."""
    path = MODELS[model](tmp_path / "tiny.gguf")
    llm = opened(path, kv_policy="full", type_k=kind, type_v=kind, n_ctx=512)
    stock = opened(path, flash_attn=True, type_k=kind, type_v=kind, n_ctx=512, swa_full=True)
    for own in (llm, stock):
        own.eval(TOKENS)
    assert llm._kv is not None
    llm._kv.shift(4, 200)
    mem = llama_cpp.llama_get_memory(stock.ctx)
    assert llama_cpp.llama_memory_can_shift(mem) and llama_cpp.llama_memory_seq_rm(mem, 0, 4, 204)
    llama_cpp.llama_memory_seq_add(mem, 0, 204, -1, -200)
    for own in (llm, stock):
        own.n_tokens = own._kv_known = 200
    if model == "gpt-oss":
        assert llama_cpp.llama_memory_can_shift(llama_cpp.llama_get_memory(llm.ctx))
    # many tokens at once: stock sums a single token's values in f16, and its cells stand in another order
    for own in (llm, stock):
        own.eval(OTHERS[:64])
    want = logits(stock)
    # f16 rows, summed in another order, differ by a tenth of a rounding step
    np.testing.assert_allclose(logits(llm), want, atol=(1e-5, 1e-4)[kind] * np.abs(want).max())


@pytest.mark.parametrize("cells", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("arch", ["llama", "exaone"])
def test_keys_are_turned(tmp_path: Path, opened: Open, arch: str, cells: str) -> None:
    """Of heads that hold different positions: keys as NumPy turns them, values as they were, bit for bit."""
    kind = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}[cells]
    path = tiny_model.write_llama(tmp_path / "tiny.gguf", arch=arch, head_dim=64)
    llm = opened(path, kv_policy="adakv", kv_budget=60, type_k=kind, type_v=kind, n_ctx=512)
    evaluate(llm, TOKENS)
    llm.eval(OTHERS[:20])
    kv = llm._kv
    assert kv is not None
    at, before = positions(llm), keys(llm)
    values = [kv.rows(il, ih, "v") for il in range(3) for ih in range(2)]
    assert len({len(own) for own in at}) > 1

    kv.shift(10, 300)
    spin = hadamard(64) if cells in ("q8_0", "q4_0") else np.eye(64)
    for i, (own, old) in enumerate(zip(at, before, strict=True)):
        pos = np.array(own)
        first, rest = pos < 10, pos >= 310
        assert positions_of(llm, i) == [*pos[first], *(pos[rest] - 300)]
        got = kv.rows(i // 2, i % 2, "k")
        assert (got[: first.sum()] == old[first]).all()
        want = turned(old[rest] @ spin, -300, neox=arch == "exaone") @ spin
        # half a step of the type, and a scale in f16; of q4_0 a whole one, an 8th of a block's largest value: seven reach the other side
        step = {"f32": 1e-5, "f16": 2**-10, "q8_0": 0.58 / 127, "q4_0": 1.02 / 8}[cells]
        assert np.abs(got[first.sum() :] - want).max() <= step * np.abs(want).max()
        stays = first | rest
        assert (kv.rows(i // 2, i % 2, "v") == values[i][stays]).all()
    llm.n_tokens = llm._kv_known = 120
    llm.eval(OTHERS[20:25])


def positions_of(llm: Llama, i: int) -> list[int]:
    return llm.kv_positions(i // 2, i % 2).tolist()


def test_layers_without_rope_stay(tmp_path: Path, opened: Open) -> None:
    """SmolLM3 leaves RoPE out in every fourth layer, which only its graph says."""
    path = tiny_model.write_llama(tmp_path / "tiny.gguf", arch="smollm3", n_layer=4)
    llm = opened(path, kv_policy="full", n_ctx=512, type_k=0, type_v=0)
    evaluate(llm, TOKENS[:200])
    kv = llm._kv
    assert kv is not None and kv.can_shift()
    before = keys(llm)
    kv.shift(50, 100)
    for i, (old, got) in enumerate(zip(before, keys(llm), strict=True)):
        assert (got[:50] == old[:50]).all()
        want = old[150:] if i // 2 == 3 else turned(old[150:], -100)
        assert np.abs(got[50:] - want).max() <= 1e-5 * np.abs(want).max()


def test_yarn_scales_keys_once(tmp_path: Path, opened: Open) -> None:
    """YaRN multiplies what it turns (arXiv 2309.00071, eq. 22); what is turned again keeps its length."""
    path = tiny_model.write_llama(tmp_path / "tiny.gguf")
    more = {"rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN, "rope_freq_scale": 0.25, "yarn_orig_ctx": 128}
    llm = opened(path, kv_policy="full", type_k=0, type_v=0, n_ctx=512, **more)
    llm.eval(TOKENS)
    before = keys(llm)
    assert llm._kv is not None
    llm._kv.shift(0, 100)
    for old, got in zip(before, keys(llm), strict=True):
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), np.linalg.norm(old[100:], axis=1), rtol=1e-5)
    # where the model itself would have put them
    llm.reset()
    llm.eval([TOKENS[0]] * 150)
    first = keys(llm)[0]  # of the first layer: the same key at every position
    llm._kv.shift(0, 50)
    np.testing.assert_allclose(keys(llm)[0], first[:100], atol=1e-4)


#
# sessions
#


def check_consistent(llm: Llama) -> None:
    stats = llm.kv_stats()
    assert llm.n_tokens == stats.n_past == llm._kv_known <= N_CTX
    for own in positions(llm):
        assert own == sorted(set(own)) and (not own or (own[0] >= 0 and own[-1] < stats.n_past))


def talk(llm: Llama, n_turns: int, *, n_new: int = 30, n_answer: int = 12, history: list[int] | None = None) -> list[int]:
    """Turns of a chat that sends all of its history; checks that nothing of it is evaluated twice."""
    history = [] if history is None else history
    batches = counted(llm)
    for i in range(n_turns):
        start, is_first = 37 * len(history) % 2000, not history
        history += LONG_TEXT[start : start + n_new]
        batches.clear()
        got = answer(llm, history, n_answer)
        # the last token of the answer before comes with the turn, and the last one of this is not evaluated
        new = n_new + (not is_first)
        if llm._kv_limit is None:  # else some are observed besides
            assert sum(batches) == new + n_answer - 1, (i, batches)
        own = llm.kv_stats()
        assert own.miss == "" and own.n_evaluated_last == new, own
        history += got
        check_consistent(llm)
    return history


# 'full' keeps every cell, which a limit does not allow
ENDLESS = [(name, limit) for name in sorted(POLICIES) for limit in (None, 160) if name != "full" or limit is None]


@pytest.mark.parametrize(("policy", "limit"), ENDLESS)
def test_a_chat_without_an_end(tiny: Path, opened: Open, importance: Any, policy: str, limit: int | None) -> None:
    """Five times the context, with every policy, with and without a limit."""
    chosen = importance(policy)
    llm = opened(tiny, kv_policy=chosen, kv_budget=0.5, n_ctx=N_CTX, kv_shift="shift", kv_limit=limit)
    history = talk(llm, 31)
    own = llm.kv_stats()
    assert len(history) > 5 * N_CTX and own.n_shifted > 4 * N_CTX
    assert own.n_shifted + llm.n_tokens == len(history) - 1
    assert llm.input_ids[:4].tolist() == history[:4]  # the sinks
    assert llm.input_ids[4 : llm.n_tokens].tolist() == history[own.n_shifted + 4 : -1]


@pytest.fixture(scope="module")
def importance() -> Callable[[str], Any]:
    """A policy by its name, with head scores where it needs some."""

    def make(name: str) -> Any:
        kind: Any = POLICIES[name]
        scores = np.arange(1, 13).reshape(3, 4) / 12  # of query heads
        own = {"importance": HeadScores({"r": scores, "r2": scores}), "task": "localization"}
        return kind(**{key: value for key, value in own.items() if key in kind.__dataclass_fields__})

    return make


def test_refused_unless_asked_for(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=0.5, n_ctx=N_CTX)
    answer(llm, TOKENS[:250])
    with pytest.raises(UnsupportedCallError, match="256 positions of 256"):
        answer(llm, [*TOKENS[:250]], 20)
    assert llm.kv_stats().n_shifted == 0
    with pytest.raises(ValueError, match="expected one of refuse, shift"):
        opened(tiny, kv_policy="snapkv", kv_shift="slide")
    with pytest.raises(ValueError, match="needs a policy"):
        opened(tiny, kv_shift="shift")


def test_a_model_that_cannot(tiny: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windowkv_edge._native.Context.can_shift", lambda self: False)
    with pytest.raises(UnsupportedModelError, match="kv_shift='shift' is not possible"):
        opened(tiny, kv_policy="snapkv", kv_shift="shift")
    opened(tiny, kv_policy="snapkv")


def test_windows_that_cannot(tmp_path: Path, opened: Open) -> None:
    """Upstream's own shift ends the process with quantised windows, or bf16 ones."""
    path = tiny_model.write_gpt_oss(tmp_path / "gpt-oss.gguf")
    for kind in (8, 30):
        with pytest.raises(UnsupportedModelError, match="kv_shift='shift' is not possible"):
            opened(path, kv_policy="snapkv", kv_shift="shift", type_k=kind)
        llm = opened(path, kv_policy="snapkv", type_k=kind)
        evaluate(llm, TOKENS[:60])
        assert not llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, 4, 20)
        assert llm.kv_stats().n_past == 60


def test_a_hole_that_nobody_could_close(tiny: Path, opened: Open) -> None:
    """Behind a loaded state the cache does not know its context until a token is evaluated."""
    llm, other = (opened(tiny, kv_policy="snapkv") for _ in range(2))
    evaluate(llm, TOKENS[:60])
    other.load_state(llm.save_state())
    memory = llama_cpp.llama_get_memory(other.ctx)
    assert not llama_cpp.llama_memory_seq_rm(memory, 0, 4, 20) and other._kv is not None
    other._kv.shift(4, 16)
    assert other.kv_stats().n_past == 44
    assert llama_cpp.llama_memory_seq_rm(memory, 0, 4, 20)
    for call in (other._kv.accumulate, lambda: other._kv.compact_custom(4, 20, lambda *own: None)):  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="were removed and the ones behind them did not move"):
            call()
    llama_cpp.llama_memory_seq_add(memory, 0, 20, -1, -16)
    assert other.kv_stats().n_past == 28


def test_an_answer_longer_than_the_context(tiny: Path, opened: Open) -> None:
    """One sampler for all of it, every token evaluated once."""
    llm = opened(tiny, kv_policy="snapkv", kv_budget=0.5, n_ctx=N_CTX, kv_shift="shift")
    batches = counted(llm)
    stream = llm.generate(TOKENS[:100], temp=0.8)
    got = [next(stream)]
    sampler = llm._sampler
    got += [next(stream) for _ in range(699)]
    assert llm._sampler is sampler and llm._kv_sampler is None
    stream.close()
    assert sum(batches) == 100 + 699
    own = llm.kv_stats()
    assert own.n_shifted + llm.n_tokens == 799 and own.n_shifted > 2 * N_CTX
    check_consistent(llm)
    assert llm.input_ids[4 : llm.n_tokens].tolist() == [*TOKENS[:100], *got][own.n_shifted + 4 : -1]
    # and its history is known
    batches.clear()
    answer(llm, [*TOKENS[:100], *got, *OTHERS[:10]])
    assert sum(batches) == 11


def test_a_prompt_longer_than_the_context(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=0.5, n_ctx=N_CTX, kv_shift="shift")
    batches = counted(llm)
    answer(llm, LONG_TEXT[:1000])
    assert sum(batches) == 1000
    own = llm.kv_stats()
    assert (own.n_evaluated_last, own.n_reused_last, own.miss) == (1000, 0, "")
    assert own.n_shifted + llm.n_tokens == 1000 and own.n_compactions > 0
    assert llm.input_ids[4 : llm.n_tokens].tolist() == LONG_TEXT[own.n_shifted + 4 : 1000]
    batches.clear()
    answer(llm, LONG_TEXT[:1000])  # the same again: its logits were kept
    assert sum(batches) == 0 and llm.kv_stats().n_reused_last == llm.n_tokens
    # pieces by hand
    llm.reset()
    llm.eval(LONG_TEXT[:700])
    llm.eval(LONG_TEXT[700:900])
    llm.sample(temp=0.0)
    assert llm.kv_stats().n_shifted - own.n_shifted + llm.n_tokens == 900
    assert llm.kv_stats().n_evaluated_last == 900
    check_consistent(llm)


def test_what_was_given_up_is_evaluated_again(tiny: Path, opened: Open) -> None:
    """Where a prompt tells it otherwise, or ends before."""
    llm = opened(tiny, kv_policy="full", n_ctx=N_CTX, kv_shift="shift")
    history = talk(llm, 8)
    own = llm.kv_stats()
    assert 0 < own.n_shifted < len(history)
    other = [*history[:50], (history[50] + 1) % tiny_model.N_VOCAB, *history[51:]]
    batches = counted(llm)
    answer(llm, other)
    assert sum(batches) == len(other) - 4  # but for the first ones
    assert "inside of what was given up" in llm.kv_stats().miss
    # and that is its history now
    batches.clear()
    answer(llm, [*other, *OTHERS[:7]])
    assert sum(batches) == 7 and llm.kv_stats().miss == ""
    batches.clear()
    answer(llm, [*history, *OTHERS[:7]])
    assert sum(batches) == len(history) + 3
    # a prompt that ends before
    batches.clear()
    answer(llm, history[:100])
    assert sum(batches) == 96
    check_consistent(llm)


def test_given_up_parts() -> None:
    """Against a history as a plain list."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        history = rng.integers(0, 3, 60).tolist()  # many tokens are alike
        held = list(enumerate(history))
        lost = GivenUp()
        for _ in range(rng.integers(1, 6)):
            p0 = int(rng.integers(0, len(held) - 2))
            n = int(rng.integers(1, min(12, len(held) - p0)))
            lost = lost.closed(p0, [token for _, token in held[p0 : p0 + n]])
            del held[p0 : p0 + n]
        lost = GivenUp.of(lost.noted())
        cached = np.array([token for _, token in held], dtype=np.intc)
        more = rng.integers(0, 3, 5).tolist()
        n_parts, mapped, why = lost.held([*history, *more], cached)
        # what is there is there once, in one way or the other
        assert mapped[: len(cached)] == cached.tolist()
        assert (n_parts, mapped, why) == (len(lost.parts), [*cached.tolist(), *more], "") or n_parts == 0
        # a history that differs: only parts that are whole are left out
        at = int(rng.integers(0, 60))
        other = [*history[:at], history[at] + 3, *history[at + 1 :]]
        n_parts, mapped, _ = lost.held(other, cached)
        n_gone = sum(n for _, own in lost.parts[:n_parts] for n, _ in own)
        assert len(mapped) == 60 - n_gone and mapped[at - n_gone] == history[at] + 3


def test_pins_stay(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="snapkv", kv_budget=0.6, n_ctx=N_CTX, kv_shift="shift")
    llm.kv_pin(40, 50)
    history = talk(llm, 20)
    ((start, stop),) = llm.kv_pinned
    assert (start, stop) == (4, 14)
    assert llm.input_ids[start:stop].tolist() == history[40:50]
    assert all(set(range(start, stop)) <= set(own) for own in positions(llm))
    # where nothing can go
    whole = opened(tiny, kv_policy="full", n_ctx=N_CTX, kv_shift="shift")
    history = talk(whole, 6)
    whole.kv_pin(0, N_CTX)
    for ask in (lambda: whole.eval(LONG_TEXT[:N_CTX]), lambda: answer(whole, [*history, *LONG_TEXT[:N_CTX]])):
        with pytest.raises(UnsupportedCallError, match="pin fewer"):
            ask()
        check_consistent(whole)
    whole.kv_unpin()
    whole.eval(LONG_TEXT[:60])
    check_consistent(whole)


def test_saved_sessions_go_on(tiny: Path, opened: Open, tmp_path: Path) -> None:
    make = {"kv_policy": "adakv", "kv_budget": 0.4, "n_ctx": N_CTX, "kv_shift": "shift"}
    llm, other = opened(tiny, **make), opened(tiny, **make)
    llm.kv_pin(30, 33)
    history = talk(llm, 12)
    llm.kv_save(tmp_path / "own.session")
    other.kv_load(tmp_path / "own.session")
    assert other.kv_pinned == llm.kv_pinned and other.kv_stats().n_shifted == llm.kv_stats().n_shifted
    want = talk(llm, 12, history=list(history))
    assert talk(other, 12, history=list(history)) == want
    assert positions(other) == positions(llm)
    assert all((a == b).all() for a, b in zip(keys(other), keys(llm), strict=True))
    # in memory, and from a cache of states
    llm.load_state(state := other.save_state())
    talk(llm, 2, history=list(want))
    llm.reset()
    assert llm._saves(state, np.array([*want, 1], dtype=np.intc)) == len(want) - 1


def test_scores_move(tiny: Path, opened: Open) -> None:
    llm = opened(tiny, kv_policy="full", n_ctx=N_CTX, kv_shift="shift", logits_all=True)
    llm.eval(LONG_TEXT[:250])
    before = llm.scores.copy()
    llm.eval(LONG_TEXT[250:260])
    n = llm.kv_stats().n_shifted
    assert n > 0 and (llm.scores[:4] == before[:4]).all() and (llm.scores[4 : 250 - n] == before[n + 4 : 250]).all()


class Failing:
    """``Context.shift`` that fails at one call: before it did anything, or behind it."""

    def __init__(self, llm: Llama, at: int, error: BaseException, *, after: bool) -> None:
        kv = llm._kv
        assert kv is not None
        self.n, self.at, self.error, self.after, self.own = 0, at, error, after, kv.shift
        kv.shift = self  # type: ignore[method-assign]

    def __call__(self, p0: int, n: int) -> None:
        self.n += 1
        if self.n == self.at and not self.after:
            raise self.error
        self.own(p0, n)
        if self.n == self.at:
            raise self.error


STOPS = {
    "memory": (NativeError("no memory for the rows"), False),
    "ctrl-c before": (KeyboardInterrupt(), False),
    "ctrl-c behind": (KeyboardInterrupt(), True),
}


@pytest.mark.parametrize(("error", "after"), STOPS.values(), ids=STOPS)
@pytest.mark.parametrize("call", ["eval", "answer", "prompt"])
def test_what_stops_a_shift(tiny: Path, opened: Open, call: str, error: BaseException, after: bool) -> None:
    """With a pin there are two moves; whichever fails, the session says what the cache holds, and goes on."""
    llm = opened(tiny, kv_policy="full", n_ctx=N_CTX, kv_shift="shift")
    llm.kv_pin(40, 50)
    answer(llm, LONG_TEXT[:250])
    failing = Failing(llm, 1, error, after=after)
    calls: dict[str, Callable[[], Any]] = {
        "eval": lambda: llm.eval(LONG_TEXT[250:270]),
        "answer": lambda: answer(llm, LONG_TEXT[:250], 20),
        "prompt": lambda: answer(llm, LONG_TEXT[:300]),
    }
    with pytest.raises(type(error)):
        calls[call]()
    assert failing.n == 1
    check_consistent(llm)
    lost = llm.kv_stats().n_shifted
    assert (lost > 0) == after
    if call == "prompt":
        known = LONG_TEXT[:250]
        want = [*known[:4], *known[4 : 50], *known[50 + lost :]] if after else known
        assert llm.input_ids[: llm.n_tokens].tolist() == want
    batches = counted(llm)
    answer(llm, LONG_TEXT[:300])
    assert sum(batches) <= 300 - 240
    check_consistent(llm)


def test_windows_and_recurrent_states(tmp_path: Path, opened: Open) -> None:
    for name in ("gpt-oss", "lfm2", "granitehybrid"):
        path = MODELS[name](tmp_path / f"{name}.gguf")
        llm = opened(path, kv_policy="snapkv", kv_budget=0.5, n_ctx=N_CTX, kv_shift="shift")
        history = talk(llm, 14)
        llm.kv_save(tmp_path / "own.session")
        other = opened(path, kv_policy="snapkv", n_ctx=N_CTX, kv_shift="shift")
        other.kv_load(tmp_path / "own.session")
        assert talk(other, 7, history=list(history)) == talk(llm, 7, history=list(history))


#
# completions and chats
#


def test_the_chat_handler(smollm2: Path, opened: Open) -> None:
    """llama-cpp-python renders the whole history at every turn; what is new is evaluated. Every other turn is a stream."""
    llm: Any = opened(smollm2, kv_policy="auto", kv_budget=0.5, n_ctx=N_CTX, kv_shift="shift", n_threads=2)
    messages = [{"role": "system", "content": "The code is 7-4-1. Answer briefly."}]
    turns = []
    for i in range(14):
        messages.append({"role": "user", "content": f"Tell me something about the number {i} and its friends."})
        before = llm.kv_stats()
        got = llm.create_chat_completion(messages, stream=i % 2 == 1, temperature=0.0, max_tokens=12)
        choices = [part["choices"][0] for part in (got if i % 2 == 1 else [got])]
        assert choices[-1]["finish_reason"] in ("stop", "length")
        text = "".join((own.get("message") or own["delta"]).get("content") or "" for own in choices)
        messages.append({"role": "assistant", "content": text})
        own = llm.kv_stats()
        turns.append(own.n_evaluated - before.n_evaluated)
        assert own.miss == ""
    assert own.n_shifted > N_CTX
    assert max(turns[1:]) < 35, turns  # a question with its template, and the end of the answer before
    start, stop = llm.kv_pinned[-1]
    assert start == 0 and b"7-4-1" in llm.detokenize(llm.input_ids[:stop].tolist())


def test_completions_behind_the_context(smollm2: Path, opened: Open) -> None:
    llm: Any = opened(smollm2, kv_policy="snapkv", kv_budget=0.5, n_ctx=N_CTX, kv_shift="shift", n_threads=2)
    text = "One two three four five six seven eight nine ten. " * 30  # 330 tokens
    out = llm.create_completion(text, max_tokens=8, temperature=0.0)
    assert out["usage"]["prompt_tokens"] > 300 and out["choices"][0]["finish_reason"] == "length"
    n_shifted = llm.kv_stats().n_shifted
    assert n_shifted > 100
    out = llm.create_completion("1, 2, 3, 4, 5, 6, 7, 8, 9,", max_tokens=None, temperature=0.0)
    assert out["usage"]["completion_tokens"] == N_CTX and llm.kv_stats().n_shifted > n_shifted
    with pytest.raises(ValueError, match="logprobs is not supported"):
        llm.create_completion("One", logprobs=1)
    assert llm._n_ctx == N_CTX and not llm._kv_lifts and not llm._kv_as_is
