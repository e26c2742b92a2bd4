"""nvcc compiles our CUDA files and the patched dispatch, without a warning or a register that spills; no GPU needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import build
import platformdirs
import pytest

ROOT = Path(__file__).parents[2]
NVCC = build.find_nvcc()

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: install the CUDA toolkit to compile the CUDA kernels")


@pytest.fixture(scope="session")
def major() -> int:
    """Version of the toolkit."""
    assert NVCC is not None
    return build.major_of(NVCC)


@pytest.fixture(scope="session")
def cublas(major: int) -> Path:
    """Folder of cuBLAS' headers, which toolkits without libraries lack; fetched once."""
    assert NVCC is not None
    toolkit = build.toolkit_of(NVCC)
    if build.has_cublas(toolkit):
        return toolkit / "include"
    cache = Path(platformdirs.user_cache_dir("windowkv-edge")) / "cublas"
    return build.fetch_cublas(major, cache, libraries=False) / "include"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patched llama.cpp."""
    folder = tmp_path_factory.mktemp("cuda") / "llama.cpp"
    built = sorted((ROOT / "build").glob("*/download"))
    cache = ["--cache", str(built[0])] if built else []
    command = [sys.executable, str(ROOT / "ggml_patch" / "patchq.py"), "prepare", "--out", str(folder), *cache]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def compile_cuda(file: Path, archs: dict[int, list[int]], source: Path, cublas: Path, out: Path, *options: str) -> None:
    """Makes PTX of some architectures, and of each the machine code of others."""
    own = [ROOT / "native", ROOT / "native/ggml", ROOT / "native/ggml-cuda"]
    upstream = [source / "ggml/src/ggml-cuda", source / "ggml/src", source / "ggml/include", cublas]
    command = [
        str(NVCC), "-std=c++17", "-c", str(file), "-o", str(out / f"{file.stem}.o"), "-use_fast_math", "-extended-lambda",
        "-DGGML_CUDA_USE_GRAPHS", "-DGGML_SCHED_MAX_COPIES=4", "--threads", str(os.cpu_count() or 1),
        "-Xcompiler", "-Wall,-Wextra,-Wno-pedantic,-Wno-unused-function,-Wno-unused-parameter,-Wno-array-bounds",
        "-Werror", "all-warnings", "--keep", "--keep-dir", str(out), *options,
        *(f"-I{folder}" for folder in [*own, *upstream]),
        *(f"-gencode=arch=compute_{ptx},code=[{','.join(f'sm_{arch}' for arch in sass)}]" for ptx, sass in archs.items()),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "warning" not in run.stderr.lower(), run.stderr[-4000:]


OURS = [path for folder in ("simt", "ggml-cuda") for path in (ROOT / "native" / folder).rglob("*.*")]
FILES = sorted((ROOT / "native" / "ggml-cuda").rglob("*.cu"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_our_files(file: Path, major: int, source: Path, cublas: Path, tmp_path: Path) -> None:
    # One architecture takes 75 s of a CPU. Copies and products are others from sm_80 on, for nothing that is newer, so that the PTX of
    # two is that of all; their machine code differs, with its registers: the oldest and the newest one. Upstream's builds for any GPU
    # hold older ones too, where the toolkit still has them
    archs = {75: [75], 80: [120], **({61: [61]} if major < 13 else {})}
    known = {arch for text in OURS for arch in re.findall(r"__CUDA_ARCH__\s*[<>=!]+\s*(\w+)", text.read_text())}
    expected = {"GGML_CUDA_CC_DP4A", "GGML_CUDA_CC_VOLTA", "GGML_CUDA_CC_TURING", "GGML_CUDA_CC_AMPERE"}
    assert known == expected, "an architecture that the PTX must be made for"
    known = {name for text in OURS for name in re.findall(r"\b\w+_AVAILABLE\b", text.read_text())}
    assert known == {"CP_ASYNC_AVAILABLE"}, "what the PTX must be made with, and without"
    compile_cuda(file, archs, source, cublas, tmp_path, "-Xptxas", "-warn-spills")

    texts = [path.read_text() for path in tmp_path.glob(f"*{file.stem}*.ptx")]
    assert len(texts) == len(archs)
    for text in texts:
        kernels = re.findall(r"\.entry (\w+)\(.*?\n}", text, re.S)
        assert len(kernels) > {"flash-attn-ragged": 50, "ragged-select": 4}[file.stem]
        # a division of 64-bit integers is a loop of some hundred instructions
        assert re.findall(r"\b(?:div|rem)\.[su]64\b.*", text) == []


def test_patched_dispatch(source: Path, cublas: Path, tmp_path: Path) -> None:
    compile_cuda(source / "ggml/src/ggml-cuda/ggml-cuda.cu", {90: [90]}, source, cublas, tmp_path)
