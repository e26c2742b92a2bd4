"""windowkv-edge eval: branches are fresh runs, suites, records that go on, reports, broken input."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tiny_model
from typer.testing import CliRunner

from windowkv_edge import AdaKV, Auto, KVPolicy, Llama, SnapKV, WindowKV
from windowkv_edge.bench.session import Model
from windowkv_edge.cli import app
from windowkv_edge.eval import (
    Branches,
    Case,
    EvalError,
    Records,
    Style,
    hay_tokens,
    needle_cases,
    prose,
    ruler_cases,
    tasks_cases,
    turns_cases,
)
from windowkv_edge.eval import metrics
from windowkv_edge.eval import needle as needles
from windowkv_edge.eval import ruler as rulers
from windowkv_edge.eval.metrics import score
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
# branches
#


def fresh(llm: Llama, prompt: list[int], follow: list[int], budget: int) -> np.ndarray:
    """Logits of a session of its own after every token, the first one of the full cache."""

    def logits() -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()

    llm.kv_budget = 10_000
    llm.eval(prompt)
    rows = [logits()]
    llm.kv_compact(budget)
    for token in follow:
        llm.eval([token])
        rows.append(logits())
    return np.array(rows)


@pytest.mark.parametrize("cells", ["f16", "q8_0"])
@pytest.mark.parametrize("which", ["smollm2", "gemma3"])
def test_branches_are_fresh_runs(
    request: pytest.FixtureRequest, which: str, cells: str, document: str, opened: Callable[..., Llama]
) -> None:
    """Bit for bit, in any order, again after another prompt, with more queries observed than a policy asks for, and for models
    whose other layers keep a window, in f16 whatever cells the policy prefers."""
    path = request.getfixturevalue(which)
    model = Model(path)
    policies: list[KVPolicy] = [WindowKV(), AdaKV(window_size=16)] if cells == "f16" else [Auto(), Auto(token_window_size=20)]
    own = Branches(model, 900, 48, cells)
    assert own.cells == cells
    tokens = model.tokenize(document)
    prompts = tokens[:800], [*tokens[:600], *tokens[2000:2250]]
    try:
        branched: dict[tuple[int, int], np.ndarray] = {}
        for i in (0, 1, 0):
            own.prefill(prompts[i])
            for j in (1, 0):
                own.compact(policies[j], 90)
                rows = [own.first]
                for token in tokens[3000:3006]:
                    own.session.decode([token])
                    rows.append(own.session.logits())
                assert np.array_equal(branched.setdefault((i, j), np.array(rows)), np.array(rows))
        for j, policy in enumerate(policies):
            llm = opened(path, kv_policy=policy, n_ctx=900)
            for i in (0, 1):
                llm.reset()
                want = fresh(llm, prompts[i], tokens[3000:3006], 90)
                assert np.array_equal(branched[i, j], want), (policy.name, i)
    finally:
        own.close()
        model.close()


@pytest.mark.parametrize("kind", ["write_llama", "write_lfm2", "write_granite_hybrid", "write_gpt_oss"])
def test_branches_of_hybrid_models(tmp_path: Path, kind: str, opened: Callable[..., Llama]) -> None:
    """The recurrent state goes back as well, to what a fresh session has."""
    path = getattr(tiny_model, kind)(tmp_path / "model.gguf")
    model = Model(path)
    own = Branches(model, 400, 8)
    tokens = np.random.default_rng(5).integers(0, tiny_model.N_VOCAB, 330).tolist()
    try:
        own.prefill(tokens[:300])
        found = []
        for _ in range(3):
            own.compact(SnapKV(window_size=8), 40)
            rows = []
            for token in tokens[300:]:
                own.session.decode([token])
                rows.append(own.session.logits())
            found.append(np.array(rows))
        assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
        llm = opened(path, kv_policy=SnapKV(window_size=8), n_ctx=400)
        assert np.array_equal(fresh(llm, tokens[:300], tokens[300:], 40)[1:], found[0])
    finally:
        own.close()
        model.close()


def test_neighbours_share_their_prefill(model: Model, document: str) -> None:
    own = Branches(model, 1700, 32)
    tokens = model.tokenize(document)
    try:
        own.prefill(tokens[:1600])
        own.prefill([*tokens[:1500], *tokens[2000:2100]])
        assert own.n_evaluated == 1600 + 1600 - 1024  # whole batches of 512
        own.prefill(own.prompt)
        assert own.n_evaluated == 1600 + 1600 - 1024
    finally:
        own.close()


#
# texts and prompts
#


def test_prose_does_not_repeat_itself() -> None:
    text = prose(200_000, seed=1)
    assert text == prose(200_000, seed=1) != prose(200_000, seed=2)
    paragraphs = text.split("\n")
    assert len(set(paragraphs)) == len(paragraphs)
    sentences = re.split(r"(?<=[.])\s", text.replace("\n", " "))
    assert len(set(sentences)) > 0.9 * len(sentences)
    assert not re.search(r"[0-9{}?]|secret|number", text)


@pytest.mark.parametrize("kind", needles.KINDS)
def test_needles(model: Model, kind: str) -> None:
    """The answer stands in the text and not in the question, every fact once, different ones by index and seed."""
    made = [needles.make_needle(kind, i, seed) for seed in (0, 1) for i in range(8)]
    assert kind != "word" or all(" " in needle.answers[0] for needle in made)  # the first token is the full cache's
    assert len({needle.sentences for needle in made}) >= 14
    for needle in made:
        for answer in needle.answers:
            assert any(answer in sentence for sentence in needle.sentences)
            assert answer not in needle.question and answer not in needle.lead
    hay = hay_tokens(model, None, 1000, 0)
    style = Style(model)
    for case in needle_cases(style, hay, [1000], [0.1, 0.9], [kind], 2, 0):
        text = model.detokenize(case.prompt)
        needle = needles.make_needle(kind, case.index, 0)
        assert all(text.count(f"\n{sentence}\n") == 1 for sentence in needle.sentences)
        assert text.endswith(f"\n\nQuestion: {needle.question}\nAnswer: {needle.lead}")
        at = len(model.tokenize(text[: text.index(needle.sentences[0])]))
        assert case.depth is not None and abs(at - 1000 * case.depth) < 80


@pytest.mark.parametrize("task", rulers.TASKS)
def test_ruler(model: Model, task: str) -> None:
    """Prompts fill their length and no more, and hold what they ask for."""
    hay = hay_tokens(model, None, 2048, 0)
    cases = list(ruler_cases(Style(model), hay, [1024, 2048], [task], 3, 0))
    again = list(ruler_cases(Style(model), hay, [1024, 2048], [task], 3, 0))
    assert [case.prompt for case in cases] == [case.prompt for case in again]
    assert len({tuple(case.prompt) for case in cases}) == 6
    for case in cases:
        assert 0.9 * case.length <= len(case.prompt) <= case.length
        text = model.detokenize(case.prompt)
        for answer in case.answers:
            assert answer in text
    if task == "cwe":
        words = re.findall(r"\d+\. ([\w -]+?)(?= \d+\.|\n)", model.detokenize(cases[-1].prompt))
        counts = {word: words.count(word) for word in words}
        best = sorted(counts, key=lambda word: -counts[word])[:3]
        assert sorted(best) == sorted(cases[-1].answers)
    if task == "fwe":
        words = re.findall(r"[a-z]{6}", model.detokenize(cases[-1].prompt).split("words.\n")[1].split("\n\nQ")[0])
        counts = {word: words.count(word) for word in words}
        assert set(sorted(counts, key=lambda word: -counts[word])[:2]) == set(cases[-1].answers)
    if task == "vt":
        values = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", model.detokenize(cases[0].prompt)))
        asked = re.search(r"hold the value (\d+)\?", model.detokenize(cases[0].prompt))
        for name in cases[0].answers:
            while name in values:
                name = values[name]
            assert asked is not None and name == asked[1]


def test_turns(model: Model) -> None:
    hay = hay_tokens(model, None, 1000, 0)
    cases = list(turns_cases(Style(model), hay, [1000], 2, 4, 0))
    assert [case.task for case in cases] == ["first", "later", "later", "later"] * 2
    assert len({tuple(case.prompt) for case in cases}) == 2
    text = model.detokenize(cases[0].prompt)
    for case in cases[1:4]:
        assert all(answer in text for answer in case.answers)
        assert model.detokenize(case.follow_up).startswith(f" {cases[0].answers[0]}.\n\nQuestion: ")
    assert len({case.key for case in cases}) == len(cases)


def test_chat_template(model: Model, gemma3: Path) -> None:
    style = Style(model, chat=True)
    text = "".join(model.piece(token) for token in [*style.head, *style.tokenize("A text."), *style.ask("Why?", "Because")])
    assert re.fullmatch(
        r"(<\|im_start\|>system\n.*<\|im_end\|>\n)?<\|im_start\|>user\nA text\.\n\nWhy\?<\|im_end\|>\n<\|im_start\|>assistant\nBecause",
        text, re.S,
    ), text  # fmt: skip
    again = "".join(model.piece(token) for token in style.ask_again("When?", "At"))
    assert re.fullmatch(r"<\|im_end\|>\n<\|im_start\|>user\nWhen\?<\|im_end\|>\n<\|im_start\|>assistant\nAt", again), again
    gemma = Model(gemma3)
    assert Style(gemma).head == [llama_cpp.llama_vocab_bos(gemma.vocab)]
    assert Style(model).head == []
    gemma.close()


@pytest.mark.parametrize(
    ("metric", "output", "answers", "classes", "want"),
    [
        ("contains_all", " Bluebird and 12", ("bluebird", "12"), (), 1.0),
        ("contains_all", " Bluebird", ("bluebird", "12"), (), 0.0),
        ("contains_share", "12, 34", ("12", "34", "56", "78"), (), 0.5),
        ("f1", "The cat sat.", ("a cat sat down",), (), 0.8),
        ("f1", "none", ("a cat", "None!"), (), 1.0),
        ("f1", "dog", ("cat",), (), 0.0),
        ("rouge_l", "the cat sat", ("the cat sat",), (), 1.0),
        ("rouge_l", "a b c d", ("a x c y",), (), 0.5),
        ("accuracy", "It is about Food.", ("Food",), ("Food", "Animal"), 1.0),
        ("accuracy", "Food or Animal", ("Food",), ("Food", "Animal"), 0.5),
        ("accuracy", "Other location", ("Other location",), ("Other location", "location"), 1.0),
        ("number", "Paragraph 3", ("Paragraph 3",), (), 1.0),
        ("number", "3 or 4", ("3",), (), 0.5),
        ("edit", "\nreturn x\nfoo()", ("return x",), (), 1.0),
        ("edit", "# why\nabcd", ("abxd",), (), 0.75),
    ],
)
def test_metrics(metric: str, output: str, answers: tuple[str, ...], classes: tuple[str, ...], want: float) -> None:
    assert score(metric, output, answers, classes) == pytest.approx(want)


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
        "'context' is missing or not a str": 1, "not a JSON object": 1, "line 10 is not JSON": 1,
    }  # fmt: skip
    empty = tmp_path / "bad.jsonl"
    empty.write_text("{broken\n")
    with pytest.raises(EvalError, match=r"holds nothing to score \(1 x line 1 is not JSON\)"):
        tasks_cases(Style(model), empty, 512)


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
    for name, n in (("needle-prose", 6), ("needle-journey", 6), ("ruler", 8), ("turns", 4), ("fidelity", 2)):
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
    for word in ("## needle: needle-prose.jsonl", "## turns/later", "## Ranks", "| auto, q8_0 |", "KL"):
        assert word in text
    assert {path.name for path in to.glob("*.png")} == {
        "needle-prose-bytes.png", "needle-prose-depth.png", "needle-prose-heatmap.png", "needle-journey-bytes.png",
        "needle-journey-depth.png", "needle-journey-heatmap.png", "ruler-bytes.png", "turns-first-bytes.png",
        "turns-later-bytes.png", "fidelity-bytes.png",
    }  # fmt: skip
    page = (to / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 10
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)  # letters of a picture may say anything
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in to.glob("*.png"))
    code, text, err = call("report", to / "ruler.jsonl")
    assert code == 0 and "## ruler" in text and "## Ranks" not in text


def test_chats_and_files(smollm2: Path, tmp_path: Path) -> None:
    """Prompts in the chat template, and a LongBench file."""
    code, _, err = call("turns", smollm2, *SMALL, "--count", 1, "--questions", 2, "--out", tmp_path / "t.jsonl", "--chat")
    assert code == 0, err
    assert [row["task"] for row in untimed(tmp_path / "t.jsonl")[1:]] == ["first", "later"]
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
    assert ranks([first]) == ""
    assert list(draw(first)) == ["bytes", "depth", "heatmap"]
    nothing = results({("full", None): [0, 0]})
    assert nothing.n_counted == 0 and draw(nothing) == {}


def test_speeds_of_answers_that_decoded_nothing() -> None:
    res = results({("full", None): [1, 1], ("a", 0.1): [1, 1]})
    res.rows[0]["results"][1]["decode_ms"] = None
    res.rows[1]["results"][1]["decode_ms"] = 7.0
    assert res.mean(Line("a", "f16"), 0.1, "decode_ms") == 7.0


def test_keys_are_one_per_prompt(model: Model) -> None:
    hay = hay_tokens(model, None, 600, 0)
    style = Style(model)
    made: list[Case] = [
        *needle_cases(style, hay, [500, 600], [0.1, 0.5], needles.KINDS, 2, 0),
        *ruler_cases(style, hay, [512], list(rulers.TASKS), 2, 0),
        *turns_cases(style, hay, [500, 600], 2, 3, 0),
    ]
    assert len({case.key for case in made}) == len(made)
