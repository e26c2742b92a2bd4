"""Models whose other layers keep a window or a recurrent state: policies compress the attention to all positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import tiny_model
from scripted import evaluate

from windowkv_edge import Llama, UnsupportedCallError, UnsupportedModelError

Open = Callable[..., Llama]

STOCK: dict[str, Any] = {"flash_attn": True, "swa_full": False}
GEMMA_LAYERS = (5, 11, 17)
GEMMA_CELL = 2 * 256 * 2  # K and V of one head, f16
# 15 layers of 512 positions, and as many again for the batch that is being evaluated
GEMMA_WINDOWS = 15 * (512 + 512) * GEMMA_CELL


def logits(llm: Llama) -> npt.NDArray[np.float32]:
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


def follow(llm: Llama, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits after every token, evaluated one by one."""
    res = []
    for token in tokens:
        llm.eval([token])
        res.append(logits(llm))
    return np.array(res)


def greedy(llm: Llama, tokens: list[int], n: int) -> list[int]:
    res = []
    for token in llm.generate(tokens, temp=0.0):
        res.append(token)
        if len(res) == n:
            break
    return res


#
# Gemma 3
#


@pytest.fixture(scope="module")
def gemma_tokens(gemma3: Path, document: str) -> list[int]:
    llm = Llama(str(gemma3), vocab_only=True, verbose=False)
    tokens = llm.tokenize(document.encode())[:1700]
    llm.close()
    assert len(tokens) == 1700
    return tokens


@pytest.fixture(scope="module")
def gemma_stock(gemma3: Path, gemma_tokens: list[int]) -> Iterator[Llama]:
    llm = Llama(str(gemma3), n_ctx=2048, n_threads=2, n_threads_batch=2, verbose=False, **STOCK)
    yield llm
    llm.close()


def test_gemma_with_room_for_all_is_stock(
    gemma3: Path, gemma_tokens: list[int], gemma_stock: Llama, opened: Open
) -> None:
    prompt = gemma_tokens[:1500]
    llm = opened(gemma3, kv_policy="windowkv", kv_budget=1600)
    for session in (gemma_stock, llm):
        session.reset()
        session.eval(prompt)
    assert np.abs(logits(llm) - logits(gemma_stock)).max() < 1e-2  # measured: 0
    want = greedy(gemma_stock, prompt, 64)
    assert greedy(llm, prompt, 64) == want
    assert llm.kv_stats().n_compactions == 0

    stock, ours = gemma_stock.kv_stats(), llm.kv_stats()
    assert stock.layers == ours.layers == GEMMA_LAYERS
    assert stock.n_past == ours.n_past == 1563
    assert stock.bytes_full == ours.bytes_full == 1563 * 3 * GEMMA_CELL
    assert stock.bytes_live == 2048 * 3 * GEMMA_CELL
    assert stock.bytes_other == ours.bytes_other == GEMMA_WINDOWS


@pytest.mark.parametrize("policy", ["windowkv", "adakv"])
def test_gemma_keeps_its_budget(policy: str, gemma3: Path, gemma_tokens: list[int], opened: Open) -> None:
    llm = opened(gemma3, kv_policy=policy, kv_budget=0.12)
    evaluate(llm, gemma_tokens[:1500])
    stats = llm.kv_stats()
    assert (stats.layers, stats.cells.shape, stats.n_past) == (GEMMA_LAYERS, (3, 1), 1500)
    assert stats.cells.sum() == 3 * 180
    assert stats.bytes_other == GEMMA_WINDOWS
    assert stats.bytes_released > 0.7 * stats.bytes_full
    assert stats.bytes_live < 0.3 * stats.bytes_full
    assert llm.kv_positions(2, 0)[-1] == 1499

    answer = llm.detokenize(greedy(llm, gemma_tokens[:1500], 48)).decode()
    words = answer.split()
    assert len(words) > 20 and sum(word.isascii() for word in words) > 0.9 * len(words), answer
    assert llm.kv_stats().n_compactions == 1


def test_gemma_windows_stand_at_true_positions(
    gemma3: Path, gemma_tokens: list[int], gemma_stock: Llama, opened: Open
) -> None:
    """What follows a compaction stays close to stock's."""
    gemma_stock.reset()
    gemma_stock.eval(gemma_tokens[:1500])
    want = follow(gemma_stock, gemma_tokens[1500:1540])
    llm = opened(gemma3, kv_policy="snapkv", kv_budget=0.5)
    evaluate(llm, gemma_tokens[:1500])
    got = follow(llm, gemma_tokens[1500:1540])
    assert llm.kv_stats().cells.max() == 750 + 40
    assert (got.argmax(axis=1) == want.argmax(axis=1)).mean() > 0.7


def test_gemma_second_turn_goes_on(gemma3: Path, gemma_tokens: list[int], opened: Open) -> None:
    """A prompt that continues the last one is not evaluated again, one that leaves it is, and rightly so."""
    llm = opened(gemma3, kv_policy="snapkv", kv_budget=0.25, kv_growth=1)
    prompt = gemma_tokens[:800]
    first = greedy(llm, prompt, 8)
    again = prompt + first[:7] + gemma_tokens[800:810]
    greedy(llm, again, 4)
    assert llm.kv_stats().n_compactions == 2
    assert llm.kv_positions(0, 0)[-1] == llm.kv_stats().n_past - 1

    # leaves the prompt inside of what was compacted
    other = prompt[:500] + gemma_tokens[1000:1200]
    got = greedy(llm, other, 12)
    fresh = opened(gemma3, kv_policy="snapkv", kv_budget=0.25)
    assert got == greedy(fresh, other, 12)
    assert llm.kv_stats().n_past == fresh.kv_stats().n_past


def test_gemma_goes_back_only_as_far_as_its_window(gemma3: Path, gemma_tokens: list[int], opened: Open) -> None:
    """Nothing was compacted, but the windows have moved on: removing nothing in one cache and something in the other
    would answer from a window with a hole."""
    llm = opened(gemma3, kv_policy="snapkv", kv_budget=1700, n_batch=256, n_ubatch=256)
    evaluate(llm, gemma_tokens[:1000])

    before = llm.kv_stats().cells.copy()
    assert not llm._ctx.kv_cache_seq_rm(-1, 300, -1)
    assert np.array_equal(llm.kv_stats().cells, before) and llm.kv_stats().n_past == 1000
    llm.n_tokens = 300
    with pytest.raises(UnsupportedCallError, match="window or recurrent layers moved on to 1000"):
        llm.eval(gemma_tokens[300:310])
    llm.n_tokens = 1000

    other = gemma_tokens[:300] + gemma_tokens[1000:1100]
    got = greedy(llm, other, 12)  # evaluated again
    fresh = opened(gemma3, kv_policy="snapkv", kv_budget=1700, n_batch=256, n_ubatch=256)
    assert got == greedy(fresh, other, 12)

    # a few tokens back is no trouble
    llm.reset()
    evaluate(llm, gemma_tokens[:900])
    follow(llm, gemma_tokens[900:920])
    llm.n_tokens = 905
    got_back = follow(llm, gemma_tokens[1600:1610])
    fresh.reset()
    evaluate(fresh, gemma_tokens[:900])
    follow(fresh, gemma_tokens[900:905])
    assert np.abs(got_back - follow(fresh, gemma_tokens[1600:1610])).max() < 1e-2
    assert llm.kv_stats().n_past == 915


def test_gemma_reset(gemma3: Path, gemma_tokens: list[int], opened: Open) -> None:
    llm = opened(gemma3, kv_policy="windowkv", kv_budget=0.12)
    want = greedy(llm, gemma_tokens[:600], 16)
    llm.reset()
    stats = llm.kv_stats()
    assert stats.n_past == 0 and stats.cells.sum() == 0
    assert greedy(llm, gemma_tokens[:600], 16) == want


def test_a_batch_that_does_not_follow_is_refused(gemma3: Path, gemma_tokens: list[int], opened: Open) -> None:
    llm = opened(gemma3, kv_policy="snapkv", kv_budget=0.25)
    evaluate(llm, gemma_tokens[:600])
    batch = llama_cpp.llama_batch_init(1, 0, 1)
    batch.n_tokens, batch.token[0], batch.pos[0] = 1, gemma_tokens[600], 700
    batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 0, 1
    assert llama_cpp.llama_decode(llm.ctx, batch) != 0
    llama_cpp.llama_batch_free(batch)
    follow(llm, gemma_tokens[600:603])
    assert llm.kv_stats().n_past == 603


def test_shifts_of_all_caches_or_none(gemma3: Path, gemma_tokens: list[int], opened: Open) -> None:
    llm = opened(gemma3, kv_policy="snapkv", kv_budget=400)
    evaluate(llm, gemma_tokens[:300])
    mem = llama_cpp.llama_get_memory(llm.ctx)
    llama_cpp.llama_memory_seq_add(mem, 0, 100, -1, -50)  # over positions that are there
    llama_cpp.llama_memory_seq_div(mem, 0, 0, -1, 2)
    assert llama_cpp.llama_memory_seq_pos_max(mem, 0) == 299
    assert llama_cpp.llama_memory_can_shift(mem) and llama_cpp.llama_memory_seq_rm(mem, 0, 4, 104)
    llama_cpp.llama_memory_seq_add(mem, 0, 104, -1, -99)  # by another number
    assert llama_cpp.llama_memory_seq_pos_max(mem, 0) == 299
    llama_cpp.llama_memory_seq_add(mem, 0, 104, -1, -100)
    assert llama_cpp.llama_memory_seq_pos_max(mem, 0) == 199
    llm.n_tokens = llm._kv_known = 200
    follow(llm, gemma_tokens[300:303])


def test_shifts_have_the_layers_own_base(gemma3: Path, gemma_tokens: list[int], opened: Open) -> None:
    """Layers without a window turn by another base than those with one; pairs are half a head apart."""
    llm = opened(gemma3, kv_policy="full", type_k=0, type_v=0, n_ctx=1024)
    llm.eval(gemma_tokens[:700])
    assert llm._kv is not None
    before = llm._kv.rows(0, 0, "k")[304:]
    llm._kv.shift(4, 300)
    base = float(llm.metadata["gemma3.rope.freq_base"])
    angle = -300 * base ** (-np.arange(128) * 2 / 256)
    x, y = before[:, :128], before[:, 128:]
    want = np.concatenate([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=1)
    np.testing.assert_allclose(llm._kv.rows(0, 0, "k")[4:], want, atol=1e-6 * np.abs(want).max())


#
# recurrent layers, learned sinks
#

TOKENS = np.random.default_rng(1).integers(0, tiny_model.N_VOCAB, 400).tolist()
MODELS: dict[str, Callable[..., Path]] = {
    "lfm2": tiny_model.write_lfm2,
    "granitehybrid": tiny_model.write_granite_hybrid,
    "gpt-oss": tiny_model.write_gpt_oss,
}
HYBRIDS = ("lfm2", "granitehybrid")


@pytest.fixture(scope="module")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of an architecture; two of its four layers attend to all positions, with two kv heads each."""
    folder = tmp_path_factory.mktemp("tiny")
    done: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in done:
            done[arch] = MODELS[arch](folder / f"{arch}.gguf")
        return done[arch]

    return make


@pytest.mark.parametrize("arch", MODELS)
def test_tiny_with_room_for_all_is_stock(arch: str, tiny_of: Callable[[str], Path], opened: Open) -> None:
    stock, llm = opened(tiny_of(arch), **STOCK), opened(tiny_of(arch), kv_policy="snapkv", kv_budget=1000)
    for session in (stock, llm):
        session.eval(TOKENS)
    assert np.abs(logits(llm) - logits(stock)).max() < 1e-2  # measured: 0, as all below
    assert np.abs(follow(llm, TOKENS[:40]) - follow(stock, TOKENS[:40])).max() < 1e-2
    assert llm.kv_stats().layers == stock.kv_stats().layers == (1, 3)
    assert llm.kv_stats().bytes_other == stock.kv_stats().bytes_other > 0


@pytest.mark.parametrize("policy", ["windowkv", "snapkv", "adakv", "streamingllm"])
@pytest.mark.parametrize("arch", MODELS)
def test_tiny_keeps_its_budget(arch: str, policy: str, tiny_of: Callable[[str], Path], opened: Open) -> None:
    llm = opened(tiny_of(arch), kv_policy=policy, kv_budget=0.25)
    evaluate(llm, TOKENS)
    stats = llm.kv_stats()
    assert stats.cells.shape == (2, 2) and stats.cells.sum() == 4 * 100
    assert stats.bytes_released > 0
    follow(llm, TOKENS[:10])
    assert llm.kv_stats().cells.sum() == 4 * 110


@pytest.mark.parametrize("arch", HYBRIDS)
def test_recurrent_layers_do_not_go_back(arch: str, tiny_of: Callable[[str], Path], opened: Open) -> None:
    llm = opened(tiny_of(arch), kv_policy="snapkv", kv_budget=0.25)
    evaluate(llm, TOKENS[:300])
    follow(llm, TOKENS[300:320])
    assert llm._ctx.kv_cache_seq_rm(-1, 320, -1)  # nothing to remove
    for p0 in (100, 310):  # compacted; not compacted
        assert not llm._ctx.kv_cache_seq_rm(-1, p0, -1)
        assert not llm._ctx.kv_cache_seq_rm(0, p0, -1)
    stats = llm.kv_stats()
    assert stats.n_past == 320 and stats.cells.tolist() == [[95, 95]] * 2
    llm.n_tokens = 310
    with pytest.raises(UnsupportedCallError, match="window or recurrent layers moved on to 320"):
        llm.eval(TOKENS[310:312])
    llm.n_tokens = 320
    after = follow(llm, TOKENS[320:330])

    fresh = opened(tiny_of(arch), kv_policy="snapkv", kv_budget=0.25)
    evaluate(fresh, TOKENS[:300])
    assert np.abs(follow(fresh, TOKENS[300:330])[20:] - after).max() < 1e-2


@pytest.mark.parametrize("arch", MODELS)
def test_tiny_prompts_one_after_another(arch: str, tiny_of: Callable[[str], Path], opened: Open) -> None:
    """A prompt that continues the last one is not evaluated again, any other is; answers equal a fresh session's."""
    llm = opened(tiny_of(arch), kv_policy="snapkv", kv_budget=0.5, kv_growth=1)
    first = greedy(llm, TOKENS[:300], 6)
    greedy(llm, [*TOKENS[:300], *first[:5], *TOKENS[300:310]], 4)
    assert llm.kv_stats().n_compactions == 2
    other = TOKENS[:200] + TOKENS[350:]
    got = greedy(llm, other, 12)
    fresh = opened(tiny_of(arch), kv_policy="snapkv", kv_budget=0.5)
    assert got == greedy(fresh, other, 12)

    llm.reset()
    assert llm.kv_stats().n_past == 0
    assert greedy(llm, TOKENS[:300], 6) == first


def test_sinks_count_in_both_kinds_of_attention(tmp_path: Path, opened: Open) -> None:
    """A sink that draws most of the attention, with budgets that drop next to nothing: ignoring it would show."""
    answers = {}
    for sink in (-30.0, 6.0):
        model = tiny_model.write_gpt_oss(tmp_path / f"sink{sink}.gguf", sink=sink)
        for policy, budget in ((None, None), ("snapkv", 398), ("adakv", 398)):
            kwargs: dict[str, Any] = STOCK if policy is None else {"kv_policy": policy, "kv_budget": budget}
            llm = opened(model, **kwargs)
            llm.eval(TOKENS)
            answers[sink, policy] = follow(llm, TOKENS[:20])
            if policy == "adakv":
                assert len(set(llm.kv_stats().cells.ravel().tolist())) > 1
    apart = np.abs(answers[6.0, None] - answers[-30.0, None]).max()
    for policy in ("snapkv", "adakv"):
        assert np.abs(answers[6.0, policy] - answers[6.0, None]).max() < 0.1 * apart


def test_layers_that_attend_to_all_positions_are_needed(tmp_path: Path) -> None:
    model = tiny_model.write_gpt_oss(tmp_path / "windows.gguf", n_layer=1)
    with pytest.raises(UnsupportedModelError, match="no layer that attends to all positions"):
        Llama(str(model), kv_policy="snapkv", n_ctx=512, verbose=False)
