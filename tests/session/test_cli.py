"""The command line: what info and demo print, and that bad input gives one line and exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from scripted import evaluate
from typer.testing import CliRunner

import windowkv_edge
from windowkv_edge import Llama, WindowKVError
from windowkv_edge.cli import app
from windowkv_edge.cli.common import parse_budget, parse_lengths
from windowkv_edge.cli.info import parse_budgets

# SmolLM2-135M: 30 layers, 3 kv heads, K and V of 64 halves each
BYTES_PER_POSITION = 30 * 3 * (64 + 64) * 2

NEEDLE = "The name of the miller's cat is Barnaby Thistle."
QUESTION = "What is the name of the miller's cat?"


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def short_text(document: str, tmp_path: Path) -> Path:
    """About 600 tokens with a needle in the middle."""
    paragraphs = document.split("\n\n")[2:9]
    path = tmp_path / "short.txt"
    path.write_text("\n\n".join([*paragraphs[:3], NEEDLE, *paragraphs[3:5]]), encoding="utf-8")
    return path


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"windowkv-edge {windowkv_edge.__version__} ")


#
# arguments
#


@pytest.mark.parametrize(("text", "budget"), [("0.12", 0.12), ("12%", 0.12), ("1.0", 1.0), ("512", 512), ("1", 1)])
def test_a_budget_is_a_fraction_or_cells(text: str, budget: float) -> None:
    got = parse_budget(text)
    assert got == budget
    assert type(got) is type(budget)


@pytest.mark.parametrize("text", ["0", "0.0", "-1", "1.5", "120%", "nan", "inf", "", "%", "many"])
def test_a_budget_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(WindowKVError, match="expected a fraction above 0"):
        parse_budget(text)


def test_lengths_and_percentages() -> None:
    assert parse_lengths("1k, 500,4K") == [1024, 500, 4096]
    assert parse_budgets("25,12%, 1.5") == [0.25, 0.12, 0.015]


def refused(result: Any, *words: str) -> None:
    """One line that begins with "error:" and exit code 2."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policy", "lru"], ["'lru'", "expected one of", "windowkv"]),
        (["--budget", "0"], ["'0'", "expected a fraction"]),
        (["--budget", "1.2"], ["'1.2'", "expected a fraction"]),
        (["--file", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--file", "empty.txt", "--question", "What?"], ["empty.txt", "is empty"]),
        (["--file", "binary.txt", "--question", "What?"], ["binary.txt", "not UTF-8"]),
        (["--file", "text.txt"], ["--question"]),
        (["--question", " "], ["--question is empty"]),
        (["--model", "nowhere.gguf"], ["nowhere.gguf", "No such file"]),
        (["--model", "text.txt"], ["text.txt", "is not a readable GGUF file"]),
        (["--model", "mamba.gguf"], ["mamba.gguf", "not supported with a KV policy", "recurrent"]),
        (["--model", "hollow.gguf"], ["cannot load", "hollow.gguf"]),
    ],
)
def test_demo_refuses(args: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "text.txt").write_text("A text.")
    write_header(tmp_path / "mamba.gguf", "mamba")
    write_header(tmp_path / "hollow.gguf", "llama")
    refused(run("demo", *args), *words)


def test_demo_refuses_texts_of_the_wrong_length(smollm2: Path, document: str, tmp_path: Path) -> None:
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("Only a few words.")
    long.write_text(document * 3)
    common = ("--model", smollm2, "--question", QUESTION, "--file")
    refused(run("demo", *common, short), "short.txt", "expected at least 256", "give a longer text")
    refused(run("demo", *common, long), "long.txt", "8,192 positions", "give a shorter text")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere.gguf"], ["nowhere.gguf", "No such file"]),
        (["."], ["give the path of a GGUF file"]),
        (["nowhere.gguf", "--lengths", "1k,many"], ["--lengths has 'many'"]),
        (["nowhere.gguf", "--lengths", "0"], ["--lengths has '0'"]),
        (["nowhere.gguf", "--budgets", "0.12"], ["--budgets has '0.12'", "from 1 to 100"]),
        (["nowhere.gguf", "--budgets", "101"], ["--budgets has '101'"]),
    ],
)
def test_info_refuses(args: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run("info", *args), *words)


#
# info
#


def write_header(path: Path, arch: str) -> None:
    """A GGUF file without tensors."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_embedding_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(2048)
    if arch == "mamba":
        writer.add_ssm_state_size(16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_info_gives_the_bytes(smollm2: Path) -> None:
    result = run("info", smollm2, "--lengths", "1000,4k", "--budgets", "25,12", "--json")
    assert result.exit_code == 0, result.output
    info = json.loads(result.stdout)
    assert info["path"] == str(smollm2)
    assert info["supported"] is True
    assert info["bytes_per_position"] == BYTES_PER_POSITION

    costs = {(row["policy"], row["budget"], row["n_tokens"]): row for row in info["costs"]}
    policies = [name for name in windowkv_edge.POLICIES if name != "full"]
    assert len(costs) == len(info["costs"]) == 2 * (1 + len(policies) * 2)
    assert costs["stock", 1.0, 1000]["n_bytes"] == 1000 * BYTES_PER_POSITION
    assert costs["auto", 0.12, 4096]["cells_per_head"] == int(0.12 * 4096 * 16 / 8.5)
    assert costs["auto", 0.12, 4096]["n_bytes"] == 925 * BYTES_PER_POSITION * 8.5 / 16
    for policy in set(policies) - {"auto"}:
        assert costs[policy, 0.25, 1000]["n_bytes"] == 250 * BYTES_PER_POSITION
        assert costs[policy, 0.12, 4096]["cells_per_head"] == 491
        assert costs[policy, 0.12, 4096]["n_bytes"] == 491 * BYTES_PER_POSITION

    # 30 layers, 9 query heads of 64 halves, 16 queries and as many of a prompt
    assert info["policies"]["windowkv"] == {"n_observed": 16, "query_bytes": 2 * 30 * 9 * 64 * 2 * 16}


def test_the_forecast_of_the_bytes_is_what_a_session_holds(smollm2: Path, document: str) -> None:
    result = run("info", smollm2, "--lengths", "600", "--budgets", "25", "--json")
    info = json.loads(result.stdout)
    cost = next(row for row in info["costs"] if row["policy"] == "windowkv")
    llm = Llama(str(smollm2), n_ctx=768, kv_policy="windowkv", kv_budget=0.25, n_threads=2, verbose=False)
    try:
        evaluate(llm, llm.tokenize(document.encode())[:600])
        stats = llm.kv_stats()
    finally:
        llm.close()
    assert stats.cells.mean() == cost["cells_per_head"]
    expected = cost["n_bytes"] + info["policies"]["windowkv"]["query_bytes"]
    # room for the next tokens comes on top
    assert expected <= stats.bytes_live <= expected + 64 * BYTES_PER_POSITION + 2**20


def test_info_prints_tables(smollm2: Path) -> None:
    result = run("info", smollm2)
    assert result.exit_code == 0, result.output
    for word in (smollm2.name, "23,040 bytes per position", "supported: plain causal", "32,768 *", "windowkv", "90.0"):
        assert word in result.stdout


def test_info_tells_why_a_model_is_not_supported(tmp_path: Path) -> None:
    write_header(tmp_path / "mamba.gguf", "mamba")
    result = run("info", tmp_path / "mamba.gguf")
    assert result.exit_code == 0, result.output
    assert "not supported" in result.stdout
    assert "recurrent" in result.stdout
    info = json.loads(run("info", tmp_path / "mamba.gguf", "--json").stdout)
    assert info["supported"] is False
    assert info["costs"] == []


#
# demo
#


def test_demo_compares_the_two_caches(smollm2: Path, short_text: Path) -> None:
    args = ("--model", smollm2, "--file", short_text, "--question", QUESTION, "--budget", "0.25", "--threads", 2)
    result = run("demo", *args, "--max-tokens", 24, "--json")
    assert result.exit_code == 0, result.output
    res = json.loads(result.stdout)
    n = res["n_prompt"]
    assert 450 < n < 900
    assert res["n_ctx"] % 256 == 0
    assert n + 24 <= res["n_ctx"] < n + 24 + 256
    assert (res["question"], res["lead"], res["expected"], res["budget"], res["threads"]) == (QUESTION, "", "", 0.25, 2)

    full, kept = res["full"], res["policy"]
    assert (full["policy"], kept["policy"]) == ("stock", "auto")
    assert "Barnaby" in full["answer"]
    assert "Barnaby" in kept["answer"]
    assert "\n" not in full["answer"]
    assert (full["cells_min"], full["cells_mean"], full["cells_max"]) == (n, n, n)
    assert kept["cells_mean"] == int(0.25 * n * 16 / 8.5)  # q8_0 cells for a quarter of the f16 bytes
    assert full["bytes_full"] == kept["bytes_full"] == n * BYTES_PER_POSITION
    assert full["bytes_live"] == full["bytes_peak"] == res["n_ctx"] * BYTES_PER_POSITION
    assert kept["bytes_live"] < full["bytes_full"] / 2
    assert kept["bytes_live"] < kept["bytes_peak"] < full["bytes_full"]  # the prompt's cells are q8_0, too
    assert res["bytes_released"] == pytest.approx(1 - kept["bytes_live"] / kept["bytes_full"])
    assert res["decode_speedup"] == pytest.approx(full["decode_ms"] / kept["decode_ms"])
    for side in (full, kept):
        assert side["prefill_s"] > 0
        assert side["n_timed"] >= 16
        assert 0 < side["cpu_share"] < 1.1
        assert side["correct"] is None
    assert kept["compaction_ms"] > 0
    assert full["rss_change"] is None
    if sys.platform == "linux":
        assert kept["rss_change"] < 0


def test_demo_prints_a_table_and_takes_the_chat_template(smollm2: Path, short_text: Path) -> None:
    args = ("--model", smollm2, "--file", short_text, "--question", QUESTION, "--policy", "snapkv", "--threads", 2)
    result = run("demo", *args, "--budget", "100", "--max-tokens", 4, "--chat")
    assert result.exit_code == 0, result.output
    for word in (
        "full cache",
        "snapkv, budget 100",
        "of the KV cache released, decode",
        "windowkv-edge chat",
        QUESTION,
    ):
        assert word in result.stdout


@pytest.mark.slow
def test_the_default_demo_answers_right(smollm2: Path) -> None:
    result = run("demo", "--model", smollm2, "--threads", 2, "--json")
    assert result.exit_code == 0, result.output
    res = json.loads(result.stdout)
    assert res["full"]["correct"] is True
    assert res["policy"]["correct"] is True
    assert res["bytes_released"] == pytest.approx(0.86, abs=0.02)  # 12 % stay, free cells and the observed queries
