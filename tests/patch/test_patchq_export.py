"""`export` and `refresh`: edits go into the right patch, later patches follow, nobody's work is undone."""

from __future__ import annotations

import shutil

import pytest
from workshop import Workshop, write


@pytest.fixture
def queue(shop: Workshop) -> Workshop:
    """Two patches on one file."""
    shop.add("first", shop.insert("src/llama-graph.cpp", "line 10", "hook();"))
    shop.add("second", shop.insert("src/llama-graph.cpp", "line 40", "other();"))
    return shop


def edit(shop: Workshop, after: str, line: str) -> None:
    file = shop.out / "src/llama-graph.cpp"
    assert f"{after}\n" in file.read_text()
    write(file, file.read_text().replace(f"{after}\n", f"{after}\n{line}\n", 1))


def test_without_edits_nothing_is_written(queue: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in queue.queue.iterdir()}
    queue.main("prepare", "--out", queue.out)
    assert queue.main("export", queue.out) == 0
    assert "written: nothing" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in queue.queue.iterdir()} == before


def test_new_patch(queue: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    queue.main("prepare", "--out", queue.out)
    edit(queue, "line 50", "third();")
    write(queue.out / "src/ours.h", "void third();\n")
    assert queue.main("export", queue.out, "--new", "third") == 0
    assert (queue.queue / "series").read_text().endswith("second.patch\nthird.patch\n")
    text = queue.patch("third").read_text()
    assert text.startswith("Subject: <") and "\n+third();\n" in text and "--- /dev/null\n+++ b/src/ours.h\n" in text
    assert queue.main("check") == 1
    assert capsys.readouterr().out.count("third.patch: the header") == 4  # to be filled in

    text = text.replace("<what it does>", "calls the third hook").replace("<fill in>", "for a reason")
    write(queue.patch("third"), text)
    assert queue.main("refresh") == 0
    assert "| [third.patch](third.patch) | calls the third hook |" in (queue.queue / "README.md").read_text()
    assert queue.main("check") == 0
    assert queue.main("prepare", "--out", queue.out) == 0
    assert queue.held() == queue.patched() and queue.whole()


def test_edits_go_to_the_last_patch_and_keep_its_header(queue: Workshop) -> None:
    queue.main("prepare", "--out", queue.out)
    edit(queue, "line 50", "late();")
    text = queue.patch("second").read_text()
    write(queue.patch("second"), text.replace("never.", "soon."))  # the header may change meanwhile
    first = queue.patch("first").read_bytes()
    assert queue.main("export", queue.out) == 0
    text = queue.patch("second").read_text()
    assert "soon." in text and "\n+other();\n" in text and "\n+late();\n" in text
    assert queue.patch("first").read_bytes() == first
    edit(queue, "line 55", "later();")  # and on
    assert queue.main("export", queue.out) == 0
    assert queue.main("check") == 0


def test_later_patches_follow_an_earlier_one(queue: Workshop) -> None:
    queue.main("prepare", "--out", queue.out, "--upto", "first")
    edit(queue, "line 20", "early();")
    assert queue.main("export", queue.out, "--patch", "first") == 0
    assert "\n+early();\n" in queue.patch("first").read_text()
    assert "@@ -40,6 +40,7 @@" in queue.patch("second").read_text()  # was 39: one line has come above
    assert queue.main("check") == 0


def test_a_later_patch_that_no_longer_applies_is_told_and_redone(
    queue: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.main("prepare", "--out", queue.out, "--upto", "first")
    edit(queue, "line 39", "in the way();")
    assert queue.main("export", queue.out) == 2
    told = capsys.readouterr().err
    assert "written: first.patch" in told and "second.patch: src/llama-graph.cpp: hunk 1" in told
    assert "prepare --out DIR --before second.patch" in told

    header = queue.patch("second").read_text().split("---")[0]
    shutil.rmtree(queue.out)
    assert queue.main("prepare", "--out", queue.out, "--before", "second.patch") == 0
    edit(queue, "line 40", "other();")
    assert queue.main("export", queue.out, "--patch", "second.patch") == 0
    assert queue.patch("second").read_text().split("---")[0] == header
    assert queue.main("check") == 0


def test_an_earlier_patch_does_not_swallow_the_later_ones(queue: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    queue.main("prepare", "--out", queue.out)
    edit(queue, "line 20", "early();")
    assert queue.main("export", queue.out, "--patch", "first") == 2
    assert "--upto first.patch" in capsys.readouterr().err
    assert b"early" not in queue.patched()["src/llama-graph.cpp"]


def test_a_new_patch_comes_last(queue: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    queue.main("prepare", "--out", queue.out, "--upto", "first")
    edit(queue, "line 20", "early();")
    assert queue.main("export", queue.out, "--new", "third") == 2
    assert "first 1 of 2 patches" in capsys.readouterr().err
    assert not queue.patch("third").exists()


@pytest.mark.parametrize("change", ["patch", "pin", "series"])
def test_an_export_does_not_undo_others_changes(
    queue: Workshop, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.main("prepare", "--out", queue.out)
    edit(queue, "line 50", "late();")
    if change == "patch":
        write(queue.patch("first"), queue.patch("first").read_text().replace("hook();", "hook(1);"))
    elif change == "pin":
        queue.write_pin(tree_sha256="0" * 64)
    else:
        write(queue.queue / "series", "second.patch\n")
    assert queue.main("export", queue.out) == 2
    assert "an export would undo that" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["second", "0001-x", "Big", "a/b"])
def test_names_of_new_patches(queue: Workshop, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    queue.main("prepare", "--out", queue.out)
    edit(queue, "line 50", "late();")
    assert queue.main("export", queue.out, "--new", name) == 2
    assert f"got the name '{name}.patch'" in capsys.readouterr().err


def test_refused_exports(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(told: str, *words: str) -> None:
        assert shop.main("export", shop.out, *words) == 2
        assert told in capsys.readouterr().err

    refused("is not a prepared folder")
    shop.main("prepare", "--out", shop.out)
    refused("--new NAME")
    refused("got no edit", "--new", "some")
    refused("expected one of the series", "--patch", "some")
    (shop.out / "a.swp").write_bytes(b"\xff\xfe")
    refused("a.swp is not UTF-8 text", "--new", "some")


def test_refresh_follows_moved_lines(queue: Workshop) -> None:
    """What a bump of the pin needs, here by dropping the patch above."""
    queue.patch("first").unlink()
    write(queue.queue / "series", "second.patch\n")
    assert queue.main("check") == 1
    assert queue.main("refresh") == 0
    assert "@@ -38,6 +38,7 @@" in queue.patch("second").read_text()  # was 39
    assert "first" not in (queue.queue / "README.md").read_text()
    assert queue.main("check") == 0


def test_readme_without_an_index(queue: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    write(queue.queue / "README.md", "# Queue\n")
    assert queue.main("refresh") == 2
    assert "README.md has no index" in capsys.readouterr().err
