"""Counts, in the machine code of the CUDA kernels, the instructions that a cell takes; no GPU needed.

Printed are those of the loop over tiles, of all warps of a block for one cell (a block of the old kernel for many rows has loops of
several lengths inside that loop, and is not counted). Part of them runs only when a maximum grows, or with a soft cap.

    python -m tests.gpu.count [--arch 90] [--source build/dev/llama.cpp] [--disassembler nvdisasm]

nvdisasm is part of the CUDA toolkit, or of the wheel nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from tests.gpu import build

N_WARPS = 4
Code = list[tuple[str, str]]  # opcode, operands


def parse(text: str) -> Iterator[tuple[str, Code, dict[str, int]]]:
    """Name, instructions and labels of every function that nvdisasm printed."""
    for section in text.split("\n\t.section\t")[1:]:
        name = re.match(r"\.text\.(\S+?),", section)
        if not name:
            continue
        code: Code = []
        labels: dict[str, int] = {}
        for line in section.splitlines():
            if label := re.match(r"\.?(L\w*):", line.strip()):
                labels[label[1]] = len(code)
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
                code.append((found[1], found[2]))
        yield name[1], code, labels


def loops(code: Code, labels: dict[str, int]) -> Iterator[Code]:
    """Bodies of the loops: from a label to a branch back to it, shortest first."""
    found = []
    for i, (opcode, operands) in enumerate(code):
        target = re.search(r"\.(L\w+)", operands) if opcode.startswith("BRA") else None
        if target and labels.get(target[1], len(code)) <= i:
            found.append(code[labels[target[1]] : i + 1])
    yield from sorted(found, key=len)


def count(body: Code, prefix: str) -> int:
    return sum(opcode.startswith(prefix) for opcode, _ in body)


def rows_of(text: str) -> Iterator[tuple[str, str, int, int, float, int]]:
    """Kernel, type, D, rows, instructions for a cell, and those of them that spill."""
    for name, code, labels in parse(text):
        if vec := re.search(r"ragged_vecI1\dfattn_row_(\w+?)Li(\d+)ELi(\d+)E", name):
            lanes, n_rows = int(vec[2]), int(vec[3])
            dim, n_cells = 8 * lanes, 32 // lanes * (2 if n_rows > 4 else 4) * N_WARPS
            body = next(b for b in loops(code, labels) if count(b, "MUFU.EX2") and count(b, "LDG") and not count(b, "BAR"))
            kernel, kind = "vec", vec[1]
        elif mma := re.search(r"ragged_mmaI1\dfattn_row_(\w+?)Li(\d+)ELi(\d+)E", name):
            dim, n_rows = int(mma[2]), int(mma[3])
            n_cells = (4096 if n_rows > 32 else 8192) // dim
            body = next(b for b in loops(code, labels) if count(b, "HMMA"))
            kernel, kind = "mma", mma[1]
        else:
            continue
        yield kernel, kind, dim, n_rows, len(body) * N_WARPS / n_cells, count(code, "STL") + count(code, "LDL")


def compile_cubin(source: Path, arch: int, out: Path) -> None:
    root = build.ROOT
    nvcc = build.find_nvcc()
    if nvcc is None:
        sys.exit("no nvcc: install the CUDA toolkit")
    toolkit = build.toolkit_of(nvcc)
    cublas = toolkit / "include"
    if not build.has_cublas(toolkit):
        cache = Path(platformdirs.user_cache_dir("windowkv-edge")) / "cublas"
        cublas = build.fetch_cublas(build.major_of(nvcc), cache, libraries=False) / "include"
    folders = [root / "native", root / "native/ggml", root / "native/ggml-cuda", cublas]
    folders += [source / "ggml" / name for name in ("src/ggml-cuda", "src", "include")]
    command = [
        str(nvcc), "-std=c++17", "-cubin", f"-arch=sm_{arch}", "-use_fast_math", "-extended-lambda", "-DGGML_CUDA_USE_GRAPHS",
        "-DGGML_SCHED_MAX_COPIES=4", *(f"-I{folder}" for folder in folders),
        str(root / "native/ggml-cuda/flash-attn-ragged.cu"), "-o", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="instructions of the CUDA kernels for a cell")
    parser.add_argument("--arch", type=int, default=90, help="compute capability (90)")
    parser.add_argument("--source", type=Path, default=build.ROOT / "build/dev/llama.cpp", help="the patched llama.cpp")
    parser.add_argument("--cubin", type=Path, help="machine code that was made before")
    parser.add_argument("--disassembler", default="nvdisasm", help="nvdisasm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cubin = args.cubin or Path(folder) / "ragged.cubin"
        if not args.cubin:
            compile_cubin(args.source, args.arch, cubin)
        text = subprocess.run([args.disassembler, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    print("kernel  cells   D  rows  instructions/cell  spills")
    for kernel, kind, dim, n_rows, per_cell, spills in sorted(rows_of(text)):
        print(f"{kernel:6}  {kind:5} {dim:4} {n_rows:4} {per_cell:18.1f} {spills:7}")


if __name__ == "__main__":
    main()
