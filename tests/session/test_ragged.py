"""Heads with cells of their own: what they hold, what they cost, and that the model's answer is computed from them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
import llama_cpp
import numpy as np
import pytest
import tiny_model
from policy_table import kept
from reference.tiny_llama import TinyLlama
from scripted import evaluate

from windowkv_edge import (
    AdaKV,
    Auto,
    HeadKV,
    HeadScores,
    KVPolicy,
    Llama,
    MissingProfileError,
    PyramidKV,
    UnsupportedModelError,
    WindowAdaKV,
    WindowHeadKV,
    WindowKV,
)

TYPES = {
    "f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16, "bf16": 30,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}  # fmt: skip


def scores(n_layer: int, n_head: int, seed: int = 0) -> HeadScores:
    rng = np.random.default_rng(seed)
    return HeadScores({"r": rng.random((n_layer, n_head)) ** 3, "r2": rng.random((n_layer, n_head)) ** 3})


@pytest.fixture
def tiny_session(opened: Callable[..., Llama], tiny: Path) -> Callable[..., Llama]:
    return functools.partial(opened, tiny, n_ctx=1024)


def logits(llm: Llama) -> np.ndarray:
    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()


def cells(llm: Llama) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    kv = llm._kv
    assert kv is not None
    n_layer, n_head_kv = llm.kv_stats().cells.shape
    return [
        [tuple(kv.rows(il, ih, w).astype(np.float64) for w in "kv") for ih in range(n_head_kv)] for il in range(n_layer)
    ]  # type: ignore[return-value]


TOKENS = np.random.default_rng(1).integers(0, tiny_model.N_VOCAB, 900).tolist()

POLICIES = {
    "windowkv": WindowKV(window_size=8, omega=4),
    "pyramidkv": PyramidKV(window_size=8, beta=5.0),
    "adakv": AdaKV(window_size=8, alpha_safeguard=0.1),
    "headkv": HeadKV(beta=1.2, importance=scores(3, 4)),
    "windowkv+adakv": WindowAdaKV(window_size=8, omega=4, alpha_safeguard=0.1),
    "windowkv+headkv": WindowHeadKV(window_size=8, omega=4, beta=1.1, importance=scores(3, 4)),
}


@pytest.mark.parametrize("name", POLICIES)
def test_answers_are_computed_from_the_cells(name: str, tiny: Path, tiny_session: Callable[..., Llama]) -> None:
    """Logits equal a NumPy model that attends to the cells the session says it holds: token by token, over the growth
    of the pools, with a second prompt of several tokens, and after a second compaction."""
    llm = tiny_session(kv_policy=POLICIES[name], kv_budget=30, type_k=TYPES["f32"], type_v=TYPES["f32"])
    oracle = TinyLlama(tiny)
    # stock attention over the cells of uniform layers rounds F32 cells and queries to F16
    atol = 1e-3 if POLICIES[name].ragged else 1.5e-2
    pos = 300
    evaluate(llm, TOKENS[:pos])
    assert llm.kv_stats().cells.mean() == 30
    if POLICIES[name].ragged:
        assert llm.kv_stats().cells.std() > 3

    held = cells(llm)
    for _ in range(50):
        llm.eval([TOKENS[pos]])
        want = oracle.step(TOKENS[pos], pos, held)
        np.testing.assert_allclose(logits(llm), want, atol=atol)
        pos += 1
    # several tokens at once see what came before them and nothing of what follows
    llama_cpp.Llama.eval(llm, TOKENS[pos : pos + 70])
    for token in TOKENS[pos : pos + 70]:
        want = oracle.step(token, pos, held)
        pos += 1
    np.testing.assert_allclose(logits(llm), want, atol=atol)
    for il, layer in enumerate(held):
        for ih, (k, _) in enumerate(layer):
            np.testing.assert_allclose(llm._kv.rows(il, ih, "k"), k, atol=atol)  # type: ignore[union-attr]
            assert len(llm.kv_positions(il, ih)) == len(k)

    llm.kv_compact(25)
    assert llm.kv_stats().cells.mean() == 25
    held = cells(llm)
    llm.eval([TOKENS[pos]])
    np.testing.assert_allclose(logits(llm), oracle.step(TOKENS[pos], pos, held), atol=atol)


@pytest.mark.parametrize("name", ["auto", "adakv", "headkv", "windowkv+adakv", "windowkv+headkv", "tokens"])
def test_selection_equals_the_reference(name: str, session: Callable[..., Llama], document: str) -> None:
    policy: KVPolicy = {
        "auto": Auto(window_floor=20),
        "tokens": WindowHeadKV(importance=scores(30, 9), token_share=0.4, window_floor=0, token_window_size=24),
        "adakv": AdaKV(window_size=16),
        "headkv": HeadKV(importance=scores(30, 9)),
        "windowkv+adakv": WindowAdaKV(),
        "windowkv+headkv": WindowHeadKV(importance=scores(30, 9)),
    }[name]
    llm = session(kv_policy=policy, kv_budget=1.0)
    llm.eval(llm.tokenize(document.encode())[:600])
    kv = llm._kv
    assert kv is not None
    bound = llm._kv_bound
    positions = [[llm.kv_positions(il, ih) for ih in range(3)] for il in range(30)]
    parts = bound.parts()
    found = [kv.scores(il, parts.scoring.window_size, among=bound.n_observed) for il in range(30)]
    tokens = [kv.scores(il, parts.scoring.token_window_size, among=bound.n_observed) for il in range(30)] if parts.scoring.token_window_size else None
    keep = kept(bound, positions, found, 60, token_scores=tokens)
    stats = llm.kv_compact(60)
    assert stats.cells.tolist() == [[int(own.sum()) for own in layer] for layer in keep]
    assert stats.cells.sum() == 60 * 90
    for il in range(30):
        for ih in range(3):
            assert llm.kv_positions(il, ih).tolist() == positions[il][ih][keep[il][ih]].tolist()


def test_memory_is_what_the_heads_hold(session: Callable[..., Llama], document: str) -> None:
    """No padding to the longest head: packed cells, 16 free ones a head, and the observed queries."""
    llm = session(n_ctx=4096, kv_policy=AdaKV(window_size=16), kv_budget=0.12)
    evaluate(llm, (llm.tokenize(document.encode()) * 2)[:2000])
    stats = llm.kv_stats()
    cell = (64 + 64) * 2
    queries = 2 * 30 * 9 * 64 * 2 * 16
    assert stats.cells.max() > 1.5 * stats.cells.mean()
    packed = int(stats.cells.sum() + 16 * stats.cells.size) * cell + queries
    assert packed <= stats.bytes_live <= packed + 30 * 4096
    assert stats.bytes_released > 0.8 * stats.bytes_full


def test_sequence_rules_hold_for_ragged_heads(tiny_session: Callable[..., Llama]) -> None:
    llm = tiny_session(kv_policy=AdaKV(window_size=8, alpha_safeguard=0.1), kv_budget=30)
    evaluate(llm, TOKENS[:200])
    before = [[llm.kv_positions(il, ih).tolist() for ih in range(2)] for il in range(3)]
    for token in TOKENS[200:240]:
        llm.eval([token])
    first = logits(llm)
    # trimming the tail and going on gives the same
    llm.n_tokens = 200
    llama_cpp.Llama.eval(llm, TOKENS[200:240])
    np.testing.assert_allclose(logits(llm), first, atol=2e-3)
    assert not llm._ctx.kv_cache_seq_rm(-1, 150, -1)  # lies in what was compacted
    assert llm._ctx.kv_cache_seq_rm(-1, 200, -1)
    llm.n_tokens = 200
    assert [[llm.kv_positions(il, ih).tolist() for ih in range(2)] for il in range(3)] == before


def test_snapshot_of_ragged_heads(tiny_session: Callable[..., Llama]) -> None:
    llm = tiny_session(kv_policy=AdaKV(window_size=8, alpha_safeguard=0.1), kv_budget=30)
    evaluate(llm, TOKENS[:200])
    llm._kv.snapshot_save()  # type: ignore[union-attr]
    want = []
    for _ in range(3):
        llm._kv.snapshot_restore()  # type: ignore[union-attr]
        llm.n_tokens = 200
        llama_cpp.Llama.eval(llm, TOKENS[200:230])
        llm.eval([TOKENS[230]])
        want.append(logits(llm))
        llm.kv_compact(10)
    assert np.array_equal(want[0], want[1]) and np.array_equal(want[0], want[2])


def test_heads_of_all_layers_fill_together(tiny_session: Callable[..., Llama]) -> None:
    """However many cells their layers hold: a token that brings a new pool ends what a device has captured of the graph."""
    llm = tiny_session(kv_policy=WindowAdaKV(across="model", alpha_safeguard=0.1), kv_budget=2400, n_ctx=5120)
    evaluate(llm, np.random.default_rng(3).integers(0, tiny_model.N_VOCAB, 4800).tolist())
    means = llm.kv_stats().cells.mean(axis=1)
    assert means.max() > 1.2 * means.min()
    sizes = [llm.kv_stats().bytes_live]
    for token in TOKENS[:200]:
        llm.eval([token])
        sizes.append(llm.kv_stats().bytes_live)
    assert 4 <= np.count_nonzero(np.diff(sizes)) <= 200 // (2400 // 64) + 1


def log_probs(row: np.ndarray) -> np.ndarray:
    x = row.astype(np.float64)
    return np.asarray(x - x.max() - np.log(np.exp(x - x.max()).sum()))


@pytest.mark.parametrize("name", ["windowkv", "adakv"])
@pytest.mark.parametrize(("type_k", "type_v"), [("bf16", "bf16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "q4_0")])
def test_cell_types(
    name: str,
    type_k: str,
    type_v: str,
    session: Callable[..., Llama],
    of_stock: Callable[..., tuple[list[list[int]], np.ndarray]],
) -> None:
    """Budget >= prompt: stock's logits with the same cells (bf16), or as near to f16 cells as stock (quantised, whose
    kernel is ours). Under a budget: the bytes of these cells, an answer far from noise."""
    (*parts, last), f16 = of_stock(TYPES["f16"], TYPES["f16"])
    stock = of_stock(TYPES[type_k], TYPES[type_v])[1]
    llm = session(kv_policy=name, kv_budget=600, type_k=TYPES[type_k], type_v=TYPES[type_v])
    kl: dict[str, list[float]] = {"stock": [], "ours": []}
    for i, part in enumerate(parts):
        llm.eval(part)
        own = logits(llm)
        if type_k == "bf16":
            assert np.abs(stock[i] - own).max() < 1e-2
        want = log_probs(f16[i])
        for key, row in (("stock", stock[i]), ("ours", own)):
            kl[key].append(float((np.exp(want) * (want - log_probs(row))).sum()))
    assert np.mean(kl["ours"]) < 1.3 * np.mean(kl["stock"]) + 1e-3
    assert llm.kv_stats().n_compactions == 0

    n_bytes = {"bf16": 128, "q8_0": 68, "q4_0": 36}
    free = 16 if name == "adakv" else 32
    stats = llm.kv_compact(100)
    packed = 30 * 3 * (100 + free) * (n_bytes[type_k] + n_bytes[type_v])
    queries = 2 * 30 * 9 * 64 * 2 * llm.kv_policy.n_observed  # type: ignore[union-attr]
    assert stats.bytes_live <= packed + queries + 30 * 4096
    llm.eval(last)
    p, q = log_probs(stock[-1]), log_probs(logits(llm))
    assert (np.exp(p) * (p - q)).sum() < 1.0  # noise would be near 10


def test_attention_kernels_agree(tiny: Path, tiny_session: Callable[..., Llama]) -> None:
    """Stock attention and the ragged op over the same cells, before and after a compaction."""
    found = []
    for kernel in ("stock", "ragged", "auto"):
        llm = tiny_session(kv_policy=WindowKV(window_size=8, omega=4), kv_budget=500)
        llm._kv.set_attention(kernel)  # type: ignore[union-attr]
        llm.eval(TOKENS[:200])
        rows = [logits(llm)]
        llm.kv_compact(40)
        for part in (TOKENS[200:201], TOKENS[201:240], TOKENS[240:241]):
            llama_cpp.Llama.eval(llm, part)
            rows.append(logits(llm))
        found.append(np.array(rows))
    np.testing.assert_allclose(found[0], found[1], atol=2e-2)
    assert np.array_equal(found[0][0], found[2][0])  # nothing evicted: stock
    np.testing.assert_allclose(found[1][1:], found[2][1:], atol=2e-2)
    assert not np.array_equal(found[0], found[1])


def test_the_faster_kernel_before_anything_is_evicted(tiny_session: Callable[..., Llama]) -> None:
    exact, fast = tiny_session(kv_policy="full"), tiny_session(kv_policy="full", kv_exact=False)
    for llm in (exact, fast):
        llm.eval(TOKENS[:300])
    assert fast.kv_stats().n_compactions == 0
    np.testing.assert_allclose(logits(fast), logits(exact), atol=2e-2)
    assert not np.array_equal(logits(fast), logits(exact))


@pytest.mark.parametrize(("head_dim", "type_name"), [(96, "q8_0"), (96, "q4_0"), (32, "q8_0"), (64, "q4_0")])
def test_rows_that_do_not_end_on_four_bytes(
    head_dim: int, type_name: str, tmp_path: Path, opened: Callable[..., Llama]
) -> None:
    """The gather copies cells byte by byte, whatever their size."""
    path = tiny_model.write_llama(tmp_path / "tiny.gguf", head_dim=head_dim)
    llm = opened(path, kv_policy=AdaKV(window_size=8), kv_budget=500, type_k=TYPES[type_name], type_v=TYPES[type_name])
    llm.eval(TOKENS[:200])
    before = cells(llm)
    llm.kv_compact(40)
    after = cells(llm)
    for il in range(3):
        for ih in range(2):
            pos = llm.kv_positions(il, ih)
            for which in (0, 1):
                assert np.array_equal(after[il][ih][which], before[il][ih][which][pos])


def divergence(type_name: str, rotated: bool, model: Path, text: Path) -> float:
    """KL divergence of a session's next-token distribution from that with f16 cells, in a process of its own."""
    code = f"""
import sys
from pathlib import Path
from windowkv_edge import Llama
import numpy as np
logits = []
for t in (1, {TYPES[type_name]}):
    llm = Llama({str(model)!r}, n_ctx=512, kv_policy="full", type_k=t, type_v=t, n_threads=2, verbose=False, logits_all=True)
    llm.eval(llm.tokenize(Path({str(text)!r}).read_bytes())[:400])
    x = np.array(llm.scores[100:400], dtype=np.float64)
    logits.append(x - x.max(axis=1, keepdims=True))
    logits[-1] -= np.log(np.exp(logits[-1]).sum(axis=1, keepdims=True))
    llm.close()
print((np.exp(logits[0]) * (logits[0] - logits[1])).sum(axis=1).mean())
"""
    env = {**os.environ, "LLAMA_ATTN_ROT_DISABLE": str(int(not rotated))}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    return float(run.stdout.split()[-1])


def test_quantised_cells_are_rotated(smollm2: Path, document: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(document)
    on, off = (divergence("q4_0", rotated, smollm2, text) for rotated in (True, False))
    assert 0 < on < 0.75 * off  # measured: see README


def test_unsupported_cells_are_refused(smollm2: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cells of type q5_1 are not supported, expected f32, f16, bf16, q8_0"):
        Llama(str(smollm2), kv_policy="windowkv", type_k=llama_cpp.GGML_TYPE_Q5_1, verbose=False)


def test_head_scores_are_looked_for(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    path.write_bytes(tiny.read_bytes())
    with pytest.raises(MissingProfileError, match="windowkv-edge profile .*copy.gguf"):
        Llama(str(path), kv_policy="headkv", verbose=False)

    given = scores(3, 4)
    beside = tmp_path / "copy.heads.json"
    given.save(beside)
    llm = Llama(str(path), n_ctx=512, kv_policy="headkv", kv_budget=30, verbose=False)
    np.testing.assert_allclose(llm._kv_bound.shares, given.kv_heads("r", 2), rtol=1e-4)  # type: ignore[attr-defined]
    evaluate(llm, TOKENS[:200])
    assert llm.kv_stats().cells.std() > 1
    llm.close()

    scores(5, 4).save(beside)
    with pytest.raises(ValueError, match="5 layers x 4 query heads do not fit .* 3 layers of 4 query heads and 2 kv heads"):
        Llama(str(path), kv_policy="headkv", verbose=False)
    beside.write_text("{}")
    with pytest.raises(ValueError, match="not a file of head scores"):
        Llama(str(path), kv_policy="headkv", verbose=False)
    # a failed change of policy leaves the session as it was
    llm = Llama(str(path), n_ctx=512, kv_policy="adakv", kv_budget=30, verbose=False)
    evaluate(llm, TOKENS[:200])
    with pytest.raises(ValueError, match="not a file of head scores"):
        llm.kv_policy = "headkv"
    assert llm.kv_policy.name == "adakv" and llm.kv_stats().cells.mean() == 30
    llm.eval([3])
    llm.close()
