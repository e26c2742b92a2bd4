"""What the commands do with a limit: chat, demo, info, eval long, and the bars that say how far a prompt is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from rich.console import Console
from scripted import TOKENS, answer
from test_chat import NEEDLE, refused, run
from test_limit import LONG

from windowkv_edge import Llama, get_policy
from windowkv_edge.cli.bars import prompt_bar, suite_bars
from windowkv_edge.cli.chat import Chat
from windowkv_edge.eval.long import EXACT, LongPlan
from windowkv_edge.forecast import forecast
from windowkv_edge.gguf_info import read_info

Open = Callable[..., Llama]


#
# what a session will hold
#


@pytest.mark.parametrize("policy", ["snapkv", "auto"])
@pytest.mark.parametrize("n_tokens", [300, 1474, 1500])
def test_the_forecast_is_what_a_session_reports(tmp_path: Path, opened: Open, policy: str, n_tokens: int) -> None:
    """30 layers, as the copy that moves cells holds one layer twice; equal heads have pools of pieces of 32 cells."""
    path = tiny_model.write_llama(tmp_path / "deep.gguf", n_layer=30, head_dim=64)
    own = forecast(read_info(path), 480, n_tokens, get_policy(policy), n_batch=32)
    llm = opened(path, kv_policy=policy, kv_limit=480, n_batch=32)
    answer(llm, LONG[:n_tokens], 1)
    stats = llm.kv_stats()
    assert own.cells_after == stats.cells.mean() == {300: 300, 1474: 470, 1500: 470}[n_tokens]
    assert own.bytes_after <= stats.bytes_live <= 1.07 * own.bytes_after
    assert own.bytes_peak <= 1.01 * stats.bytes_peak and stats.bytes_peak <= 1.07 * own.bytes_peak
    own_stats = llm._kv.stats()  # type: ignore[union-attr]
    assert own.bytes_full == n_tokens * own_stats.bytes_cell + own_stats.bytes_live - own_stats.bytes_pool
    answer(llm, llm.input_ids[:n_tokens].tolist(), 200)
    assert llm.kv_stats().cells.mean() <= own.cells_most and llm.kv_stats().bytes_live <= 1.07 * own.bytes_most


def test_info_forecasts(tmp_path: Path) -> None:
    path = tiny_model.write_llama(tmp_path / "tiny.gguf")
    result = run("info", path, "--lengths", "500,4k", "--limit", "512", "--policy", "snapkv", "--json")
    rows = json.loads(result.stdout)["limits"]
    assert [row["cells_after"] for row in rows] == [500, 448] and rows[1]["cells_peak"] == 971
    assert json.loads(run("info", path, "--json").stdout)["limits"] == []
    shown = run("info", path, "--lengths", "4k", "--limit", "1MiB").stdout
    assert "Within the limit 1MiB, auto" in shown and "Below the MiB: cells per head" in shown
    refused(run("info", path, "--limit", "20"), "--limit=20 holds 20 cells per head, expected at least 64")
    refused(run("info", path, "--limit", "12 apples"), "the limit is '12 apples'", "expected bytes such as 512MiB")


#
# chat
#


@pytest.fixture
def talk(session: Open) -> tuple[Chat, io.StringIO]:
    out = io.StringIO()
    llm = session(kv_policy="auto", kv_budget=1.0, n_batch=128)
    return Chat(llm, Console(file=out, width=200), temperature=0.0, max_tokens=4), out


def test_limit_in_a_chat(talk: tuple[Chat, io.StringIO], document: str, tmp_path: Path) -> None:
    chat, out = talk
    text = tmp_path / "long.txt"
    text.write_text(document[:2800] + NEEDLE)
    chat.command(f"/file {text}")
    assert "it will be read with the full cache" in out.getvalue()
    for line, said in (
        ("/limit", "no limit, budget 1.0"), ("/limit 300", "at most 300 cells per head"), ("/limit 9MiB", "at most 9MiB"),
        ("/limit 10", "expected at least"), ("/limit many", "expected bytes such as 512MiB"), ("/limit off", "no limit"),
        ("/limit 320", "at most 320"),
    ):  # fmt: skip
        chat.command(line)
        assert said in out.getvalue().splitlines()[-1], line
    chat.attached.clear()
    chat.command(f"/file {text}")
    assert "it will be read within 320 cells per head and a batch, as your message asks" in out.getvalue()
    chat.say("What is the name of the miller's cat?")
    stats = chat.llm.kv_stats()
    assert stats.cells.mean() <= 320 < stats.n_past and stats.n_compactions > 2
    assert len(chat.messages) == 2

    text.write_text(document)
    chat.command(f"/file {text}")
    assert "tokens, not added: the context holds 1,024 positions, of which" in out.getvalue() and not chat.attached


def test_chat_and_demo_take_a_limit(smollm2: Path, document: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(document[:2400] + "\n\n" + NEEDLE)
    result = run(
        "demo", "--file", text, "--question", "What is the name of the miller's cat?", "--max-tokens", "4", "--budget", "1.0",
        "--limit", "300", "--threads", "2", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert got["limit"] == 300 and got["policy"]["cells_mean"] <= 300 < got["full"]["cells_mean"]
    assert result.stderr == ""  # no bar: nobody looks
    for command in (("demo",), ("chat", smollm2)):
        refused(run(*command, "--limit", "0"), "the limit is 0 cells")
        refused(run(*command, "--limit", "1KB 2"), "expected bytes such as 512MiB")
    refused(run("chat", smollm2, "--limit", "20"), "holds 20 cells per head")


#
# bars
#


@pytest.mark.parametrize("shows", [True, False])
def test_a_bar_where_somebody_looks(tiny: Path, opened: Open, shows: bool) -> None:
    out = io.StringIO()
    llm = opened(tiny, kv_policy="snapkv", n_batch=32)
    seen: list[int] = []
    llm.kv_progress = before = lambda done, total: seen.append(done)
    with prompt_bar(llm, Console(file=out, force_terminal=shows, width=100), "reading"):
        answer(llm, TOKENS, 2)
    assert llm.kv_progress is before and not seen
    assert ("reading" in out.getvalue() and "100%" in out.getvalue()) == shows and (shows or out.getvalue() == "")
    with pytest.raises(KeyboardInterrupt), prompt_bar(llm, Console(file=out), "reading"):
        raise KeyboardInterrupt
    assert llm.kv_progress is before


def test_bars_of_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with suite_bars(2) as bars:
        bars.note("two [prompts]")
        for n in (100, 1000):
            for done in range(512, n + 512, 512):
                bars.read(min(done, n), n)
            bars.done(f"needle/{n}")
    err = capsys.readouterr().err
    assert "two [prompts]" in err and "needle" not in err


#
# eval long
#


def test_eval_long(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "long.jsonl"
    args: list[Any] = [
        "eval", "long", smollm2, "--limits", "256", "--lengths", "400", "--kinds", "number,word", "--depths", "0.5",
        "--threads", "2", "--out", out,
    ]  # fmt: skip
    result = run(*args)
    assert result.exit_code == 0, result.output
    header, *rows = map(json.loads, out.read_text().splitlines())
    assert header["suite"] == "long" and len(rows) == 2
    for row in rows:
        full, *others = row["results"]
        assert full["policy"] == "full" and full["cells"] == "q8_0" and full["n_peak"] == row["n_prompt"]
        if full["score"] == 0:
            assert not others
            continue
        by_name = {own["policy"]: own for own in others}
        assert set(by_name) == {"auto", "auto" + EXACT, "streamingllm"}
        for name in ("auto", "streamingllm"):
            assert by_name[name]["budget"] == 256 and by_name[name]["n_compactions"] >= 1
            assert by_name[name]["n_peak"] <= 1.3 * (256 + 512)
        assert by_name["auto" + EXACT]["n_peak"] == row["n_prompt"]
    assert any(row["results"][0]["score"] > 0 for row in rows)
    assert "auto (exact), q8_0" in result.stdout and "By depth" not in result.stdout
    size = out.stat().st_size
    assert run(*args).exit_code == 0 and out.stat().st_size == size  # nothing is measured twice
    report = run("eval", "report", out, "--to", tmp_path / "report")
    assert report.exit_code == 0 and {path.suffix for path in (tmp_path / "report").iterdir()} >= {".md", ".html"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policies", "full"], "keeps every cell"),
        (["--policies", ""], "is empty"),
        (["--exact", "snapkv"], "--exact has 'snapkv'"),
        (["--types", "q5_0"], "expected own or one of"),
        (["--limits", "9000"], "was trained with 8,192 positions"),
        (["--kinds", "moon"], "--kinds has 'moon'"),
        (["--lengths", "0"], "--lengths has '0'"),
    ],
)
def test_eval_long_refuses(smollm2: Path, tmp_path: Path, args: list[str], words: str) -> None:
    refused(run("eval", "long", smollm2, "--out", tmp_path / "long.jsonl", *args), words)
    assert not list(tmp_path.iterdir())


def test_plans_are_checked() -> None:
    policy = get_policy("snapkv")
    for kwargs in ({"policies": {}}, {"limits": ()}, {"exact": ["auto"]}):
        with pytest.raises(ValueError, match="at least one|none of the policies"):
            LongPlan(**{"policies": {"snapkv": policy}, "exact": [], "limits": (64,), "cells": "f16", "threads": 1, **kwargs})  # type: ignore[arg-type]
