"""What runs on the test device (tests/native/device), in a process of its own: a backend that is registered stays."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]


class Stats(ctypes.Structure):
    """``struct test_device_stats``."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *(
                "n_set",
                "bytes_set",
                "n_get",
                "bytes_get",
                "n_sync",
                "n_graphs",
                "n_graphs_new",
                "n_ragged",
                "n_devices",
                "n_select",
                "n_failed",
            ),
            *("bytes_live", "bytes_peak"),
        )
    ]


library: ctypes.CDLL


def load(path: Path, kernel: str) -> None:
    """Register the device; ``kernel`` as its header says."""
    global library
    os.environ["TEST_DEVICE_KERNEL"] = kernel
    import windowkv_edge  # noqa: F401
    from llama_cpp import llama_cpp as low

    low.llama_backend_init()
    low._lib.ggml_backend_load.restype = ctypes.c_void_p
    assert low._lib.ggml_backend_load(str(path).encode())
    library = ctypes.CDLL(str(path))


def on_device(path: Path, kernel: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run`` in a new process with the device."""
    with ProcessPoolExecutor(1, get_context("spawn"), load, (path, kernel)) as pool:
        return pool.submit(run, *args, **kwargs).result(timeout=600)


def stats() -> Json:
    res = Stats()
    library.test_device_get_stats(ctypes.byref(res))
    return {name: getattr(res, name) for name, _ in Stats._fields_}


@contextlib.contextmanager
def counted() -> Iterator[Json]:
    """A dict that has the counts of the block behind it."""
    found: Json = {}
    library.test_device_reset()
    yield found
    found.update(stats())


def tokens(n: int, n_vocab: int = 128) -> list[int]:
    return np.random.default_rng(1).integers(0, n_vocab, n).tolist()


@contextlib.contextmanager
def session(model: Path, layers: int, **kwargs: Any) -> Iterator[Any]:
    from windowkv_edge import Llama

    common = {
        "n_ctx": 1024,
        "n_ubatch": 128,
        "n_threads": 1,
        "n_threads_batch": 1,
        "flash_attn": True,
        "verbose": False,
    }
    llm = Llama(str(model), n_gpu_layers=layers, **{**common, **kwargs})
    try:
        yield llm
    finally:
        llm.close()


def logits(llm: Any) -> np.ndarray:
    from llama_cpp import llama_cpp as low

    return np.ctypeslib.as_array(low.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


def evaluate(llm: Any, prompt: list[int]) -> None:
    """Sampling ends the prompt."""
    llm.eval(prompt)
    llm.sample(temp=0.0)


def decode(llm: Any, n_prompt: int, n_tokens: int) -> np.ndarray:
    """Logits [1 + n_tokens, n_vocab] behind a prompt and every token."""
    every = tokens(n_prompt + n_tokens)
    if n_prompt:
        evaluate(llm, every[:n_prompt])
    rows = [logits(llm)]
    for token in every[n_prompt:]:
        llm.eval([token])
        rows.append(logits(llm))
    return np.array(rows)


def answers(model: Path, layers: int, variants: Sequence[Json]) -> list[Json]:
    """Logits behind 300 tokens, 40 more and pieces of several, and the positions held, of sessions with ``layers`` layers on the
    device."""
    import llama_cpp as low

    res = []
    for variant in variants:
        kwargs = dict(variant)
        attention = kwargs.pop("attention", None)  # until the prompt has been compacted, so that scores are equal
        with warnings.catch_warnings(record=True) as warned, session(model, layers, **kwargs) as llm:
            warnings.simplefilter("always")
            if attention:
                llm._kv.set_attention(attention)
            library.test_device_reset()
            rows = decode(llm, 300, 0)
            if attention:
                llm._kv.set_attention("auto")
            rows = np.vstack([rows, decode(llm, 0, 40)[1:]])
            if llm._kv is not None:
                llm._kv.watch(False)  # or the runtime would find prompts in what is decoded below the class
            for n in (3, 8, 9, 1, 40, 2):  # several at once, as drafts are; what they see is not compacted
                low.Llama.eval(llm, tokens(n))
                rows = np.vstack([rows, logits(llm)])
            held = []
            if kwargs.get("kv_policy"):
                shape = llm.kv_stats().cells.shape
                held = [[llm.kv_positions(il, ih).tolist() for ih in range(shape[1])] for il in range(shape[0])]
            n_compactions, n_ragged = llm.kv_stats().n_compactions, stats()["n_ragged"]
        texts = [str(own.message) for own in warned]
        res.append(
            {"logits": rows, "positions": held, "n_compactions": n_compactions, "n_ragged": n_ragged, "warnings": texts}
        )
    return res


PIECES = (1, 2, 8, 9, 20, 1, 128, 300)  # the last one in three ubatches


def pieces(model: Path, variants: Sequence[Json]) -> list[list[Json]]:
    """Logits behind pieces of several tokens each, over cells that a compaction left, and the last ubatch's nodes of the op."""
    import llama_cpp as low

    res = []
    for variant in variants:
        kwargs = dict(variant)
        attention = kwargs.pop("attention")
        with session(model, 99, **kwargs) as llm:
            evaluate(llm, tokens(300))
            llm._kv.watch(False)
            llm._kv.set_attention(attention)
            own = []
            for n in PIECES:
                library.test_device_reset()
                low.Llama.eval(llm, tokens(n))
                n_ubatches = -(-n // 128)
                own.append({"logits": logits(llm), "n_ragged": stats()["n_ragged"] // n_ubatches})
            res.append(own)
    return res


def twice(model: Path, kwargs: Json) -> Json:
    """Logits of tokens and pieces behind a compaction, the same after going back, and in pools that do not move; how many sizes the pools
    had."""
    import llama_cpp as low

    def run(llm: Any, sizes: set[int]) -> np.ndarray:
        rows = []
        for n in (*[1] * 100, 20, 1, 300, *[1] * 20):
            low.Llama.eval(llm, tokens(n))
            rows.append(logits(llm))
            sizes.add(int(llm._kv.stats().bytes_pool))
        return np.array(rows)

    res: Json = {}
    sizes: set[int] = set()
    with session(model, 99, **kwargs) as llm:
        evaluate(llm, tokens(300))
        llm._kv.watch(False)
        llm._kv.snapshot_save()
        for name in ("first", "second", "roomy"):
            if name != "first":
                llm._kv.snapshot_restore()
                llm.n_tokens = 300
            if name == "roomy":
                llm._kv.reserve(500)
            res[name] = run(llm, sizes if name == "first" else set())
        res["n_pools"] = len(sizes)
    return res


def graphs_built(model: Path, policy: Any, n_prompt: int) -> Json:
    """Graphs of 600 tokens behind a compaction, how many of them were new, pools and lengths of heads there were."""
    import llama_cpp as low

    with session(model, 99, n_ctx=4096, kv_policy=policy, kv_budget=1.0) as llm:
        llm.eval(tokens(n_prompt))
        llm.kv_compact(n_prompt // 3)
        llm._kv.watch(False)
        low.Llama.eval(llm, [1])
        sizes = set()
        with counted() as found:
            for token in tokens(600):
                low.Llama.eval(llm, [token])
                logits(llm)
                sizes.add(int(llm._kv.stats().bytes_pool))
        return {**found, "n_pools": len(sizes), "n_lengths": len(np.unique(llm.kv_stats().cells))}


def stands_in(model: Path) -> Json:
    """What ``auto`` is on this device."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with session(model, 99, kv_policy="auto", kv_budget=60) as llm:
            assert np.isfinite(decode(llm, 300, 5)).all()
            found, bound = llm.kv_stats(), llm._kv_bound
    return {
        "policy": found.policy,
        "cells": found.cells.tolist(),
        "cell_types": found.cell_types,
        "options": {name: getattr(bound, name) for name in ("omega", "token_share", "window_size", "carry", "task")},
        "warnings": [str(own.message) for own in warned],
    }


def per_token(model: Path, policy: Any, budget: float) -> Json:
    """What decoding costs: counts of 12 tokens between two growth steps."""
    with session(model, 99, kv_policy=policy, **({"kv_budget": budget} if policy else {})) as llm:
        decode(llm, 300, 2)
        with counted() as found:
            for token in tokens(12):
                llm.eval([token])
                logits(llm)
        return found


def compaction(model: Path, policy: Any, n_prompt: int) -> Json:
    """Counts of one compaction, and how many cells there were before and after it."""
    with session(model, 99, n_ctx=4096, kv_policy=policy, kv_budget=1.0) as llm:
        llm.eval(tokens(n_prompt))
        n_before = int(llm.kv_stats().cells.sum())
        with counted() as found:
            llm.kv_compact(n_prompt // 8)
        return {**found, "cells": n_before, "cells_after": int(llm.kv_stats().cells.sum())}


def by_definition(llm: Any, budget: int) -> list[list[list[int]]]:
    """Positions that the policy of a session leaves by its definition in NumPy, of the scores that the session tells."""
    from policy_table import kept

    kv, bound = llm._kv, llm._kv_bound
    task = getattr(bound, "task", "localization")
    task = "localization" if task == "auto" else task
    sizes, (n_layer, n_head_kv) = bound.parts(task).scoring, llm.kv_stats().cells.shape
    positions = [[llm.kv_positions(il, ih) for ih in range(n_head_kv)] for il in range(n_layer)]

    def scores(window_size: int) -> list[Any]:
        return [kv.scores(il, window_size, among=sizes.n_observed) for il in range(n_layer)]

    tokens = scores(sizes.token_window_size) if sizes.token_window_size else None
    keep = kept(bound, positions, scores(sizes.window_size), budget, task=task, token_scores=tokens)
    return [[positions[il][ih][keep[il][ih]].tolist() for ih in range(n_head_kv)] for il in range(n_layer)]


def selections(model: Path, layers: int, policies: Sequence[Any], budgets: Sequence[int], n_prompt: int) -> list[Json]:
    """Positions that policies leave of a prompt, with budgets one after the other, each from the same cells; counts of each."""
    res = []
    for policy in policies:
        with session(model, layers, n_ctx=4096, kv_policy=policy, kv_budget=1.0, type_k=1, type_v=1) as llm:
            llm._kv.set_attention("stock")  # the same kernel on all devices, so that scores are equal
            llm.eval(tokens(n_prompt))
            llm._kv.snapshot_save()
            for budget in budgets:
                llm._kv.snapshot_restore()
                want = by_definition(llm, budget)
                with counted() as found:
                    llm.kv_compact(budget)
                n_layer, n_head_kv = llm.kv_stats().cells.shape
                held = [[llm.kv_positions(il, ih).tolist() for ih in range(n_head_kv)] for il in range(n_layer)]
                res.append({**found, "positions": held, "want": want, "policy": str(policy), "budget": budget})
            assert np.isfinite(decode_below(llm, 3)).all()
    return res


def chat(model: Path, policy: Any) -> list[Json]:
    """Positions after two prompts, each compacted; counts of the compactions."""
    res = []
    with session(model, 99, n_ctx=4096, kv_policy=policy, kv_budget=1.0, type_k=1, type_v=1) as llm:
        llm._kv.set_attention("stock")
        for _ in range(2):
            llm.eval(tokens(300))
            with counted() as found:
                llm.kv_compact(60)
            n_layer, n_head_kv = llm.kv_stats().cells.shape
            held = [[llm.kv_positions(il, ih).tolist() for ih in range(n_head_kv)] for il in range(n_layer)]
            res.append({**found, "positions": held})
    return res


def masks(model: Path, policy: Any, n_tokens: int) -> Json:
    """Counts of a batch of n_tokens behind a compacted prompt, and the cells of every layer behind it."""
    import llama_cpp as low

    with session(model, 99, n_ctx=4096, kv_policy=policy, kv_budget=1.0) as llm:
        llm.eval(tokens(2000))
        llm.kv_compact(400)
        with counted() as found:
            low.Llama.eval(llm, tokens(n_tokens))
            logits(llm)
        return {**found, "cells": llm.kv_stats().cells.max(axis=1).tolist()}


def memory(model: Path, policy: Any) -> list[tuple[int, int]]:
    """Bytes live on the device and by kv_stats(), relative to the start: after a prompt, compaction and 100 tokens; the peaks; after
    a reset."""
    with session(model, 99, n_ctx=4096, kv_policy=policy, kv_budget=1.0) as llm:
        llm.eval(tokens(4))  # what a context allocates once
        llm.reset()
        llm._ctx.kv_cache_clear()
        library.test_device_reset()
        start, own = stats()["bytes_live"], llm.kv_stats().bytes_live
        peak = llm.kv_stats().bytes_peak
        res = []

        def note() -> None:
            res.append((stats()["bytes_live"] - start, llm.kv_stats().bytes_live - own))

        llm.eval(tokens(2000))
        note()
        llm.kv_compact(250)
        note()
        for token in tokens(100):
            llm.eval([token])
        note()
        assert llm.kv_stats().bytes_peak > peak
        res.append((stats()["bytes_peak"] - start, llm.kv_stats().bytes_peak - own))
        llm.reset()
        llm._ctx.kv_cache_clear()
        note()
        return res


def refusals(model: Path) -> Json:
    """A device without attention over ragged heads: what is refused, what works, and what host memory costs."""
    from windowkv_edge import WindowKV

    res: Json = {}
    try:
        with session(model, 99, kv_policy="adakv", kv_budget=40):
            res["ragged"] = "no error"
    except Exception as error:
        res["ragged"] = f"{type(error).__name__}: {error}"
    with session(model, 99, kv_policy=WindowKV(window_size=8), kv_budget=40) as llm:
        res["uniform"] = bool(np.isfinite(decode(llm, 300, 5)).all())
        res["cells"] = int(llm.kv_stats().cells.max())
    with session(model, 99, kv_policy="auto", kv_budget=40) as llm:
        res["auto"] = llm.kv_stats().policy
    with session(model, 99, kv_policy="adakv", kv_budget=40, offload_kqv=False) as llm:
        res["host"] = bool(np.isfinite(decode(llm, 300, 5)).all())
        res["host_cells"] = llm.kv_stats().cells.tolist()
    return res


def refusal(model: Path, policy: str) -> str | None:
    """Why a session with all layers on the device is refused; None if it loads, compacts and decodes."""
    try:
        with session(model, 99, kv_policy=policy, kv_budget=40) as llm:
            assert np.isfinite(decode(llm, 300, 5)).all()
            assert llm.kv_stats().n_compactions == 1
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return None


def out_of_memory(model: Path, policy: Any) -> Json:
    """Logits behind single tokens and a piece of several ubatches where memory runs out again and again, each tried once more with
    memory; the same where there is enough; how often it ran out, and what refused pieces left changed."""
    import llama_cpp as low

    def held(llm: Any) -> tuple[int, int, int, list[list[int]]]:
        found = llm.kv_stats()
        memory = low.llama_get_memory(llm.ctx)
        return llm.n_tokens, low.llama_memory_seq_pos_max(memory, 0), found.n_past, found.cells.tolist()

    res: Json = {"n_refused": 0, "changed": []}
    for name in ("enough", "short"):
        rows, rest = [], tokens(300)
        with session(model, 99, kv_policy=policy, kv_budget=40, n_ubatch=32) as llm:
            evaluate(llm, tokens(300))
            llm._kv.watch(False)  # the pieces below are no prompts
            for n in (*[1] * 40, 250, 1, 1):
                piece, rest = rest[:n], rest[n:]
                before = held(llm)
                if name == "short":
                    library.test_device_set_limit(stats()["bytes_live"])
                try:
                    low.Llama.eval(llm, piece)  # below the class, which reserves memory first
                except RuntimeError:
                    res["n_refused"] += 1
                    res["changed"] += [before, held(llm)] if held(llm) != before else []
                    library.test_device_set_limit(0)
                    low.Llama.eval(llm, piece)
                finally:
                    library.test_device_set_limit(0)
                rows.append(logits(llm))
        res[name] = np.array(rows)
    return res


def compaction_out_of_memory(model: Path, policy: Any) -> list[Json]:
    """A compaction whose allocations fail, one after the other, each from the same cache: what it raised, what it left, what a second
    one made of that; last of all without a failure."""
    from windowkv_edge import NativeError

    def compact(llm: Any) -> Json:
        before = llm.kv_stats()
        try:
            llm.kv_compact(40)
            error = ""
        except NativeError as failed:
            error = str(failed)
        library.test_device_fail_buffer(-1)
        own, now = llm._kv.stats(), llm.kv_stats()
        return {
            "error": error,
            "cells": now.cells.tolist(),
            "n_compactions": now.n_compactions - before.n_compactions,
            "freed": before.bytes_live - now.bytes_live,
            "n_boundary": own.n_boundary,
            "reported": [own.bytes_released, own.t_score_ms, own.t_gather_ms],
        }

    res = []
    with session(model, 99, kv_policy=policy, kv_budget=1.0) as llm:
        llm.eval(tokens(300))
        llm._kv.snapshot_save()
        while not res or res[-1]["n_failed"]:
            llm._kv.snapshot_restore()
            library.test_device_fail_buffer(len(res))
            with counted() as found:
                own = compact(llm)
            res.append({**own, "n_failed": found["n_failed"]})
            assert np.isfinite(decode_below(llm, 3)).all()  # it can be used as it is
            res[-1]["again"] = compact(llm)
        assert np.isfinite(decode(llm, 0, 3)[1:]).all()
    return res


def prompt_out_of_memory(model: Path, policy: Any) -> list[Json]:
    """A prompt that is read within a limit and whose allocations fail, one after the other: of observers, of compactions, of pools
    that grow. What it raised, what tokens and positions it left, and the answer to the next prompt; last of all without a failure."""
    from windowkv_edge import NativeError

    def answer(llm: Any) -> list[int]:
        stream = llm.generate(tokens(110), temp=0.0)
        try:
            return [next(stream) for _ in range(2)]
        finally:
            stream.close()

    res: list[Json] = []
    with session(model, 99, kv_policy=policy, kv_limit=64, n_batch=32) as llm:
        answer(llm)
        while not res or res[-1]["n_failed"]:
            llm.reset()
            library.test_device_fail_buffer(len(res))
            error = ""
            with counted() as found:
                try:
                    answer(llm)
                except NativeError as failed:
                    error = str(failed)
            library.test_device_fail_buffer(-1)
            left = llm.n_tokens, llm.kv_stats().n_past
            llm.reset()
            res.append({"n_failed": found["n_failed"], "error": error, "left": left, "next": answer(llm)})
            res[-1]["cells"] = float(llm.kv_stats().cells.mean())
    return res


def decode_below(llm: Any, n_tokens: int) -> np.ndarray:
    """Logits [n_tokens, n_vocab] of tokens that are taken back."""
    import llama_cpp as low

    n_past, memory = llm.n_tokens, low.llama_get_memory(llm.ctx)
    rows = []
    for token in tokens(n_tokens):
        low.Llama.eval(llm, [token])
        rows.append(logits(llm))
    assert low.llama_memory_seq_rm(memory, 0, n_past, -1)
    llm.n_tokens = n_past
    return np.array(rows)


def failing_graphs(model: Path, policy: Any) -> Json:
    """Graphs that fail, in a prompt, behind it and in a compaction: what each raised and left; logits at the end, and those of a
    session where nothing failed."""
    import llama_cpp as low

    from windowkv_edge import NativeError

    def held(llm: Any) -> tuple[int, int, list[list[int]]]:
        found = llm.kv_stats()
        return llm.n_tokens, low.llama_memory_seq_pos_max(low.llama_get_memory(llm.ctx), 0), found.cells.tolist()

    res: Json = {"errors": [], "changed": []}
    for name in ("none", "some"):
        with session(model, 99, kv_policy=policy, kv_budget=1.0) as llm:
            calls = [(0, lambda: llm.eval(tokens(100))), (0, lambda: llm.kv_compact(40)), (0, lambda: llm.eval([5]))]
            for i, call in calls:
                before = held(llm)
                if name == "some":
                    library.test_device_fail_graph(i)
                    try:
                        call()
                    except NativeError as failed:
                        res["errors"].append(str(failed))
                    library.test_device_fail_graph(-1)
                    res["changed"] += [before, held(llm)] if held(llm) != before else []
                call()
            res[name] = logits(llm)
    return res


def failing_graph_of_a_hybrid(model: Path, policy: Any) -> Json:
    """A token that fails where a recurrent state cannot go back: what was raised, what is left, and logits as above."""
    import llama_cpp as low

    from windowkv_edge import NativeError

    res: Json = {}
    for name in ("none", "some"):
        with session(model, 99, kv_policy=policy, kv_budget=1.0) as llm:
            if name == "some":
                llm.eval(tokens(100))
                library.test_device_fail_graph(0)
                try:
                    llm.eval([5])
                except NativeError as failed:
                    res["error"] = str(failed)
                library.test_device_fail_graph(-1)
                res["left"] = llm.n_tokens, low.llama_memory_seq_pos_max(low.llama_get_memory(llm.ctx), 0)
            llm.eval(tokens(100))
            llm.eval([5])
            res[name] = logits(llm)
    return res


def bench(model: Path, *options: str) -> list[Json]:
    """Rows of ``windowkv-edge bench`` with all layers on the device."""
    from typer.testing import CliRunner

    from windowkv_edge.cli import app

    found = CliRunner().invoke(app, ["bench", str(model), "--gpu-layers", "-1", "--json", *options])
    assert found.exit_code == 0, found.stderr
    return list(json.loads(found.stdout)["rows"])


def replayed(model: Path, layers: int, type_kv: int, offload_kqv: bool = True) -> list[np.ndarray]:
    """Scores of 300 positions whose first 250 were repeated, by kv head, more tokens at a time than a ubatch has; and logits of a
    token behind the compaction."""
    cells = {"type_k": type_kv, "type_v": type_kv, "offload_kqv": offload_kqv}
    with session(model, layers, kv_policy="kvzip", kv_budget=1.0, **cells) as llm:
        llm.eval(tokens(300))
        kv = llm._kv
        for start, stop in ((0, 100), (100, 250)):
            with kv.observing((start, stop)):
                llm._batch.set_batch(batch=tokens(300)[start:stop], n_past=300, logits_all=False)
                llm._ctx.decode(llm._batch)
        res = [own for il in range(int(kv.stats().n_layer)) for own in kv.replayed(il)]
        llm.kv_compact(60)
        llm.eval(tokens(1))
        return [*res, logits(llm)]
