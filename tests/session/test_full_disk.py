"""A disk that fills up while a command runs: one line that says what to do, and what was done is not lost.

A limit on the size of files stands for the disk. It is that of this process.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from typer.testing import CliRunner

from windowkv_edge import HeadScores
from windowkv_edge.cli import app
from windowkv_edge.profile import EXAMPLES, Outcome, Plan, ProfileError, measure

PLAN = Plan(lengths=(64,), depths=(0.2, 0.8), examples=EXAMPLES[:1])
EVAL = (
    "eval", "needle", "--lengths", "300", "--depths", "0.5", "--policies", "snapkv", "--budgets", "12%", "--threads", "2",
    "--kinds", "number,word",
)  # fmt: skip


@contextmanager
def room(n_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def call(*args: object) -> tuple[int, str, str]:
    res = CliRunner().invoke(app, [str(arg) for arg in args])
    assert res.exception is None or isinstance(res.exception, SystemExit), res.exception
    return res.exit_code, " ".join(res.stdout.split()), " ".join(res.stderr.split())


@pytest.fixture
def copy(smollm2: Path, tmp_path: Path) -> Path:
    """The model under another path, so that nothing is written beside the cached one."""
    path = tmp_path / "copy.gguf"
    path.symlink_to(smollm2)
    return path


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("profile", "MODEL"), "copy.heads.json"),
        (("eval", "needle", "MODEL", "--out", "out.jsonl"), "out.jsonl"),
        (("eval", "all", "MODEL", "--to", "out"), "report.md"),
        (("bench", "MODEL", "--plot", "out.png"), "out.png"),
    ],
)
def test_found_before_the_work(args: tuple[str, ...], name: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    with room(0):
        code, out, err = call(*(copy if arg == "MODEL" else arg for arg in args))
    assert code == 2 and f"{name}: File too large; make room, or give another --" in err
    assert not out
    assert [path.name for path in copy.parent.rglob("*") if path.is_file()] == ["copy.gguf"]


@pytest.fixture(scope="module")
def results(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts."""
    path = tmp_path_factory.mktemp("results") / "out.jsonl"
    assert call(*EVAL, smollm2, "--out", path)[0] == 0
    return path


def test_eval_keeps_what_it_has(smollm2: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    out.write_bytes(lines[0] + lines[1])
    with room(out.stat().st_size + 200):
        code, _, err = call(*EVAL, smollm2, "--out", out)
    assert code == 2 and "File too large; make room and run the same command again, it goes on from there" in err
    assert "has 1 of 2 prompts, going on from there" in err
    assert out.read_bytes() == lines[0] + lines[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_profile_goes_on(copy: Path, tmp_path: Path) -> None:
    part, whole = tmp_path / "part.jsonl", tmp_path / "whole.jsonl"
    want = measure(copy, whole, PLAN, 2)
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0] + lines[1])
    with room(part.stat().st_size + 200), pytest.raises(ProfileError, match="File too large; make room and run the same"):
        measure(copy, part, PLAN, 2)
    assert part.read_bytes().startswith(lines[0] + lines[1])
    seen: list[Outcome | None] = []
    got = measure(copy, part, PLAN, 2, lambda done, total, outcome: seen.append(outcome))
    assert len(seen) == 2 and part.read_bytes() == whole.read_bytes()
    assert (got.scores["r"] == want.scores["r"]).all()


def test_scores_that_cannot_be_saved_are_not_measured_again(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("profile", copy, "--lengths", "64", "--depths", "0.5", "--threads", "2")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(HeadScores, "save", full)
        code, _, err = call(*args)
    assert code == 2
    assert "copy.heads.json: No space left on device; make room and run the same command again, nothing is measured twice" in err
    before = (tmp_path / "copy.heads.json.measuring.jsonl").stat().st_size
    assert before > 1000
    assert call(*args)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"copy.gguf", "copy.heads.json"}


def test_a_report_that_does_not_fit(results: Path, tmp_path: Path) -> None:
    """What was there stays."""
    to = tmp_path / "to"
    assert call("eval", "report", results, "--to", to)[0] == 0
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    assert set(before) == {"report.md", "report.html", *(f"out-{name}.png" for name in ("bytes", "depth", "heatmap"))}
    with room(5000):
        code, _, err = call("eval", "report", results, "--to", to)
    assert code == 2 and f"cannot write to {to}: File too large; make room and run the same command again" in err
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before


def test_a_report_without_matplotlib(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = tmp_path / "to"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, said, _ = call("eval", "report", results, "--to", to)
    assert code == 0 and 'no pictures: they need matplotlib; pip install "windowkv-edge[eval]"' in said
    assert {path.name for path in to.iterdir()} == {"report.md", "report.html"}
    page = (to / "report.html").read_text()
    assert "<table>" in page and "<img" not in page


def test_a_picture_that_does_not_fit(tmp_path: Path) -> None:
    """The table was printed before."""
    model = tiny_model.write_llama(tmp_path / "tiny.gguf")
    args = ("--fill", "--lengths", 64, "--rounds", 1, "--references", "", "--baselines", "f16", "--policies", "windowkv")
    with room(5000):
        code, out, err = call("bench", model, *args, "--plot", tmp_path / "out.png")
    assert code == 2 and "out.png: File too large; give another --plot" in err
    assert "64 positions" in out
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf"}
