"""windowkv-edge chat: a scripted one, and what interrupts and errors leave of it."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from prompt_toolkit.history import InMemoryHistory
from rich.console import Console
from typer.testing import CliRunner

import windowkv_edge
from windowkv_edge import Llama
from windowkv_edge.cli import app
from windowkv_edge.cli.chat import Chat, _history, plain_prompt

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


@pytest.mark.parametrize("args", [["--policy", "lru"], ["--budget", "0"], ["--query", "all"]])
def test_chat_refuses(args: list[str]) -> None:
    refused(run("chat", "nowhere.gguf", *args), "expected")
    refused(run("chat", "nowhere.gguf"), "nowhere.gguf", "No such file")


def test_a_scripted_chat(smollm2: Path, short_text: Path) -> None:
    lines = [
        "Say hello.", "/stats", f"/file {short_text}", QUESTION, "/stats", "/query", "/query all", "/query last", "/policy",
        "/policy lru", "/policy snapkv 0.25",
        "And the miller?", "/stats", "/frobnicate", "/help", "Go on.", "/regenerate", "/stats", "/edit Who is the miller?",
        "/stats", "/undo", "/reset", "/stats", "/file nowhere.txt", "/file", "/quit", "not read",
    ]  # fmt: skip
    options = ["--ctx", "1024", "--threads", "2", "--temperature", "0", "--max-tokens", "12", "--budget", "20%"]
    command = [sys.executable, "-m", "windowkv_edge.cli", "chat", str(smollm2), *options]
    result = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    parts = result.stdout.split("\n> ")[1:]
    assert len(parts) == len(lines) - 1
    said = dict(zip(lines, parts, strict=False))
    first, second, third, again, edited, last = (part for part in parts if part.startswith("/stats"))

    assert "ms per token" in said["Say hello."]
    assert "auto, budget 0.2" in first
    assert row(first, "compactions") == "0"
    assert "tokens, sent with your next message" in said[f"/file {short_text}"]
    assert row(second, "compactions") == "1"
    assert int(row(second, "positions seen").split()[0]) > 450
    assert row(second, "cells are kept for") == "the last question and any other"
    assert int(row(second, "positions repeated").replace(",", "")) > 300
    assert "kept for the last question and any other;" in said["/query"] and "kept for the last question;" in said["/query last"]
    assert "/query is 'all', expected one of auto, last, any, both" in said["/query all"]
    assert row(third, "cells are kept for") == "the last question" and "repeated" not in third
    assert float(row(second, "KV cache").split()[0]) < float(row(second, "if every cell stayed").split()[0])
    for name in windowkv_edge.POLICIES:
        assert name in said["/policy"]
    assert "'lru', expected one of" in said["/policy lru"]
    assert "policy snapkv, budget 0.25" in said["/policy snapkv 0.25"]
    assert "snapkv, budget 0.25" in third
    assert int(row(third, "positions seen").split()[0]) > int(row(second, "positions seen").split()[0])
    assert "unknown command /frobnicate" in said["/frobnicate"]
    assert "/policy" in said["/help"]
    assert row(again, "of the last prompt").startswith("0 evaluated")
    assert said["/regenerate"].split("\n")[1] == said["Go on."].split("\n")[1]  # at temperature 0
    assert 0 < int(row(edited, "of the last prompt").split()[0]) < 24
    assert row(edited, "states to go back to").endswith("MiB of host memory")
    assert "are forgotten" in said["/undo"]
    assert row(last, "positions seen").startswith("0 of")
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
        self.kv_progress: Any = None
        self.kv_shift = "refuse"
        self.prompts: list[Any] = []
        self.kv_progress: Any = None
        self.kv_shift = "refuse"

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


def test_going_back_in_a_conversation() -> None:
    """Another answer, another question behind the same files, a turn less."""
    chat, out = talk(["ok"])
    for line, words in (
        ("/regenerate", "/regenerate: nothing was said yet"), ("/edit x", "/edit: nothing was said yet"),
        ("/undo", "/undo: nothing was said yet"), ("/edit", "expected /edit TEXT"),
    ):  # fmt: skip
        assert chat.command(line) and words in out.getvalue()
    chat.attached = ["a file", "another"]
    chat.say("Hi")
    chat.attached = ["for later"]
    chat.say("And?")
    chat.command("/undo")
    assert [m["content"] for m in chat.messages] == ["a file\n\nanother\n\nHi", "ok"]
    assert "taken back" not in out.getvalue() and "are forgotten" in out.getvalue()
    chat.command("/edit Hello  there")
    first = {"role": "user", "content": "a file\n\nanother\n\nHello  there"}
    assert chat.messages == [first, {"role": "assistant", "content": "ok"}] and chat.typed == ["Hello  there"]
    chat.llm.pieces = ["other"]  # type: ignore[attr-defined]
    chat.command("/regenerate")
    assert chat.messages == [first, {"role": "assistant", "content": "other"}]
    assert chat.llm.prompts[-1] == [first]  # type: ignore[attr-defined]
    chat.command("/undo")
    assert chat.messages == [] and chat.typed == []


@pytest.mark.parametrize("command", ["/regenerate", "/edit Again"])
def test_going_back_without_an_answer(command: str) -> None:
    """The conversation stays what it was."""
    chat, out = talk(["ok"])
    chat.attached = ["a file"]
    chat.say("Hi")
    before = [dict(message) for message in chat.messages], list(chat.typed)
    for pieces, words in ((["^C"], "stopped before the reply began"), ([ValueError("no")], "was not answered")):
        chat.llm.pieces = pieces  # type: ignore[attr-defined]
        chat.command(command)
        assert (chat.messages, chat.typed) == before
        assert f"{words}" in out.getvalue() and "the conversation stays as it was" in out.getvalue()


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


def test_a_chat_that_goes_on_another_day(smollm2: Path, short_text: Path, tmp_path: Path) -> None:
    """As one that never ended: the history travels, so that the next prompt goes on from what the cache holds."""
    (tmp_path / "part.txt").write_text(short_text.read_text(encoding="utf-8")[:900], encoding="utf-8")
    lines = [f"/file {tmp_path / 'part.txt'}", QUESTION, "Say hello.", "And now?"]
    options = ["--ctx", "1024", "--threads", "2", "--temperature", "0", "--max-tokens", "8", "--budget", "60"]

    def talk(lines: list[str], *more: str) -> str:
        command = [sys.executable, "-m", "windowkv_edge.cli", "chat", str(smollm2), *options, *more]
        res = subprocess.run(command, input="\n".join([*lines, ""]), capture_output=True, text=True, timeout=300, check=False)
        assert res.returncode == 0, res.stderr
        return res.stdout

    def replies(text: str) -> list[str]:
        return [part.split("\n")[0] for part in text.split(f"> {lines[3]}\n")[1:]]

    (want,) = replies(talk(lines))
    file, copy = tmp_path / "talk.session", tmp_path / "copy"
    talk([*lines[:3], f"/save {copy}"], "--session", str(file))
    second = talk(["/stats", lines[3], f"/load {copy}", lines[3]], "--session", str(file))
    assert "2 messages of yours" in second
    assert row(second.split("> /stats")[1], "compactions") == "0"  # nothing was read again
    assert replies(second) == [want, want]


def test_files_that_hold_no_conversation(smollm2: Path, tmp_path: Path) -> None:
    llm = Llama(str(smollm2), n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False, kv_policy="snapkv")
    console = Console(file=io.StringIO())
    talk = Chat(llm, console, system="Be brief.")
    try:
        llm.kv_save(tmp_path / "session", extra={"messages": [{"role": "tool", "content": "x"}], "attached": []})
        (tmp_path / "text").write_text("text")
        llm.eval([1, 2, 3])
        for line, word in (
            (f"/load {tmp_path / 'session'}", "no conversation"), (f"/load {tmp_path / 'text'}", "not a saved session"),
            (f"/load {tmp_path / 'none'}", "No such file"), ("/load", "--session FILE"), ("/save", "--session FILE"),
            (f"/save {tmp_path / 'none' / 'file'}", "cannot write"),
        ):  # fmt: skip
            assert talk.command(line)
            assert word in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert llm.n_tokens == 3 and talk.messages == [{"role": "system", "content": "Be brief."}]
        llm.eval([4])
    finally:
        llm.close()
    refused(run("chat", smollm2, "--session", tmp_path / "none" / "file"), "--session", "no folder")
    refused_late = run("chat", smollm2, "--session", tmp_path / "text")
    assert refused_late.exit_code == 2 and "not a saved session" in refused_late.stderr


def test_a_chat_longer_than_the_context(smollm2: Path, opened: Callable[..., Llama]) -> None:
    """It goes on, and says what was given up."""
    out = io.StringIO()
    llm = opened(smollm2, n_ctx=256, kv_policy="auto", kv_shift="shift")
    chat = Chat(llm, Console(file=out, width=200), max_tokens=3, temperature=0.0)
    for i in range(4):
        chat.say(f"Number {i}: " + "one two three four five six seven eight nine ten, " * 6)
    assert len(chat.messages) == 8 and "dropped" not in out.getvalue()
    assert "the context was full: the oldest" in out.getvalue() and llm.kv_stats().n_shifted > 0
