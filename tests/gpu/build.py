"""Builds the libraries and test programs for a GPU, on a machine with or without one.

Without one the linker gets a driver library made of nothing but names; and what toolkits may lack of cuBLAS comes from its wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = ("llama", "test-backend-ops-ragged", "test-ragged")
CUBLAS = {13: "nvidia-cublas==13.1.0.3", 12: "nvidia-cublas-cu12==12.9.1.4"}  # by the toolkit's major version

Run = Callable[[Sequence[str | Path]], str]


def find_nvcc() -> Path | None:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(found) if found else None


def toolkit_of(nvcc: Path) -> Path:
    """The toolkit's folder: with include/ and lib64/."""
    text = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", text, re.M)
    return Path(found[1]).resolve() if found else nvcc.resolve().parents[1]


def major_of(nvcc: Path) -> int:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return int(text.split("release ")[1].split(".")[0])


def has_cublas(toolkit: Path) -> bool:
    libraries = [toolkit / name / "libcublas.so" for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    return (toolkit / "include" / "cublas_v2.h").exists() and any(path.exists() for path in libraries)


def fetch_cublas(major: int, folder: Path, libraries: bool = True) -> Path:
    """A folder with include/ of cuBLAS and, if asked for, lib/ (600 MB), from its wheel; fetched once."""
    folder = folder / CUBLAS[major].replace("==", "-")
    include, lib = folder / "include", folder / "lib"
    if (include / "cublas_v2.h").exists() and (not libraries or (lib / f"libcublas.so.{major}").exists()):
        return folder
    wheels = folder / "wheel"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), CUBLAS[major]]
    subprocess.run(command, check=True)
    include.mkdir(exist_ok=True)
    lib.mkdir(exist_ok=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        # the header that is looked for comes last: what was cut off is fetched again
        for name in sorted(archive.namelist(), key=lambda name: name.endswith("cublas_v2.h")):
            is_header = "/include/" in name and name.endswith(".h")
            if is_header or (libraries and re.search(r"/libcublas(Lt)?\.so\.\d+$", name)):
                path = (include if is_header else lib) / Path(name).name
                with archive.open(name) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out)
    shutil.rmtree(wheels)
    return folder


def has_driver_library(toolkit: Path) -> bool:
    """Whether the linker finds libcuda: the driver's, or the toolkit's stub."""
    stubs = [toolkit / "lib64/stubs/libcuda.so", *toolkit.glob("targets/*/lib/stubs/libcuda.so")]
    if any(path.exists() for path in stubs):
        return True
    listed = (
        subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout if shutil.which("ldconfig") else ""
    )
    return "libcuda.so " in listed


def write_driver_stub(toolkit: Path, folder: Path) -> Path:
    """A libcuda.so for the linker: all functions of cuda.h, which do nothing. The driver's own is loaded at run time."""
    folder.mkdir(parents=True, exist_ok=True)
    header = ["-include", "cuda.h", f"-I{toolkit / 'include'}"]
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-E", "-P", "-x", "c", *header, os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = sorted(set(re.findall(r"\bCUresult\s+(cu\w+)\s*\(", text)))
    source, library = folder / "libcuda.c", folder / "libcuda.so"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names), encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    return library


def cuda_options(folder: Path, arch: str | None) -> list[str]:
    """CMake's options for a named architecture, or for the GPU of this machine (None).

    Raises:
        FileNotFoundError: there is no nvcc.
        subprocess.CalledProcessError: the compiler or pip failed.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("no nvcc: install the CUDA toolkit")
    toolkit, major = toolkit_of(nvcc), major_of(nvcc)
    options = ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={arch or 'native'}"]
    if arch:
        # it runs on another processor, and has what there is on that machine
        options += ["-DGGML_NATIVE=OFF", "-DGGML_CUDA_NCCL=OFF"]
    if not has_driver_library(toolkit):
        options.append(f"-DCUDA_cuda_driver_LIBRARY={write_driver_stub(toolkit, folder / 'stubs')}")
    if not has_cublas(toolkit):
        cublas = fetch_cublas(major, folder / "cublas").resolve()
        options.append(f"-DCMAKE_CUDA_FLAGS=-isystem={cublas / 'include'}")
        options += [
            f"-DCUDA_{name}_LIBRARY={cublas / 'lib' / f'lib{name}.so.{major}'}" for name in ("cublas", "cublasLt")
        ]
        # programs are linked with libggml-cuda, which needs it
        options.append(f"-DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,{cublas / 'lib'}")
    return options


def runtime_libraries() -> list[Path]:
    """Small libraries that the build is linked with and another machine may lack: CUDA's runtime, and OpenMP's."""
    res = []
    nvcc = find_nvcc()
    if nvcc is not None:
        name = f"libcudart.so.{major_of(nvcc)}"
        res += [path for part in ("lib64", "lib") if (path := toolkit_of(nvcc) / part / name).exists()][:1]
    command = [os.environ.get("CC", "cc"), "-print-file-name=libgomp.so.1"]
    openmp = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return [*res, *([openmp] if openmp.is_absolute() else [])]


def build(run: Run, folder: Path, source: Path | None, arch: str | None = None, jobs: int | None = None) -> None:
    """Configure and build into a folder.

    Args:
        run: runs a command that has to succeed.
        folder: of the build.
        source: llama.cpp of the pinned version; None = download.
        arch: CUDA architecture such as "90"; None = that of this machine's GPU, or Metal.
        jobs: compilers at a time; None = as many as there are cores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # the address sanitizer would hide CUDA's devices
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DWINDOWKV_TESTS=ON", "-DWINDOWKV_SANITIZE=OFF"]
    if arch or sys.platform != "darwin":
        options += cuda_options(folder.resolve(), arch)
    if source:
        kind = "LLAMA_CPP_SOURCE_DIR" if source.is_dir() else "LLAMA_CPP_SDIST"
        options.append(f"-D{kind}={source.resolve()}")
    if shutil.which("ccache"):
        options += [f"-DCMAKE_{lang}_COMPILER_LAUNCHER=ccache" for lang in ("C", "CXX", "CUDA")]
    run(["cmake", "-S", ROOT, "-B", folder, *options])
    run(["cmake", "--build", folder, "-j", str(jobs or os.cpu_count() or 4), "--target", *TARGETS])
