"""One file with all that a check needs on another machine: programs, libraries, the Python package and what it imports.

Python there brings numpy and cffi, which are compiled for one version of Python; everything else that is imported lies in the
archive. A CUDA archive also needs the driver and cuBLAS of that machine.

    windowkv-gpu/archive.json                what it was made of
    windowkv-gpu/package/                    a folder for PYTHONPATH
    windowkv-gpu/package/windowkv_edge/lib   libraries; programs in _tests/ find them by their RPATH
    windowkv-gpu/tests/                      the check itself
    windowkv-gpu/models/                     a model, if there was room
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NAME = "windowkv-gpu"
MAX_BYTES = 52 << 20
PRESET = 6  # of xz
PROGRAMS = ("test-backend-ops-ragged", "test-ragged")

# what the package imports when it measures, without numpy and cffi
IMPORTED = (
    "diskcache", "gguf", "jinja2", "llama-cpp-python", "markupsafe", "platformdirs", "psutil", "pycparser", "pyyaml",
    "rich", "typing-extensions",
)  # fmt: skip

# what every machine has
SYSTEM = r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d+|ld-linux.*"

Json = dict[str, Any]


class ArchiveError(Exception):
    """An archive cannot be made, or is none."""


@dataclass(frozen=True)
class Built:
    """What a build or an installed package has of the native side.

    Attributes:
        lib: folder of libraries.
        include: folder of headers.
        stamp: the file _stamp.py.
        programs: folder of test programs.
    """

    lib: Path
    include: Path
    stamp: Path
    programs: Path

    def missing(self, programs: bool = True) -> list[str]:
        paths = (self.lib, self.include, self.stamp, *((self.programs,) if programs else ()))
        return [str(path) for path in paths if not path.exists()]

    def libraries(self) -> list[Path]:
        """One file per library, under the name its users look for."""
        return sorted(
            path for path in self.lib.iterdir() if re.fullmatch(r"libllama\.so|libggml[a-z-]*\.so\.\d+", path.name)
        )


def add_package(folder: Path, version: str = "0+check") -> Path:
    """The package's Python files in a folder for PYTHONPATH; its own folder, which lacks the native side."""
    own = folder / "windowkv_edge"
    left_out = shutil.ignore_patterns("__pycache__", "lib", "include", "_stamp.py", "_tests")
    shutil.copytree(ROOT / "windowkv_edge", own, ignore=left_out)
    # its version is asked for when it is imported
    about = folder / f"windowkv_edge-{version}.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: windowkv-edge\nVersion: {version}\n", encoding="utf-8")
    return own


def _add_imported(folder: Path) -> None:
    """Python files of other packages; of compiled ones only those that every Python version can load."""
    for name in IMPORTED:
        found = importlib.metadata.distribution(name)
        for file in found.files or ():
            path = Path(str(file))
            if ".." in path.parts or path.is_absolute() or "__pycache__" in path.parts:
                continue  # commands, and what is made again
            if ".dist-info" in path.parts[0] and path.name != "METADATA":
                continue
            if path.suffix in (".so", ".pyd", ".a", ".c", ".h") and ".abi3." not in path.name:
                continue  # these packages have a version in Python beside it
            source = Path(str(found.locate_file(file)))
            if source.is_file():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, folder / path)


def _add_checks(folder: Path) -> None:
    (folder / "gpu").mkdir(parents=True)
    for path in sorted((ROOT / "tests/gpu").glob("*.py")):
        if not path.name.startswith("test_"):
            shutil.copy2(path, folder / "gpu")
    shutil.copy2(ROOT / "tests/tiny_model.py", folder)


def _copy_program(source: Path, to: Path, ours: bool = True) -> None:
    """Ours without symbols, which would be most of it."""
    shutil.copy2(source.resolve(), to)
    if ours and shutil.which("strip"):
        subprocess.run(["strip", "--strip-unneeded", to], check=True)


def needed_by(file: Path) -> set[str]:
    """Names of the libraries that a library or program is linked with."""
    text = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))


def _check_needed(own: Path, there: Sequence[str]) -> None:
    """Raise ArchiveError if a library would be missing: not in the archive, not of the system, and not said to be there."""
    files = [*(own / "lib").iterdir(), *(own / "_tests").iterdir()]
    known = {path.name for path in files} | set(there)
    missing = sorted(
        f"{name} (of {path.name})"
        for path in files
        for name in needed_by(path) - known
        if not re.fullmatch(SYSTEM, name)
    )
    if missing:
        raise ArchiveError(f"the archive would lack {', '.join(missing)}")


def pack(
    file: Path,
    built: Built,
    about: Json,
    libraries: Sequence[Path] = (),
    modules: Sequence[Path] = (),
    model: Path | None = None,
    max_bytes: int = MAX_BYTES,
) -> Json:
    """Write the archive; what it says about itself.

    Args:
        file: to write, a .tar.xz.
        built: the native side.
        about: commit and the like; "needed" are libraries that the other machine has.
        libraries: further ones, of others.
        modules: what the programs can load.
        model: left out if there is no room.
        max_bytes: of the archive.

    Raises:
        ArchiveError: something is missing, or it is too large.
    """
    if missing := built.missing():
        raise ArchiveError(f"no {', '.join(missing)}; run the step build first")
    with tempfile.TemporaryDirectory() as work:
        top = Path(work) / NAME
        own = add_package(top / "package", about.get("version", "0+check"))
        for name in ("lib", "_tests", "include"):
            (own / name).mkdir()
        for path in built.libraries():
            _copy_program(path, own / "lib" / path.name)
        for path in (*(built.programs / name for name in PROGRAMS), *modules):
            _copy_program(path, own / "_tests" / path.name)
        for path in libraries:
            _copy_program(path, own / "lib" / path.name, ours=False)
        _check_needed(own, about.get("needed", ()))
        for path in sorted(built.include.glob("windowkv*.h")):
            shutil.copy2(path, own / "include")
        shutil.copy2(built.stamp, own / "_stamp.py")
        _add_imported(top / "package")
        _add_checks(top / "tests")
        about = {**about, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}

        # a model hardly shrinks
        if model is not None and model.stat().st_size < max_bytes - _n_bytes(top) // 3:
            (top / "models").mkdir()
            shutil.copy2(model, top / "models")
            about["model"] = model.name
        (top / "archive.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file, "w:xz", preset=PRESET) as archive:
            archive.add(top, NAME)
    size = file.stat().st_size
    if size > max_bytes:
        file.unlink()
        raise ArchiveError(f"the archive has {size >> 20} MiB, at most {max_bytes >> 20} travel")
    return {**about, "file": str(file), "bytes": size}


def _n_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def unpack(archive: Path, folder: Path) -> Path:
    """The archive's folder: a file is unpacked into ``folder``, a folder is taken as it is.

    Raises:
        ArchiveError: it is no archive of ours.
    """
    if not archive.exists():
        raise ArchiveError(f"there is no {archive}")
    top = archive
    if archive.is_file():
        top = folder / NAME
        shutil.rmtree(top, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tarfile.open(archive) as file:
                if hasattr(tarfile, "data_filter"):
                    file.extractall(folder, filter="data")
                else:  # Python 3.10 and 3.11 before their last versions
                    file.extractall(folder)
        except (tarfile.TarError, EOFError) as error:
            raise ArchiveError(f"{archive} cannot be unpacked: {error}") from error
    if not (top / "archive.json").exists():
        raise ArchiveError(f"{archive} has no archive.json; make it with --steps build --arch")
    return top


def about(top: Path) -> Json:
    return dict(json.loads((top / "archive.json").read_text(encoding="utf-8")))
