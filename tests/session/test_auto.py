"""kv_policy="auto": q8_0 cells for the bytes of f16 ones, unless the caller says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import tiny_model
from scripted import evaluate

from windowkv_edge import Auto, HeadScores, Llama
from windowkv_edge.heads import ModelHeads

CELL = 2 * 2 * 64  # bytes of K and V of one head, f16
Open = Callable[..., Llama]


def test_a_budget_is_one_of_bytes(session: Open, document: str) -> None:
    llm = session(kv_policy="auto", kv_budget=0.12)
    tokens = llm.tokenize(document.encode())[:900]
    evaluate(llm, tokens)
    stats = llm.kv_stats()
    assert stats.cell_types == ("q8_0", "q8_0")
    assert stats.cells.sum() == 90 * int(0.12 * 900 * 16 / 8.5)
    assert stats.bytes_full == 900 * 90 * CELL
    queries = 2 * 30 * 9 * 64 * 2 * 32
    free = 90 * 17 * CELL * 8.5 / 16 + 30 * 4096  # and what buffers are rounded up to
    assert 0.11 * stats.bytes_full < stats.bytes_live - queries < 0.12 * stats.bytes_full + free


def test_what_the_caller_says_about_cells_goes_first(session: Open, document: str) -> None:
    for kind, name, bits in ((llama_cpp.GGML_TYPE_F16, "f16", 16), (llama_cpp.GGML_TYPE_Q4_0, "q4_0", 4.5)):
        llm = session(kv_policy="auto", kv_budget=0.12, type_k=kind, type_v=kind)
        evaluate(llm, llm.tokenize(document.encode())[:600])
        assert llm.kv_stats().cell_types == (name, name)
        assert llm.kv_stats().cells.sum() == 90 * int(0.12 * 600 * 16 / bits)


def test_numbers_count_cells_and_other_policies_positions(session: Open, document: str) -> None:
    llm = session(kv_policy="auto", kv_budget=70)
    tokens = llm.tokenize(document.encode())[:600]
    evaluate(llm, tokens)
    assert llm.kv_stats().cells.sum() == 90 * 70
    llm.kv_policy, llm.kv_budget = "snapkv", 0.12
    evaluate(llm, tokens)
    assert llm.kv_stats().cell_types == ("q8_0", "q8_0")
    assert (llm.kv_stats().cells == 72).all()


@pytest.mark.parametrize("budget", [1.0, 0.6, 700])
def test_nothing_is_evicted_where_the_bytes_suffice(
    session: Open, of_stock: Callable[[int, int], tuple[list[list[int]], np.ndarray]], budget: float
) -> None:
    """0.6 of the bytes hold all positions in q8_0. With stock's kernel the logits are those of stock with q8_0 cells, bit
    for bit; ours, the default for quantised cells on the CPU, rounds differently (test_ragged.py, test_cell_types)."""
    parts, want = of_stock(llama_cpp.GGML_TYPE_Q8_0, llama_cpp.GGML_TYPE_Q8_0)
    llm = session(kv_policy="auto", kv_budget=budget)
    llm._kv.set_attention("stock")  # type: ignore[union-attr]
    for part, row in zip(parts, want, strict=True):
        llm.eval(part)
        pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        assert np.array_equal(np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)), row)
    assert llm.kv_stats().n_compactions == 0 and (llm.kv_stats().cells == 565).all()


def test_window_layers_keep_their_cells(opened: Open, gemma3: Path, document: str) -> None:
    others = set()
    for policy in ("auto", "windowkv"):
        llm = opened(gemma3, kv_policy=policy, kv_budget=0.12)
        evaluate(llm, llm.tokenize(document.encode())[:900])
        others.add(llm.kv_stats().bytes_other)
    assert len(others) == 1


def test_heads_that_q8_0_does_not_fit(tmp_path: Path, opened: Open) -> None:
    """48 values are no whole blocks of 32: f16 cells, and fractions of positions."""
    path = tiny_model.write_llama(tmp_path / "odd.gguf", head_dim=48)
    llm = opened(path, kv_policy=Auto(), kv_budget=0.25, n_ctx=512)
    evaluate(llm, np.random.default_rng(0).integers(0, tiny_model.N_VOCAB, 400).tolist())
    assert llm.kv_stats().cell_types == ("f16", "f16")
    assert llm.kv_stats().cells.sum() == 100 * llm.kv_stats().cells.size


def test_head_scores_are_used_where_there_are_some(session: Open, tmp_path: Path) -> None:
    llm = session(kv_policy="auto", kv_budget=0.12)
    allocation = llm._kv_bound.allocation()
    assert allocation.beta == 2 and allocation.importance.shape == (30, 3)  # those of the package
    model = ModelHeads(str(tmp_path / "unknown.gguf"), {}, 2, 2, (0, 1), n_head=2)
    assert Auto().bind(model).allocation().beta == 0.0
    scores = HeadScores({"r2": np.array([[1.0, 0.0], [3.0, 0.0]])})
    assert Auto(importance=scores).bind(model).allocation().importance.tolist() == [[0.25, 0.0], [0.75, 0.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"across": "head"}, "across is 'head', expected one of layer, model"),
        ({"importance_floor": -1}, "importance_floor is -1, expected an int of at least 0"),
        ({"importance": "scores.json", "across": "layer"}, "auto divides by importance with across='model' only"),
        ({"budget": "arithmetic"}, "auto with across='model' needs budget='flat'"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Auto(**arguments)  # type: ignore[arg-type]
