"""What is given to a session is checked at once; errors say why, and nothing ends the process."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from scripted import TOKENS, answer, evaluate, positions

from windowkv_edge import (
    Llama,
    NativeError,
    SnapKV,
    UnsupportedCallError,
    UnsupportedModelError,
    WindowKV,
    _native,
)
from windowkv_edge.bench.session import Model, Session


def test_eval_says_why(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=1.0, n_ctx=256)
    llm.eval(TOKENS[:200])
    with pytest.raises(UnsupportedCallError, match="llama_decode of 100 tokens returned 1: .*200 positions of 256 are taken"):
        llm.eval(TOKENS[:100])
    assert llm.n_tokens == llm.kv_stats().n_past == 200
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
    with pytest.raises(RuntimeError, match="returned 1: .*position 200 of sequence 0, expected position 0") as caught:
        llm.eval(TOKENS[:1])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert llm.n_tokens == llm.kv_stats().n_past == 0
    # the reason of before is not repeated
    llm._n_vocab = 2**20  # what we refuse comes to llama.cpp
    with pytest.raises(RuntimeError) as caught:
        llm.eval([10**6])
    assert "position 200" not in str(caught.value) and "batch is invalid" in str(caught.value)


def test_a_refused_batch_prints_nothing(
    tiny: Path, opened: Callable[..., Llama], capfd: pytest.CaptureFixture[str]
) -> None:
    """llama-cpp-python prints llama.cpp's warnings even with verbose=False; the error has the reason."""
    llm = opened(tiny, n_ctx=256, kv_policy=SnapKV())
    llm.eval(TOKENS[:200])
    capfd.readouterr()
    with pytest.raises(UnsupportedCallError, match="200 positions of 256 are taken, no room for 100 more"):
        llm.eval(TOKENS[:100])
    assert capfd.readouterr().err == ""


def test_bench_says_why(tiny: Path) -> None:
    model = Model(tiny)
    session = Session(model, 256, "f16", SnapKV(), True, 1, 128)
    try:
        session.decode(TOKENS[:100])
        session.decode(TOKENS[:100])
        with pytest.raises(UnsupportedCallError, match="llama_decode of 100 tokens returned 1: .*no room for 100 more"):
            session.decode(TOKENS[:100])
        for call in (session.decode, session.decode_all):  # llama.cpp would abort
            for n in (0, 300):
                with pytest.raises(ValueError, match=f"a batch of {n} tokens, expected 1 to 128"):
                    call(TOKENS[:n])
    finally:
        session.close()
        model.close()


def test_native_codes_are_kinds_of_errors(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV())
    for kind in (NativeError, ValueError):
        with pytest.raises(kind, match="layer is 99"):
            llm.kv_positions(99, 0)
    stock = _native.Context(opened(tiny).ctx)
    for other in (NativeError, UnsupportedCallError):
        with pytest.raises(other, match="created without a KV policy"):
            stock.cells()
    at = np.arange(10, dtype=np.int32)
    layers = [[at, at + 1]]
    scores = [[np.ones(10, dtype=np.float32)] * 2]
    for unsupported in (NativeError, UnsupportedModelError):
        with pytest.raises(unsupported, match="scope = layer needs heads"):
            _native.select(WindowKV(scope="layer").parts(), [[2, 2]], layers, scores)


def test_stock_defaults_are_accepted(tiny: Path, opened: Callable[..., Llama]) -> None:
    """llama_cpp.server and other wrappers pass all of them."""
    with pytest.warns(UserWarning, match="flash_attn=False is stock's default") as warned:
        llm = opened(
            tiny, kv_policy=SnapKV(), kv_budget=60, flash_attn=False, embedding=False, vocab_only=False, swa_full=None,
            logits_all=False, type_k=None, type_v=None, offload_kqv=True, op_offload=None, draft_model=None, numa=False,
        )  # fmt: skip
    assert len(warned) == 1
    evaluate(llm, TOKENS)
    assert (llm.kv_stats().cells == 60).all()


@pytest.mark.parametrize("given", [1, 15])
def test_a_few_cells_are_asked_about(tiny: Path, opened: Callable[..., Llama], given: int) -> None:
    with pytest.warns(UserWarning, match=rf"kv_budget={given} keeps {given} cells? per head.*1.0 keeps all") as warned:
        llm = opened(tiny, kv_policy=SnapKV(), kv_budget=given)
    assert warned[0].filename == str(Path(__file__).parents[1] / "conftest.py")
    with pytest.warns(UserWarning, match=f"kv_budget={given}"):
        llm.kv_budget = given
    llm.eval(TOKENS)
    with pytest.warns(UserWarning, match=f"kv_budget={given}"):
        llm.kv_compact(given)


@pytest.mark.parametrize("bad", [128, -1, 10**6, 2**31, 2**40 + 3, 2**70])
def test_ids_outside_of_the_vocabulary(tiny: Path, opened: Callable[..., Llama], bad: int) -> None:
    """They are named, and what was evaluated stays."""
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=60)
    answer(llm, TOKENS)
    want = positions(llm)
    for call in (lambda: llm.eval([1, bad]), lambda: next(llm.generate([*TOKENS[:50], bad]))):
        with pytest.raises(ValueError, match=rf"token \d+ of \d+ is {bad}, expected an id of 0 to 127"):
            call()
        assert llm.n_tokens == llm.kv_stats().n_past == 400 and positions(llm) == want
    for wrong in ([1.5], ["a"], "ab", [None]):
        with pytest.raises(TypeError):
            llm.eval(wrong)  # type: ignore[arg-type]
    drafted = opened(tiny, kv_policy=SnapKV(), logits_all=True, draft_model=lambda ids: np.array([min(bad, 2**62)]))
    stream = drafted.generate([1, 2, 3], temp=0.0)
    next(stream)
    with pytest.raises(ValueError, match="expected an id of 0 to 127"):
        next(stream)
    assert drafted.n_tokens == drafted.kv_stats().n_past


@pytest.mark.parametrize("policy", ["snapkv", None])
def test_text_without_a_tokenizer(tiny: Path, opened: Callable[..., Llama], policy: str | None) -> None:
    """llama.cpp ends the process at each of these."""
    llm = opened(tiny, kv_policy=policy)
    yes = llama_cpp.LlamaGrammar.from_string('root ::= "yes"', verbose=False)
    llm.eval([1, 2])
    for call in (
        lambda: llm.sample(grammar=yes), lambda: llm.tokenize(b""), lambda: llm.detokenize([1]), lambda: llm.tokenizer().encode("a"),
        lambda: llm.tokenizer().decode([1]), lambda: llm("a"), lambda: llm.create_completion([1, 2], max_tokens=1),
        lambda: llm.create_chat_completion([{"role": "user", "content": "a"}]),
        lambda: next(llm.generate([1, 2], grammar=yes)),
    ):  # fmt: skip
        with pytest.raises(UnsupportedModelError, match="has no tokenizer; give Llama one"):
            call()
    assert answer(llm, TOKENS, 2)


def test_text_of_ids_that_there_are_not(session: Callable[..., Llama]) -> None:
    """std::out_of_range, which nobody catches."""
    llm = session()
    for bad in (-1, 49152, 2**31):
        with pytest.raises(ValueError, match=f"token 1 of 2 is {bad}, expected an id of 0 to 49151"):
            llm.detokenize([1, bad])
    assert llm.detokenize(llm.tokenize(b"Hello")) == b"Hello"


@pytest.mark.parametrize("policy", ["snapkv", None])
def test_sampling_without_logits(tiny: Path, opened: Callable[..., Llama], policy: str | None) -> None:
    """llama.cpp asserts that there are some."""
    llm = opened(tiny, kv_policy=policy)
    llm.n_tokens = 5
    with pytest.raises(UnsupportedCallError, match="no logits of the last token; evaluate tokens first"):
        llm.sample()
    llm.n_tokens = 0
    llm.eval(TOKENS)
    for idx in (0, 500):
        with pytest.raises(UnsupportedCallError, match=f"no logits at idx={idx}; .*logits_all=True"):
            llm.sample(idx=idx)
    assert llm.sample(temp=0.0) == llm.sample(temp=0.0, idx=399)


@pytest.mark.parametrize("policy", ["snapkv", None])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("n_batch", -1), ("n_batch", 0), ("n_batch", 2**31), ("n_batch", "a"), ("n_ctx", -1), ("n_ctx", 2**40), ("n_ctx", 1.5),
        ("type_k", 999), ("type_k", -1), ("type_v", 26), ("type_v", "f16"), ("kv_exact", "no"), ("kv_exact", 1), ("kv_exact", None),
        ("kv_min_prompt", 10**30), ("kv_min_prompt", True), ("kv_min_prompt", float("nan")),
    ],
)  # fmt: skip
def test_arguments_that_end_the_process(tiny: Path, policy: str | None, name: str, bad: Any) -> None:
    """The first ones did: sizes below zero, types that there are not. The others said something else than was meant."""
    with pytest.raises(ValueError, match=f"{name} is {bad!r}, expected"):
        Llama(str(tiny), kv_policy=policy, verbose=False, **{name: bad})


def test_numbers_of_numpy(tiny: Path, opened: Callable[..., Llama]) -> None:
    """They mean what Python's mean, everywhere, and come back as Python's."""
    llm = opened(
        tiny, kv_policy=SnapKV(window_size=np.int32(16)), kv_budget=np.float32(0.25), kv_min_prompt=np.int64(10),
        kv_exact=np.bool_(True), n_ctx=np.int64(512), n_batch=np.int32(128),
    )  # fmt: skip
    assert type(llm.kv_budget) is float and llm.kv_budget == 0.25 and llm.kv_policy == SnapKV(window_size=16)
    evaluate(llm, np.array(TOKENS))  # type: ignore[arg-type]
    assert (llm.kv_stats().cells == 100).all()
    llm.kv_budget = np.int64(60)  # type: ignore[assignment]
    assert type(llm.kv_budget) is int and llm.kv_budget == 60
    assert (llm.kv_compact(np.uint8(50)).cells == 50).all()
    assert llm.kv_positions(np.int64(0), np.int8(1)).size == 50  # type: ignore[arg-type]
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.kv_budget == 60 and copy.n_ctx() == 512
    copy.close()


@pytest.mark.parametrize("bad", [True, "12", None, [50], np.array([50]), np.bool_(True), float("nan"), float("inf"), -0.5, 0])
def test_budgets_that_are_none(tiny: Path, opened: Callable[..., Llama], bad: Any) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=60)
    evaluate(llm, TOKENS)
    if bad is not None:  # the session's
        with pytest.raises((TypeError, ValueError), match="kv_budget is"):
            llm.kv_compact(bad)
    with pytest.raises((TypeError, ValueError), match="kv_budget is"):
        llm.kv_budget = bad
    assert llm.kv_budget == 60 and (llm.kv_stats().cells == 60).all()


def test_layers_and_heads_that_are_none(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV())
    for bad in (-1, 3, 2**31, 2**70):
        with pytest.raises(ValueError, match=f"layer is {bad}, expected"):
            llm.kv_positions(bad, 0)
        with pytest.raises(ValueError, match=f"head is {bad}, expected"):
            llm.kv_positions(0, bad)
    for wrong in ("a", 1.0, None):
        with pytest.raises(TypeError, match=f"head is {wrong!r}, expected an int"):
            llm.kv_positions(0, wrong)  # type: ignore[arg-type]


def test_a_policy_that_the_cells_cannot_serve(tiny: Path, opened: Callable[..., Llama]) -> None:
    """It said so at every prompt, once it was set."""
    llm = opened(tiny, kv_policy="auto", kv_budget=60)
    before = llm.kv_policy
    with pytest.raises(UnsupportedModelError, match=r"needs cells that are not rotated, got \('q8_0', 'q8_0'\); use f16"):
        llm.kv_policy = "expected-attention"  # type: ignore[assignment]
    assert llm.kv_policy is before
    with pytest.raises(UnsupportedModelError, match="use f16 cells"):
        opened(tiny, kv_policy="expected-attention", type_k=8, type_v=8)
    evaluate(llm, TOKENS)
    assert llm.kv_stats().n_compactions == 1


def test_budgets_beyond_the_interface_are_refused(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV())
    evaluate(llm, TOKENS)
    for budget in (2**31, 10**30):
        with pytest.raises(ValueError, match=r"less than 2\^31"):
            llm.kv_compact(budget)


@pytest.mark.parametrize("policy", [None, SnapKV()])
def test_the_cache_property(tiny: Path, opened: Callable[..., Llama], policy: SnapKV | None) -> None:
    llm = opened(tiny, kv_policy=policy)
    llm.cache = cache = llama_cpp.LlamaRAMCache()
    assert llm.cache is cache
    llm.set_cache(None)
    assert llm.cache is None


def test_a_task_cannot_be_told_without_a_tokenizer(tiny: Path, opened: Callable[..., Llama]) -> None:
    with pytest.raises(UnsupportedModelError, match="has no tokenizer; give the policy task='localization'"):
        opened(tiny, kv_policy="windowkv-paper")
    llm = opened(tiny, kv_policy="windowkv-paper(task='aggregation')", kv_budget=100)
    evaluate(llm, TOKENS)
    assert llm.kv_stats().n_compactions == 1
    with pytest.raises(UnsupportedModelError, match="has no tokenizer"):
        llm.kv_policy = "windowkv-paper"
    model = Model(tiny)
    assert (model.detokenize([1, 2]), model.piece(1), model.is_end(1)) == ("", "", False)
    model.close()


def test_arguments_that_python_refuses(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError):
        Llama(str(tiny), "snapkv")  # type: ignore[misc]
    gc.collect()
    assert "ignored" not in capsys.readouterr().err


def test_a_grammar_that_cannot_be_read(session: Callable[..., Llama]) -> None:
    """llama.cpp gives no sampler then, and stock's chain follows the null pointer."""
    llm = session(kv_policy=SnapKV())
    for text in ("root := (", "other ::= [a-z]"):
        with pytest.raises(ValueError, match="cannot be read, expected GBNF"):
            llm("a", max_tokens=2, grammar=llama_cpp.LlamaGrammar.from_string(text, verbose=False))
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes"', verbose=False)
    assert llm("a", max_tokens=4, grammar=grammar)["choices"][0]["text"] == "yes"


@pytest.mark.parametrize("cells", [9, 15])
def test_types_that_no_cells_have(tiny: Path, cells: int) -> None:
    """Products of activations, in which stock crashes."""
    with pytest.raises(ValueError, match=f"type_k is {cells}, expected None or a type of cells"):
        Llama(str(tiny), type_k=cells, verbose=False)


def test_arrays_of_one_number(tiny: Path, opened: Callable[..., Llama]) -> None:
    assert opened(tiny, n_ctx=np.array(512)).n_ctx() == 512
