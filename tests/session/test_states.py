"""Saved sessions: what goes on from one is what would have gone on, and nothing else is taken."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tiny_model
from kinds import WRITERS, logits
from scripted import OTHERS, TOKENS, Script, answer, positions
from test_full_disk import room

from windowkv_edge import POLICIES, HeadScores, Llama, NativeError, UnsupportedCallError, _native, state_files
from windowkv_edge._files import FileError
from windowkv_edge.errors import FormatError
from windowkv_edge.prompts import n_reused
from windowkv_edge.states import SavedState, policy_text

Open = Callable[..., Llama]

SMALL: dict[str, Any] = {"n_ctx": 1024, "n_batch": 512, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1}
BUDGET = 40

SCORES = HeadScores({kind: np.random.default_rng(0).random((4, 4)) for kind in ("r", "r2")})


@pytest.fixture(scope="module")
def pair(models: dict[str, Path]) -> Iterator[tuple[Llama, Llama]]:
    """Two sessions with the same model and policy, shared by the tests that leave them usable."""
    sessions = [make(models["llama"]) for _ in range(2)]
    yield sessions[0], sessions[1]
    for llm in sessions:
        llm.close()


def make(model: Path, **kwargs: Any) -> Llama:
    return Llama(str(model), **{**SMALL, "verbose": False, "kv_policy": "snapkv", "kv_budget": BUDGET, **kwargs})


def answering(llm: Llama, tokens: list[int] = TOKENS) -> Llama:
    """A compacted prompt and the begin of an answer."""
    llm.reset()
    llm.eval(tokens[:300])
    for token in OTHERS[:5]:
        llm.eval([token])
    return llm


def go_on(llm: Llama) -> tuple[Any, ...]:
    """Tokens, another prompt behind them, its compaction, a token."""
    rows = []
    for tokens in ([OTHERS[5]], [OTHERS[6]], TOKENS[300:390], [OTHERS[7]]):
        llm.eval(tokens)
        rows.append(logits(llm))
    return llm.n_tokens, np.array(rows).tobytes(), positions(llm), llm.kv_stats().n_compactions > 0


def same(llm: Llama, tokens: list[int] = TOKENS) -> None:
    """The session is what :func:`answering` makes of it."""
    assert llm.n_tokens == 305 and llm._input_ids.tolist() == tokens[:300] + OTHERS[:5]
    got = go_on(llm)
    assert got == go_on(answering(llm, tokens))


def policy(name: str, kind: str) -> Any:
    if name in ("headkv", "headkv-r2", "windowkv+headkv"):
        n_layer = 3 if kind == "llama" else 4
        return POLICIES[name](importance=HeadScores({key: rows[:n_layer] for key, rows in SCORES.scores.items()}))
    return "windowkv-paper(task='aggregation')" if name == "windowkv-paper" else name


#
# going on
#


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "llama") for name in POLICIES), *((name, kind) for name in ("windowkv", "adakv", "h2o") for kind in WRITERS if kind != "llama")],
)  # fmt: skip
def test_a_session_goes_on_bit_for_bit(models: dict[str, Path], opened: Open, tmp_path: Path, name: str, kind: str) -> None:
    own = policy(name, kind)
    llm, other = (opened(models[kind], kv_policy=own, kv_budget=BUDGET, **SMALL) for _ in range(2))
    state = answering(llm).save_state()
    llm.kv_save(tmp_path / "file")
    want = go_on(llm)

    other.load_state(pickle.loads(pickle.dumps(state)))
    assert go_on(other) == want
    other.load_state(state)  # over what is there
    assert go_on(other) == want
    other.kv_load(tmp_path / "file")
    assert go_on(other) == want


def test_a_policy_in_python_and_a_prompt_that_was_not_compacted(models: dict[str, Path], opened: Open) -> None:
    script = Script(action=lambda: None)
    llm, other = (opened(models["llama"], kv_policy=script, kv_budget=400, **SMALL) for _ in range(2))
    state = answering(llm).save_state()
    llm.kv_budget = BUDGET
    llm.kv_compact()
    want = go_on(llm)
    other.load_state(state)
    assert other.kv_budget == 400 and other.kv_stats().cells.min() == 305
    other.kv_budget = BUDGET
    other.kv_compact()
    assert go_on(other) == want


def test_what_a_state_carries(pair: tuple[Llama, Llama], models: dict[str, Path], opened: Open) -> None:
    llm, other = pair
    llm.set_seed(17)
    state = answering(llm).save_state()
    assert isinstance(state, llama_cpp.LlamaState)
    assert state.n_tokens == 305 and state.input_ids[:305].tolist() == TOKENS[:300] + OTHERS[:5]
    assert (state.input_ids[305:] == -1).all()  # nothing that a prefix could go on into
    assert len(state.llama_state) == state.llama_state_size < llm.kv_stats().bytes_live and state.seed == 17
    other.load_state(state)
    assert other._seed == 17 and other.kv_stats().bytes_live == llm.kv_stats().bytes_live

    with_logits = opened(models["llama"], kv_policy="snapkv", kv_budget=BUDGET, logits_all=True, **SMALL)
    with pytest.raises(UnsupportedCallError, match="without logits_all=True"):
        with_logits.load_state(state)
    scores = answering(with_logits)._scores.copy()
    own = with_logits.save_state()
    with_logits.reset()
    with_logits.load_state(own)
    assert np.array_equal(with_logits._scores, scores)


@pytest.mark.parametrize("seed", [-1, np.int64(5), 2**32 - 1])
def test_every_seed_comes_back(pair: tuple[Llama, Llama], tmp_path: Path, seed: int) -> None:
    llm, other = pair
    llm.set_seed(seed)
    answering(llm).kv_save(tmp_path / "seed.session")
    other.kv_load(tmp_path / "seed.session")
    assert other._seed == seed


def test_counts_and_pins_come_along(pair: tuple[Llama, Llama]) -> None:
    llm, other = pair
    llm.reset()
    llm.kv_pin(3, 9)
    llm.eval(TOKENS[:300])  # the beginning of a prompt
    state = llm.save_state()
    llm.kv_unpin()
    answer(other, OTHERS[:50])
    other.load_state(state)
    assert other.kv_pinned == ((3, 9),)
    answer(other, TOKENS[:305])
    own = other.kv_stats()
    assert (own.n_evaluated_last, own.n_reused_last) == (5, 300)
    assert set(range(3, 9)) <= set(other.kv_positions(0, 0).tolist())
    other.kv_unpin()


def test_a_cache_brings_no_pins_back(models: dict[str, Path], opened: Open) -> None:
    llm = opened(models["llama"], kv_policy="snapkv", kv_budget=BUDGET, **SMALL)
    states = llama_cpp.LlamaRAMCache()
    answer(llm, TOKENS[:200])
    states[TOKENS[:200]] = llm.save_state()
    llm.reset()
    llm.kv_pin(0, 5)
    assert not llm._take_best(states, TOKENS[:300])
    assert llm.kv_pinned == ((0, 5),)
    llm.kv_unpin()
    assert llm._take_best(states, TOKENS[:300])


#
# what does not fit
#


def test_a_state_of_something_else_is_refused(
    pair: tuple[Llama, Llama], models: dict[str, Path], opened: Open, tmp_path: Path
) -> None:
    llm, other = pair
    state = answering(llm).save_state()
    llm.kv_save(tmp_path / "file")
    tiny_model.write_llama(tmp_path / "seed.gguf", seed=5)  # the same shapes and metadata

    for changes, why in (
        ({"kv_policy": "adakv"}, "saved with kv_policy=snapkv"),
        ({"kv_policy": "snapkv(kernel_size=3)"}, r"this session has snapkv\(window_size=32, kernel_size=3"),
        ({"n_ctx": 256}, "n_ctx=256"),
        ({"type_k": 8, "type_v": 8}, "type of K is 1, expected 8"),
        ({"rope_freq_base": 5000.0}, "RoPE"),
        ({"model": tmp_path / "seed.gguf"}, "another model"),
        ({"model": models["granite"]}, "another model"),
    ):
        model = changes.pop("model", models["llama"])
        into = make(model, **changes)
        into.eval(TOKENS[:50])
        before = into.save_state().llama_state
        for load in (lambda into=into: into.load_state(state), lambda into=into: into.kv_load(tmp_path / "file")):
            with pytest.raises(UnsupportedCallError, match=why):
                load()
            assert into.n_tokens == 50 and into.save_state().llama_state == before
        into.eval([1])
        into.close()

    stock = opened(models["llama"], **SMALL)
    stock.eval(TOKENS[:20])
    stocks = stock.save_state()
    answering(other, OTHERS)
    with pytest.raises(UnsupportedCallError, match="without a policy"):
        other.load_state(stocks)
    with pytest.raises(TypeError, match="got int, expected what save_state"):
        other.load_state(5)
    with pytest.raises(UnsupportedCallError, match=r"kv_save\(\) needs a session with a policy"):
        stock.kv_save(tmp_path / "stock")
    same(other, OTHERS)


def test_policies_are_told_apart() -> None:
    texts = [policy_text(POLICIES[name]()) for name in POLICIES]
    assert len(set(texts)) == len(texts)
    rng = np.random.default_rng(0)
    own, others = (POLICIES["headkv"](importance=HeadScores({"r": rng.random((4, 4))})) for _ in range(2))
    assert policy_text(own) != policy_text(others)
    assert policy_text(own) == policy_text(pickle.loads(pickle.dumps(own)))


def test_context_that_others_cleared(pair: tuple[Llama, Llama]) -> None:
    llm, _ = pair
    answering(llm)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
    with pytest.raises(UnsupportedCallError, match="n_tokens is 305 and the cache holds 0"):
        llm.save_state()
    same(answering(llm))


#
# caches of states
#


@pytest.mark.parametrize(
    ("held", "removable", "prompt", "known", "n"),
    [
        ([1, 2, 3], 3, [1, 2, 3, 4], (), 3),
        ([1, 2, 3], 3, [1, 2, 4, 4], (), 0),  # what was compacted cannot go back
        ([1, 2, 3], 2, [1, 2, 4, 4], (), 2),
        ([1, 2, 3], 3, [1, 2, 3], (), 0),  # one would have to be evaluated again
        ([1, 2, 3], 3, [1, 2, 3], {3}, 3),
        ([1, 2, 3], 2, [1, 2, 3], (), 2),
        ([1, 2, 3], 2, [1, 2], {2}, 2),
        ([1, 2, 3], 2, [1, 2], {3}, 0),
        ([], 0, [1], (), 0),
    ],
)
def test_what_a_state_saves(held: list[int], removable: int, prompt: list[int], known: Any, n: int) -> None:
    ids = [np.array(tokens, dtype=np.intc) for tokens in (held, prompt)]
    assert n_reused(ids[0], removable, ids[1], known) == n


class Counted(Llama):
    """Counts the tokens that it evaluates."""

    n_evaluated = 0

    def eval(self, tokens: Any) -> None:
        self.n_evaluated += len(tokens)
        super().eval(tokens)


DOCUMENT, QUESTIONS = TOKENS[:70], (OTHERS[:10], OTHERS[20:30])


@pytest.fixture(scope="module")
def talker(smollm2: Path) -> Iterator[Counted]:
    llm = Counted(
        str(smollm2), n_ctx=256, n_threads=2, n_threads_batch=2, verbose=False, kv_policy="snapkv", kv_budget=50
    )
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def fresh(talker: Counted) -> list[list[int]]:
    """Answers to both prompts by sessions that know nothing."""
    res = []
    for question in QUESTIONS:
        talker.reset()
        res.append(complete(talker, DOCUMENT + question))
    return res


def complete(llm: Llama, tokens: list[int]) -> list[int]:
    """What create_completion generates; the model has no tokenizer, so that its text is said by token numbers."""
    got: list[int] = []
    own = llm.generate

    def generate(*args: Any, **kwargs: Any) -> Iterator[int]:
        for token in own(*args, **kwargs):
            got.append(token)
            yield token

    llm.generate = generate  # type: ignore[method-assign]
    try:
        llm.create_completion(tokens, max_tokens=3, temperature=0.0)
    finally:
        del llm.generate
    return got


@pytest.mark.parametrize("what", ["budget", "noted", "n_past", "all of it"])
def test_a_cache_passes_over_states_of_another_version(talker: Counted, fresh: list[list[int]], what: str) -> None:
    """Or of a budget that is another one though the number is the same: 50 cells and, if that could be, 50 times all of them."""
    llm, prompt, ram = talker, DOCUMENT + QUESTIONS[0], llama_cpp.LlamaRAMCache()
    llm.kv_budget = 50
    llm.reset()
    llm.set_cache(ram)
    try:
        assert complete(llm, prompt) == fresh[0]
        (state,) = ram.cache_state.values()
        assert isinstance(state, SavedState)
        if what == "all of it":
            del state.session  # as an older pickle
        else:
            state.session = {**state.session, what: {"budget": 50.0, "noted": {}, "n_past": "75"}[what]}
        llm.reset()
        llm.n_evaluated = 0
        assert complete(llm, prompt) == fresh[0]
        assert llm.n_evaluated >= len(prompt)
    finally:
        llm.set_cache(None)


@pytest.fixture(params=["ram", "disk", "other"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "disk":
        return llama_cpp.LlamaDiskCache(str(tmp_path / "cache"))
    ram = llama_cpp.LlamaRAMCache()
    if request.param == "ram":
        return ram

    class Other:
        def __getitem__(self, key: Any) -> Any:
            return ram[key]

        def __setitem__(self, key: Any, value: Any) -> None:
            ram[key] = value

    return Other()


def test_a_cache_gives_the_state_that_saves_most_and_no_wrong_answer(
    talker: Counted, fresh: list[list[int]], cache: Any
) -> None:
    llm, prompts = talker, [DOCUMENT + question for question in QUESTIONS]
    llm.kv_budget = 50
    llm.set_cache(cache)
    assert llm.cache is cache

    def n_evaluated(tokens: list[int], want: list[int] | None) -> int:
        llm.n_evaluated = 0
        assert complete(llm, tokens) == want or want is None
        return llm.n_evaluated

    llm.reset()
    assert n_evaluated(prompts[0], fresh[0]) >= len(prompts[0])

    # shares the document, which was compacted with another question: nothing of that helps
    llm.reset()
    assert n_evaluated(prompts[1], fresh[1]) >= len(prompts[1])

    # goes on from the first answer, which the session itself has lost
    chat = prompts[0] + fresh[0] + OTHERS[50:60]
    llm.n_evaluated = 0
    got = complete(llm, chat)
    assert (n_saved := llm.n_evaluated) <= len(chat) - len(prompts[0]) + 4

    # another budget's states are no answers to this one's prompts
    llm.kv_budget = 60
    llm.reset()
    assert n_evaluated(chat, None) >= len(chat)

    # as in one session that never left
    llm.set_cache(None)
    llm.kv_budget = 50
    llm.reset()
    complete(llm, prompts[0])
    assert n_evaluated(chat, got) == n_saved


#
# files
#


@pytest.fixture
def saved(pair: tuple[Llama, Llama], tmp_path: Path) -> Path:
    answering(pair[0]).kv_save(tmp_path / "saved", extra={"messages": [{"role": "user", "content": "é"}]})
    return tmp_path / "saved"


def test_what_its_owner_adds_comes_back(pair: tuple[Llama, Llama], saved: Path, tmp_path: Path) -> None:
    llm, other = pair
    other.kv_budget = 100
    assert other.kv_load(saved) == {"messages": [{"role": "user", "content": "é"}]}
    assert other.kv_budget == BUDGET
    same(other)
    for bad, kind in ((5, TypeError), ({"a": "x" * (17 << 20)}, ValueError), ({"a": {1: object()}}, TypeError)):
        with pytest.raises(kind):
            llm.kv_save(tmp_path / "bad", extra=bad)
        assert not (tmp_path / "bad").exists()
    same(answering(llm))


def seal(data: bytes) -> bytes:
    """With the length and the checksum that fit."""
    data = data[:16] + len(data).to_bytes(8, "little") + data[24:]
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "little")


def test_other_files_are_refused(pair: tuple[Llama, Llama], saved: Path, tmp_path: Path) -> None:
    _, other = pair
    data = saved.read_bytes()
    answering(other, OTHERS)
    path = tmp_path / "bad"
    for bad, why in (
        (b"", "does not begin as one"),
        (b"GGUF" + data[4:], "does not begin as one"),
        (pickle.dumps({"a": 1}), "does not begin as one"),
        (data[:20], "cut after 20 bytes"),
        (data[:-1], "that is whole"),
        (data + b"x", "that is whole"),
        (data[:8] + b"\x09" + data[9:], f"version is 9, expected {state_files.VERSION}"),
        (data[:-50] + b"x" + data[-49:], "was changed"),
        (seal(data.replace(b'"n_tokens": 305', b'"n_tokens": 304')), "does not fit"),
        (seal(data.replace(b'"n_past": 305', b'"n_past": 306')), "cells are of 305 positions .*expected 306"),
        (seal(data.replace(b'"removable": 300', b'"removable": 999')), "can be removed"),
        (seal(data.replace(b'"budget": 40', b'"budget": -1')), "budget"),
        (seal(data.replace(b'"known"', b'"knowm"')), "noted"),
        (seal(data.replace(b'{"about"', b'["about"')), "header"),
        (seal(data[:-40] + data[-4:]).replace(b"", b"", 0), "does not fit"),
    ):
        path.write_bytes(bad)
        with pytest.raises((FormatError, UnsupportedCallError), match=why) as caught:
            other.kv_load(path)
        assert "bad" in str(caught.value)
    for odd in (tmp_path, Path("/dev/null"), tmp_path / "none"):
        with pytest.raises(OSError):
            other.kv_load(odd)
    same(other, OTHERS)


def test_ten_thousand_damaged_files(tmp_path: Path, opened: Open) -> None:
    """Most with a checksum that fits, so that they reach the parsers: refused, or a session that can be used. More kinds
    of damage: ``python -m tests.fuzz.run``."""
    model = tiny_model.write_llama(tmp_path / "tiny.gguf", n_layer=1)
    small = {**SMALL, "n_ctx": 192, "kv_policy": "snapkv(window_size=4)", "kv_budget": 20}
    other = opened(model, **small)
    other.eval(TOKENS[:60])
    other.eval([1])
    other.kv_save(tmp_path / "saved")
    data, rng = (tmp_path / "saved").read_bytes(), np.random.default_rng(3)
    n_header = int.from_bytes(data[12:16], "little")
    path, n_loaded, n_refused = tmp_path / "bad", 0, 0
    other.reset()
    other.eval(OTHERS[:50])
    before = other.save_state()
    want = go_on(other)
    other.load_state(before)
    for i in range(10_000):
        bad = bytearray(data)
        # the header, the tokens and what is not rows, or anywhere
        n = (24 + n_header, 24 + n_header + 4 * 61 + 600, len(bad))[i % 3]
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, min(n, len(bad) - 8)))
            match int(rng.integers(0, 4)):
                case 0:
                    bad[at] ^= 1 << int(rng.integers(0, 8))
                case 1:
                    del bad[at : at + int(rng.integers(1, 9))]
                case 2:
                    there = int(rng.integers(0, min(n, len(bad) - 8)))
                    bad[at : at + 4], bad[there : there + 4] = bad[there : there + 4], bad[at : at + 4]
                case 3:
                    bad[at : at + 4] = int(rng.choice([0, 1, 61, 192, 2**31, 2**32 - 1])).to_bytes(4, "little")
        path.write_bytes(seal(bytes(bad)) if rng.random() < 0.9 and len(bad) > 28 else bytes(bad))
        try:
            other.kv_load(path)
        except (FormatError, UnsupportedCallError) as error:
            n_refused += 1
            assert str(error)
            if "the session is empty" in str(error):
                assert other.n_tokens == other.kv_stats().n_past == 0
                other.load_state(before)
            elif i % 50 == 0:
                assert other.save_state().llama_state == before.llama_state
        else:
            n_loaded += 1
            if other.n_tokens < 192:
                other.eval([1])
            other.load_state(before)
    assert n_loaded > 300 and n_refused > 3000
    assert go_on(other) == want


def test_full_disk(pair: tuple[Llama, Llama], saved: Path) -> None:
    llm, other = pair
    before = saved.read_bytes()
    answering(llm, OTHERS)
    with room(len(before) // 2), pytest.raises(FileError, match="cannot write .*saved.*make room"):
        llm.kv_save(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]
    with pytest.raises(FileError, match="cannot write"):
        llm.kv_save(saved.parent / "none" / "file")
    other.kv_load(saved)
    same(other)
    same(llm, OTHERS)


KILLED = """
import sys
from windowkv_edge import Llama
llm = Llama(sys.argv[1], n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False, kv_policy="snapkv", kv_budget=40)
llm.eval(list(range(100)) * 3)
print("ready", flush=True)
while True:
    llm.kv_save(sys.argv[2])
"""


def test_kill_leaves_a_whole_file(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "saved"
    for wait in (0.0, 0.02):
        process = subprocess.Popen([sys.executable, "-c", KILLED, models["llama"], path], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while not path.exists():
            time.sleep(0.001)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert state_files.read(path).tokens.tolist() == list(range(100)) * 3


def test_interrupted_saves_and_loads(pair: tuple[Llama, Llama], saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the cells and what Python knows of them: an empty session, not one of each."""
    _, other = pair
    answering(other, OTHERS)

    def interrupt(noted: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(other, "_kv_note", interrupt)
        with pytest.raises(KeyboardInterrupt):
            other.kv_load(saved)
    assert other.n_tokens == 0 and other.kv_stats().n_past == 0
    other.kv_load(saved)
    same(other)


def test_no_memory(pair: tuple[Llama, Llama], saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Python's; native/failing-alloc.cpp fails the others."""
    _, other = pair
    answering(other, OTHERS)
    empty = np.empty

    def fail(shape: Any, *args: Any, **kwargs: Any) -> Any:
        if np.prod(shape) > 10_000:
            raise MemoryError
        return empty(shape, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(np, "empty", fail)
        for call in (other.save_state, lambda: other.kv_save(saved), lambda: other.kv_load(saved)):
            with pytest.raises(NativeError, match="no memory"):
                call()
    same(other, OTHERS)


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator stands on glibc")
@pytest.mark.parametrize("kind", ["llama", "gpt-oss", "lfm2"])
def test_every_allocation_of_a_save_and_a_load_fails(
    models: dict[str, Path], native_tests: Path, tmp_path: Path, kind: str
) -> None:
    script = Path(__file__).with_name("state_allocations.py")
    env = {**os.environ, "LD_PRELOAD": str(native_tests / "failing-alloc.so"), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, script, models[kind], tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    assert min(map(int, process.stdout.split()[:2])) > 100


def test_loading_takes_little_more_than_reading(smollm2: Path, tmp_path: Path) -> None:
    """The bound for 12 MiB is 30 ms. Here it is that of seven copies of the same bytes with their checksums, which took 38 ms
    of a processor where loading took 16 (tests/measure/session_files.py); both are slower on a slower machine."""
    llm = Llama(str(smollm2), n_ctx=2048, n_threads=2, n_threads_batch=2, verbose=False, kv_policy="streamingllm", kv_budget=512)
    path = tmp_path / "saved"
    try:
        _native.Context(llm.ctx).fill(1024)
        llm.input_ids[:1024] = 5
        llm.n_tokens = llm._kv_known = 1024
        llm.kv_compact()
        llm.kv_save(path)
        assert 11 << 20 < path.stat().st_size < 16 << 20

        def fastest(call: Callable[[], object]) -> float:
            times = []
            for _ in range(7):
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
            return min(times)

        def copies() -> None:
            data = bytearray(path.read_bytes())
            for _ in range(6):
                data = bytearray(data)
                zlib.crc32(data)

        load, reference = fastest(lambda: llm.kv_load(path)), fastest(copies)
        assert load < reference
    finally:
        llm.close()
