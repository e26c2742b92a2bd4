"""What is tried: how an input is made, how it is used, and which errors it may end in."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import tiny_model
from rich.console import Console

from windowkv_edge import POLICIES, HeadScores, HeadScoresError, Llama, NativeError, UnsupportedCallError, WindowKVError, get_policy
from windowkv_edge._json import dumps
from windowkv_edge._text import for_terminal
from windowkv_edge.cli.info import _model_table
from windowkv_edge.errors import FormatError, MissingProfileError, UnsupportedModelError
from windowkv_edge.eval.case import EvalError
from windowkv_edge.eval.metrics import DATASETS, score
from windowkv_edge.eval.page import html
from windowkv_edge.eval.results import load
from windowkv_edge.eval.tables import markdown
from windowkv_edge.eval.tasks import tasks_cases
from windowkv_edge.gguf_info import cost_table, read_info, support
from windowkv_edge.heads import METADATA_KEY, ModelHeads

from .mutate import STRING, Header, damage, dump, restructure


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        suffix: of the files.
        prepare: called once with a folder; what it returns is passed to make.
        make: an input from random numbers.
        use: everything that the package does with such a file.
        errors: the documented errors; anything else is a finding.
    """

    suffix: str
    prepare: Callable[[Path], Any]
    make: Callable[[Any, random.Random], bytes]
    use: Callable[[Path], None]
    errors: tuple[type[Exception], ...]


def _harmless(text: str) -> None:
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", text), (
        f"control characters in the output: {text[:200]!r}"
    )


#
# headers
#


def _use_header(path: Path) -> None:
    info = read_info(path)
    supported, reason = support(info)
    try:
        rows = cost_table(info, [1000], [0.1], ["snapkv"])
    except UnsupportedModelError:
        rows = []
    if path.stat().st_size % 8 == 0:  # a table takes as long as all of the rest
        out = StringIO()
        Console(file=out, width=200).print(_model_table(info, supported, reason, bool(rows)))
        _harmless(out.getvalue())
    text = dumps(asdict(info) | {"path": str(path), "costs": [asdict(row) for row in rows]})
    json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))
    if supported:
        assert min((info.n_head_kv[il] for il in info.compressed_layers), default=0) > 0


#
# head scores
#

_ABOUT = {"model": "tiny", "model_sha256": "0" * 64, "counts": {"r": {"asked": 4, "right": 3}}}


def _make_heads(_: Any, rng: random.Random) -> bytes:
    n_layer, n_head = rng.choice(((2, 4), (3, 4), (1, 1)))
    if rng.random() < 0.5:
        value: Any = {f"{il}-{ih}": [rng.random() for _ in range(3)] for il in range(n_layer) for ih in range(n_head)}
        if rng.random() < 0.3:
            value[rng.choice(("99999999-0", "3000000-3000000", "-1-0", "1-01", "0-0-0", "é-1", "511-1023"))] = [1]
    else:
        rows = [[round(rng.random(), 4) for _ in range(n_head)] for _ in range(n_layer)]
        value = {
            "format": "windowkv-edge head scores",
            "version": 1,
            "about": _ABOUT,
            "scores": {"r": rows, "r2": rows},
        }
    return _json_input(value, rng)


def _json_input(value: Any, rng: random.Random) -> bytes:
    data = dump(restructure(value, rng) if rng.random() < 0.7 else value, rng)
    return data if rng.random() < 0.6 else damage(data, rng)


def _use_heads(path: Path) -> None:
    scores = HeadScores.load(path)
    n_layer, n_head = scores.shape
    for kind in scores.scores:
        shares = ModelHeads("m.gguf", {}, n_layer, 1, tuple(range(n_layer)), n_head).importance(scores, kind, "mean")  # type: ignore[arg-type]
        assert np.isfinite(shares).all() and abs(shares.sum() - 1) < 1e-6
    again = ModelHeads("m.gguf", {METADATA_KEY: scores.dumps()}, n_layer, 1, (0,)).find(None)
    assert again.shape == scores.shape


#
# policy specs
#

_NAMES = (*POLICIES, "lru", "", "windowkv ", "../x", "a" * 300)
_OPTIONS = (
    "window_size", "kernel_size", "accounting", "omega", "top_p", "gamma", "scope", "budget", "lam", "beta", "kind", "reduce", "importance",
    "recent_share", "protect_first", "carry", "share", "n_sink", "alpha_safeguard", "token_share", "suffix", "needs_task", "nonsense", "shares",
)  # fmt: skip
_LITERALS = (
    "1", "8", "0", "-1", "3.5", "1e999", "-0.0", "2147483648", "10**9", "9" * 400, "9" * 5000, "0x" + "f" * 1500, "True", "None", "'a'", "'layer'", "'r'",
    "'native'", "'paper'", "b'a'", "[1]", "{[]}", "{1: 2}", "{[]: 1}", "1j", "()", "f'{1}'", "open('x')", "-" * 300 + "1", "-" * 5000 + "1",
    "[" * 300, "[" * 5000, "(" * 99 + ")" * 99, "'\\ud800'", "'\0'", "lambda: 0", "'/dev/null'", "'.'", "*x", "**x", "1 if 1 else 2", "'" + "a" * 3000 + "'",
)  # fmt: skip


def _make_spec(_: Any, rng: random.Random) -> bytes:
    name, names, values = rng.choice(_NAMES), _OPTIONS, _LITERALS
    if rng.random() < 0.6:  # options that the policy has, and mostly values that it may take
        name = rng.choice(list(POLICIES))
        names = tuple(own.name for own in fields(POLICIES[name]) if own.init) or _OPTIONS  # type: ignore[arg-type]
        values = (
            _LITERALS
            if rng.random() < 0.3
            else ("1", "7", "16", "0.5", "2.0", "True", "'mean'", "'layer'", "'r2'", "'paper'")
        )
    options = [f"{rng.choice(names)}={rng.choice(values)}" for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    text = f"{name}({', '.join(options)})" if options or rng.random() < 0.5 else name
    data = text.encode("utf-8", "surrogatepass")
    return data if rng.random() < 0.5 else damage(data, rng)


def _use_spec(path: Path) -> None:
    policy = get_policy(path.read_bytes().decode("utf-8", "surrogateescape"))
    assert 1 <= policy.n_observed < 2**31
    repr(policy)
    if policy.in_python:
        return
    model = ModelHeads("m.gguf", {}, 2, 2, (0, 1), 4)
    try:
        bound = policy.bind(model)
    except (MissingProfileError, OSError):  # no scores, or a file that is not there
        return
    for task in ("localization", "aggregation"):
        bound.parts(task)  # type: ignore[arg-type]


#
# task files
#


class _Bytes:
    """Stands for a style whose tokens are bytes."""

    bos: list[int] = []
    head = [1]

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def ask(self, question: str, lead: str = "") -> list[int]:
        return self.tokenize(question)


def _make_tasks(_: Any, rng: random.Random) -> bytes:
    rows: list[Any] = [
        {"dataset": rng.choice((*DATASETS, "trec", "x")), "context": "Ana lives in Rome. " * 3, "input": "Where?", "answers": ["Rome", "3"],
         "all_classes": rng.choice((["Rome", "Paris"], None))}
        for _ in range(rng.choice((1, 2, 4)))
    ]  # fmt: skip
    lines = [dump(restructure(row, rng) if rng.random() < 0.6 else row, rng) for row in rows]
    data = b"\n".join(lines) + b"\n"
    if rng.random() < 0.1:
        data = b"\xef\xbb\xbf" + data
    return data if rng.random() < 0.6 else damage(data, rng)


def _use_tasks(path: Path) -> None:
    cases, skipped = tasks_cases(_Bytes(), path, 1024)  # type: ignore[arg-type]
    assert len(skipped) < 30 and all(len(reason) < 600 for reason in skipped)
    for case in cases:
        assert len(case.prompt) <= 1024 and isinstance(case.key, str)
        for output in ("Rome 3", ""):
            assert 0 <= score(case.metric, output, case.answers, case.classes) <= 1


#
# results files
#


def _row(suite: str, i: int, rng: random.Random) -> dict[str, Any]:
    results = []
    for policy, budget in (("full", None), ("snapkv", 0.12), ("windowkv(omega=8)", 0.12), ("snapkv", 64)):
        value = {"policy": policy, "budget": budget, "cells": "f16", "n_cells": 100.0, "kv_bytes": 4096}
        if suite == "fidelity":
            value |= {"kl": rng.random(), "top1": rng.random(), "nll_increase": rng.random() - 0.5}
        else:
            value |= {"score": rng.choice((0.25, 1.0)), "decode_ms": rng.choice((None, 2.5)), "output": " Rome"}
        results.append(value)
    return {
        "case": f"{suite}/t/1000/0.5/{i}", "suite": suite, "task": "t", "length": 1000, "depth": rng.choice((None, 0.5)), "index": i,
        "n_prompt": 1000, "n_follow": 8, "results": results,
    }  # fmt: skip


def _make_results(_: Any, rng: random.Random) -> bytes:
    header = {
        "format": "windowkv-edge eval", "version": 1, "model": rng.choice(("m.gguf", "a$x^$.gguf", "<script>|\x1b[31m\n.gguf")),
        "model_sha256": "0" * 64, "package": "1", "seed": 0, "budgets": [0.12, 64],
    }  # fmt: skip
    suite = rng.choice(("needle", "ruler", "turns", "fidelity", "tasks"))
    rows: list[Any] = [header, *(_row(suite, i, rng) for i in range(rng.choice((1, 2, 5))))]
    if rng.random() < 0.2:
        rows.append(_row(rng.choice(("needle", "fidelity")), 9, rng))
    if rng.random() < 0.8:
        at = rng.randrange(len(rows))
        rows[at] = restructure(rows[at], rng)
    data = b"".join(dump(row, rng) + b"\n" for row in rows)
    return data if rng.random() < 0.75 else damage(data, rng)


def _use_results(path: Path) -> None:
    results = load([path])
    text = markdown(results)
    _harmless(text)
    assert "<script" not in text and for_terminal(text, keep="\n") == text
    if len(text) % 64 == 0:  # its pictures take a second, so some inputs have to do
        assert "<script" not in html(results, [{} for _ in results])


def _header(folder: Path) -> Header:
    base = Header(tiny_model.write_llama(folder / "base.gguf", n_layer=1, n_head=2, n_head_kv=1))
    scores = HeadScores({"r": np.ones((1, 2)), "r2": np.ones((1, 2))})
    base.fields.append((METADATA_KEY, STRING, scores.dumps()))
    return base


def _nothing(_: Path) -> None:
    return None


def _metrics(_: Path) -> None:
    score("rouge_l", "a", ["a"])  # what it imports takes seconds, once


#
# saved sessions
#

_llm: Any = None  # of this process and its children, which have no threads to miss


def _session(folder: Path) -> bytes:
    global _llm
    model = tiny_model.write_gpt_oss(folder / "model.gguf", n_layer=2, window=16)
    _llm = Llama(
        str(model), kv_policy="snapkv", kv_budget=40, n_ctx=256, n_ubatch=32, n_threads=1, n_threads_batch=1, verbose=False
    )
    _llm.eval(list(range(100)))
    _llm.eval([5])
    _llm.kv_save(folder / "base")
    return (folder / "base").read_bytes()


def seal(data: bytes) -> bytes:
    """With the length and the checksum that fit."""
    data = data[:16] + len(data).to_bytes(8, "little") + data[24:-4]
    return data + zlib.crc32(data).to_bytes(4, "little")


def _make_session(base: bytes, rng: random.Random) -> bytes:
    n_header = int.from_bytes(base[12:16], "little")
    what = rng.randrange(4)
    if what == 0:
        header = dump(restructure(json.loads(base[24 : 24 + n_header]), rng), rng)
        data = base[:12] + len(header).to_bytes(4, "little") + base[16:24] + header + base[24 + n_header :]
    elif what == 1:
        data = damage(base, rng)
    else:  # tokens and what the cells are, without most of their rows, or anything
        at = 24 + n_header + rng.choice((0, 4 * 101))
        end = rng.choice((at + 1500, len(base)))
        out = bytearray(base)
        for _ in range(rng.choice((1, 1, 3))):
            i = rng.randrange(at, end - 4)
            out[i : i + 4] = rng.choice(
                (rng.randbytes(4), b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x65\0\0\0", b"\1\0\0\0", out[i + 1 : i + 5])
            )
        data = bytes(out)
    return seal(data) if len(data) > 28 and rng.random() < 0.9 else data


def _use_session(path: Path) -> None:
    _llm._kv_guard._pid = os.getpid()
    _llm.reset()
    _llm.eval([1, 2, 3])
    try:
        _llm.kv_load(path)
    finally:
        assert _llm.n_tokens <= _llm.kv_stats().n_past
        if _llm.n_tokens + 3 <= 256:
            with contextlib.suppress(NativeError):  # rows may hold anything: scores that are not finite
                _llm.eval([1])
                _llm.eval([1, 2])
        _llm.reset()
        _llm.eval([1, 2, 3])


TARGETS: dict[str, Target] = {
    "headers": Target(".gguf", _header, lambda base, rng: base.mutated(rng), _use_header, (FormatError,)),
    "heads": Target(".json", _nothing, _make_heads, _use_heads, (HeadScoresError,)),
    "specs": Target(".txt", _nothing, _make_spec, _use_spec, (ValueError,)),
    "tasks": Target(".jsonl", _metrics, _make_tasks, _use_tasks, (EvalError,)),
    "results": Target(".jsonl", _nothing, _make_results, _use_results, (EvalError,)),
    "sessions": Target(".session", _session, _make_session, _use_session, (FormatError, UnsupportedCallError)),
}


def fault(target: Target, error: BaseException) -> str | None:
    """Why an error is a finding; None if it is documented and says something that can be shown."""
    if not isinstance(error, target.errors) or not (isinstance(error, WindowKVError) or type(error) is ValueError):
        return f"{type(error).__name__}: {str(error)[:300]}"
    if not str(error) or len(str(error)) > 6000:
        return f"{type(error).__name__} with a message of {len(str(error))} characters"
    return None
