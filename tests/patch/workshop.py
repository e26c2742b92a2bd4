"""A small invented upstream, its source distribution, and a patch queue for it."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import patchq
import strictdiff

TOOL = Path(patchq.__file__)
PINNED = ["include", "ggml", "src", "LICENSE"]

LLAMA_H = """\
#pragma once
struct llama_model; // opaque
enum llama_kind {
    LLAMA_KIND_NONE,
    LLAMA_KIND_SOME,
};
struct llama_params {
    int n_ctx; // { a brace in a comment
    struct { int a; } inner;
};
int llama_decode(void);
"""

TREE = {
    "LICENSE": "free\n",
    "include/llama.h": LLAMA_H,
    "ggml/include/ggml.h": "enum op {\n    OP_ADD,\n    OP_COUNT,\n};\n",
    "src/llama-graph.h": "#pragma once\n",
    "src/llama-graph.cpp": "".join(f"line {n}\n" for n in range(1, 61)),
    "src/llama-arch.cpp": "".join(f"arch {n}\n" for n in range(1, 31)),
    "src/no-newline.txt": "one\ntwo",
}

# a build backend without requirements: pip asks it for metadata when it downloads the sdist
BACKEND = """\
import pathlib
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "tiny_upstream-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-upstream\\nVersion: 1.0\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return info.name
def build_wheel(*args): raise SystemExit("the download must not build anything")
build_sdist = build_wheel
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
PROJECT += '[project]\nname = "tiny-upstream"\nversion = "1.0"\n'

HEADER = "Subject: {}\n\nWhy: it is needed.\n\nWhy not outside upstream:\nno other place.\n\nWhen it can go: never.\n\n"
README = "# Queue\n\n<!-- series: generated -->\n<!-- end of series -->\n\nMore.\n"


class Workshop:
    """Everything in one folder: sdist/ with the archive, source/ unpacked, queue/, and out/ to prepare."""

    def __init__(self, root: Path) -> None:
        self.root, self.queue, self.out = root, root / "queue", root / "work" / "out"
        files = {f"vendor/llama.cpp/{path}": text for path, text in TREE.items()}
        files["vendor/llama.cpp/tools/unused.cpp"] = "not kept\n"
        files |= {"pyproject.toml": PROJECT, "backend.py": BACKEND}
        files["PKG-INFO"] = "Metadata-Version: 2.1\nName: tiny-upstream\nVersion: 1.0\n"
        self.source = root / "source"
        self.sdist = root / "sdist" / "tiny_upstream-1.0.tar.gz"
        self.sdist.parent.mkdir()
        with tarfile.open(self.sdist, "w:gz") as archive:
            for path, text in files.items():
                write(self.source / path, text)
                member = tarfile.TarInfo(f"tiny_upstream-1.0/{path}")
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
        self.write_pin()
        write(self.queue / "series", "# order of application\n")
        write(self.queue / "README.md", README)

    def write_pin(self, **changed: object) -> None:
        tree = {path: text.encode() for path, text in TREE.items()}
        values = {
            "package": "tiny-upstream",
            "version": "1.0",
            "sha256": hashlib.sha256(self.sdist.read_bytes()).hexdigest(),
            "tree_sha256": patchq.tree_hash(tree),
            "subdir": "vendor/llama.cpp",
            "paths": PINNED,
        } | changed
        text = "# the pin\n" + "".join(f"{key} = {value!r}\n".replace("'", '"') for key, value in values.items())
        write(self.queue / "pin.toml", text)

    def main(self, *words: object) -> int:
        """Runs the tool in this process; the source is the sdist."""
        return patchq.main(self.words(words))

    def start(self, *words: object, script: str | None = None, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, *([str(TOOL)] if script is None else ["-c", script]), *self.words(words)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe, env=os.environ | env)

    def words(self, words: tuple[object, ...]) -> list[str]:
        local = words[0] != "stamp" and not {"--source", "--sdist", "--cache"} & set(words)
        return ["--queue", str(self.queue), *map(str, words), *(["--sdist", str(self.sdist)] if local else [])]

    def add(self, name: str, edits: dict[str, str | None], header: str | None = None) -> None:
        """A new patch at the end of the series that gives files these texts (None: deletes them)."""
        before = self.patched()
        after = {**before, **{path: text.encode() for path, text in edits.items() if text is not None}}
        after = {path: data for path, data in after.items() if edits.get(path, "") is not None}
        self.put(name, (header or HEADER.format(name)) + strictdiff.diff_trees(before, after))

    def put(self, name: str, text: str) -> None:
        """A new patch with just this text, the series and the index telling of it."""
        write(self.queue / f"{name}.patch", text)
        series = self.queue / "series"
        series.write_text(series.read_text() + f"{name}.patch\n")
        patchq.write_patches(self.queue, patchq.load_patches(self.queue))

    def patched(self) -> dict[str, bytes]:
        tree = {path: text.encode() for path, text in TREE.items()}
        for patch in patchq.load_patches(self.queue):
            tree = strictdiff.apply_patch(tree, patch)
        return tree

    def text(self, path: str) -> str:
        return self.patched()[path].decode()

    def insert(self, path: str, after: str, line: str) -> dict[str, str | None]:
        """The edit that puts a line behind the first one that reads `after`."""
        old = self.text(path)
        assert f"{after}\n" in old
        return {path: old.replace(f"{after}\n", f"{after}\n{line}\n", 1)}

    def patch(self, name: str) -> Path:
        return self.queue / f"{name}.patch"

    def held(self) -> dict[str, bytes]:
        return patchq.read_folder(self.out)

    def whole(self) -> bool:
        """Whether out/ is a complete prepared folder."""
        record = patchq.read_record(self.out)
        return record is not None and record.files == patchq.hashes(self.held())


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
