"""Text from outside where it is shown: terminals, rich's markup, matplotlib, Markdown, HTML, JSON."""

from __future__ import annotations

import io
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from windowkv_edge import get_policy
from windowkv_edge._text import for_file_name, for_markdown, for_markup, for_plot, for_terminal
from windowkv_edge.bench.plot import plot
from windowkv_edge.bench.run import Row
from windowkv_edge.cli import app
from windowkv_edge.cli.chat import Chat

NAMES = (
    "a$x^$.gguf", "$\\frac{$", "_hidden", "[red]a[/red]", "[/]", "[bold", "a\\", "\\[red]", "\x1b[31mred", "\x1b]0;title\x07", "a\rb",
    "<script>alert(1)</script>", "a|b", "a\nb", "a\u2028b", "\u202etxt", "*b*", "`c`", "[x](http://y)", "&amp;", "\udcff", "é漢𝄞",
)  # fmt: skip
CONTROL = "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_shown_as_it_is(name: str) -> None:
    """And nothing else happens: no formula, no colour, no cell, no tag, no line of its own."""
    plain = for_terminal(name)
    assert not re.search(CONTROL, plain) and "\n" not in plain
    assert plain == name or re.search(CONTROL + "|\n", name)
    plain.encode()

    assert Text.from_markup(f"[bold]{for_markup(name)}[/] rest").plain == f"{plain} rest"
    out = io.StringIO()
    table = Table()
    table.add_row(for_markup(name))
    Console(file=out, width=200).print(table)
    assert plain in out.getvalue()

    figure = Figure()
    figure.suptitle(for_plot(name))
    (line,) = figure.subplots().plot([1], [1], label=for_plot(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks
        figure.axes[0].legend()
        figure.savefig(io.BytesIO(), format="png", dpi=20)
    assert not str(line.get_label()).startswith("_")

    cell = for_markdown(name)
    assert not re.search(r"(?<!\\)\|", cell) and "<" not in cell and "\n" not in cell
    out = io.StringIO()
    Console(file=out, width=200).print(Markdown(f"| head |\n| --- |\n| .{cell}. |\n"))
    assert f".{plain}." in out.getvalue()


def test_long_text_does_not_stop_a_picture() -> None:
    assert len(for_plot("a" * 100_000)) == 200
    assert for_terminal("a\nb\tc", keep="\n\t") == "a\nb\tc"


def header(path: Path, name: str, arch: str = "llama", **keys: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    for key in ("block_count", "context_length", "embedding_length", "attention.head_count"):
        writer.add_uint32(f"{arch}.{key}", 4)
    for key, value in keys.items():
        writer.add_uint32(f"{arch}.{key.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


EVIL = "[/red][bold\x1b]0;title\x07\x1b[2J"


@pytest.mark.parametrize(
    ("arch", "keys", "code"),
    [("llama", {}, 0), (f"x{EVIL}", {}, 0), ("llama", {f"ssm.{EVIL}": 1}, 0), ("llama", {}, 2)],
    ids=["name", "architecture", "key", "error"],
)
def test_info_shows_a_hostile_header(tmp_path: Path, arch: str, keys: dict[str, int], code: int) -> None:
    path = header(tmp_path / "a[red]\x1b[2J.gguf", EVIL, arch, **keys)
    if code:
        path.write_bytes(b"GGUF")
    result = CliRunner().invoke(app, ["info", str(path)])
    assert result.exit_code == code, result.output
    assert not re.search(CONTROL, result.output)
    assert "\\x1b" in result.output
    if code == 0:
        as_json = CliRunner().invoke(app, ["info", str(path), "--json"])
        assert json.loads(as_json.stdout)["name"] == EVIL


def test_a_reply_cannot_steer_the_terminal() -> None:
    pieces = [" red \x1b[31m", "[bold]\n", "\x1b]0;title\x07", " end"]
    chunks = [{"choices": [{"text": text, "finish_reason": None}]} for text in pieces]
    stats = SimpleNamespace(bytes_live=1, bytes_full=1, n_shifted=0)
    llm: Any = SimpleNamespace(
        metadata={}, reset=lambda: None, n_tokens=9, kv_stats=lambda: stats, kv_progress=None, kv_shift="shift",
        create_completion=lambda *a, **k: iter(chunks),
    )  # fmt: skip
    out = io.StringIO()
    talk = Chat(llm, Console(file=out, width=200))
    talk.say("hello")
    assert not re.search(CONTROL, out.getvalue())
    assert out.getvalue().startswith("red \\x1b[31m[bold]\n\\x1b]0;title\\x07 end")
    assert talk.messages[-1]["content"] == "".join(pieces)  # the model sees what it said


def test_a_picture_of_a_bench_shows_any_name(tmp_path: Path) -> None:
    rows = [
        Row(**{field: 1 for field in Row.__dataclass_fields__} | {"session": name, "length": length})  # type: ignore[arg-type]
        for name in ("stock f16", "snapkv('$x^$')", "_a") for length in (100, 200)
    ]  # fmt: skip
    for some in (rows, [row for row in rows if row.length == 100]):
        plot(some, "a$x^$.gguf, \x1b[31m", tmp_path / "a.png")


HEADER = {"format": "windowkv-edge eval", "version": 1, "model_sha256": "0" * 64, "package": "1", "seed": 0}


def test_a_report_shows_any_name(tmp_path: Path) -> None:
    policy = "<script>alert(1)</script>|$x^$\n\x1b[31m"
    full = {"policy": "full", "budget": None, "cells": "f16", "kv_bytes": 100, "score": 1.0, "decode_ms": 2.0}
    rows = [
        {
            "case": f"{suite} {task}", "suite": suite, "task": task, "length": 1000, "depth": 0.5,
            "results": [full, full | {"policy": policy, "budget": 0.5}],
        }
        for suite in ("needle", "ruler") for task in ("<img src=x>|[a](b)", "$y^$")
    ]  # fmt: skip
    path = tmp_path / "r$x^$<b>.jsonl"
    lines = [HEADER | {"model": "<script>$x^$|\x1b[31m\n.gguf"}, *rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = CliRunner().invoke(app, ["eval", "report", str(path)])
    assert result.exit_code == 0 and not re.search(CONTROL, result.output), result.output
    for text in (result.output, *report(path, tmp_path / "to")):
        assert not re.search(r"<(script|img|b)\b", text)
        assert not re.search(CONTROL, text)
    table = [line for line in result.output.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", table[1])) for row in table[:3])


def report(path: Path, to: Path) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["eval", "report", str(path), "--to", str(to)])
    assert result.exit_code == 0, result.output
    assert {file.suffix for file in to.iterdir()} == {".md", ".html", ".png"}
    page = (to / "report.html").read_text()
    assert "&lt;script&gt;" in page
    return (to / "report.md").read_text(), re.sub('<img alt="[a-z]+" src="data:', "", page)


#
# policy specs
#


@pytest.mark.parametrize(
    "spec",
    [
        "windowkv(omega=" + "-" * 5000 + "1)",
        "windowkv(omega=" + "-" * 1500 + "1)",
        "windowkv(omega=" + "[" * 1500 + ")",
        "windowkv(" * 200,
        "windowkv(omega={[]: 1})",
        "windowkv(omega={[1]})",
        "windowkv(omega=0x" + "f" * 1900 + ")",
        "windowkv(omega=" + "9" * 1900 + ")",
        "windowkv(omega=" + "9" * 5000 + ")",
        "windowkv(omega=1e999)",
        "windowkv(omega='\ud800)",
        "windowkv\0(omega=1)",
        "\ud800",
        "a" * 100_000,
        "windowkv(**{})",
        "windowkv(omega=8) or f()",
    ],
    ids=lambda spec: ascii(spec[:30]),
)
def test_hostile_specs_are_refused_in_words(spec: str) -> None:
    with pytest.raises(ValueError, match="kv_policy is|omega is") as caught:
        get_policy(spec)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 5000


def test_names_of_files() -> None:
    assert for_file_name("needle-prose") == "needle-prose"
    assert for_file_name("a\0b\n\x1b[31m<script>/../c") == "a_b_31m_script_.._c"
    assert len(for_file_name("x" * 300)) == 100
