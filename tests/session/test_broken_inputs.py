"""Damaged headers, head scores, policy specs, task files and results files; ``python -m tests.fuzz.run`` runs more of them."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz import runner
from fuzz.mutate import STRING, Header
from fuzz.runner import Loader, run
from fuzz.targets import TARGETS
from typer.testing import CliRunner

from windowkv_edge import HeadScores, Llama
from windowkv_edge.cli import app


@pytest.mark.parametrize("name", TARGETS)
def test_three_hundred_inputs(name: str, tmp_path: Path, native_tests: Path) -> None:
    """Each ends in the documented error or in none; no header kills a process that stock survives."""
    report = run(name, 300, "tests", tmp_path, loads=name == "headers")
    assert report.findings == []
    assert report.outcomes["used"] > 20 and report.outcomes["refused"] > 60  # valid ones and broken ones were among them
    if name == "headers":
        assert report.outcomes["load ok"] >= 4 and report.outcomes["load refused"] > 10


def _raw(path: Path) -> None:
    raise json.JSONDecodeError("raw", "", 0)


def _memory(path: Path) -> None:
    bytearray(2 << 30)


def _hang(path: Path) -> None:
    time.sleep(1000)


def _crash(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("use", "what"),
    [(_raw, "JSONDecodeError: raw"), (_memory, "MemoryError"), (_hang, "more than 1 s"), (_crash, "the process died with -11")],
)  # fmt: skip
def test_planted_faults_are_found(use: Any, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of them, with the input in a file that can be used again."""
    monkeypatch.setattr(runner, "SECONDS", 1)
    object.__setattr__(TARGETS["heads"], "use", (real := TARGETS["heads"].use) and use)
    try:
        report = run("heads", 3, "planted", tmp_path)
    finally:
        object.__setattr__(TARGETS["heads"], "use", real)
    assert len(report.findings) == 3 and report.outcomes["finding"] == 3
    for i, (path, said) in enumerate(report.findings):
        assert what in said
        assert path.read_bytes() == runner.make("heads", None, "planted", i)


def test_a_load_that_dies_is_told_from_one_that_is_refused(tiny: Path, tmp_path: Path, native_tests: Path) -> None:
    """llama.cpp asserts that there are layers; the next model is loaded all the same."""
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    base = Header(tiny)
    fields = [(key, kind, 0 if key == "llama.block_count" else value) for key, kind, value in base.fields]
    (tmp_path / "hollow.gguf").write_bytes(base.whole(fields))
    for policy in (None, "auto"):
        with Loader(policy) as loader:
            assert loader.load(tiny) == "ok"
            assert loader.load(tmp_path / "no.gguf") == "refused"
            assert loader.load(tmp_path / "hollow.gguf") == f"died with {-signal.SIGABRT}"
            assert loader.load(tiny) == "ok"


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ x }", "error: cannot load .*templated.gguf: unexpected '}'"), ("{{ 1 // 0 }}", "is dropped: integer division")],
)
def test_a_chat_template_that_fails(template: str, message: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "templated.gguf"
    base = Header(tiny)
    path.write_bytes(base.whole([*base.fields, ("tokenizer.chat_template", STRING, template)]))
    chat = CliRunner().invoke(app, ["chat", str(path), "--ctx", "512", "--policy", "snapkv"], input="hello\n/quit\n")
    assert re.search(message, " ".join(chat.output.split())), chat.output
    demo = CliRunner().invoke(app, ["demo", "--model", str(path), "--chat"])
    assert demo.exit_code == 2 and re.search("error: (cannot load|the chat template of) .*templated.gguf", demo.output)


def test_an_observation_window_is_no_longer_than_the_context(tiny: Path, opened: Callable[..., Llama]) -> None:
    """Its queries, twice, for 3 layers of 4 heads of 32 values in f16."""
    llm = opened(tiny, n_ctx=512, kv_policy="snapkv(window_size=2000000000)")
    assert llm.kv_stats().bytes_live <= 2 * 512 * 3 * 4 * 32 * 2


def test_scores_of_the_fuzz_are_scores(tmp_path: Path) -> None:
    """Unharmed inputs are read: the generators make what they say."""
    found = 0
    for i in range(40):
        (tmp_path / "a.json").write_bytes(runner.make("heads", None, "x", i))
        try:
            found += HeadScores.load(tmp_path / "a.json").shape in ((2, 4), (3, 4), (1, 1))
        except ValueError:
            pass
    assert found >= 5
