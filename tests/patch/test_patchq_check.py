"""`check`: each promise of the queue, broken on purpose, is told; the real queue keeps them."""

from __future__ import annotations

from pathlib import Path

import patchq
import pytest
from workshop import HEADER, Workshop, write

REAL_QUEUE = Path(patchq.__file__).parent


@pytest.fixture
def queue(shop: Workshop) -> Workshop:
    """Two good patches on one file, and one that says that it touches a public header."""
    shop.add("first", shop.insert("src/llama-graph.cpp", "line 10", "hook();"))
    shop.add("second", shop.insert("src/llama-graph.cpp", "line 40", "other();"))
    listed = HEADER.format("public") + "Touches-Public-Header: ggml/include/ggml.h\n\n"
    shop.add("public", shop.insert("ggml/include/ggml.h", "    OP_ADD,", "    OP_RAGGED,"), listed)
    return shop


def problems(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    status = shop.main("check")
    lines = capsys.readouterr().out.splitlines()
    assert status == (lines != ["patchq: the queue keeps its promises"])
    return lines if status else []


def replace(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    write(file, file.read_text().replace(old, new))


def test_a_good_queue(queue: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(queue, capsys) == []
    rows = ["| [first.patch](first.patch) | first |", "| [second.patch](second.patch) | second |"]
    assert "\n".join(rows) in (queue.queue / "README.md").read_text()


def test_an_empty_queue(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    patchq.write_patches(shop.queue, [])
    assert problems(shop, capsys) == []


# file, what is replaced in it, by what, what is told
BROKEN = {
    "series lacks a file": ("series", "second.patch\n", "", "['second.patch']"),
    "series names no file": ("series", "second.patch", "second.patch\nthird.patch", "['third.patch']"),
    "order": ("series", "first.patch\nsecond.patch", "second.patch\nfirst.patch", "second.patch: src/"),
    "no subject": ("first.patch", "Subject: first\n", "Add a hook\n", "expected 'Subject: WHAT IT DOES'"),
    "skeleton subject": ("first.patch", "Subject: first\n", "Subject: <what it does>\n", "expected 'Subject:"),
    "no why": ("first.patch", "Why: it", "Reason: it", "no paragraph 'Why:"),
    "no reason for its place": ("first.patch", "Why not outside upstream:\nno other place.", "", "'Why not outside"),
    "no end": ("first.patch", "When it can go: never.", "When it can go:", "'When it can go:"),
    "skeleton paragraph": ("first.patch", "Why: it is needed.", "Why: <fill in>", "no paragraph 'Why:"),
    "git's lines": ("first.patch", "--- a/src", "diff --git a/x b/x\n--- a/src", "'diff --git a/x b/x'"),
    "offset": ("first.patch", "@@ -8,6 +8,7 @@", "@@ -7,6 +7,7 @@", "its lines stand at line 8; type:"),
    "fuzz": ("first.patch", " line 8\n", " line eight\n", "expected 'line eight"),
    "function name": ("first.patch", "+8,7 @@\n", "+8,7 @@ f()\n", "got '@@ -8,6 +8,7 @@ f()'"),
    "less context": ("first.patch", "@@ -8,6 +8,7 @@\n line 8\n", "@@ -9,5 +9,6 @@\n", "what an export writes"),
    "index": ("README.md", "| first |", "| First |", "README.md: its index"),
    "no index": ("README.md", "<!-- end of series -->", "", "README.md: its index"),
    "unlisted header": ("public.patch", "Touches-Public-Header", "Touches", "'Touches-Public-Header: ggml/include/"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(queue: Workshop, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, old, new, told = BROKEN[case]
    replace(queue.queue / name, old, new)
    status = queue.main("check")
    said = capsys.readouterr()
    assert status in (1, 2) and told in said.out + said.err, said
    assert "Traceback" not in said.err


def lines(*numbers: int) -> str:
    return "".join(f"line {n}\n" for n in numbers)


@pytest.mark.parametrize(("n_add", "n_remove"), [(10, 0), (0, 10), (5, 5), (9, 1)])
def test_ten_lines_but_not_eleven(
    n_add: int, n_remove: int, shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Added and removed together; a replaced line is both."""
    old, path = shop.text("src/llama-graph.cpp"), "src/llama-graph.cpp"
    removed = lines(*range(10, 10 + n_remove))
    assert removed in old
    edited = old.replace("line 9\n" + removed, "line 9\n" + "hook();\n" * n_add, 1)
    shop.add("ten", {path: edited})
    assert problems(shop, capsys) == []

    # one more line added or removed, in a hunk of its own
    removed = lines(*range(40, 40 + n_remove))
    shop.add("eleven", {path: edited.replace("line 39\n" + removed, "line 39\n" + "more();\n" * (n_add + 1), 1)})
    (told,) = problems(shop, capsys)
    want = f"eleven.patch: {path}: hunk 1 adds {n_add + 1} and removes {n_remove} lines, expected at most 10 in all"
    assert want in told and "native/" in told


def test_hunks_are_counted_one_by_one(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    text = shop.text("src/llama-graph.cpp").replace(lines(*range(10, 15)), "hook();\n" * 5)
    shop.add("two", {"src/llama-graph.cpp": text.replace(lines(*range(40, 45)), "hook();\n" * 5)})
    assert problems(shop, capsys) == []


@pytest.mark.parametrize(
    ("line", "fine"),
    [
        ("    } else", False),
        ("    else", False),
        ("    else // stock", False),
        ("    } else if (hook()) {", True),
        ("    } else {", True),
        ("    // or else", True),
    ],
)
def test_no_else_dangles(line: str, fine: bool, shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """An added `else` must not take what upstream's next line happens to be for its branch."""
    shop.add("branch", shop.insert("src/llama-graph.cpp", "line 10", line))
    told = problems(shop, capsys)
    assert told == [] if fine else "hunk 1 adds" in told[0] and "else" in told[0] and "'else if (...) {'" in told[0]


def test_llama_graph_h_stays(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.add("graph", shop.insert("src/llama-graph.h", "#pragma once", "void hook();"))
    (told,) = problems(shop, capsys)
    assert "src/llama-graph.h: must stay" in told and "native/" in told


@pytest.mark.parametrize(
    ("after", "line", "fine"),
    [
        ("    int n_ctx; // { a brace in a comment", "    int budget;", False),
        ("    struct { int a; } inner;", "    // a comment", False),
        ("int llama_decode(void);", "int llama_more(void);", True),
        ("    LLAMA_KIND_NONE,", "    LLAMA_KIND_RAGGED,", True),
        ("int llama_decode(void);", "struct llama_more { int n; };", True),
    ],
)
def test_public_structs_never_change(
    shop: Workshop, after: str, line: str, fine: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = shop.insert("include/llama.h", after, line)
    shop.add("api", edit, HEADER.format("api") + "Touches-Public-Header: include/llama.h\n\n")
    told = problems(shop, capsys)
    assert told == [] if fine else "a change in 'struct llama_params { int n_ctx;" in told[0]


def test_a_struct_moved_away_is_a_change(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.add("api", {"include/llama.h": None}, HEADER.format("api") + "Touches-Public-Header: include/llama.h\n\n")
    assert any("a change in 'struct llama_params" in told for told in problems(shop, capsys))


def test_the_real_queue_keeps_its_promises(real_sdist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = patchq.main(["check", "--sdist", str(real_sdist)])
    assert status == 0, capsys.readouterr()


def test_the_pin_reads_as_toml_says() -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    pin = patchq.read_pin(REAL_QUEUE)
    assert {**pin.__dict__, "paths": list(pin.paths)} == tomllib.loads((REAL_QUEUE / "pin.toml").read_text())
