"""windowkv-edge eval: records that go on, the commands and what they write, broken input, sums."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from windowkv_edge.bench.session import Model
from windowkv_edge.cli import app
from windowkv_edge.eval import (
    EvalError,
    Records,
    Style,
    tasks_cases,
)
from windowkv_edge.eval import metrics
from windowkv_edge.eval.forms import FORMS, _messages
from windowkv_edge.eval.pictures import draw
from windowkv_edge.eval.results import Line, Results, load
from windowkv_edge.eval.tables import mean_ranks, ranks


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Model]:
    res = Model(smollm2)
    yield res
    res.close()


def call(*args: object) -> tuple[int, str, str]:
    res = CliRunner().invoke(app, ["eval", *map(str, args)])
    assert res.exception is None or isinstance(res.exception, SystemExit), res.exception
    return res.exit_code, res.stdout, res.stderr


#
# records
#


def test_records_go_on(tmp_path: Path) -> None:
    path, header = tmp_path / "out.jsonl", {"model": "m", "lengths": (1, 2)}
    with Records(path, header) as records:
        records.add({"case": "a", "results": []})
        assert "a" in records and "b" not in records
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"case": "b", "resul')  # killed while writing
    with Records(path, header) as records:
        assert records.n_old == 1 and path.read_bytes() == whole
        records.add({"case": "b", "results": []})
    assert path.read_bytes() == whole + b'{"case": "b", "results": []}\n'
    with pytest.raises(EvalError, match="holds another run: lengths differ; give another --out"):
        Records(path, {**header, "lengths": (3,)})
    path.write_text("hello\n")
    with pytest.raises(EvalError, match="line 1 is not a JSON object"):
        Records(path, header)
    path.write_text("hello")
    with pytest.raises(EvalError, match="is not a results file"):
        Records(path, header)
    assert path.read_text() == "hello"
    with pytest.raises(EvalError, match="cannot write .*; give another --out"):
        Records(tmp_path, header)


def test_a_run_without_results_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    Records(path, {"lengths": 1}).close()
    Records(path, {"lengths": 2}).close()
    assert json.loads(path.read_text())["lengths"] == 2


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what to do; what was written stays whole, and the run goes on from it."""
    path, header = tmp_path / "out.jsonl", {"model": "m"}
    records = Records(path, header)
    records.add({"case": "a", "results": []})
    whole = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EvalError, match="No space left on device; make room and run the same command again"):
        records.add({"case": "b", "results": []})
    records.close()
    assert path.read_bytes() == whole
    monkeypatch.undo()
    with Records(path, header) as again:
        assert "a" in again and "b" not in again


#
# the commands
#


def longbench(path: Path) -> Path:
    rows: list[Any] = [
        {"dataset": "hotpotqa", "context": "Ana lives in Rome. " * 600, "input": "Where does Ana live?", "answers": ["Rome"]},
        {"dataset": "trec_e", "context": "Q: a\nType: Food\n", "input": "Q: b\nType:", "answers": ["Food"], "all_classes": ["Food"]},
        {"dataset": "hotpotqa", "context": "a\u2028b", "input": "i", "answers": ["a"]},
        {"dataset": "lcc", "context": "def f(x):\n", "input": "", "answers": ["    return x"]},
        {"dataset": "gov_report", "context": "A report.", "input": "", "answers": ["A report."]},
        {"dataset": "dureader", "context": "c", "input": "i", "answers": ["a"]},
        {"dataset": "hotpotqa", "context": "c", "input": "i", "answers": []},
        {"dataset": "hotpotqa", "input": "i", "answers": ["a"]},
        ["no object"],
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "{broken\n\n")
    return path


def test_longbench_files(model: Model, tmp_path: Path) -> None:
    cases, skipped = tasks_cases(Style(model), longbench(tmp_path / "all.jsonl"), 1024)
    assert [(case.task, case.metric, case.first_line) for case in cases] == [
        ("hotpotqa", "f1", False), ("trec", "accuracy", True), ("hotpotqa", "f1", False), ("lcc", "edit", False), ("gov_report", "rouge_l", False),
    ]  # fmt: skip
    assert len(cases[0].prompt) == 1024 - 32  # the middle is left out
    text = model.detokenize(cases[0].prompt)
    assert text.startswith("Ana lives") and text.endswith("\n\nQuestion: Where does Ana live?\nAnswer:")
    assert model.detokenize(cases[1].prompt) == "Q: a\nType: Food\nQ: b\nType:"
    assert model.detokenize(cases[3].prompt) == "def f(x):\n"
    assert dict(skipped) == {
        "dataset 'dureader' has no metric here": 1, "'answers' is empty or not a list of strings": 1,
        "'context' is missing or not a str": 1, "not a JSON object": 1,
        "not JSON (line 10: Expecting property name enclosed in double quotes: line 1 column 2 (char 1))": 1,
    }  # fmt: skip
    empty = tmp_path / "bad.jsonl"
    empty.write_text("{broken\n")
    with pytest.raises(EvalError, match=r"holds nothing to score \(1 x not JSON \(line 1: Expecting"):
        tasks_cases(Style(model), empty, 512)


def test_shared_contexts(model: Model, smollm2: Path, tmp_path: Path) -> None:
    """Compacted before a question is read; lines of one context share its reading, wherever they stand."""
    path = tmp_path / "shared.jsonl"
    text = "Ana lives in Rome. Ben lives in Oslo. " * 30
    lines = [(text, "Where does Ana live?", "Rome"), ("c " * 300, "What?", "c"), (text, "And where is it that Ben lives?", "Oslo")]
    rows = [{"dataset": "hotpotqa", "context": c, "input": q, "answers": [a]} for c, q, a in lines]
    path.write_text("".join(json.dumps(own) + "\n" for own in rows))
    style = Style(model)
    cases, _ = tasks_cases(style, path, 320, before=True)
    assert [case.answers for case in cases] == [("Rome",), ("Oslo",), ("c",)]  # neighbours share what is read
    ana, ben, other = cases
    assert ana.prompt == ben.prompt != other.prompt and [case.index for case in cases] == [0, 1, 2]
    assert ana.follow_up == style.ask("Where does Ana live?") and ben.follow_up == style.ask("And where is it that Ben lives?")
    assert len(ben.prompt) + len(ben.follow_up) == 320 - 32 > len(ana.prompt) + len(ana.follow_up)
    after, _ = tasks_cases(style, path, 320)
    assert [case.answers for case in after] == [("Rome",), ("c",), ("Oslo",)] and not any(case.follow_up for case in after)
    out = tmp_path / "l.jsonl"
    code, _, err = call("tasks", smollm2, path, "--before", "--policies", "kvzip", "--budgets", "50%", "--n-ctx", 320, "--out", out)
    assert code == 0, err
    header, *results = untimed(out)
    assert header["before"] is True and [row["answers"] for row in results] == [["Rome"], ["Oslo"], ["c"]]


SMALL = ("--lengths", "600", "--policies", "snapkv,auto", "--budgets", "12%,3%", "--threads", "2")


def untimed(path: Path) -> list[dict[str, Any]]:
    """Rows without times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for result in row.get("results", []):
            result.pop("decode_ms", None)
            result.pop("compact_ms", None)
    return rows


def test_a_run_of_needles(smollm2: Path, tmp_path: Path) -> None:
    """What a run writes; interrupted and gone on, it is the same."""
    out, part = tmp_path / "needle.jsonl", tmp_path / "part.jsonl"
    args = ("needle", smollm2, *SMALL, "--depths", "10%,0.5", "--kinds", "number,word")
    code, text, err = call(*args, "--out", out)
    assert code == 0, err
    rows = untimed(out)
    assert len(rows) == 5
    header = rows[0]
    assert header["model_sha256"].startswith("b179c9523d0e") and header["seed"] == 0 and header["package"]
    assert header["policies"]["snapkv"].startswith("SnapKV(")
    variants = {(r["policy"], r["cells"], r["budget"]) for r in rows[1]["results"]}
    assert variants == {
        ("full", "f16", None), ("full", "q8_0", None), *((p, c, b) for p, c in (("snapkv", "f16"), ("auto", "q8_0")) for b in (0.12, 0.03)),
    }  # fmt: skip
    full = rows[1]["results"][0]
    by = {(r["policy"], r["budget"]): r for r in rows[1]["results"]}
    n = rows[1]["n_prompt"]
    assert full["kv_bytes"] == n * 30 * 3 * 64 * 2 * 2
    assert by["snapkv", 0.12]["n_cells"] == int(0.12 * n)
    assert by["auto", 0.12]["n_cells"] == int(0.12 * n * 16 / 8.5)
    assert by["auto", 0.12]["kv_bytes"] == pytest.approx(0.12 * full["kv_bytes"], rel=0.01)

    lines = out.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    code, _, err = call(*args, "--out", part)
    assert code == 0 and "has 2 of 4 prompts, going on from there" in " ".join(err.split())
    assert untimed(part) == rows


def test_all_small(smollm2: Path, tmp_path: Path) -> None:
    """Every suite and its report: tables, ranks, pictures and a page that stands alone."""
    to = tmp_path / "out"
    args = ("all", smollm2, "--small", "--to", to, "--policies", "auto,snapkv", "--budgets", "12%,3%", "--threads", 2)
    code, _, err = call(*args)
    assert code == 0, err
    for name, n in (("needle-prose", 6), ("needle-journey", 6), ("ruler", 8), ("turns", 8), ("fidelity", 2)):
        rows = untimed(to / f"{name}.jsonl")[1:]
        assert len(rows) == n
        for row in rows:
            # what the full cache fails is counted and not branched
            assert len(row["results"]) == (1 if row["results"][0].get("score") == 0 else 6)
    suites = {res.suite: res for res in load(to.glob("*.jsonl"))}
    assert suites["needle"].n_counted >= 3
    fidelity = suites["fidelity"]
    for budget in (0.12, 0.03):
        kl = {line.policy: fidelity.mean(line, budget, "kl") for line in fidelity.lines}
        assert 0 < kl["auto"] < kl["snapkv"]  # measured: half

    text = (to / "report.md").read_text()
    for word in ("## needle: needle-prose.jsonl", "## turns/later", "## turns/before", "## Ranks", "| auto, q8_0 |", "KL"):
        assert word in text
    assert {path.name for path in to.glob("*.png")} == {
        "needle-prose-bytes.png", "needle-prose-depth.png", "needle-prose-heatmap.png", "needle-journey-bytes.png",
        "needle-journey-depth.png", "needle-journey-heatmap.png", "ruler-bytes.png", "turns-first-bytes.png",
        "turns-later-bytes.png", "turns-before-bytes.png", "fidelity-bytes.png",
    }  # fmt: skip
    page = (to / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 11
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)  # letters of a picture may say anything
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in to.glob("*.png"))
    code, text, err = call("report", to / "ruler.jsonl")
    assert code == 0 and "## ruler" in text and "## Ranks" not in text


def test_forms(smollm2: Path, tmp_path: Path) -> None:
    """Where the question stands: every form is a chat of the same document, read by sessions of every query."""
    out = tmp_path / "f.jsonl"
    forms = ("forms", smollm2, "--lengths", 250, "--count", 1, "--budgets", "50%", "--threads", 2, "--out", out)
    some = "--policies", "auto,snapkv", "--queries", "auto,last"
    code, text, err = call(*forms, *some, "--forms", "last,first")
    assert code == 0 and "forms: f.jsonl" in text, err
    rows = untimed(out)[1:]
    assert [row["task"] for row in rows] == ["last", "first"] and all(row["n_prompt"] > 250 for row in rows)
    full, *others = rows[0]["results"]
    assert (full["policy"], full["score"]) == ("full", 1)
    assert [(own["policy"], own["query"]) for own in others] == [
        ("auto", "both"), ("auto, last", "last"), ("snapkv", "last")
    ]  # fmt: skip
    assert all(own["kv_bytes"] < full["kv_bytes"] for own in others)
    assert call(*forms, *some, "--forms", "last,first")[0] == 0 and untimed(out)[1:] == rows
    for wrong, reason in (
        (("--forms", "middle"), "--forms has 'middle', expected some of last, system"),
        (("--queries", "all"), "--queries has 'all', expected some of auto, last"),
    ):
        code, _, err = call(*forms, *wrong)
        assert code == 2 and reason in err


def test_forms_of_chats() -> None:
    """The document and the question stand where they should, once."""
    for form in FORMS:
        messages = _messages(form, "DOCUMENT", "QUESTION")
        text = "\n".join(own["content"] for own in messages)
        assert text.count("DOCUMENT") == text.count("QUESTION") == 1
        assert (text.index("QUESTION") < text.index("DOCUMENT")) == (form == "first")
        assert text.endswith("QUESTION") == (form in ("last", "system"))
        assert [own["role"] for own in messages] == (["system", "user"] if form == "system" else ["user"])


def test_chats_and_files(smollm2: Path, tmp_path: Path) -> None:
    """Prompts in the chat template, and a LongBench file."""
    code, _, err = call("turns", smollm2, *SMALL, "--count", 1, "--questions", 2, "--out", tmp_path / "t.jsonl", "--chat")
    assert code == 0, err
    assert [row["task"] for row in untimed(tmp_path / "t.jsonl")[1:]] == ["first", "later", "before", "before"]
    talk = ("chat", smollm2, "--turns", 4, "--count", 1, "--document", 60, "--policies", "snapkv", "--threads", 2, "--out", tmp_path / "c.jsonl")
    code, text, err = call(*talk, "--chat", "--budgets", "90%")
    assert code == 0 and "chat: c.jsonl" in text, err
    rows = untimed(tmp_path / "c.jsonl")[1:]
    assert len(rows) == 2 and all(row["suite"] == "chat" and 0 < row["depth"] <= 1 for row in rows)
    for row in rows:
        full, *others = row["results"]
        assert full["policy"] == "full" and full["n_evaluated"] < 60  # no turn evaluates the one before
        assert len(others) == (full["score"] > 0)
    assert call(*talk, "--chat", "--budgets", "90%")[0] == 0 and untimed(tmp_path / "c.jsonl")[1:] == rows
    code, _, err = call(*talk[:-1], tmp_path / "d.jsonl", "--limited", "--budgets", "90%")
    assert code == 2 and "expected numbers of cells per head with --limited" in err
    file = longbench(tmp_path / "all.jsonl")
    code, text, err = call(
        "tasks", smollm2, file, "--n-ctx", 600, "--policies", "snapkv", "--budgets", "12%", "--limit", 2, "--out", tmp_path / "l.jsonl"
    )
    assert code == 0 and "tasks: l.jsonl" in text, err
    assert [row["task"] for row in untimed(tmp_path / "l.jsonl")[1:]] == ["hotpotqa", "trec"]


@pytest.mark.parametrize(("module", "name"), [("rapidfuzz", "rapidfuzz"), ("rouge_score.rouge_scorer", "rouge-score")])
def test_a_missing_package_is_found_before_the_work(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    metrics._rouge.cache_clear()
    file = longbench(tmp_path / "all.jsonl")
    code, _, err = call("tasks", smollm2, file, "--n-ctx", 600, "--out", tmp_path / "out.jsonl")
    assert code == 2 and f'needs {name}; pip install "windowkv-edge[eval]"' in err
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("needle", "--policies", "nonsense"), "the policy is 'nonsense', expected one of auto, full"),
        (("needle", "--policies", "snapkv(window_size=0)"), "window_size is 0, expected an int of at least 1"),
        (("needle", "--kinds", "pins"), "--kinds has 'pins', expected some of number, word"),
        (("needle", "--depths", "2"), "--depths has '2', expected shares"),
        (("needle", "--types", "q3"), "--types has 'q3', expected some of own, f32"),
        (("needle", "--budgets", "0"), "the budget is '0', expected"),
        (("needle", "--lengths", "100k"), "was trained with 8,192; ask for shorter --lengths"),
        (("needle", "--haystack", "EMPTY"), "empty.txt is empty, expected a text"),
        (("needle", "--haystack", "SHORT"), "expected at least 4,096; give a longer --haystack, or shorter --lengths"),
        (("needle", "--haystack", "FOLDER"), "holds no .txt or .md file"),
        (("ruler", "--lengths", "100"), "--lengths has 100, expected at least 512"),
        (("fidelity", "--text", "SHORT"), "expected at least 2,144 (window and what follows)"),
        (("tasks", "EMPTY"), "empty.txt is empty"),
        (("report", "SHORT"), "line 1 is not a JSON object"),
        (("report", "EMPTY"), "is empty; run windowkv-edge eval"),
    ],
)
def test_broken_input(smollm2: Path, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("A short text.\n")
    (tmp_path / "folder").mkdir()
    names = {"EMPTY": "empty.txt", "SHORT": "short.txt", "FOLDER": "folder"}
    rest = [str(tmp_path / names[arg]) if arg in names else arg for arg in args[1:]]
    out = [] if args[0] == "report" else ["--out", tmp_path / "out.jsonl"]
    code, _, err = call(args[0], *([] if args[0] == "report" else [smollm2]), *rest, *out)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out.jsonl").exists() or len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_a_model_without_chat_template(gemma3: Path, tmp_path: Path) -> None:
    code, _, err = call("needle", gemma3, "--lengths", "600", "--chat", "--out", tmp_path / "out.jsonl")
    assert code == 2
    assert "has no chat template" in err and "leave --chat out" in err


#
# sums
#


def results(scores: dict[tuple[str, float | None], list[float]], suite: str = "needle") -> Results:
    """Made-up results: one prompt per place in the lists."""
    rows = []
    for i in range(len(scores["full", None])):
        found = [
            {"policy": p, "budget": b, "cells": "f16", "score": s[i], "kl": s[i], "kv_bytes": 10, "decode_ms": 1.0}
            for (p, b), s in scores.items()
        ]
        rows.append({"case": str(i), "task": "t", "length": 1000, "depth": 0.5, "results": found, "n_follow": 4})
    return Results({"model": "m", "model_sha256": "0" * 64, "package": "1", "seed": 0}, suite, rows, "x.jsonl")


def test_retention_leaves_out_what_the_full_cache_fails() -> None:
    res = results({("full", None): [1, 0, 0.5], ("a", 0.1): [1, 1, 0.25], ("b", 0.1): [0, 1, 0.5]})
    assert res.n_counted == 2
    assert res.retention(Line("a", "f16"), 0.1) == pytest.approx(1.25 / 1.5)
    assert res.retention(Line("b", "f16"), 0.1) == pytest.approx(0.5 / 1.5)
    assert res.interval(Line("a", "f16"), 0.1) is None  # too few


def test_intervals_cover() -> None:
    """95 % intervals of a mean hold the truth about as often."""
    rng = random.Random(4)
    hits = 0
    for _ in range(60):
        sample = [rng.gauss(0.3, 0.1) for _ in range(40)]
        low, high = results({("full", None): sample, ("a", 0.1): sample}, "fidelity").interval(Line("a", "f16"), 0.1, "kl") or (0, 0)
        hits += low <= 0.3 <= high
    assert hits >= 52


def test_ranks() -> None:
    first = results({("full", None): [1, 1], ("a", 0.1): [1, 1], ("b", 0.1): [1, 0], ("c", 0.1): [1, 0]})
    second = results({("full", None): [0, 0], ("a", 0.1): [0.3, 0.3], ("b", 0.1): [0.1, 0.1], ("c", 0.1): [0.2, 0.2]}, "fidelity")
    found = mean_ranks([first, second])[0.1]
    assert {line.policy: place for line, place in found.items()} == {"a": 2.0, "b": 1.75, "c": 2.25}
    assert ranks([first]) is None
    assert list(draw(first)) == ["bytes", "depth", "heatmap"]
    nothing = results({("full", None): [0, 0]})
    assert nothing.n_counted == 0 and draw(nothing) == {}


def test_speeds_of_answers_that_decoded_nothing() -> None:
    res = results({("full", None): [1, 1], ("a", 0.1): [1, 1]})
    res.rows[0]["results"][1]["decode_ms"] = None
    res.rows[1]["results"][1]["decode_ms"] = 7.0
    assert res.mean(Line("a", "f16"), 0.1, "decode_ms") == 7.0
