"""Cells, memory and positions of sessions with a policy, on a real model."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from policy_table import kept
from reference.attention import observe
from scripted import evaluate

from windowkv_edge import POLICIES, Llama, NativeError, SnapKV, UnsupportedCallError, WindowKV, _native
from windowkv_edge.budget import bits

CELL_BYTES = (64 + 64) * 2  # K and V of one head, f16
N_LAYER, N_HEAD_KV = 30, 3


def rss() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def anonymous() -> int:
    """Bytes of the process that are not pages of the mapped model file, which load as tokens touch them, and not those of freed
    blocks, which the C library keeps or gives back as it likes."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    status = Path("/proc/self/status")
    if not status.exists():
        return rss()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])  # type: ignore[index]


def prompt(llm: Llama, document: str, n: int) -> list[int]:
    tokens = llm.tokenize(document.encode())
    return (tokens * (n // len(tokens) + 1))[:n]


def test_pools_hold_the_prompt_and_not_the_context(session: Callable[..., Llama], document: str) -> None:
    llm = session(n_ctx=8192, kv_policy="windowkv", kv_budget=1.0)
    # the observed queries of 16 tokens, and as many of a prompt's end: 30 layers, 9 heads of 64 f16 values
    assert llm.kv_stats().bytes_live == 2 * 16 * 30 * 9 * 64 * 2
    llm.eval(prompt(llm, document, 1000))
    stats = llm.kv_stats()
    assert (stats.cells == 1000).all()
    assert stats.bytes_full == 1000 * N_LAYER * N_HEAD_KV * CELL_BYTES
    # padded to 256 cells as stock reads them, plus the observed queries
    assert stats.bytes_full < stats.bytes_live < 1.10 * stats.bytes_full


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_every_policy_keeps_its_budget(name: str, session: Callable[..., Llama], document: str) -> None:
    llm = session(kv_policy=name, kv_budget=0.12)
    tokens = prompt(llm, document, 600)
    evaluate(llm, tokens)
    stats = llm.kv_stats()
    assert stats.policy == name
    assert stats.n_past == llm.n_tokens == 600
    assert stats.cells.shape == (N_LAYER, N_HEAD_KV)
    share = bits(*stats.cell_types) / 16
    assert share == (1 if POLICIES[name].cells is None else 8.5 / 16)
    assert stats.cells.mean() == int(0.12 * 600 / share + 1e-6)  # exactly
    assert stats.n_compactions == 1
    for layer in (0, 14, 29):
        for head in range(N_HEAD_KV):
            pos = llm.kv_positions(layer, head)
            assert len(pos) == stats.cells[layer, head]
            assert (np.diff(pos) > 0).all() and pos[-1] == 599 and pos[0] >= 0

    slack = stats.bytes_live - int(stats.cells.sum()) * CELL_BYTES * share
    policy = llm.kv_policy
    assert policy is not None
    queries = 2 * N_LAYER * 9 * 64 * 2 * min(policy.n_observed, 1024)  # no more than there are positions
    assert 0 <= slack - queries <= N_LAYER * N_HEAD_KV * CELL_BYTES * 40  # under 40 free cells a head


def test_scores_and_selection_equal_the_reference(session: Callable[..., Llama], document: str) -> None:
    """From the model's own K and Q: native scores to float accuracy, native selection cell by cell."""
    policy = WindowKV(window_size=16, carry=3, recent_share=0.5)
    llm = session(kv_policy=policy, kv_budget=1.0)
    llm.eval(prompt(llm, document, 500))
    kv = llm._kv
    assert kv is not None

    positions, scores = [], []
    for layer in range(N_LAYER):
        pos = [llm.kv_positions(layer, head) for head in range(N_HEAD_KV)]
        got = kv.scores(layer, policy.window_size)
        positions.append(pos)
        scores.append(got)
        if layer in (0, 11, 29):
            for head in range(N_HEAD_KV):
                observed = [kv.queries(layer, head * 3 + g) for g in range(3)]
                want = observe(
                    np.stack([q for _, q in observed]), observed[0][0], kv.rows(layer, head, "k"), pos[head], 64**-0.5
                )
                # K and Q are rounded to f16 (2^-11) before the product, the logits are of order 10
                np.testing.assert_allclose(got[head], want, rtol=2e-2, atol=1e-6)
                np.testing.assert_allclose(got[head].sum(), 1.0, rtol=1e-4)

    llm.kv_compact(60)
    keep = kept(policy, positions, scores, 60)
    for layer in range(N_LAYER):
        for head in range(N_HEAD_KV):
            assert llm.kv_positions(layer, head).tolist() == positions[layer][head][keep[layer][head]].tolist()


def test_memory_is_released(session: Callable[..., Llama], document: str) -> None:
    """At least 90 % of the bytes reported as released leave the process (4,000 tokens, 12 %)."""
    llm = session(n_ctx=4352, kv_policy="windowkv", kv_budget=1.0)
    llm.eval(prompt(llm, document, 4000))
    before = rss()
    stats = llm.kv_compact(0.12)
    fell = before - rss()
    assert stats.bytes_released > 0.85 * 4000 * N_LAYER * N_HEAD_KV * CELL_BYTES
    assert fell >= 0.9 * stats.bytes_released
    assert stats.bytes_peak < 1.2 * stats.bytes_full + (
        8 << 20
    )  # the peak is the prompt and one layer, not twice the cache

    held = llm.kv_stats().bytes_live
    before = rss()
    llm.reset()
    assert llm.kv_stats().bytes_live == 2 * 16 * N_LAYER * 9 * 64 * 2  # observed queries
    assert before - rss() >= 0.9 * (held - llm.kv_stats().bytes_live) - (1 << 20)


@pytest.mark.parametrize(("model", "n"), [("smollm2", 60), ("tiny", 2000)])
def test_no_growth_over_many_prompts(
    request: pytest.FixtureRequest, opened: Callable[..., Llama], model: str, n: int
) -> None:
    llm = opened(request.getfixturevalue(model), n_ctx=512, kv_policy="windowkv", kv_budget=40, kv_task="localization")
    tokens = [1 + i * 7 % 120 for i in range(n + 150)]

    def run(i: int) -> None:
        llm.reset()
        llm.eval(tokens[i : i + 100 + i % 50])
        for _ in range(3):
            llm.eval([llm.sample(temp=0.0)])

    # the longest of the prompts, too: how many pages of the compute buffer are touched goes with a prompt's length
    for i in [*range(n // 4), 49]:
        run(i)
    before, peak = anonymous(), llm.kv_stats().bytes_peak
    for i in range(n):
        run(i)
    assert anonymous() - before < 1 << 19
    assert llm.kv_stats().bytes_peak <= peak * 1.01
    assert llm.kv_stats().n_compactions == n + n // 4 + 1


def test_short_prompts_are_left_whole(session: Callable[..., Llama], document: str) -> None:
    llm = session(kv_policy="windowkv", kv_budget=0.12)
    llm.eval(prompt(llm, document, 255))
    assert llm.kv_stats().n_compactions == 0
    llm.reset()
    evaluate(llm, prompt(llm, document, 256))
    assert llm.kv_stats().n_compactions == 1

    llm = session(kv_policy="windowkv", kv_budget=0.12, kv_min_prompt=0)
    evaluate(llm, prompt(llm, document, 50))
    assert (llm.kv_stats().cells == 6).all()


def test_first_token_comes_from_full_attention(session: Callable[..., Llama], document: str) -> None:
    full = session(flash_attn=True)
    tokens = prompt(full, document, 400)
    full.eval(tokens)
    want = full.sample(temp=0.0)
    for policy in ("streamingllm", "windowkv"):
        llm = session(kv_policy=policy, kv_budget=8)
        evaluate(llm, tokens)
        assert llm.kv_stats().cells.mean() == 8
        assert llm.sample(temp=0.0) == want


def test_prompt_in_batches_attends_to_everything(session: Callable[..., Llama], document: str) -> None:
    """Chunked prefill: nothing is evicted before the last chunk, whatever the batch size."""
    kept = []
    for n_batch in (64, 512):
        llm = session(kv_policy="snapkv", kv_budget=100, n_batch=n_batch)
        evaluate(llm, prompt(llm, document, 500))
        assert llm.kv_stats().n_compactions == 1
        kept.append([set(llm.kv_positions(layer, 0).tolist()) for layer in range(N_LAYER)])
    same = np.mean([len(a & b) / 100 for a, b in zip(*kept)])
    assert same > 0.97  # batch sizes change the last bits of the logits and with them a few ties


def test_positions_continue_after_compaction(session: Callable[..., Llama], document: str) -> None:
    llm = session(kv_policy="windowkv", kv_budget=50)
    evaluate(llm, prompt(llm, document, 300))
    for _ in range(70):
        llm.eval([llm.sample(temp=0.0)])
    pos = llm.kv_positions(3, 1)
    assert pos[-70:].tolist() == list(range(300, 370))
    assert len(pos) == 120


def test_second_turn_reuses_the_prefix(session: Callable[..., Llama], document: str) -> None:
    llm = session(n_ctx=2048, kv_policy="windowkv", kv_budget=0.25)
    evaluated: list[int] = []
    original = llm._ctx.decode
    llm._ctx.decode = lambda batch: (evaluated.append(batch.n_tokens()), original(batch))[1]  # type: ignore[method-assign]

    messages = [{"role": "user", "content": document[:4000] + "\n\nWhat is this text about? Answer in one sentence."}]
    first = llm.create_chat_completion(messages, max_tokens=48, temperature=0.0)["choices"][0]["message"]
    n_first, n_past = sum(evaluated), llm.n_tokens
    assert llm.kv_stats().n_compactions == 1

    evaluated.clear()
    messages += [first, {"role": "user", "content": "Name one thing that the text mentions."}]
    second = llm.create_chat_completion(messages, max_tokens=32, temperature=0.0)["choices"][0]["message"]["content"]
    assert sum(evaluated) < 100 < n_first  # the document is not evaluated again
    assert llm.n_tokens > n_past
    assert llm.kv_positions(0, 0)[-1] == llm.n_tokens - 1
    words = second.split()
    assert len(words) >= 3 and len(set(words)) > len(words) // 3, second


def test_repeated_prompt_gives_the_same_answer(session: Callable[..., Llama], document: str) -> None:
    llm = session(kv_policy="windowkv", kv_budget=0.2)
    answers = [llm(document[:2000], max_tokens=16, temperature=0.0)["choices"][0]["text"] for _ in range(3)]
    assert len(set(answers)) == 1
    assert llm.kv_stats().n_compactions == 1


def test_setting_n_tokens_back_into_the_prompt_is_refused(session: Callable[..., Llama], document: str) -> None:
    llm = session(kv_policy="windowkv", kv_budget=50)
    tokens = prompt(llm, document, 300)
    evaluate(llm, tokens)
    llm.n_tokens = 200
    with pytest.raises(UnsupportedCallError, match="positions below 300 were compacted"):
        llm.eval(tokens[200:])
    llm.reset()
    evaluate(llm, tokens)
    assert llm.kv_stats().n_past == 300


def test_policy_and_budget_can_change(session: Callable[..., Llama], document: str) -> None:
    llm = session(kv_policy="streamingllm", kv_budget=50)
    tokens = prompt(llm, document, 300)
    evaluate(llm, tokens)
    llm.kv_policy = SnapKV(window_size=24)
    assert llm.n_tokens == 0 and llm.kv_stats().bytes_live < 2 << 20
    llm.kv_budget = 0.5
    evaluate(llm, tokens)
    assert llm.kv_stats().policy == "snapkv"
    assert (llm.kv_stats().cells == 150).all()
    llm.kv_compact(30)
    assert (llm.kv_stats().cells == 30).all()
    with pytest.raises(ValueError, match="expected one of"):
        llm.kv_policy = "snap"
    with pytest.raises(ValueError, match="fraction"):
        llm.kv_budget = 1.5


def test_compacting_nothing_is_an_error(session: Callable[..., Llama]) -> None:
    llm = session(kv_policy="windowkv")
    assert llm.kv_compact().n_compactions == 0  # an empty cache holds nothing over budget
    with pytest.raises(NativeError, match="layer is 99"):
        llm.kv_positions(99, 0)
    with pytest.raises(NativeError, match="head is 7"):
        llm.kv_positions(0, 7)


def test_library_and_package_belong_together() -> None:
    from windowkv_edge._stamp import STAMP

    assert _native.ffi.string(_native.lib.wkv_build_stamp()).decode() == STAMP
