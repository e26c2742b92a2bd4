"""Diffs: exact at the stated lines or refused, one way to write each change, and the one that git reads."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from strictdiff import Patch, PatchError, Tree, apply_patch, diff_trees, parse_patch
from workshop import Workshop, write

OLD = "".join(f"line {n}\n" for n in range(1, 41))


def patch_of(old: Tree, new: Tree) -> Patch:
    return parse_patch("some.patch", "Subject: some\n\n" + diff_trees(old, new))


def one(text: str) -> Tree:
    return {"a.c": text.encode()}


def random_text(rng: random.Random) -> str:
    # few different lines, so that places repeat; also marks, form feeds, carriage returns and no line end
    lines = ["\n", "}\n", "    }\n", "-- x\n", "++ y\n", "@@ -1 +1 @@\n", "\\ No\n", "a\fb\n", "c\r\n", "d\u2028e\n"]
    text = "".join(rng.choice(lines) for _ in range(rng.randrange(40)))
    return text[: rng.randrange(len(text) - 1, len(text) + 1)] if text else text


def edited(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(lines) + 1)
        lines[at : at + rng.randrange(3)] = [f"new {rng.randrange(3)}"] * rng.randrange(3)
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(200))
def test_apply_undoes_diff(seed: int) -> None:
    rng = random.Random(seed)
    old: Tree = {f"src/{name}.c": random_text(rng).encode() for name in "abcd"}
    new: Tree = {path: edited(rng, data.decode()).encode() for path, data in old.items()}
    del new["src/a.c"], old["src/b.c"]  # a deleted file and a new one
    patch = patch_of(old, new)
    assert apply_patch(old, patch) == new
    assert [diff.path for diff in patch.diffs] == sorted(
        path for path in {*old, *new} if old.get(path) != new.get(path)
    )
    assert diff_trees(old, apply_patch(old, patch)) == patch.body


def test_git_reads_the_diffs_alike(tmp_path: Path) -> None:
    rng = random.Random(1)
    old: Tree = {f"{n}.c": (OLD + random_text(rng)).encode() for n in range(20)} | {"gone.c": b"x\n", "end.c": b"a\nb"}
    new: Tree = {path: edited(rng, data.decode()).encode() for path, data in old.items()}
    new |= {"new.c": b"y", "end.c": b"a\nc"}
    del new["gone.c"]
    for path, data in old.items():
        (tmp_path / path).write_bytes(data)
    write(tmp_path / "p.patch", patch_of(old, new).body)
    # a repository of its own: inside another one's ignored folder, git apply does nothing and says nothing
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "apply", "p.patch"], check=True, cwd=tmp_path)
    assert {path: (tmp_path / path).read_bytes() for path in new} == new
    assert not (tmp_path / "gone.c").exists()


def test_a_kept_brace_between_insertions_stays() -> None:
    """More than 200 lines: difflib's default would call '}' junk and show it as removed and added."""
    old = "f\n}\ng\n" + "x\n}\n" * 200
    body = diff_trees(one(old), one(old.replace("f\n}\ng\n", "f\n1\n}\n2\ng\n")))
    assert [line for line in body.split("\n") if line.startswith(("+", "-"))][2:] == ["+1", "+2"]


def test_only_a_line_feed_ends_a_line() -> None:
    patch = patch_of(one("a\f\x85\u2028b\nc\n"), one("a\f\x85\u2028b\nd\n"))
    assert patch.body.count("\n") == 6


GOOD = patch_of(one(OLD), one(OLD.replace("line 20\n", "line 20\nhook();\n"))).body
assert GOOD.startswith("--- a/a.c\n+++ b/a.c\n@@ -18,6 +18,7 @@\n line 18\n")

REFUSED = {
    "offset": (GOOD.replace("-18,6 +18,7", "-17,6 +17,7"), "line 17: expected 'line 18\\n', found 'line 17\\n'"),
    "offset of the new side": (GOOD.replace("+18,7", "+19,7"), "says new line 19, expected 18"),
    "fuzz": (GOOD.replace(" line 18\n", " line 1\n"), "line 18: expected 'line 1\\n', found 'line 18\\n'"),
    "white space": (GOOD.replace(" line 18\n", " line 18 \n"), "line 18: expected 'line 18 \\n'"),
    "end of file": (GOOD.replace("-18,6 +18,7", "-38,6 +38,7"), "line 38: expected 'line 18\\n'"),
    "before the first line": (GOOD.replace("-18,6 +18,7", "-0,6 +0,7"), "expected"),
    "too few lines": (GOOD.replace("-18,6 +18,7", "-18,7 +18,8"), "hunk of the length"),
    "too many lines": (GOOD.replace("-18,6 +18,7", "-18,5 +18,6"), "hunk of the length"),
    "cut off": (GOOD[:-1], "hunk of the length"),
    "git's lines": (GOOD + "diff --git a/b.c b/b.c\n" + GOOD, "'diff --git a/b.c b/b.c'"),
    "trailing text": (GOOD + "-- \n2.39\n", "hunk of the length"),
    "two names": (GOOD.replace("+++ b/a.c", "+++ b/b.c"), "expected '--- a/PATH'"),
    "a file that is not there": (GOOD.replace("/a.c", "/b.c"), "b.c is not there"),
    "a file that is there": ("--- /dev/null\n+++ b/a.c\n@@ -0,0 +1 @@\n+x\n", "a.c is there already"),
    "a rest": ("--- a/a.c\n+++ /dev/null\n@@ -1 +0,0 @@\n-line 1\n", "39 lines left"),
    "overlapping hunks": (GOOD + GOOD[GOOD.index("@@") :], "line 18: expected a place after the hunk before"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    text, told = REFUSED[case]
    with pytest.raises(PatchError) as caught:
        apply_patch(one(OLD), parse_patch("some.patch", "Subject: some\n\n" + text))
    assert str(caught.value).startswith("some.patch") and told in str(caught.value)


def test_moved_lines_are_told_and_followed() -> None:
    patch = parse_patch("some.patch", GOOD)
    moved = one("new first line\n" + OLD)
    with pytest.raises(PatchError, match=r"at line 19; type: .*refresh"):
        apply_patch(moved, patch)
    assert apply_patch(moved, patch, relocate=True) == one("new first line\n" + OLD.replace("20\n", "20\nhook();\n"))


def test_two_places_are_not_guessed() -> None:
    with pytest.raises(PatchError, match=r"at 2 places, not one; .*--before some.patch"):
        apply_patch(one("new\n" + OLD + OLD), parse_patch("some.patch", GOOD), relocate=True)


def test_a_refused_patch_stops_prepare(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.add("first", shop.insert("src/llama-graph.cpp", "line 10", "hook();"))
    write(shop.patch("first"), shop.patch("first").read_text().replace(" line 9\n", " line nine\n"))
    assert shop.main("prepare", "--out", shop.out) == 2
    assert "first.patch: src/llama-graph.cpp: hunk 1: line 9: expected" in capsys.readouterr().err
    assert not shop.out.exists()
