"""The command line: what info, demo and chat print, and that bad input gives one line and exit code 2."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import platformdirs
import pytest
from prompt_toolkit.history import InMemoryHistory
from rich.console import Console
from typer.testing import CliRunner

import windowkv_edge
from windowkv_edge import Llama, WindowKVError
from windowkv_edge.cli import app
from windowkv_edge.cli.chat import Chat, _history, plain_prompt
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


@pytest.mark.parametrize("args", [["--policy", "lru"], ["--budget", "0"]])
def test_chat_refuses(args: list[str]) -> None:
    refused(run("chat", "nowhere.gguf", *args), "expected")
    refused(run("chat", "nowhere.gguf"), "nowhere.gguf", "No such file")


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
        llm.eval(llm.tokenize(document.encode())[:600])
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


#
# chat
#


def test_a_scripted_chat(smollm2: Path, short_text: Path) -> None:
    lines = [
        "Say hello.", "/stats", f"/file {short_text}", QUESTION, "/stats", "/policy", "/policy lru", "/policy snapkv 0.25",
        "And the miller?", "/stats", "/frobnicate", "/help", "/reset", "/stats", "/file nowhere.txt", "/file", "/quit",
        "not read",
    ]  # fmt: skip
    options = ["--ctx", "1024", "--threads", "2", "--temperature", "0", "--max-tokens", "12", "--budget", "20%"]
    command = [sys.executable, "-m", "windowkv_edge.cli", "chat", str(smollm2), *options]
    result = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    parts = result.stdout.split("\n> ")[1:]
    assert len(parts) == len(lines) - 1
    said = dict(zip(lines, parts, strict=False))
    first, second, third, fourth = (part for part in parts if part.startswith("/stats"))

    assert "ms per token" in said["Say hello."]
    assert "auto, budget 0.2" in first
    assert row(first, "compactions") == "0"
    assert "tokens, sent with your next message" in said[f"/file {short_text}"]
    assert row(second, "compactions") == "1"
    assert int(row(second, "positions seen").split()[0]) > 450
    assert float(row(second, "KV cache").split()[0]) < float(row(second, "if every cell stayed").split()[0])
    for name in windowkv_edge.POLICIES:
        assert name in said["/policy"]
    assert "'lru', expected one of" in said["/policy lru"]
    assert "policy snapkv, budget 0.25" in said["/policy snapkv 0.25"]
    assert "snapkv, budget 0.25" in third
    assert int(row(third, "positions seen").split()[0]) > int(row(second, "positions seen").split()[0])
    assert "unknown command /frobnicate" in said["/frobnicate"]
    assert "/policy" in said["/help"]
    assert row(fourth, "positions seen").startswith("0 of")
    assert "No such file" in said["/file nowhere.txt"]
    assert "expected /file PATH" in said["/file"]


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """A runner that was started in the background inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def row(table: str, name: str) -> str:
    line = next(line for line in table.splitlines() if line.strip("│ ").startswith(name))
    return line.strip("│ ").removeprefix(name).strip("│ ")


class FakeLlama:
    """Streams pieces; an exception among them is raised, "^C" is a real interrupt."""

    def __init__(self, pieces: list[Any], has_template: bool = True) -> None:
        self.metadata = {"tokenizer.chat_template": "..."} if has_template else {}
        self.pieces = pieces
        self.n_tokens = 0
        self.n_resets = 0
        self.prompts: list[Any] = []

    def create_chat_completion(self, messages: list[dict[str, str]], **_: Any) -> Iterator[dict[str, Any]]:
        self.prompts.append([dict(message) for message in messages])
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            if piece == "^C":
                signal.raise_signal(signal.SIGINT)
            self.n_tokens += 1
            yield {"choices": [{"delta": {"content": piece}, "text": piece, "finish_reason": None}]}
        yield {"choices": [{"delta": {}, "text": "", "finish_reason": "stop"}]}

    def create_completion(self, prompt: str, **kwargs: Any) -> Iterator[dict[str, Any]]:
        assert kwargs["stop"] == ["\nUser:"]
        self.prompts.append(prompt)
        yield from self.create_chat_completion([])

    def kv_stats(self) -> Any:
        return windowkv_edge.KVStats("windowkv", 0, (), None, ("f16", "f16"), 0, 0, 0, 0, 0, 0, 0.0, 0.0)  # type: ignore[arg-type]

    def n_ctx(self) -> int:
        return 512

    def reset(self) -> None:
        self.n_resets += 1


def talk(pieces: list[Any], **kwargs: Any) -> tuple[Chat, io.StringIO]:
    out = io.StringIO()
    llm: Any = FakeLlama(pieces, **kwargs)
    return Chat(llm, Console(file=out, width=100)), out


def test_a_turn_keeps_message_and_reply() -> None:
    chat, out = talk(["Hel", "lo."])
    chat.attached = ["a file"]
    chat.say("Hi")
    assert chat.messages == [{"role": "user", "content": "a file\n\nHi"}, {"role": "assistant", "content": "Hello."}]
    assert chat.attached == []
    assert "Hello." in out.getvalue()


def test_ctrl_c_stops_the_reply_and_keeps_what_was_said() -> None:
    chat, out = talk(["One", " two", "^C", " three"])
    chat.say("Count")
    assert [m["content"] for m in chat.messages] == ["Count", "One two"]
    assert "One two" in out.getvalue()
    assert "stopped; the reply so far stays" in out.getvalue()
    assert "three" not in out.getvalue()


def test_ctrl_c_before_the_reply_drops_the_message() -> None:
    chat, out = talk(["^C", "One"])
    chat.attached = ["a file"]
    chat.say("Count")
    assert chat.messages == []
    assert chat.attached == ["a file"]
    assert "stopped before the reply began" in out.getvalue()


def test_a_context_that_is_too_small_drops_the_message() -> None:
    chat, out = talk([ValueError("Requested tokens (9000) exceed context window of 512")])
    chat.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat.say("long")
    assert len(chat.messages) == 2
    assert "would have 9,000 tokens, the context holds 512" in out.getvalue()


def test_a_failed_evaluation_clears_the_session() -> None:
    chat, out = talk(["One", RuntimeError("llama_decode returned 1")])
    n_resets = chat.llm.n_resets  # type: ignore[attr-defined]
    chat.say("Count")
    assert chat.messages == []
    assert chat.llm.n_resets == n_resets + 1  # type: ignore[attr-defined]
    assert "llama_decode returned 1" in out.getvalue()


def test_the_loop_hints_at_quit_and_ends_with_the_input() -> None:
    chat, out = talk(["ok"])
    inputs: list[Any] = [KeyboardInterrupt(), "", "  ", "Hi", "/nope", EOFError()]

    def read() -> str:
        item = inputs.pop(0)
        if isinstance(item, BaseException):
            raise item
        return str(item)

    chat.run(read)
    assert inputs == []
    assert len(chat.messages) == 2
    assert "/quit or Ctrl-D leaves" in out.getvalue()
    assert "unknown command /nope" in out.getvalue()


def test_models_without_a_template_get_plain_lines() -> None:
    chat, out = talk([" Hello", "."], has_template=False)
    chat.system = "Be brief."
    chat.reset("")
    chat.say("Hi")
    chat.say("Again")
    assert chat.llm.prompts[0] == "Be brief.\nUser: Hi\nAssistant:"  # type: ignore[attr-defined]
    assert plain_prompt(chat.messages[:3]) == "Be brief.\nUser: Hi\nAssistant: Hello.\nAssistant:"
    assert "\nHello." in out.getvalue()


def test_an_interrupted_session_goes_on(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = Llama(str(smollm2), n_ctx=512, kv_policy="windowkv", n_threads=2, verbose=False)
    evaluated: list[int] = []
    plain_eval = llm.eval

    def counted(tokens: list[int]) -> None:
        evaluated.append(len(tokens))
        plain_eval(tokens)
        if len(evaluated) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(llm, "eval", counted)
    out = io.StringIO()
    chat = Chat(llm, Console(file=out, width=100), temperature=0.0, max_tokens=12)
    try:
        chat.say("Tell me a story about a river.")
        assert len(evaluated) == 5
        assert len(chat.messages) == 2
        assert chat.messages[1]["content"]
        assert "stopped" in out.getvalue()

        chat.say("Go on.")
        assert len(chat.messages) == 4
        # the second turn reuses the first: of its prompt only the new lines are evaluated
        assert evaluated[5] < 24 < llm.n_tokens - 12
        chat.say("word " * 600)
        assert len(chat.messages) == 4
        assert "the context holds 512" in out.getvalue()
    finally:
        llm.close()


def test_the_history_is_private_and_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda _: str(tmp_path / "state"))
    _history().store_string("Hi")
    path = tmp_path / "state" / "chat_history"
    assert "Hi" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda _: str(tmp_path / "file"))
    assert isinstance(_history(), InMemoryHistory)
