"""hipcc compiles our CUDA files too, without a warning; no GPU needed. No build takes them yet: nobody ran them on an AMD GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HIPCC = shutil.which("hipcc") or shutil.which("hipcc", path="/opt/rocm/bin")
FILES = sorted((ROOT / "native" / "ggml-cuda").rglob("*.cu"))

pytestmark = pytest.mark.skipif(
    HIPCC is None, reason="no hipcc: install ROCm's compiler to compile the kernels for AMD GPUs"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patched llama.cpp."""
    folder = tmp_path_factory.mktemp("hip") / "llama.cpp"
    built = sorted((ROOT / "build").glob("*/download"))
    cache = ["--cache", str(built[0])] if built else []
    command = [sys.executable, str(ROOT / "ggml_patch" / "patchq.py"), "prepare", "--out", str(folder), *cache]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_our_files(file: Path, source: Path) -> None:
    environment = {**os.environ, "HIP_PLATFORM": "amd"}  # on a machine with nvcc hipcc would ask that
    text = subprocess.run([str(HIPCC), "--version"], capture_output=True, text=True, env=environment, check=True).stdout
    version = tuple(int(part) for part in re.findall(r"HIP version: (\d+)\.(\d+)", text)[0])

    folders = [ROOT / "native", ROOT / "native/ggml", ROOT / "native/ggml-cuda"]
    if version < (6, 1):  # of which llama.cpp says that it needs it
        folders.insert(0, ROOT / "tests/gpu/rocm5")
    upstream = [source / "ggml/src/ggml-cuda", source / "ggml/src", source / "ggml/include"]
    command = [
        str(HIPCC), "-fsyntax-only", "-std=c++17", "-x", "hip", str(file),
        "--offload-arch=gfx1030", "--offload-arch=gfx90a",
        "-DGGML_USE_HIP", "-DGGML_HIP_NO_VMM", "-Wall", "-Wextra", "-Werror", "-Wno-unused-command-line-argument",
        "-Wno-unused-function", "-Wno-unused-parameter",
        *(f"-I{folder}" for folder in folders), *(f"-isystem{folder}" for folder in upstream),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]


def test_no_hip_build_calls_them(source: Path) -> None:
    """Such a device refuses the op, and attention takes the way of backends without it."""
    text = (source / "ggml/src/ggml-cuda/ggml-cuda.cu").read_text()
    calls = [match.start() for match in re.finditer(r"ggml_cuda_(flash_attn_ragged|ragged_select)|(flash-attn-ragged|ragged-select)\.cuh", text)]
    assert len(calls) == 6
    for call in calls:
        before = text[:call]
        guard = before.rindex("\n#if ")
        assert before[guard:].startswith("\n#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)\n")
        assert "#endif" not in before[guard:]
