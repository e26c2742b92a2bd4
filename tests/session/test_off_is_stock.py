"""Policy off is stock, bit for bit; a budget that evicts nothing gives stock's answers."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from windowkv_edge import Llama

# runs in a process of its own: llama_cpp with the stock library, nothing of ours
STOCK = """
import sys, ctypes, numpy as np, llama_cpp
model, tokens_file, out, flash, type_k = sys.argv[1:]
assert "windowkv_edge" not in sys.modules
assert not hasattr(llama_cpp.llama_cpp._lib, "wkv_build_stamp")
llm = llama_cpp.Llama(model, n_ctx=2048, n_threads=2, n_threads_batch=2, verbose=False, flash_attn=flash == "1")
rows = []
for chunk in np.load(tokens_file, allow_pickle=True):
    llm.eval(list(chunk))
    rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy())
np.save(out, np.array(rows))
"""


N_PROMPT, N_SINGLE = 600, 256


@pytest.fixture(scope="module")
def stock_logits(
    native_tests: Path, document: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, bool], tuple[list[list[int]], np.ndarray]]:
    """A text's first tokens at once and the next ones singly, and the stock library's logits behind each, float32 [parts, n_vocab],
    by the model and whether with flash attention."""

    @functools.cache
    def read(model: Path, flash: bool) -> tuple[list[list[int]], np.ndarray]:
        folder = tmp_path_factory.mktemp("stock")
        llm = Llama(str(model), vocab_only=True, verbose=False)
        tokens = llm.tokenize(document.encode())[: N_PROMPT + N_SINGLE]
        llm.close()
        chunks = [tokens[:N_PROMPT], *([token] for token in tokens[N_PROMPT:])]
        np.save(folder / "tokens.npy", np.array([np.array(c) for c in chunks], dtype=object), allow_pickle=True)
        env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(native_tests / "stock")}
        subprocess.run(
            [sys.executable, "-c", STOCK, model, folder / "tokens.npy", folder / "out.npy", str(int(flash)), "f16"],
            env=env, check=True, cwd=folder,
        )  # fmt: skip
        return chunks, np.load(folder / "out.npy")

    return read


def our_logits(llm: Llama, chunks: list[list[int]]) -> np.ndarray:
    import llama_cpp

    rows = []
    for chunk in chunks:
        llm.eval(chunk)
        rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy())
    return np.array(rows)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("model_name", ["smollm2", "gemma3"])
def test_off_is_stock_bit_for_bit(
    model_name: str,
    flash: bool,
    stock_logits: Callable[[Path, bool], tuple[list[list[int]], np.ndarray]],
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(model_name)
    chunks, want = stock_logits(model, flash)
    llm = Llama(str(model), n_ctx=2048, n_threads=2, n_threads_batch=2, verbose=False, flash_attn=flash)
    got = our_logits(llm, chunks)
    assert len(got) == 257
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))

    stats = llm.kv_stats()
    assert stats.policy == "stock"
    assert stats.n_past == 856
    if model_name == "smollm2":  # 30 layers x 3 kv heads x (64 + 64) x 2 bytes, all n_ctx positions allocated
        assert stats.bytes_live == 2048 * 30 * 3 * 128 * 2
        assert stats.bytes_full == 856 * 30 * 3 * 128 * 2
    llm.close()


@pytest.mark.parametrize("policy", ["full", "windowkv", "snapkv"])
def test_a_budget_that_evicts_nothing_is_stock(
    policy: str,
    smollm2: Path,
    session: Callable[..., Llama],
    stock_logits: Callable[[Path, bool], tuple[list[list[int]], np.ndarray]],
) -> None:
    chunks, rows = stock_logits(smollm2, True)
    want = rows[:65]
    llm = session(n_ctx=2048, kv_policy=policy, kv_budget=1000)
    got = our_logits(llm, chunks[:65])
    assert llm.kv_stats().n_compactions == 0
    assert np.abs(got - want).max() < 1e-2  # measured: 0
    assert np.array_equal(got.argmax(axis=1), want.argmax(axis=1))


def test_greedy_answers_equal_stock(document: str, session: Callable[..., Llama]) -> None:
    prompt = document[:2500] + "\n\nIn short, this text"
    want = session(n_ctx=1536, flash_attn=True)(prompt, max_tokens=64, temperature=0.0)
    for budget in (1.0, 1400):
        got = session(n_ctx=1536, kv_policy="windowkv", kv_budget=budget)(prompt, max_tokens=64, temperature=0.0)
        assert got["choices"][0]["text"] == want["choices"][0]["text"]


# names and operations of all nodes of a prompt's graph and of a token's, as the scheduler meets them
NODES = """
import sys, ctypes, json
model, ours, flash, out = sys.argv[1:]
if ours == "1":
    import windowkv_edge
from llama_cpp import llama_cpp as low
assert hasattr(low._lib, "wkv_build_stamp") == (ours == "1")
for name in ("ggml_get_name", "ggml_op_desc"):
    getattr(low._lib, name).restype = ctypes.c_char_p
    getattr(low._lib, name).argtypes = [ctypes.c_void_p]
nodes = []

def visit(tensor, ask, _):
    if ask:
        nodes.append([low._lib.ggml_get_name(tensor).decode(), low._lib.ggml_op_desc(tensor).decode()])
    return False

low.llama_backend_init()
weights = low.llama_model_load_from_file(model.encode(), low.llama_model_default_params())
params = low.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = 512
params.flash_attn_type = int(flash)
callback = low.ggml_backend_sched_eval_callback(visit)
params.cb_eval = callback
ctx = low.llama_init_from_model(weights, params)
for tokens in ([5] * 300, [7]):
    nodes.append(["a graph", str(len(tokens))])
    array = (low.llama_token * len(tokens))(*tokens)
    assert low.llama_decode(ctx, low.llama_batch_get_one(array, len(tokens))) == 0
json.dump(nodes, open(out, "w"))
"""


@pytest.mark.parametrize("flash", [0, 1])
@pytest.mark.parametrize("model_name", ["smollm2", "gemma3"])
def test_off_adds_no_node(
    model_name: str, flash: int, native_tests: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The graphs are stock's, node by node: on every backend, for graphs are built before any of these is asked."""
    model = request.getfixturevalue(model_name)
    found = []
    for ours in (0, 1):
        out = tmp_path / f"{ours}.json"
        env = dict(os.environ) if ours else {**os.environ, "LLAMA_CPP_LIB_PATH": str(native_tests / "stock")}
        command = [sys.executable, "-c", NODES, model, str(ours), str(flash), out]
        subprocess.run(command, env=env, check=True, cwd=tmp_path)
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]
    assert len(found[0]) > 1000 and sum(name == "a graph" for name, _ in found[0]) == 2
    assert any(desc == "FLASH_ATTN_EXT" for _, desc in found[0]) == bool(flash)
    assert not any(desc == "FLASH_ATTN_RAGGED" for _, desc in found[0])
