"""Every code block of every README is executed, or its options are checked; links lead somewhere; tables are those of the code.

Python blocks run as they stand, in a folder that has the files they name. Commands run as well, those that would take long with
the further options in REDUCED; the ones in OPTIONS_ONLY take hours, gigabytes or an install, and their options are checked.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from windowkv_edge import POLICIES
from windowkv_edge.cli import app

ROOT = Path(__file__).parents[2]
FOLDERS = ("ggml_patch", "native", "tests", "windowkv_edge")
READMES = [Path("README.md"), *(path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("README.md")))]

# by the beginning of a command: what makes it short
REDUCED = {
    "windowkv-edge demo --model": "--max-tokens 4",
    "windowkv-edge info": "",
    "windowkv-edge chat": "",
    "windowkv-edge profile": "--lengths 64 --depths 0.5",
    "windowkv-edge eval fidelity": "--lengths 300 --windows 1 --follow 4 --budgets 25%",
    "windowkv-edge eval generate": "--tokens 40 --cells 32 --free 8 --policies streamingllm",
    "windowkv-edge eval forms": "--lengths 250 --count 1 --forms last --budgets 50%",
    "windowkv-edge eval turns": "--lengths 300 --count 1 --questions 2 --policies kvzip --types f16 --budgets 25%",
    "windowkv-edge eval needle": "--lengths 600 --depths 0.5 --kinds number",
    "windowkv-edge bench smollm2": "--lengths 300 --rounds 1 --fill --references 2",
    "python tests/measure/compaction.py smollm2": "--lengths 300 --rounds 1",
    "python -m tests.gpu.check --table": "",
    "python tests/measure/thinking.py smollm2": "--length 300 --limit 128 --thought 40 --policies snapkv --kinds number --depths 0.5",
    "python -m tests.fuzz.run": "--n 5 --no-loads",
}
OPTIONS_ONLY = (
    "windowkv-edge demo",  # tests/session/test_cli.py runs it
    "windowkv-edge eval all",  # tests/session/test_eval.py runs it with --small
    "windowkv-edge eval long",  # tests/session/test_limit_commands.py runs it
    "windowkv-edge bench llama-",
    "windowkv_edge/_tests/test-backend-ops-ragged perf",
    "python tests/measure/bounded.py",
    "python tests/measure/reading.py",
    "python tests/measure/chat_turns.py",
    "python tests/measure/prefill.py",
    "python tests/measure/eval_costs.py",
    "python tests/measure/compaction.py llama-",  # it writes a model of 0.7 GB
    "python -m tests.gpu.check",
    "python3 -m tarfile -e windowkv-gpu",  # tests/gpu/test_archive.py runs these two, of an archive
    "python3 -u /tmp/windowkv-gpu/",
    "python ggml_patch/patchq.py",  # tests/patch runs its commands
    "cmake",
    "pip install",
    "pytest",
)


def blocks(language: str) -> Iterator[Any]:
    """(page, text) of the code blocks in a language."""
    for name in READMES:
        found = re.findall(r"^```([^\n]*)\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)
        for i, (own, text) in enumerate(found):
            if own == language:
                yield pytest.param(name, text, id=f"{name.parent}-{i}")


def commands() -> Iterator[Any]:
    """The simple commands of all sh blocks."""
    for param in blocks("sh"):
        name, text = param.values
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\|?|;", line):
                if part.strip():
                    yield pytest.param(shlex.split(part, comments=True), id=f"{name.parent}: {part.strip()[:60]}")


def words(command: list[str]) -> list[str]:
    """A command without the variables in front of it."""
    return command[next(i for i, word in enumerate(command) if not re.match(r"[A-Z_]+=", word)) :]


@pytest.fixture
def folder(tmp_path: Path, smollm2: Path, document: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a reader: a model and texts under the names that the pages use."""
    (tmp_path / "model.gguf").symlink_to(smollm2)
    for name in ("report.txt", "journey.txt", "prose.txt"):
        (tmp_path / name).write_text(document[:4000], encoding="utf-8")  # about 900 tokens
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_blocks_have_languages_that_are_tested() -> None:
    """And drawings hold no commands."""
    for name in READMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        opened = re.findall(r"^```(.*)$", text, re.M)
        assert len(opened) % 2 == 0 and set(opened[1::2]) <= {""}, name
        assert set(opened[::2]) <= {"python", "sh", "text", "toml"}, name
    for param in blocks("text"):
        assert not re.search(r"^(windowkv-edge|python3?|pip|pytest|cmake|git) ", param.values[1], re.M)
    for param in blocks("toml"):
        tomllib.loads(param.values[1])


@pytest.mark.parametrize(("name", "text"), list(blocks("python")))
def test_python(name: Path, text: str, folder: Path) -> None:
    scope: dict[str, Any] = {"__name__": "readme"}
    try:
        exec(compile(text, f"{name}", "exec", dont_inherit=True), scope)
        stats = scope["llm"].kv_stats()
        assert stats.policy in (*POLICIES, "by-value")
        if stats.n_past > 256:
            assert stats.n_compactions >= 1 and stats.cells.mean() < stats.n_past and (stats.cells <= stats.n_past).all()
    finally:
        if "llm" in scope:
            scope["llm"].close()


@pytest.mark.parametrize("command", list(commands()))
def test_command(command: list[str], folder: Path) -> None:
    given = shlex.join(words(command))
    check_options(words(command))
    more = next((more for begin, more in REDUCED.items() if given.startswith(begin)), None)
    if more is None:
        assert given.startswith(OPTIONS_ONLY), f"{given!r} is not executed: say in REDUCED how, or in OPTIONS_ONLY why not"
        return
    program, *args = words(command)
    if program == "windowkv-edge":
        args = ["-m", "windowkv_edge.cli", *args]
    where = folder if args[1] == "windowkv_edge.cli" else ROOT
    run = subprocess.run(
        [sys.executable, *args, *shlex.split(more)], input="/quit\n", capture_output=True, text=True, cwd=where, timeout=600
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert run.stdout.strip()


#
# options
#


def check_options(command: list[str]) -> None:
    """Raise AssertionError, or what the command's own parser raises, if the command does not have an option or a file."""
    program, *args = command
    if program == "windowkv-edge":
        check_typer(args)
    elif (program, *args[:3]) == ("python3", "-m", "tarfile", "-e"):
        assert len(args) == 5
    elif program in ("python", "python3"):
        args = [arg for arg in args if arg != "-u"]
        rest = args[1:] if args[0] == "-m" else args
        file = ROOT / (rest[0].replace(".", "/") + ".py" if args[0] == "-m" else rest[0].removeprefix("/tmp/windowkv-gpu/"))
        assert file.is_file(), file
        sub = [word for word in rest[1:2] if file.name == "patchq.py"]
        assert_options(rest[1:], help_of(str(file), *sub))
        for name in re.findall(r"--(?:patch|upto|before) (\S+)", " ".join(rest)):
            assert (ROOT / "ggml_patch" / f"{name}.patch").is_file(), name
    elif program == "cmake":
        known = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
        for name in re.findall(r"-D(WINDOWKV_\w+|LLAMA_\w+)", " ".join(args)):
            assert name in known, name
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert args[0] == "install"
        for extra in re.findall(r"\[(\w+)\]", " ".join(args)):
            assert extra in project["optional-dependencies"], extra
    elif program == "pytest":
        assert all((ROOT / arg).exists() for arg in args if arg.endswith(".py"))
    else:
        source = ROOT / "tests" / "native" / f"{Path(program).name}.cpp"
        assert f'"{args[0]}"' in source.read_text(encoding="utf-8"), f"{program} {args[0]}"


@cache
def help_of(file: str, *sub: str) -> str:
    return subprocess.run([sys.executable, file, *sub, "--help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def assert_options(args: list[str], text: str) -> None:
    for arg in args:
        if arg.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(arg.split('=')[0])}(?![\w-])", text), f"{arg} is not in:\n{text}"


def check_typer(args: list[str]) -> None:
    """Parse a command line as the command would: options, their types and bounds, and what is required."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("windowkv-edge", list(args), resilient_parsing=True)
    while hasattr(command, "commands"):
        name, *args = args
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
        context = command.make_context(name, list(args), parent=context, resilient_parsing=hasattr(command, "commands"))


@pytest.mark.parametrize("name", READMES, ids=str)
def test_commands_inside_of_sentences(name: Path) -> None:
    """They name commands and options that exist; capitals stand for what the reader puts there."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    for span in re.findall(r"`windowkv-edge ([^`]+)`", text):
        command: Any = typer.main.get_command(app)
        args = [word for word in shlex.split(span) if word != "..."]
        while args and hasattr(command, "commands"):
            assert args[0] in command.commands, span
            command = command.commands[args.pop(0)]
        options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
        assert {arg for arg in args if arg.startswith("--")} <= options, span


#
# links and tables
#


def anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", READMES, ids=str)
def test_links_lead_somewhere(name: Path) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not path.startswith("http"), "a page that is not here is not checked"
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def rows(name: str, header: str) -> list[list[str]]:
    """Cells of the table with this header line."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def test_the_tables_of_policies_are_complete() -> None:
    for name, header in (("README.md", "| `kv_policy` | what stays"), ("windowkv_edge/policies/README.md", "| policy | file |")):
        named = [policy for row in rows(name, header) for policy in re.findall(r"`([^`]+)`", row[0])]
        assert sorted(named) == sorted(POLICIES), name


def own_fields(policy: str) -> set[str]:
    return {field.name for field in fields(POLICIES[policy]) if field.init}  # type: ignore[arg-type]


@pytest.mark.parametrize("row", rows("windowkv_edge/policies/README.md", "| policy | file |"), ids=lambda row: row[0].strip("`"))
def test_the_index_has_the_options_and_papers_of_a_policy(row: list[str]) -> None:
    policy, file, _, paper, options = row[0].strip("`"), *row[1:]
    cls = POLICIES[policy]
    assert f"]({cls.__module__.rsplit('.')[-1]}.py)" in file
    assert set(re.findall(r"\d{4}\.\d{5}", paper)) == set(re.findall(r"\d{4}\.\d{5}", cls.paper))
    listed: set[str] = set()
    added, _, left_out = options.partition("without")
    for word in re.findall(r"`([^`]+)`", added):
        listed |= own_fields(word) if word in POLICIES else {word}
    assert listed - set(re.findall(r"`([^`]+)`", left_out)) == own_fields(policy)


@pytest.mark.parametrize("folder", ["native/llama", "native/policy"])
def test_the_native_page_names_every_file(folder: str) -> None:
    text = (ROOT / "native" / "README.md").read_text(encoding="utf-8")
    names = {path.stem for path in (ROOT / folder).iterdir()}
    assert names and {name for name in names if f"`{name}`" not in text} == set()


def test_the_page_of_the_tests_names_every_file() -> None:
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    tests = ROOT / "tests"
    files = {f"{path.parent.name}/{path.name}" for name in ("session", "unit") for path in (tests / name).glob("test_*.py")}
    assert set(re.findall(r"`((?:session|unit)/test_\w+\.py)`", text)) == files


def test_the_ci_runs_the_command_of_the_readme() -> None:
    """One block of the first page ends in pytest; .ci/run looks for it and runs it as it stands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = [block for block in re.findall(r"```sh\n(.*?)```", text, re.S) if block.strip().endswith("pytest")]
    assert len(found) == 1
