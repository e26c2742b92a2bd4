"""Files with an owner, files that are whole or not there, and what is no regular file."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from windowkv_edge import _files
from windowkv_edge._files import FileError, check_output, lock, open_own, open_regular, owned, write_text, writing
from windowkv_edge.cli import app

KINDS = ("a folder", "a FIFO", "a socket", "a device")


@contextlib.contextmanager
def odd_file(folder: Path, kind: str) -> Iterator[Path]:
    path = folder / "odd"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path = Path("/dev/zero")
    elif kind == "a socket":
        with contextlib.chdir(folder) if sys.version_info >= (3, 11) else _in(folder):
            server = socket.socket(socket.AF_UNIX)
            server.bind("odd")  # a longer path would not fit
        with server:
            yield path
        return
    yield path


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    with odd_file(tmp_path, kind) as path:
        for action in (open_regular, open_own, lambda path: check_output(path, "--out")):
            with pytest.raises((OSError, FileError)) as error:
                action(path)
            said = getattr(error.value, "strerror", str(error.value))
            # the system itself refuses to open a socket
            assert f"it is {kind}, expected a regular file" in said or (kind == "a socket" and action is open_own)


def test_links_are_followed_where_a_user_named_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"text"
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(OSError, match="it is a symbolic link, expected a regular file"):
            open_own(tmp_path / "link", flags)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="symbolic link"):
        open_own(tmp_path / "dangling", os.O_RDWR | os.O_CREAT, "r+b")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", [("info",), ("demo", "--model"), ("chat",), ("bench",), ("profile",), ("eval", "needle")])
def test_a_model_that_is_no_file(tmp_path: Path, command: tuple[str, ...], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with odd_file(tmp_path, kind) as path:
        result = CliRunner().invoke(app, [*command, str(path)])
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert f"error: cannot read {path}: it is {kind}, expected a regular file; give the path of a GGUF file" in said


@pytest.mark.parametrize("kind", ["a FIFO", "a device"])
def test_a_text_that_is_no_file(tmp_path: Path, smollm2: Path, kind: str) -> None:
    with odd_file(tmp_path, kind) as path:
        for args in (("demo", "--question", "What?", "--file"), ("bench", smollm2, "--text"), ("eval", "needle", smollm2, "--haystack")):
            result = CliRunner().invoke(app, [*map(str, args), str(path)])
            assert result.exit_code == 2
            assert f"cannot read {path}: it is {kind}, expected a regular file" in " ".join(result.stderr.split())


#
# whole or not at all
#


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    path.chmod(0o640)
    with pytest.raises(KeyboardInterrupt), writing(path) as part:
        assert part.parent == tmp_path and part.suffix == ".json"
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["out.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with writing(path) as one, writing(path) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["out"]  # "two" was done first


def test_a_link_of_the_user_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("old")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_parts_of_killed_processes_go(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".out.1.part.txt", ".out.2.part.txt", ".outer.3.part.txt"))
    for file in (old, young, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (0, time.time() - 2 * 24 * 3600))
    write_text(tmp_path / "out.txt", "new")
    assert not old.exists() and young.exists() and other.exists()


#
# owners
#

HOLD = """
import contextlib, sys, time
from pathlib import Path
from windowkv_edge._files import owned
with contextlib.ExitStack() as stack:
    for path in sys.argv[1:]:
        stack.enter_context(owned(Path(path), "--out"))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_run() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Another process that owns files."""
    started = []

    def start(*paths: Path) -> subprocess.Popen[str]:
        run = subprocess.Popen([sys.executable, "-c", HOLD, *map(str, paths)], stdout=subprocess.PIPE, text=True)
        started.append(run)
        assert run.stdout is not None and run.stdout.readline() == "held\n"
        return run

    yield start
    for run in started:
        run.kill()
        run.wait()


def test_the_second_run_is_refused(tmp_path: Path, other_run: Callable[..., subprocess.Popen[str]]) -> None:
    """Whatever it calls the file; and it takes over from one that was killed."""
    path = tmp_path / "out.jsonl"
    (tmp_path / "link.jsonl").symlink_to(path)
    first = other_run(path)
    for name in (path, tmp_path / "link.jsonl"):
        with pytest.raises(FileError, match=f"another run is writing {name}: process {first.pid} on .* since 20.*; wait"), owned(name, "--out"):
            pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "out.jsonl.lock").exists()
    with owned(path, "--out"), pytest.raises(FileError, match=f"process {os.getpid()} "), owned(path, "--out"):
        pass
    assert os.listdir(tmp_path) == ["link.jsonl"]


def test_the_commands_refuse_the_second_run(
    tmp_path: Path, smollm2: Path, other_run: Callable[..., subprocess.Popen[str]]
) -> None:
    owner = other_run(*(tmp_path / name for name in ("h.json.measuring.jsonl", "r.jsonl", "p.png", "report.md")))
    commands = (
        ("profile", smollm2, "--out", tmp_path / "h.json"), ("eval", "needle", smollm2, "--out", tmp_path / "r.jsonl"),
        ("bench", smollm2, "--plot", tmp_path / "p.png"), ("eval", "all", smollm2, "--to", tmp_path),
        ("eval", "ruler", smollm2, "--out", tmp_path / "r.jsonl"),
    )  # fmt: skip
    for args in commands:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 2, (args, result.output)
        assert f": process {owner.pid} on " in " ".join(result.stderr.split())
    assert all(path.suffix == ".lock" for path in tmp_path.iterdir())


def test_what_a_lock_says_is_not_repeated_if_it_is_no_owner(tmp_path: Path) -> None:
    with lock(tmp_path / "out.lock"):
        (tmp_path / "out.lock").write_text("\033[31mprocess 1 on evil since ever")
        with pytest.raises(FileError, match="another run is writing .*out: it does not say which; wait"), owned(tmp_path / "out", "--out"):
            pass


def test_ctrl_c_while_waiting_leaves_the_writers_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from windowkv_edge.bench import shapes

    monkeypatch.setenv("WINDOWKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(shapes.SHAPES, "small", shapes.Shape("small", 1, 64, 64, 2, 1, 32, 64))
    folder = tmp_path / "models"
    folder.mkdir()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with lock(folder / "shape-small.q4_0.lock"), writing(folder / "shape-small.q4_0.gguf") as part:
        part.write_text("half")
        before = set(os.listdir(folder))
        monkeypatch.setattr(_files.fcntl, "flock", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shapes.fetch_shape("small")
        assert set(os.listdir(folder)) == before
        part.write_text("whole")
    assert (folder / "shape-small.q4_0.gguf").read_text() == "whole"


#
# before the work
#


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOSPC, "make room, or give another --out"), (errno.EACCES, "make it writable, or give another --out"), (errno.EIO, "; give another --out")]
)
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_files.tempfile, "TemporaryFile", fails)
    with pytest.raises(FileError, match=f"cannot write .*out: {os.strerror(number)}.*{fix}"):
        check_output(tmp_path / "out", "--out")


def test_room_for_what_will_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"has [\d,]+ MiB free, [\d,]+ MiB needed; make room"):
        check_output(tmp_path / "out", "--gguf", 1 << 60)
    with pytest.raises(FileError, match="there is no folder .*nowhere; create it, or give another --out"):
        check_output(tmp_path / "nowhere" / "out", "--out")
    check_output(tmp_path / "out", "--out", 1 << 10)
    assert os.listdir(tmp_path) == []


def test_what_a_run_needs_is_not_its_output(tmp_path: Path) -> None:
    """``profile MODEL --out MODEL`` replaced the model."""
    model, link, other = tmp_path / "model.gguf", tmp_path / "link.gguf", tmp_path / "other.json"
    model.write_bytes(b"GGUF")
    link.symlink_to(model)
    for path, keeps in ((model, (model,)), (link, (None, model)), (other, (tmp_path / "x" / ".." / "other.json",))):
        with pytest.raises(FileError, match="is a file that this run needs itself; give another --out"):
            check_output(path, "--out", keeps=keeps)
        with pytest.raises(FileError, match="is a file that this run needs itself"), owned(path, "--out", keeps=keeps):
            pass
    check_output(other, "--out", keeps=(model, None))
    assert model.read_bytes() == b"GGUF"


@pytest.mark.parametrize("command", [["profile", "MODEL", "--out", "MODEL"], ["bench", "MODEL", "--plot", "MODEL.png"]])
def test_commands_keep_their_model(tiny: Path, tmp_path: Path, command: list[str]) -> None:
    model = tmp_path / "model.png"  # a picture's ending, which plots want
    data = tiny.read_bytes()
    model.write_bytes(data)
    args = [str(model) if part.startswith("MODEL") else part for part in command]
    run = subprocess.run([sys.executable, "-m", "windowkv_edge.cli", *args], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "needs itself" in run.stderr.replace("\n", " "), run.stderr
    assert model.read_bytes() == data
