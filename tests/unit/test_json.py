"""JSON from outside: what is refused, with file and line; what we write can be read everywhere."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from windowkv_edge import FormatError, HeadScoresError, WindowKVError, _json
from windowkv_edge.eval.case import EvalError
from windowkv_edge.eval.records import Records, read_records
from windowkv_edge.eval.results import load
from windowkv_edge.eval.tables import markdown
from windowkv_edge.eval.tasks import tasks_cases


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"a": 1} {"b": 2}', "Extra data"),
        ('{"a": NaN}', "the number NaN, expected finite ones"),
        ("[-Infinity]", "the number -Infinity"),
        ("[1e400]", "a number beyond float64"),
        ("[9223372036854775808123]", "an integer beyond 64 bits"),
        ("9" * 5000, "4300 digits"),
        ('{"a": 1, "a": 2}', "the key 'a' twice in one object"),
        (r'"\ud800"', "half of a character"),
        (r'{"\udfff": 1}', "half of a character"),
        (b"\xff\xfe{}", "codec can't decode byte 0xff"),
        ("[" * 33 + "]" * 33, "nested too deeply, expected at most 32 levels"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (" " * (_json.MAX_BYTES + 1), "16,777,217 characters, expected at most 16,777,216"),
    ],
)
def test_what_is_refused(text: str | bytes, why: str) -> None:
    for kind in (FormatError, HeadScoresError):
        with pytest.raises(kind, match=f"^file: line 7: .*{why}") as caught:
            _json.loads(text, "file: line 7", kind)
        assert type(caught.value) is kind and isinstance(caught.value, ValueError)
        assert len(str(caught.value)) < 300


def test_what_is_read() -> None:
    value = {"a": [1, -0.5, True, None, "é𝄞"], "b": {"c": 2**64 - 1, "d": -(2**63)}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), "\ufeff" + json.dumps(value)):
        assert _json.loads(text, "x") == value
        assert _json.loads(text.encode(), "x") == value
    assert _json.loads("[" * 32 + "1" + "]" * 32, "x")
    assert _json.loads(r'"\ud834\udd1e"', "x") == "𝄞"  # two halves are a character


def test_what_is_written_is_read_everywhere() -> None:
    value = {"a": float("nan"), "b": [float("inf"), (1, 2.5)], "\udcff": "\udcff.gguf"}
    text = _json.dumps(value, indent=1)
    assert _json.loads(text, "x") == {"a": None, "b": [None, [1, 2.5]], "\\udcff": "\\udcff.gguf"}


def test_files_are_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"12345")
    assert _json.read_bytes(path, 5) == b"12345"
    with pytest.raises(FormatError, match=r"a\.json: 5 bytes, expected at most 4"):
        _json.read_bytes(path, 4)
    tracemalloc.start()
    try:
        assert _json.read_bytes(path, 1 << 30) == b"12345"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # not the bound, but what is there
    finally:
        tracemalloc.stop()
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="it is a (FIFO|device), expected a regular file"):
            _json.read_bytes(odd, 10)
    for no_path in ("a\0b", "\ud800"):
        with pytest.raises(FormatError, match="is no path: "):
            _json.read_bytes(no_path, 10)
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(OSError):
            _json.read_bytes(missing, 10)


#
# results files
#

HEADER = {
    "format": "windowkv-edge eval",
    "version": 1,
    "model": "m.gguf",
    "model_sha256": "0" * 64,
    "package": "1",
    "seed": 0,
}
FULL = {"policy": "full", "budget": None, "cells": "f16", "kv_bytes": 100, "score": 1.0, "decode_ms": 2.0}
KEPT = {"policy": "snapkv", "budget": 0.12, "cells": "f16", "kv_bytes": 12, "score": 0.5, "decode_ms": None}
ROW = {"case": "a", "suite": "needle", "task": "number", "length": 1000, "depth": 0.5, "results": [FULL, KEPT]}
KL = {"kl": 0.1, "top1": 0.9, "nll_increase": -0.1}
FAR = ROW | {"suite": "fidelity", "n_follow": 8, "results": [FULL | KL, KEPT | KL]}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_results_are_read(tmp_path: Path) -> None:
    (needle, far) = load([written(tmp_path / "a.jsonl", HEADER, ROW, FAR)])
    assert (needle.suite, far.suite) == ("needle", "fidelity")
    assert "| snapkv | 50.0% |" in markdown([needle])


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ({"model": None}, {}, "line 1: 'model' is None, expected text"),
        ({"model_sha256": 7}, {}, "line 1: 'model_sha256' is 7, expected text"),
        ({"seed": "0"}, {}, "line 1: 'seed' is '0', expected a number"),
        ({"version": [1]}, {}, r"has version \(list\), expected 1"),
        ({}, {"case": None}, "line 2 is not the result of a prompt: 'case' is None"),
        ({}, {"case": ["a"]}, "line 2 is not the result of a prompt"),
        ({}, {"suite": "<script>"}, "line 2: 'suite' is '<script>', expected one of needle"),
        ({}, {"suite": {}}, r"'suite' is \(dict\)"),
        ({}, {"task": 1}, "'task' is 1, expected text"),
        ({}, {"length": "1000"}, "'length' is '1000', expected a number"),
        ({}, {"length": 1e300}, "'length' is 1e.300"),
        ({}, {"depth": "half"}, "'depth' is 'half', expected a share"),
        ({}, {"suite": "fidelity"}, "'n_follow' is None"),
        ({}, {"suite": "fidelity", "n_follow": 8}, "'kl' is None, expected a number or null"),
        ({}, {"results": None}, "'results' is None, expected a list"),
        ({}, {"results": []}, r"'results' is \(list\), expected a list of objects"),
        ({}, {"results": [1]}, "expected a list of objects"),
        ({}, {"results": [KEPT]}, "the first of 'results' is not that of the full f16 cache"),
        ({}, {"results": [FULL, KEPT | {"policy": 1}]}, "'policy' of a result is 1"),
        ({}, {"results": [FULL, KEPT | {"budget": None}]}, "'budget' of 'snapkv' is None, expected a share"),
        ({}, {"results": [FULL, KEPT | {"budget": True}]}, "'budget' of 'snapkv' is True"),
        ({}, {"results": [FULL, KEPT | {"budget": 1.5}]}, "'budget' of 'snapkv' is 1.5"),
        ({}, {"results": [FULL, KEPT | {"budget": [0.1]}]}, "'budget' of 'snapkv'"),
        ({}, {"results": [FULL | {"score": 2}]}, "'score' is 2, expected a number of 0 to 1"),
        ({}, {"results": [FULL | {"kv_bytes": -1}]}, "'kv_bytes' is -1, expected a number"),
        ({}, {"results": [FULL | {"decode_ms": "fast"}]}, "'decode_ms' is 'fast'"),
        (
            {},
            {"results": [FULL, *(KEPT | {"policy": f"p{i}"} for i in range(70))]},
            "71 policies with 1 budgets in needle",
        ),
    ],
)
def test_broken_results_name_file_and_line(
    tmp_path: Path, header: dict[str, Any], row: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvalError, match=rf"a\.jsonl.*{message}"):
        load([written(tmp_path / "a.jsonl", HEADER | header, ROW | row)])


@pytest.mark.parametrize("key", [key for key in ROW if key != "case"])
def test_rows_are_whole(tmp_path: Path, key: str) -> None:
    row = {own: value for own, value in ROW.items() if own != key}
    with pytest.raises(EvalError, match=rf"a\.jsonl: line 2: '{key}' is None"):
        load([written(tmp_path / "a.jsonl", HEADER, row)])


@pytest.mark.parametrize("key", [*FULL, *KL])
@pytest.mark.parametrize("at", [0, 1])
def test_results_of_a_row_are_whole(tmp_path: Path, key: str, at: int) -> None:
    row = FAR if key in KL else ROW
    results = [{own: value for own, value in r.items() if own != key or i != at} for i, r in enumerate(row["results"])]
    with pytest.raises(EvalError, match=r"a\.jsonl: line 2: "):
        load([written(tmp_path / "a.jsonl", HEADER, row | {"results": results})])


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"case": "b", "x": NaN}', '{"case": "b", "case": "c"}', "[]", "7", r'{"case": "\ud800"}']
)
def test_broken_lines_stop_reports_and_runs(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "a.jsonl", HEADER, ROW, line)
    for use in (load, lambda paths: Records(paths[0], HEADER)):
        with pytest.raises(EvalError, match=r"a\.jsonl: line 3 is not a JSON object: .*give another --out, or delete"):
            use([path])


def test_results_that_are_no_numbers_stay_readable(tmp_path: Path) -> None:
    """A model that computes NaN, and one whose name is not UTF-8, are seen after the work."""
    path = tmp_path / "a.jsonl"
    with Records(path, HEADER | {"model": "\udcff.gguf"}) as records:
        records.add(FAR | {"results": [FULL | KL, KEPT | KL | {"kl": float("nan")}]})
    (res,) = load([path])
    assert "\\\\udcff.gguf" in markdown([res])
    assert res.rows[0]["results"][1]["kl"] is None
    with Records(path, HEADER | {"model": "\udcff.gguf"}) as again:
        assert again.n_old == 1


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for use in (lambda p: read_records(p), lambda p: Records(p, HEADER), lambda p: tasks_cases(None, p, 512)):  # type: ignore[arg-type]
        with pytest.raises(EvalError, match="expected a regular file|not seekable"):
            use(tmp_path / "pipe")


#
# task files
#


class Letters:
    """Stands for a style; a token is a byte."""

    bos: list[int] = []
    head: list[int] = []

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    ask = tokenize


TASK = {"dataset": "hotpotqa", "context": "Ana lives in Rome.", "input": "Where?", "answers": ["Rome"]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            r'{"dataset": "hotpotqa", "context": "\ud800", "input": "i", "answers": ["a"]}',
            "not JSON .line 2: half of a character",
        ),
        ('{"a":' * 100_000, "not JSON .line 2: it is nested too deeply"),
        (json.dumps(TASK | {"context": 7}), "'context' is missing or not a str"),
        (json.dumps(TASK | {"answers": "Rome"}), "'answers' is missing or not a list"),
        (json.dumps(TASK | {"answers": [["Rome"]]}), "'answers' is empty or not a list of strings"),
        (json.dumps(TASK | {"dataset": ["x"]}), "'dataset' is missing or not a str"),
        (json.dumps(TASK | {"dataset": "x" * 5000}), "dataset 'xxx"),
        (
            json.dumps(TASK | {"dataset": "trec", "all_classes": "abc"}),
            "'all_classes' is missing or not a list of strings",
        ),
        (
            json.dumps(TASK | {"dataset": "trec", "all_classes": [1]}),
            "'all_classes' is missing or not a list of strings",
        ),
        ("null", "not a JSON object"),
    ],
)
def test_broken_tasks_are_skipped_with_a_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps(TASK) + f"\n{line}\n", encoding="utf-8")  # a BOM does not matter
    cases, skipped = tasks_cases(Letters(), path, 512)  # type: ignore[arg-type]
    assert len(cases) == 1 and skipped.total() == 1
    (got,) = skipped
    assert re.match(reason, got) and len(got) < 300


def test_reasons_are_few(tmp_path: Path) -> None:
    rows = [TASK, *(TASK | {"dataset": f"set {i}"} for i in range(500))]
    path = written(tmp_path / "a.jsonl", *rows, *["{broken"] * 500)
    _, skipped = tasks_cases(Letters(), path, 512)  # type: ignore[arg-type]
    assert skipped.total() == 1000 and len(skipped) <= 22
    with pytest.raises(EvalError, match="is empty"):
        tasks_cases(Letters(), written(path, " "), 512)  # type: ignore[arg-type]
    with pytest.raises(EvalError, match="cannot read .*none.jsonl: No such file"):
        tasks_cases(Letters(), tmp_path / "none.jsonl", 512)  # type: ignore[arg-type]


def test_every_error_is_one_kind() -> None:
    for kind in (FormatError, HeadScoresError, EvalError):
        assert issubclass(kind, ValueError) and issubclass(kind, WindowKVError)
