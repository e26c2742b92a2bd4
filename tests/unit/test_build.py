"""The build says what is missing: each failure at configure time is one clear message."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def configure(build: Path, *options: str, tools: tuple[str, ...] = (), **env: str) -> str:
    """Output of a configure run that has to fail. With tools, only these are on the PATH."""
    cmake = shutil.which("cmake")
    assert cmake, "cmake is missing: pip install '.[test]' brings it"
    path = os.environ["PATH"]
    if tools:
        folder = build.parent / "bin"
        folder.mkdir()
        for name in tools:
            if found := shutil.which(name):
                (folder / name).symlink_to(found)
        path = str(folder)
    run = subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}", *options],
        capture_output=True, text=True, timeout=300,
        env={**{k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "WINDOWKV_SDIST")}, "PATH": path, **env},
    )  # fmt: skip
    assert run.returncode != 0
    return " ".join((run.stdout + run.stderr).split())


def test_compiler_missing(tmp_path: Path) -> None:
    output = configure(tmp_path / "build", tools=("make", "ninja", "uname", "sh"))
    assert "no C compiler found. Install one" in output


def test_unsupported_platform(tmp_path: Path) -> None:
    output = configure(tmp_path / "build", "-DCMAKE_SYSTEM_NAME=Windows")
    assert "builds on Linux and macOS, this is Windows" in output


def test_wrong_hash(tmp_path: Path) -> None:
    sdist = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    sdist.write_bytes(b"not the pinned source")
    output = configure(tmp_path / "build", f"-DLLAMA_CPP_SDIST={sdist}")
    assert "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e" in output
    assert "could not be prepared" in output
    assert not (tmp_path / "build" / "llama.cpp").exists()


@pytest.mark.parametrize("option", ["LLAMA_CPP_SDIST", "LLAMA_CPP_SOURCE_DIR"])
def test_local_source_that_is_not_there(option: str, tmp_path: Path) -> None:
    output = configure(tmp_path / "build", f"-D{option}={tmp_path / 'nowhere'}")
    assert "nowhere" in output and "could not be prepared" in output


def test_no_network(tmp_path: Path) -> None:
    output = configure(tmp_path / "build", PIP_NO_INDEX="1", PIP_NO_CACHE_DIR="1", PIP_FIND_LINKS=str(tmp_path))
    assert "LLAMA_CPP_SDIST" in output and "could not be prepared" in output
