"""Unified diffs, read, applied and written strictly: no fuzz, no offsets, one way to write each change.

`git apply` is not used: in an ignored folder of another repository it exits 0 and changes nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TOOL = "python ggml_patch/patchq.py"
FILE = re.compile(r"^--- (?:a/(.+)|/dev/null)\n\+\+\+ (?:b/(.+)|/dev/null)\n", re.MULTILINE)
# start, length (1 if absent) of the old and the new side, lines
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@\n((?:(?!--- (?:a/|/dev/null))[ +\\-].*\n)*)")


Tree = dict[str, bytes]
Lines = list[str]


class PatchError(Exception):
    """One line: what was got, what was expected, what to type next."""


@dataclass(frozen=True)
class Hunk:
    old_start: int  # as stated: from 1, for an empty side the line before
    new_start: int
    lines: tuple[str, ...]  # each with its mark: ' ', '-' or '+'

    def side(self, other: str) -> Lines:
        """The lines of one side: those without the mark of the other."""
        return [line[1:] for line in self.lines if line[0] != other]


@dataclass(frozen=True)
class FileDiff:
    path: str
    creates: bool
    deletes: bool
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True)
class Patch:
    name: str
    header: str
    body: str
    diffs: tuple[FileDiff, ...]


def parse_patch(name: str, text: str) -> Patch:
    start = at = first.start() if (first := FILE.search(text)) else len(text)
    diffs = []
    while at < len(text):
        match = FILE.match(text, at)
        if not match or not (path := match[2] or match[1]) or path != (match[1] or path):
            line = text[at:].split("\n", 1)[0]
            raise PatchError(
                f"{name}:{text.count(chr(10), 0, at) + 1}: got {line!r}, expected '--- a/PATH' and '+++ b/PATH' or a "
                f"hunk of the length its @@ line says; do not edit diffs by hand: {redo(name)}"
            )
        at, hunks = match.end(), []
        while hunk := HUNK.match(text, at):
            # a line, without its end where the next one says that the file has none
            lines = [line.split("\n\\")[0] for line in re.findall(r".*\n(?:\\.*\n)?", hunk[5])]
            lengths = [sum(line[0] != mark for line in lines) for mark in "+-"]
            if lengths != [int(hunk[2] or 1), int(hunk[4] or 1)]:
                break
            hunks.append(Hunk(int(hunk[1]), int(hunk[3]), tuple(lines)))
            at = hunk.end()
        diffs.append(FileDiff(path, match[1] is None, match[2] is None, tuple(hunks)))
    return Patch(name, text[:start], text[start:], tuple(diffs))


def apply_patch(tree: Tree, patch: Patch, relocate: bool = False) -> Tree:
    """A patched copy. Hunks must match exactly at their stated lines or, with relocate, at one single place."""
    result = dict(tree)
    for diff in patch.diffs:
        if diff.creates == (diff.path in result):
            state = "is there already" if diff.creates else "is not there"
            raise PatchError(f"{patch.name}: {diff.path} {state}, expected the opposite; {redo(patch.name)}")
        old = split_lines(decode(diff.path, result.pop(diff.path, b"")))
        try:
            new = apply_hunks(patch.name, diff, old, relocate=False)
        except PatchError:
            if not relocate:
                raise
            new = apply_hunks(patch.name, diff, old, relocate=True)
        if not diff.deletes:
            result[diff.path] = "".join(new).encode()
        elif new:
            raise PatchError(f"{patch.name}: {diff.path}: got {len(new)} lines left, expected none; {redo(patch.name)}")
    return result


def apply_hunks(name: str, diff: FileDiff, old: Lines, relocate: bool) -> Lines:
    new: Lines = []
    done = 0  # lines of old that are in new already
    for number, hunk in enumerate(diff.hunks, 1):
        want, put = hunk.side("+"), hunk.side("-")
        start = hunk.old_start - bool(want)
        places = [i for i in range(done, len(old) - len(want) + 1) if old[i : i + len(want)] == want]
        advice = f"at {len(places)} places, not one; {redo(name)}"
        if len(places) == 1:
            advice = f"at line {places[0] + 1}; type: {TOOL} refresh"
        if relocate and len(places) == 1:
            start = places[0]
        elif relocate or start not in places:
            raise PatchError(
                f"{name}: {diff.path}: hunk {number}: {mismatch(old, want, start)}; its lines stand {advice}"
            )
        new += old[done:start]
        if not relocate and len(new) != hunk.new_start - bool(put):
            got = f"new line {hunk.new_start}, expected {len(new) + bool(put)}"
            raise PatchError(f"{name}: {diff.path}: hunk {number}: says {got}; type: {TOOL} refresh")
        new += put
        done = start + len(want)
    return new + old[done:]


def mismatch(old: Lines, want: Lines, start: int) -> str:
    for i, line in enumerate(want, start):
        found = old[i] if i < len(old) else "the end of the file"
        if found != line:
            return f"line {i + 1}: expected {line!r}, found {found!r}"
    return f"line {start + 1}: expected a place after the hunk before"


def redo(name: str) -> str:
    return f"to redo it type: {TOOL} prepare --out DIR --before {name}, edit, {TOOL} export DIR --patch {name}"


def diff_trees(old: Tree, new: Tree) -> str:
    """The canonical diff: files by name, three lines of context, no time stamps and no blob hashes."""
    changed = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    return "".join(diff_file(path, old.get(path), new.get(path)) for path in changed)


def diff_file(path: str, old: bytes | None, new: bytes | None) -> str:
    a, b = split_lines(decode(path, old or b"")), split_lines(decode(path, new or b""))
    out = ["--- /dev/null\n" if old is None else f"--- a/{path}\n"]
    out += ["+++ /dev/null\n" if new is None else f"+++ b/{path}\n"]
    # autojunk would show a kept '}' between two insertions as removed and added again
    for group in difflib.SequenceMatcher(None, a, b, autojunk=False).get_grouped_opcodes(3):
        old_range, new_range = line_range(group[0][1], group[-1][2]), line_range(group[0][3], group[-1][4])
        out.append(f"@@ -{old_range} +{new_range} @@\n")
        for tag, i1, i2, j1, j2 in group:
            out += [(" " if tag == "equal" else "-") + line for line in a[i1:i2]]
            out += ["+" + line for line in b[j1:j2] if tag != "equal"]
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in out)


def line_range(start: int, end: int) -> str:
    """[start, end) as a hunk states it: from 1, a length of 1 left out, an empty range at the line before."""
    return f"{start + 1}" if end - start == 1 else f"{start + (end > start)},{end - start}"


def rebase(tree: Tree, patches: Sequence[Patch]) -> Iterator[Patch]:
    """The patches as they read on top of tree, each hunk where its lines stand now."""
    for patch in patches:
        after = apply_patch(tree, patch, relocate=True)
        yield parse_patch(patch.name, patch.header + diff_trees(tree, after))
        tree = after


def decode(path: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise PatchError(f"{path} is not UTF-8 text, expected only text; take it out of the folder") from None


def split_lines(text: str) -> Lines:
    """Lines with their ends; only a line feed ends one (str.splitlines would also split at form feeds)."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)
