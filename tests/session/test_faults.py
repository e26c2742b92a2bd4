"""What users did and what went wrong: each of these once stopped a policy in silence, lost cells or said nothing."""

from __future__ import annotations

import ctypes
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tiny_model
from scripted import OTHERS, TOKENS, Script, answer, decode, once, positions

from windowkv_edge import (
    CacheView,
    Llama,
    NativeError,
    SnapKV,
    UnsupportedCallError,
    UnsupportedModelError,
    WindowKV,
    _native,
    get_policy,
)
from windowkv_edge.bench.session import Model, Session

#
# 1: what is absent stays absent
#


def test_a_copy_resolves_what_was_left_out(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy="auto", n_ctx=512)
    copy = pickle.loads(pickle.dumps(llm))
    try:
        for session in (llm, copy):
            session.eval(TOKENS)
        assert llm.kv_stats().cell_types == copy.kv_stats().cell_types == ("q8_0", "q8_0")
        assert positions(llm) == positions(copy)
        given = {"model_path", "n_ctx", "n_threads", "n_threads_batch", "verbose", "kv_policy", "kv_min_prompt", "kv_exact"}
        assert set(llm.__getstate__()) == set(copy.__getstate__()) == given
    finally:
        copy.close()


def test_a_copy_has_what_was_said_and_changed(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy="auto", type_k=1, type_v=1, kv_budget=100, n_ctx=512)
    llm.kv_policy, llm.kv_budget = SnapKV(window_size=16), 60
    llm.set_seed(11)
    llm.chat_format = "chatml"
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.kv_stats().cell_types == ("f16", "f16")
    assert (copy.kv_policy, copy.kv_budget, copy._seed, copy.chat_format) == (SnapKV(window_size=16), 60, 11, "chatml")
    copy.close()


#
# 2: whether a compaction is due follows what the cache holds
#


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_a_failed_selection_is_made_up_for(tiny: Path, opened: Callable[..., Llama], error: BaseException) -> None:
    llm = opened(tiny, kv_policy=Script(action=once(error)), kv_budget=60)
    with pytest.raises(type(error)):
        answer(llm, TOKENS)
    assert (llm.kv_stats().cells == 400).all() and llm.n_tokens == 400
    answer(llm, TOKENS)  # "full prompt already cached"
    assert (llm.kv_stats().cells == 60).all()


class Uneven(Script):
    """The first head of a layer keeps twice as many cells as the second."""

    ragged = True

    def select(self, scores: Any, budget: int, ctx: CacheView) -> Any:
        self.action()
        return [[first[-80:], second[-40:]] for first, second in ctx.positions]


def test_a_prompt_is_compacted_once(tiny: Path, opened: Callable[..., Llama]) -> None:
    """Heads that hold more than the budget's average are no reason to ask again."""
    asked: list[int] = []
    llm = opened(tiny, kv_policy=Uneven(action=lambda: asked.append(1)), kv_budget=60)
    for _ in range(3):
        answer(llm, TOKENS)  # "full prompt already cached" from the second on
        assert llm.kv_stats().cells.tolist() == [[80, 40]] * 3
    assert asked == [1] and llm.kv_stats().n_compactions == 1


def test_a_stream_that_somebody_holds(tiny: Path, opened: Callable[..., Llama]) -> None:
    """As the traceback of a notebook does."""
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=60)
    stream = llm.generate(TOKENS, temp=0.0)
    next(stream)
    llm.reset()
    llm.eval(OTHERS)
    assert (llm.kv_stats().cells == 60).all() and llm.kv_stats().n_past == 400
    llm.eval(TOKENS[:100])
    assert (llm.kv_stats().cells == 60).all() and llm.kv_stats().n_past == 500
    other = llm.generate(TOKENS[:300], temp=0.0)
    next(other)
    assert (llm.kv_stats().cells == 60).all() and llm.kv_stats().n_past == 300
    next(other)
    assert (llm.kv_stats().cells == 61).all() and llm.kv_stats().n_compactions == 4
    stream.close()


@pytest.mark.parametrize("pieces", [[400], [200, 200]])
def test_libraries_that_decode_on_the_context(tiny: Path, opened: Callable[..., Llama], pieces: list[int]) -> None:
    llm, fresh = (opened(tiny, kv_policy=SnapKV(), kv_budget=60, n_ctx=1024) for _ in range(2))
    fresh.eval(TOKENS)
    at = 0
    for n in pieces:
        assert decode(llm, TOKENS[at : at + n]) == 0
        at += n
    assert (llm.kv_stats().cells == 400).all()
    assert decode(llm, [5]) == 0
    assert llm.kv_stats().n_compactions == 1 and (llm.kv_stats().cells == 61).all()
    assert decode(llm, [6]) == 0
    assert llm.kv_stats().n_compactions == 1 and (llm.kv_stats().cells == 62).all()
    if pieces == [400]:  # other batches round differently
        assert [own[:60] for own in positions(llm)] == positions(fresh)


def test_short_prompts_on_the_context_stay_whole(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=0.1)
    decode(llm, TOKENS[:100])
    for token in TOKENS[:3]:
        decode(llm, [token])
    assert (llm.kv_stats().cells == 103).all()


def test_an_error_inside_decode_comes_with_the_next_call(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=Script(action=once(ZeroDivisionError("in select"))), kv_budget=60)
    decode(llm, TOKENS)
    with pytest.warns(UserWarning, match="its compaction failed, the full cache stays: ZeroDivisionError"):
        assert decode(llm, [5]) == 0
    assert (llm.kv_stats().cells == 401).all()
    with pytest.raises(ZeroDivisionError, match="in select"):
        llm.kv_compact()
    llm.kv_compact()
    assert (llm.kv_stats().cells == 60).all()


def test_drafts_and_long_prompts_are_no_prompts_below(tiny: Path, opened: Callable[..., Llama]) -> None:
    """A last batch of one token is part of the prompt, a batch of drafts is part of the answer."""
    draft = lambda ids: np.array([1, 2, 3])  # noqa: E731
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=60, n_batch=133, logits_all=True, draft_model=draft)
    stream = llm.generate(TOKENS, temp=0.0)  # 3 x 133 + 1
    for _ in range(9):
        next(stream)
    assert llm.kv_stats().n_compactions == 1
    stream.close()
    assert decode(llm, [5]) == 0  # nor does the next one find a prompt in the answer
    assert llm.kv_stats().n_compactions == 1


def test_a_prompt_of_others_goes_on_in_the_class(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=60)
    decode(llm, TOKENS)
    llm.n_tokens = len(TOKENS)
    llm.eval([5])
    assert llm.kv_stats().n_compactions == 1 and (llm.kv_stats().cells == 61).all()


def test_old_failures_do_not_pile_up(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=Script(action=lambda: 1 / 0), kv_budget=60)
    with pytest.warns(UserWarning, match="its compaction failed"):
        for i in range(3):
            decode(llm, TOKENS[:120])
            decode(llm, [i])
    with pytest.raises(ZeroDivisionError):
        llm.kv_budget = 50
    llm.kv_budget = 50
    assert llm.kv_stats().n_past == 363
    with pytest.warns(UserWarning, match="its compaction failed"):
        decode(llm, TOKENS[:2])
        decode(llm, [1])
    llm.reset()  # about what is gone
    assert llm.kv_stats().n_past == 0
    with pytest.warns(UserWarning, match="its compaction failed"):
        decode(llm, TOKENS)
        decode(llm, [1])
    llm.kv_policy = "snapkv"  # type: ignore[assignment]
    llm.eval(TOKENS)
    assert (llm.kv_stats().cells == 50).all()


def test_dropping_a_session_frees_it_at_once(tiny: Path) -> None:
    gc.disable()
    try:
        llm = Llama(str(tiny), n_ctx=512, kv_policy=SnapKV(), kv_budget=60, verbose=False)
        llm.eval(TOKENS)
        weak = weakref.ref(llm)
        del llm
        assert weak() is None
    finally:
        gc.enable()


#
# 3: what the cache holds is not what n_tokens says
#


def test_compacting_what_others_decoded(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=1.0)
    decode(llm, TOKENS)
    assert (llm.kv_compact(50).cells == 50).all()
    assert llm.kv_stats().n_past == 400

    llm.reset()
    llm.eval(TOKENS[:200])
    decode(llm, TOKENS[200:])
    assert (llm.kv_compact(0.25).cells == 100).all()


def test_n_tokens_that_fits_neither_is_refused(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV(), kv_budget=1.0)
    llm.eval(TOKENS)
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, 300, -1)
    with pytest.raises(UnsupportedCallError, match="n_tokens is 400 and the cache holds 300 positions; set n_tokens = 300"):
        llm.kv_compact(50)
    llm.n_tokens = 300
    llm.eval(TOKENS[300:310])
    assert (llm.kv_compact(50).cells == 50).all()


#
# 4: going back
#


@pytest.mark.parametrize("policy", ["snapkv", "auto", "adakv", "h2o"])
def test_going_back_chooses_the_cells_of_a_fresh_session(tiny: Path, opened: Callable[..., Llama], policy: str) -> None:
    fresh, back, lower = (opened(tiny, kv_policy=policy, kv_budget=1.0, n_ctx=1024) for _ in range(3))
    fresh.eval(TOKENS)
    fresh.kv_compact(60)

    # an answer is taken back
    back.eval(TOKENS)
    for token in OTHERS[:70]:
        back.eval([token])
    back.n_tokens = 400
    back.kv_compact(60)
    assert positions(back) == positions(fresh)

    # a lowered budget and the same prompt
    answer(lower, TOKENS, 50)
    lower.kv_budget = 60
    answer(lower, TOKENS)
    # the prompt's last token is evaluated anew, in a batch of one that rounds differently
    same = [len(set(a) & set(b)) for a, b in zip(positions(lower), positions(fresh))]
    assert sum(same) >= 0.98 * sum(map(len, positions(fresh)))


def test_another_budget_and_the_same_prompt(tiny: Path, opened: Callable[..., Llama]) -> None:
    """What was evicted is evaluated again."""
    llm, fresh = (opened(tiny, kv_policy=SnapKV(), kv_budget=60, n_ctx=1024) for _ in range(2))
    answer(fresh, TOKENS)
    for budget in (100, 30, 60):
        llm.kv_budget = budget
        answer(llm, TOKENS)
        assert (llm.kv_stats().cells == budget).all()
    assert positions(llm) == positions(fresh)


#
# 5: reasons
#


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


#
# 7, 8, 9: arguments
#


def test_stock_defaults_are_accepted(tiny: Path, opened: Callable[..., Llama]) -> None:
    """llama_cpp.server and other wrappers pass all of them."""
    with pytest.warns(UserWarning, match="flash_attn=False is stock's default") as warned:
        llm = opened(
            tiny, kv_policy=SnapKV(), kv_budget=60, flash_attn=False, embedding=False, vocab_only=False, swa_full=None,
            logits_all=False, type_k=None, type_v=None, offload_kqv=True, op_offload=None, draft_model=None, numa=False,
        )  # fmt: skip
    assert len(warned) == 1
    llm.eval(TOKENS)
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


def test_budgets_beyond_the_interface_are_refused(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV())
    llm.eval(TOKENS)
    for budget in (2**31, 10**30):
        with pytest.raises(ValueError, match=r"less than 2\^31"):
            llm.kv_compact(budget)


def test_the_cache_property_is_refused_at_once(tiny: Path, opened: Callable[..., Llama]) -> None:
    llm = opened(tiny, kv_policy=SnapKV())
    with pytest.raises(UnsupportedCallError, match=r"llm.cache is not supported with kv_policy='snapkv' yet") as caught:
        llm.cache = llama_cpp.LlamaRAMCache()
    assert llm.cache is None and "continues" in str(caught.value)
    llm.cache = None
    stock = opened(tiny)
    stock.cache = cache = llama_cpp.LlamaRAMCache()
    assert stock.cache is cache
    stock.set_cache(None)
    assert stock.cache is None


def test_a_task_cannot_be_told_without_a_tokenizer(tiny: Path, opened: Callable[..., Llama]) -> None:
    with pytest.raises(UnsupportedModelError, match="has no tokenizer; give the policy task='localization'"):
        opened(tiny, kv_policy="windowkv-paper")
    llm = opened(tiny, kv_policy="windowkv-paper(task='aggregation')", kv_budget=100)
    llm.eval(TOKENS)
    assert llm.kv_stats().n_compactions == 1
    with pytest.raises(UnsupportedModelError, match="has no tokenizer"):
        llm.kv_policy = "windowkv-paper"
    model = Model(tiny)
    assert (model.detokenize([1, 2]), model.piece(1), model.is_end(1)) == ("", "", False)
    model.close()


class Keeps(Script):
    """Keeps what it was given, and answers with a position twice."""

    def select(self, scores: Any, budget: int, ctx: CacheView) -> Any:
        self.action(ctx)
        return [[[*own[-10:], own[-1]] for own in layer] for layer in ctx.positions]


def test_a_kept_view_reads_nothing(tiny: Path, opened: Callable[..., Llama]) -> None:
    """It ended in memory that was gone. And a position twice left fewer cells than it said."""
    kept: list[CacheView] = []
    llm = opened(tiny, kv_policy=Keeps(action=lambda ctx: (kept.append(ctx), ctx.keys(0, 0))), kv_budget=60)
    with pytest.raises(ValueError, match="layer 0, kv head 0 returned 1 of its 11 positions more than once"):
        answer(llm, TOKENS)
    assert (llm.kv_stats().cells == 400).all()
    for when in ("after select", "after close"):
        with pytest.raises(ValueError, match="ctx is null"):
            kept[0].keys(0, 0)
        if when == "after select":
            kv = llm._kv
            llm.close()
    with pytest.raises(ValueError, match="null"):
        kv.stats()


@pytest.mark.parametrize("write", [tiny_model.write_llama, tiny_model.write_gpt_oss, tiny_model.write_lfm2])
def test_selections_cannot_meddle_below(
    write: Callable[..., Path], tmp_path: Path, opened: Callable[..., Llama]
) -> None:
    """What llama.h offers changes no part of a memory while a selection runs: windows and recurrent states stay, too."""
    llm: Llama
    seen: list[int] = []

    def action() -> None:
        memory = llama_cpp.llama_get_memory(llm.ctx)
        llama_cpp.llama_memory_clear(memory, True)
        llama_cpp.llama_memory_seq_cp(memory, 0, 1, -1, -1)
        llama_cpp.llama_memory_seq_keep(memory, 1)
        # windows and recurrent states; a state of the attention's cells is refused in any case
        others = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = llama_cpp.llama_state_seq_get_size_ext(llm.ctx, 0, others)
        assert (size > 0) == (write is not tiny_model.write_llama)
        state = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data_ext(llm.ctx, state, size, 0, others) == size
        assert llama_cpp.llama_state_seq_set_data_ext(llm.ctx, state, size, 0, others) == 0
        assert not llama_cpp.llama_memory_seq_rm(memory, -1, 0, -1)
        assert decode(llm, TOKENS[:1]) == 1
        seen.append(llama_cpp.llama_memory_seq_pos_max(memory, 0))

    model = write(tmp_path / "tiny.gguf")
    llm = opened(model, kv_policy=Script(action=action), kv_budget=60)
    found = answer(llm, TOKENS, 8)
    assert seen == [399]
    assert found == answer(opened(model, kv_policy=Script(action=lambda: None), kv_budget=60), TOKENS, 8)


def test_selections_below_cannot_meddle(tiny: Path, opened: Callable[..., Llama]) -> None:
    """Inside llama_decode, where a batch of several tokens ended the process and one of another token took the place of it."""
    llm: Llama
    statuses: list[int] = []

    def action() -> None:
        statuses.extend((decode(llm, [3]), decode(llm, [3, 4])))
        for call, name in ((llm.close, "close"), (llm.reset, "reset"), (lambda: llm.eval([1]), "eval")):
            with pytest.raises(UnsupportedCallError, match=rf"{name}\(\) was called while kv_policy='script' selects"):
                call()

    rows = []
    for act in (action, lambda: None):
        llm = opened(tiny, kv_policy=Script(action=act), kv_budget=60)
        decode(llm, TOKENS)
        assert decode(llm, [5]) == 0
        assert llm.kv_stats().n_past == 401 and (llm.kv_stats().cells == 61).all()
        rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy())
    assert statuses == [1, 1]
    assert np.array_equal(*rows)


def test_one_cell_is_not_all_of_them(tiny: Path, opened: Callable[..., Llama]) -> None:
    with pytest.warns(UserWarning):
        llm = opened(tiny, kv_policy="snapkv", kv_budget=1)
    answer(llm, TOKENS)
    llm.kv_budget = 1.0
    answer(llm, TOKENS)
    assert (llm.kv_stats().cells == 400).all()


@pytest.mark.parametrize(("first", "then"), [("snapkv", "auto"), ("auto", "snapkv")])
def test_a_copy_keeps_the_cells_of_a_changed_policy(
    tiny: Path, opened: Callable[..., Llama], first: str, then: str
) -> None:
    llm = opened(tiny, kv_policy=first, kv_budget=0.12)
    llm.kv_policy = then  # type: ignore[assignment]
    copy = pickle.loads(pickle.dumps(llm))
    try:
        found = [(answer(own, TOKENS, 4), positions(own), own.kv_stats().cell_types) for own in (llm, copy)]
        assert found[0] == found[1]
    finally:
        copy.close()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("snapkv(window_size=2147483648)", r"below 2\^31"),
        ("streamingllm(n_sink=2147483648)", r"below 2\^31"),
        ("windowkv(omega=2147483648)", r"below 2\^31"),
        ("snapkv(window_size=8, window_size=9)", "every parameter once"),
        ("snapkv(window_size=" + "-" * 5000 + "1)", "expected parameters such as"),
        ("snapkv(" + "(" * 5000 + ")", "expected parameters such as"),
    ],
    ids=["window", "sink", "omega", "twice", "signs", "brackets"],
)
def test_parameters_are_checked_where_they_are_given(policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_policy(policy)


def test_arguments_that_python_refuses(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError):
        Llama(str(tiny), "snapkv")  # type: ignore[misc]
    gc.collect()
    assert "ignored" not in capsys.readouterr().err
