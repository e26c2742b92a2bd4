"""`prepare`: what it makes, from where, and that nothing can leave it half done."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from pathlib import Path

import patchq
import pytest
from workshop import TOOL, TREE, Workshop, write


def error(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("patchq: error: ") and text.count("\n") == 1, text
    return text


def two_patches(shop: Workshop) -> None:
    shop.add("first", shop.insert("src/llama-graph.cpp", "line 10", "hook();"))
    shop.add("second", shop.insert("src/llama-arch.cpp", "arch 5", "arch();"))


# ---- what is made


def test_empty_series_gives_the_kept_files(shop: Workshop) -> None:
    assert shop.main("prepare", "--out", shop.out) == 0
    assert shop.held() == {path: text.encode() for path, text in TREE.items()}


def test_patches_apply_in_the_order_of_the_series(shop: Workshop) -> None:
    shop.add("zebra", shop.insert("src/llama-graph.cpp", "line 10", "hook();"))
    shop.add("apple", shop.insert("src/llama-graph.cpp", "hook();", "more();"))
    assert shop.main("prepare", "--out", shop.out) == 0
    assert b"line 10\nhook();\nmore();\nline 11\n" in shop.held()["src/llama-graph.cpp"]


@pytest.mark.parametrize(
    ("option", "hooks"), [(["--upto", "first"], 1), (["--before", "second.patch"], 1), (["--pristine"], 0)]
)
def test_part_of_the_series(shop: Workshop, option: list[str], hooks: int) -> None:
    two_patches(shop)
    assert shop.main("prepare", "--out", shop.out, *option) == 0
    assert shop.held()["src/llama-graph.cpp"].count(b"hook") == hooks
    assert b"arch()" not in shop.held()["src/llama-arch.cpp"]


def test_stamp_tells_states_of_the_queue_apart(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    def stamp() -> str:
        assert shop.main("stamp") == 0
        return capsys.readouterr().out.strip()

    two_patches(shop)
    stamps = [stamp(), stamp()]
    assert stamps[0] == stamps[1] and len(stamps[0]) == 64 and int(stamps[0], 16)
    for file, text in {
        "series": "second.patch\nfirst.patch\n",
        "first.patch": shop.patch("first").read_text().replace("never", "soon"),
        "pin.toml": (shop.queue / "pin.toml").read_text() + "# bumped\n",
    }.items():
        write(shop.queue / file, text)
        stamps.append(stamp())
    assert len(set(stamps)) == 4


# ---- again


def times(shop: Workshop) -> dict[str, int]:
    return {path: (shop.out / path).stat().st_mtime_ns for path in shop.held()}


def test_same_stamp_does_nothing(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    two_patches(shop)
    shop.main("prepare", "--out", shop.out)
    before = times(shop), shop.out.stat().st_ino
    assert shop.main("prepare", "--out", shop.out) == 0
    assert "up to date" in capsys.readouterr().out
    assert (times(shop), shop.out.stat().st_ino) == before


def test_only_changed_files_get_a_new_time(shop: Workshop) -> None:
    two_patches(shop)
    shop.main("prepare", "--out", shop.out)
    before, built = times(shop), time.time_ns()
    shop.add("third", shop.insert("src/llama-arch.cpp", "arch 20", "late();"))
    shop.main("prepare", "--out", shop.out)
    changed = {path for path, at in times(shop).items() if at != before[path]}
    assert changed == {"src/llama-arch.cpp"}
    assert times(shop)["src/llama-arch.cpp"] >= built - 10**8  # the file system's clock ticks coarsely


def test_a_dropped_patch_leaves_no_stale_object(shop: Workshop) -> None:
    """The pristine bytes come back with a time of now: an object built from the patched file is older."""
    two_patches(shop)
    shop.main("prepare", "--out", shop.out)
    time.sleep(0.05)
    built = time.time_ns() - 10**7
    shop.main("prepare", "--out", shop.out, "--upto", "first")
    assert times(shop)["src/llama-arch.cpp"] > built > times(shop)["src/llama-graph.cpp"]


def test_a_missing_file_comes_back(shop: Workshop) -> None:
    shop.main("prepare", "--out", shop.out)
    (shop.out / "src/llama-arch.cpp").unlink()
    assert shop.main("prepare", "--out", shop.out) == 0
    assert shop.whole()


@pytest.mark.parametrize("path", ["src/llama-graph.cpp", "src/llama-arch.cpp", "src/new.cpp"])
def test_edits_are_not_overwritten(shop: Workshop, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    shop.main("prepare", "--out", shop.out)
    write(shop.out / path, "my work\n")
    two_patches(shop)
    assert shop.main("prepare", "--out", shop.out) == 2
    text = error(capsys)
    assert path in text and "export" in text and "--discard" in text
    assert (shop.out / path).read_text() == "my work\n"
    assert shop.main("prepare", "--out", shop.out, "--discard") == 0
    assert shop.held() == shop.patched()


def test_folders_of_others_are_not_touched(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    write(shop.out / "thesis.tex", "years of work\n")
    assert shop.main("prepare", "--out", shop.out) == 2
    assert "--out" in error(capsys)
    assert shop.held() == {"thesis.tex": b"years of work\n"}


# ---- killed, failing, at the same time

# dies before its n-th step that changes the disk
MORTAL = f"""
import os, pathlib, shutil, signal, sys
sys.path.insert(0, {str(TOOL.parent)!r})
import patchq
left = int(os.environ["STEPS"])
def mortal(real):
    def step(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    return step
for owner, name in (pathlib.Path, "write_bytes"), (pathlib.Path, "rename"), (os, "replace"), (shutil, "rmtree"):
    setattr(owner, name, mortal(getattr(owner, name)))
sys.exit(patchq.main(sys.argv[1:]))
"""


def test_killed_at_any_step_it_leaves_no_half_patched_source(shop: Workshop) -> None:
    shop.add("first", shop.insert("src/llama-graph.cpp", "line 10", "hook();"))
    shop.main("prepare", "--out", shop.out)
    kept = shop.root / "kept"
    shutil.copytree(shop.out, kept)
    shop.add("second", shop.insert("src/llama-arch.cpp", "arch 5", "arch();"))
    for steps in range(1, 100):
        shutil.rmtree(shop.out.parent)
        shutil.copytree(kept, shop.out)
        process = shop.start("prepare", "--out", shop.out, script=MORTAL, STEPS=str(steps))
        process.communicate()
        assert shop.whole() or not shop.out.exists(), f"half-patched when killed at step {steps}"
        if process.returncode == 0:
            break
        graph = shop.out.with_name(".out.old") / "src/llama-graph.cpp"
        old = (graph if graph.exists() else shop.out / "src/llama-graph.cpp").stat().st_mtime_ns
        assert shop.main("prepare", "--out", shop.out) == 0
        assert shop.held() == shop.patched() and shop.whole()
        assert times(shop)["src/llama-graph.cpp"] == old, f"recompiles after a kill at step {steps}"
        assert sorted(file.name for file in shop.out.parent.iterdir()) == [".out.lock", "out"]
    assert steps > len(TREE) + 4  # it did die at every file, at the record and around both renames


def test_a_full_disk_leaves_the_old_source(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.main("prepare", "--out", shop.out)
    before = times(shop)
    two_patches(shop)

    def full(file: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert shop.main("prepare", "--out", shop.out) == 2
    assert "No space left on device" in error(capsys)
    assert times(shop) == before
    assert shop.main("prepare", "--out", shop.out) == 0
    assert shop.held() == shop.patched()


def test_concurrent_runs_agree(shop: Workshop) -> None:
    two_patches(shop)
    runs = [shop.start("prepare", "--out", shop.out) for _ in range(4)]
    said = sorted(run.communicate()[0].split(": ")[2].split(",")[0] for run in runs)
    assert [run.returncode for run in runs] == [0] * 4
    assert said == ["prepared", "up to date", "up to date", "up to date"]
    assert shop.held() == shop.patched()


def test_no_place_to_write_is_one_line(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.main("prepare", "--out", shop.sdist / "out") == 2
    assert str(shop.sdist) in error(capsys)


# ---- where the source comes from


@pytest.mark.parametrize("folder", ["source", "source/vendor/llama.cpp"])
def test_local_source(shop: Workshop, folder: str) -> None:
    assert shop.main("prepare", "--out", shop.out, "--source", shop.root / folder) == 0
    assert shop.held() == shop.patched()


def test_environment_names_a_local_sdist(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDOWKV_SDIST", str(shop.sdist))
    assert patchq.main(["--queue", str(shop.queue), "prepare", "--out", str(shop.out)]) == 0
    assert shop.held() == shop.patched()


@pytest.mark.parametrize("change", ["edited", "added", "removed", "line ends"])
def test_local_source_must_be_pristine(shop: Workshop, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = shop.source / "vendor/llama.cpp/src/llama-arch.cpp"
    if change == "removed":
        file.unlink()
    elif change == "line ends":
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    else:
        write(file.with_name("more.cpp") if change == "added" else file, "other\n")
    assert shop.main("prepare", "--out", shop.out, "--source", shop.source) == 2
    text = error(capsys)
    assert "not the pristine" in text and patchq.read_pin(shop.queue).tree_sha256 in text
    assert not shop.out.exists()


def test_what_is_not_kept_may_differ(shop: Workshop) -> None:
    write(shop.source / "vendor/llama.cpp/tools/unused.cpp", "other\n")
    assert shop.main("prepare", "--out", shop.out, "--source", shop.source) == 0


def test_another_folder_as_source(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert shop.main("prepare", "--out", shop.out, "--source", shop.queue) == 2
    assert "has no include" in error(capsys)


def test_wrong_hash(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    right = patchq.read_pin(shop.queue).sha256
    write(shop.sdist, "not the archive")
    assert shop.main("prepare", "--out", shop.out) == 2
    text = error(capsys)
    assert right in text and patchq.sha256(b"not the archive") in text and "LLAMA_CPP_SDIST" in text
    assert not shop.out.exists()


@pytest.fixture
def index(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder in the place of the package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.sdist.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return shop.sdist


def test_download(shop: Workshop, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = shop.root / "cache"
    assert shop.main("prepare", "--out", shop.out, "--cache", cache) == 0
    assert "downloading" in capsys.readouterr().out and shop.held() == shop.patched()
    assert sorted(file.name for file in cache.iterdir()) == [".lock", index.name]

    shutil.rmtree(shop.out)
    assert shop.main("prepare", "--out", shop.out, "--cache", cache) == 0
    assert "downloading" not in capsys.readouterr().out

    shutil.rmtree(shop.out)
    write(cache / index.name, "half of it")
    assert shop.main("prepare", "--out", shop.out, "--cache", cache) == 0
    assert "downloading" in capsys.readouterr().out and shop.held() == shop.patched()


def test_download_lies_beside_the_prepared_folder(shop: Workshop, index: Path) -> None:
    assert patchq.main(["--queue", str(shop.queue), "prepare", "--out", str(shop.out)]) == 0
    assert (shop.out.parent / "sdist" / index.name).is_file()


def test_download_with_another_hash(shop: Workshop, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = patchq.read_pin(shop.queue).sha256
    shop.write_pin(sha256="0" * 64)
    assert shop.main("prepare", "--out", shop.out, "--cache", shop.root / "cache") == 2
    text = error(capsys)
    assert got in text and "0" * 64 in text and "pin.toml" in text


@pytest.mark.parametrize("trouble", ["no network", "no pip"])
def test_download_fails(
    shop: Workshop, index: Path, trouble: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if trouble == "no network":
        monkeypatch.setenv("PIP_FIND_LINKS", str(shop.queue))
    else:
        python = shop.root / "python"
        write(python, "#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
    assert shop.main("prepare", "--out", shop.out, "--cache", shop.root / "cache") == 2
    text = error(capsys)
    assert "-DLLAMA_CPP_SDIST=FILE" in text and "-DLLAMA_CPP_SOURCE_DIR=DIR" in text
    assert ("No matching distribution" if trouble == "no network" else "No module named pip") in text


def test_pin_with_a_key_missing(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    write(shop.queue / "pin.toml", 'package = "tiny-upstream"\n')
    assert shop.main("prepare", "--out", shop.out) == 2
    assert "'tree_sha256'" in error(capsys)
