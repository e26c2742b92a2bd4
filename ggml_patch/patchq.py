"""Prepares, checks and exports this folder's patch queue for the pinned llama.cpp.

Only the standard library: CMake runs it by path, before anything is installed. Trees are held in memory
(path -> bytes, about 30 MB), so that nothing half-patched ever reaches a disk. strictdiff.py reads, applies and
writes diffs, rules.py says what they may hold; here is what touches files.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rules import PARAGRAPHS, content_problems, header_problems
from strictdiff import (
    TOOL,
    Patch,
    PatchError,
    Tree,
    apply_patch,
    decode,
    diff_trees,
    parse_patch,
    rebase,
)

LOCAL_SOURCE = "pass -DLLAMA_CPP_SDIST=FILE or -DLLAMA_CPP_SOURCE_DIR=DIR to CMake (here: --sdist, --source)"
RECORD = ".patchq.json"  # in a prepared folder: what it holds
SKELETON = "Subject: <what it does>\n\n" + "".join(f"{label}: <fill in>\n\n" for label in PARAGRAPHS)
INDEX = re.compile(r"(<!-- series[^\n]*-->\n).*?(<!-- end of series -->)", re.DOTALL)


# ---- pin, series and patches -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pin:
    package: str
    version: str
    sha256: str  # of the source distribution
    tree_sha256: str  # of the kept files, see tree_hash()
    subdir: str  # of llama.cpp inside the source distribution
    paths: tuple[str, ...]  # files and folders kept, relative to subdir


def read_pin(queue: Path) -> Pin:
    """Python 3.10 has no tomllib; the strings and arrays of strings used here are written as in Python."""
    found = re.findall(r'^(\w+) *= *("[^"\n]*"|\[[^\]]*\])', read_text(queue / "pin.toml"), re.MULTILINE)
    values = {key: ast.literal_eval(value) for key, value in found}
    names = [field.name for field in fields(Pin)]
    if sorted(values) != sorted(names):
        raise PatchError(f"pin.toml: got keys {sorted(values)}, expected {sorted(names)}; mend {queue / 'pin.toml'}")
    return Pin(**{**values, "paths": tuple(values["paths"])})


def read_series(queue: Path) -> list[str]:
    names = re.findall(r"^[ \t]*([^#\s]+)", read_text(queue / "series"), re.MULTILINE)
    if len(set(names)) < len(names):
        raise PatchError(f"series: got a name twice in {names}, expected each once; mend {queue / 'series'}")
    return names


def load_patches(queue: Path) -> list[Patch]:
    return [parse_patch(name, read_text(queue / name)) for name in read_series(queue)]


def position(patches: Sequence[Patch], name: str) -> int:
    names = [patch.name for patch in patches]
    if name not in names:
        raise PatchError(f"got patch {name!r}, expected one of the series: {', '.join(names) or '(empty)'}")
    return names.index(name)


def stamp_of(queue: Path, patches: Sequence[Patch]) -> str:
    """Hash of pin, series and patches, in order. The first line is the version of what `prepare` writes."""
    digest = hashlib.sha256(b"patchq 1\n")
    for part in (queue / "pin.toml").read_bytes(), *((p.name + "\n" + p.header + p.body).encode() for p in patches):
        digest.update(b"%d\n%s" % (len(part), part))
    return digest.hexdigest()


# ---- upstream source -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where the pristine source comes from: a folder, else a file, else a download kept in the cache."""

    source: Path | None
    sdist: Path | None
    cache: Path


def load_tree(pin: Pin, origin: Origin) -> Tree:
    where = origin.source or origin.sdist or download(pin, origin.cache)
    tree = read_source(pin, where) if origin.source else read_sdist(pin, where)
    if (got := tree_hash(tree)) != pin.tree_sha256:
        raise PatchError(
            f"{where} is not the pristine {pin.package} {pin.version} (edited, another version, or line ends changed "
            f"by git): its files hash to {got}, expected {pin.tree_sha256}; give the pinned source, or none to "
            "download it (when bumping the pin: write the hash got into tree_sha256 of pin.toml)"
        )
    return tree


def read_source(pin: Pin, folder: Path) -> Tree:
    root = folder / pin.subdir if (folder / pin.subdir).is_dir() else folder
    tree: Tree = {}
    for path in pin.paths:
        if not (root / path).exists():
            raise PatchError(f"{root} has no {path}, expected the folder of llama.cpp or of an unpacked sdist")
        tree.update(read_folder(root, path))
    return tree


def read_folder(root: Path, start: str = "") -> Tree:
    top = root / start
    files = [top] if top.is_file() else [file for file in top.rglob("*") if file.is_file() and RECORD not in file.name]
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


def read_sdist(pin: Pin, file: Path) -> Tree:
    if (got := sha256(file.read_bytes())) != pin.sha256:
        raise wrong_hash(pin, str(file), got)
    wanted = re.compile(rf"[^/]+/{re.escape(pin.subdir)}/((?:{'|'.join(map(re.escape, pin.paths))})(?:/.*)?)")
    tree: Tree = {}
    with tarfile.open(file, "r:gz") as archive:
        for member in archive:
            if (match := wanted.fullmatch(member.name)) and (data := archive.extractfile(member)):
                tree[match[1]] = data.read()
    return tree


def wrong_hash(pin: Pin, what: str, got: str) -> PatchError:
    return PatchError(
        f"{what} has sha256 {got}, expected {pin.sha256} ({pin.package} {pin.version}); to use a right one, "
        f"{LOCAL_SOURCE}; to bump the pin, write the hash got into sha256 of pin.toml"
    )


def download(pin: Pin, cache: Path) -> Path:
    """The sdist in the cache, fetched where missing or damaged. pip checks its hash before it runs any of it."""
    target = cache / f"{pin.package.replace('-', '_')}-{pin.version}.tar.gz"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / ".lock"):
        if target.is_file() and sha256(target.read_bytes()) == pin.sha256:
            return target
        partial = fresh_folder(cache / "partial")
        (partial / "pin.txt").write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet"]
        command += ["--no-deps", "--no-binary", pin.package, "--require-hashes", "-r", str(partial / "pin.txt")]
        say(f"downloading {pin.package} {pin.version} with pip into {cache}")
        done = subprocess.run([*command, "-d", str(partial)], check=False, capture_output=True, text=True)
        if got := re.search(r"Got\s+([0-9a-f]{64})", done.stderr):
            raise wrong_hash(pin, f"the downloaded {pin.package} {pin.version}", got[1])
        found = list(partial.glob("*.tar.gz"))
        if done.returncode or len(found) != 1:
            reason = ["no sdist came", *filter(None, done.stderr.split("\n"))][-1]
            raise PatchError(f"pip could not download {pin.package} {pin.version} ({reason}); {LOCAL_SOURCE}")
        os.replace(found[0], target)
        shutil.rmtree(partial)
    return target


# ---- prepare ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    stamp: str
    tree_sha256: str  # of the pin
    patches: dict[str, str]  # name -> sha256 of its diff, in order of application
    files: dict[str, str]  # path -> sha256 of the patched file


def make_record(queue: Path, patches: Sequence[Patch], tree: Tree) -> Record:
    diffs = {patch.name: sha256(patch.body.encode()) for patch in patches}
    return Record(stamp_of(queue, patches), read_pin(queue).tree_sha256, diffs, hashes(tree))


def read_record(folder: Path) -> Record | None:
    try:
        return Record(**json.loads((folder / RECORD).read_bytes()))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def write_record(folder: Path, record: Record) -> None:
    write_file(folder / RECORD, json.dumps(asdict(record), indent=0).encode())


def prepare(queue: Path, patches: Sequence[Patch], out: Path, origin: Origin, discard: bool = False) -> bool:
    """Makes out the patched source; False where it was already. Killed at any point, it can be run again."""
    out = Path(os.path.abspath(out))
    new, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock")):
        if old.exists() and not out.exists():  # killed between the two renames below
            old.rename(out)
        for leftover in new, old:
            shutil.rmtree(leftover, ignore_errors=True)
        record, held = read_record(out), hashes(read_folder(out))
        if record is None:
            if held:
                raise PatchError(
                    f"{out} holds files of others, expected a new or prepared folder; delete it or give another --out"
                )
        elif record.stamp == stamp_of(queue, patches) and record.files.items() <= held.items():
            return False
        elif (edited := sorted(held.items() - record.files.items())) and not discard:
            raise PatchError(
                f"{out} holds edits that no patch has ({', '.join(path for path, _ in edited[:5])}); to keep them "
                f"type: {TOOL} export {out}; to drop them: {TOOL} prepare --out {out} --discard"
            )
        tree = load_tree(read_pin(queue), origin)
        for patch in patches:
            tree = apply_patch(tree, patch)
        write_tree(fresh_folder(new), tree, old=out, held=held)
        write_record(new, make_record(queue, patches, tree))
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    return True


def write_tree(folder: Path, tree: Tree, old: Path, held: dict[str, str]) -> None:
    """Files with the bytes they had in old keep their time, so that little is compiled again. The others are of
    now, pristine ones too: a fixed old time would leave stale objects behind when a patch is dropped."""
    for path, data in tree.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        if held.get(path) == sha256(data):
            at = (old / path).stat().st_mtime_ns
            os.utime(file, ns=(at, at))


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however it ends."""
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# ---- check -----------------------------------------------------------------------------------------


def check(queue: Path, origin: Origin) -> list[str]:
    """Every broken promise of the queue, one line each."""
    odd = set(read_series(queue)) ^ {file.name for file in queue.glob("*.patch")}
    if odd:
        return [f"series and folder differ in {sorted(odd)}; add a line to {queue / 'series'} or delete the file"]
    patches = load_patches(queue)
    problems = [problem for patch in patches for problem in header_problems(patch)]
    index = INDEX.search(read_text(queue / "README.md"))
    if index is None or index[0] != index[1] + index_table(patches) + index[2]:
        problems.append(f"README.md: its index is not that of the series; type: {TOOL} refresh")
    tree = load_tree(read_pin(queue), origin)
    for patch in patches:
        try:
            after = apply_patch(tree, patch)
        except PatchError as error:
            return [*problems, str(error)]
        if diff_trees(tree, after) != patch.body:
            problems.append(f"{patch.name}: its diff differs from what an export writes; type: {TOOL} refresh")
        problems += content_problems(patch, tree, after)
        tree = after
    return problems


def index_table(patches: Sequence[Patch]) -> str:
    rows = (f"| [{p.name}]({p.name}) | {p.header.split(chr(10))[0].removeprefix('Subject: ')} |\n" for p in patches)
    return "| patch | what it does |\n| --- | --- |\n" + "".join(rows)


# ---- export and refresh ----------------------------------------------------------------------------


def export(queue: Path, folder: Path, origin: Origin, name: str | None = None, new: bool = False) -> list[str]:
    """Writes the edits in a prepared folder into one patch and moves the later ones; returns the files written."""
    patches = load_patches(queue)
    at = export_target(queue, patches, folder, name, new)
    base = load_tree(read_pin(queue), origin)
    for patch in patches[:at]:
        base = apply_patch(base, patch)
    tree = read_folder(folder)
    body = diff_trees(base, tree)
    if not body:
        raise PatchError(f"{folder} got no edit for the patch, expected one; to drop a patch see README.md")
    if new and name:
        patches.append(parse_patch(name, SKELETON + body))
    else:
        patches[at] = parse_patch(patches[at].name, patches[at].header + body)
    written = write_patches(queue, patches)
    if new:
        write_file(queue / "series", (read_text(queue / "series") + f"{name}\n").encode())
    write_record(folder, make_record(queue, patches[: at + 1], tree))
    try:
        later = list(rebase(tree, patches[at + 1 :]))
    except PatchError as error:
        raise PatchError(f"written: {', '.join(written)}; but a later patch no longer applies: {error}") from None
    return written + write_patches(queue, patches[: at + 1] + later)


def export_target(queue: Path, patches: Sequence[Patch], folder: Path, name: str | None, new: bool) -> int:
    """Index of the patch that takes the edits: the last one the folder holds, the next one redone by hand, or a new."""
    record = read_record(folder)
    if record is None:
        raise PatchError(f"{folder} is not a prepared folder; type: {TOOL} prepare --out {folder}")
    held = list(record.patches.items())
    count = len(held)
    now = make_record(queue, patches[:count], {})
    if record.tree_sha256 != now.tree_sha256 or held != list(now.patches.items()):
        raise PatchError(
            f"pin or patches have changed since {folder} was prepared, an export would undo that; "
            "prepare another folder, make the edits there and export it"
        )
    if new:
        if not name or not re.fullmatch(r"[a-z][a-z0-9-]*\.patch", name) or (queue / name).exists():
            raise PatchError(f"got the name {name!r}, expected a new one of small letters, digits and '-'")
        at, reached = len(patches), count == len(patches)
    else:
        at = position(patches, name) if name else count - 1
        reached = at in (count - 1, count)
    if at < 0:
        raise PatchError(f"{folder} holds no patch to take the edits; type: {TOOL} export {folder} --new NAME")
    if not reached:
        raise PatchError(
            f"{folder} holds the first {count} of {len(patches)} patches, expected them up to {name} and no more; "
            f"type: {TOOL} prepare --out ANOTHER{'' if new else f' --upto {name}'}, make the edits there and export it"
        )
    return at


def refresh(queue: Path, origin: Origin) -> list[str]:
    """Moves hunks to where their lines stand and rewrites patches and index; returns the files written."""
    return write_patches(queue, list(rebase(load_tree(read_pin(queue), origin), load_patches(queue))))


def write_patches(queue: Path, patches: Sequence[Patch]) -> list[str]:
    readme = read_text(queue / "README.md")
    if not INDEX.search(readme):
        raise PatchError("README.md has no index, expected '<!-- series -->' and '<!-- end of series -->'; add them")
    files = {patch.name: patch.header + patch.body for patch in patches}
    files["README.md"] = INDEX.sub(lambda match: match[1] + index_table(patches) + match[2], readme)
    changed = [name for name, text in files.items() if not (queue / name).exists() or read_text(queue / name) != text]
    for name in changed:
        write_file(queue / name, files[name].encode())
    return changed


# ---- small helpers ---------------------------------------------------------------------------------


def say(text: str) -> None:
    print(f"patchq: {text}", flush=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hashes(tree: Tree) -> dict[str, str]:
    return {path: sha256(data) for path, data in tree.items()}


def tree_hash(tree: Tree) -> str:
    """Over path, length and bytes of every file, in the order of the paths."""
    digest = hashlib.sha256()
    for path, data in sorted(tree.items()):
        digest.update(b"%s\0%d\0%s" % (path.encode(), len(data), data))
    return digest.hexdigest()


def read_text(file: Path) -> str:
    return decode(str(file), file.read_bytes())


def write_file(file: Path, data: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, file)


def fresh_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# ---- command line ----------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def patch(text: str) -> str:
        return text.removesuffix(".patch") + ".patch"

    parser = argparse.ArgumentParser(prog="patchq.py", description=__doc__)
    parser.add_argument("--queue", type=Path, default=Path(__file__).parent, help="folder of pin.toml, series, patches")
    commands = parser.add_subparsers(dest="command", required=True)
    origin = argparse.ArgumentParser(add_help=False)
    group = origin.add_mutually_exclusive_group()
    group.add_argument("--source", type=Path, help="pristine llama.cpp folder, or unpacked sdist, to use")
    group.add_argument("--sdist", type=Path, help="sdist to use (default: $WINDOWKV_SDIST, else a download)")
    origin.add_argument("--cache", type=Path, help="keeps the download (default: $WINDOWKV_CACHE, else beside DIR)")
    command = commands.add_parser("prepare", parents=[origin], help="make a folder the patched source")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder")
    command.add_argument("--discard", action="store_true", help="drop edits in the folder that no patch has")
    group = command.add_mutually_exclusive_group()
    group.add_argument("--upto", type=patch, metavar="NAME", help="stop after this patch")
    group.add_argument("--before", type=patch, metavar="NAME", help="stop before this patch")
    group.add_argument("--pristine", action="store_true", help="apply no patch")
    commands.add_parser("stamp", help="print the hash of pin, series and patches")
    commands.add_parser("check", parents=[origin], help="prove that the queue keeps its promises")
    commands.add_parser("refresh", parents=[origin], help="move hunks to where their lines stand; rewrite the index")
    command = commands.add_parser("export", parents=[origin], help="write the edits in a prepared folder into a patch")
    command.add_argument("out", type=Path, metavar="DIR", help="the folder")
    group = command.add_mutually_exclusive_group()
    group.add_argument("--patch", type=patch, metavar="NAME", help="the patch that takes them (default: the last)")
    group.add_argument("--new", type=patch, metavar="NAME", help="a new patch at the end of the series takes them")
    return parser.parse_args(argv)


def find_origin(args: argparse.Namespace) -> Origin:
    sdist, cache = os.environ.get("WINDOWKV_SDIST"), os.environ.get("WINDOWKV_CACHE")
    beside = args.out.absolute().parent if "out" in args else args.queue.absolute().parent / "build"
    default = Path(cache) if cache else beside / "sdist"
    return Origin(args.source, args.sdist or (Path(sdist) if sdist else None), args.cache or default)


def run(args: argparse.Namespace) -> int:
    queue: Path = args.queue
    if args.command == "stamp":
        print(stamp_of(queue, load_patches(queue)))
    elif args.command == "prepare":
        patches = [] if args.pristine else load_patches(queue)
        if name := args.upto or args.before:
            patches = patches[: position(patches, name) + bool(args.upto)]
        made = prepare(queue, patches, args.out, find_origin(args), args.discard)
        say(f"{args.out}: {'prepared' if made else 'up to date'}, {len(patches)} patches")
    elif args.command == "check":
        problems = check(queue, find_origin(args))
        print(*(f"patchq: {problem}" for problem in problems or ["the queue keeps its promises"]), sep="\n")
        return 1 if problems else 0
    else:
        origin = find_origin(args)
        if args.command == "export":
            written = export(queue, args.out, origin, args.new or args.patch, new=bool(args.new))
        else:
            written = refresh(queue, origin)
        say(f"written: {', '.join(written) or 'nothing, all is as it should be'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        return run(args)
    except PatchError as error:
        print(f"patchq: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"patchq: error: {error}; see that the place exists, may be written and has room", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
