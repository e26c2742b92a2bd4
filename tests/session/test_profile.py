"""Head scores measured on a real model: right, resumable, and used by the sessions that need them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scripted import evaluate
from typer.testing import CliRunner

from windowkv_edge import HeadScores, Llama
from windowkv_edge.cli import app
from windowkv_edge.profile import EXAMPLES, Example, Outcome, Plan, ProfileError, _Watcher, measure, write_gguf

QUICK = Plan(lengths=(150,), depths=(0.2, 0.8), examples=EXAMPLES[:1] + EXAMPLES[-1:])


@pytest.fixture
def copy(smollm2: Path, tmp_path: Path) -> Path:
    """The model under another path, so that nothing is written beside the cached one."""
    path = tmp_path / "copy.gguf"
    path.symlink_to(smollm2)
    return path


def test_where_the_needle_stands(smollm2: Path) -> None:
    watcher = _Watcher(smollm2, QUICK, 2)
    for example in EXAMPLES:
        for depth in (0.0, 0.37, 1.0):
            tokens, needle, answer = watcher.prompt(example, 150, depth)
            text = lambda part: watcher.llm.detokenize(part).decode()  # noqa: E731
            assert text(tokens[needle]).strip() == example.needle
            assert text(tokens[answer]).strip() == example.answer
            assert needle.start == int(150 * depth) and needle.start < answer.start < answer.stop < needle.stop
            assert len(tokens) - (needle.stop - needle.start) > 150
    watcher.close()


def test_attention_is_that_of_the_last_position(smollm2: Path) -> None:
    """Every row of every query head sums to 1, and equals softmax(q K^T) from the session's own K and Q."""
    watcher = _Watcher(smollm2, QUICK, 2)
    tokens, _, _ = watcher.prompt(EXAMPLES[0], 150, 0.5)
    watcher.llm.eval(tokens)
    weights = watcher._attention()
    assert weights.shape == (30, 9, len(tokens))
    np.testing.assert_allclose(weights.sum(axis=2), 1.0, rtol=1e-4)
    for layer, head in ((0, 0), (17, 3), (29, 8)):
        pos, q = watcher.kv.queries(layer, head)
        assert pos.tolist() == [len(tokens) - 1]
        x = watcher.kv.rows(layer, head // 3, "k").astype(np.float64) @ q[0] / 8
        want = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        np.testing.assert_allclose(weights[layer, head], want, rtol=2e-2, atol=1e-6)
    watcher.close()


def test_a_right_answer_earns_by_the_papers_rules(smollm2: Path) -> None:
    watcher = _Watcher(smollm2, QUICK, 2)
    r = watcher.run((150, 0.5, 0), EXAMPLES[0])
    assert r.answer == EXAMPLES[0].answer and r.earned is not None
    # an answer of N tokens earns a head k/N, k of its steps
    n = len(watcher.llm.tokenize(b" " + EXAMPLES[0].answer.encode(), add_bos=False))
    np.testing.assert_allclose(r.earned * n, np.round(r.earned * n), atol=1e-9)
    assert 0 < r.earned.max() <= 1 + 1e-9
    r2 = watcher.run((150, 0.5, 3), EXAMPLES[3])
    assert r2.earned is not None and 0 < r2.earned.max() <= 1
    assert not np.array_equal(r2.earned > 0, r.earned > 0)
    wrong = Example("r", "The lid of the box is blue.", "What is 17 times 23 minus 9?", "The result is", "lid of the box")
    assert watcher.run((150, 0.5, 0), wrong).earned is None
    watcher.close()


def test_interrupted_and_resumed(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what an uninterrupted run gives. There the second prompt shares two batches with the first, and whole
    ones, as kernels may round differently in others; the run that resumes evaluates the same two."""
    starts = []  # positions that were there when a prompt was evaluated

    def noted(llm: Llama, tokens: list[int]) -> None:
        if len(tokens) > 1:
            starts.append(llm.n_tokens)
        plain_eval(llm, tokens)

    plain_eval = Llama.eval
    monkeypatch.setattr(Llama, "eval", noted)
    part = tmp_path / "part.jsonl"
    plan = replace(QUICK, lengths=(530,), depths=(0.97,), examples=QUICK.examples[::-1])  # scores with all digits first

    def stop_at_one(done: int, total: int, outcome: Outcome | None) -> None:
        assert total == 2
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(copy, part, plan, 2, stop_at_one)
    assert len(part.read_text().splitlines()) == 2
    with part.open("a") as file:
        file.write('{"case": [530, 0.97, 1], "answ')  # cut off while it was written

    seen: list[int] = []
    resumed = measure(copy, part, plan, 2, lambda done, total, outcome: seen.append(done))
    assert seen == [1, 2]
    whole = measure(copy, tmp_path / "other.jsonl", plan, 2)
    assert starts == [0, 0, 0, 512]
    assert part.read_bytes() == (tmp_path / "other.jsonl").read_bytes()
    for kind in ("r", "r2"):
        assert whole.scores[kind].any() and np.array_equal(resumed.scores[kind], whole.scores[kind])
    assert resumed.about["counts"] == whole.about["counts"]
    # of another plan: measured anew
    seen.clear()
    measure(copy, part, Plan((160,), (0.5,), QUICK.examples), 2, lambda done, total, outcome: seen.append(done))
    assert seen == [0, 1, 2]


def test_command_and_sessions(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "carries.gguf"
    run = CliRunner().invoke(
        app, ["profile", str(copy), "--lengths", "150", "--depths", "0.5", "--threads", "2", "--gguf", str(out)]
    )
    assert run.exit_code == 0, run.output
    beside = tmp_path / "copy.heads.json"
    assert "of the score" in run.output and json.loads(beside.read_text())["format"] == "windowkv-edge head scores"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["carries.gguf", "copy.gguf", "copy.heads.json"]
    scores = HeadScores.load(beside)
    assert scores.shape == (30, 9) and scores.about["counts"]["r"]["asked"] == 2

    # found beside the file, and inside the copy that carries them
    for path in (copy, out):
        llm = Llama(str(path), n_ctx=512, kv_policy="headkv", kv_budget=50, n_threads=2, verbose=False)
        np.testing.assert_allclose(llm._kv_bound.shares, scores.kv_heads("r", 3), rtol=1e-4)  # type: ignore[attr-defined]
        evaluate(llm, list(range(100, 300)))
        assert llm.kv_stats().cells.sum() == 50 * 90 and llm.kv_stats().cells.std() > 5
        llm.close()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lengths", "many"], "--lengths has 'many', expected a number of tokens"),
        (["--lengths", "10"], "at least 64 tokens"),
        (["--depths", "2"], "expected shares of 0 to 1"),
        (["--lengths", "9000"], "the model was trained on"),
        (["--lengths", "7000"], "the text has"),
        (["--out", "nowhere/h.json"], "there is no folder"),
        (["--gguf", "nowhere/m.gguf"], "create it, or give another --gguf"),
        (["--gguf", "copy.gguf"], "is the model itself"),
    ],
)
def test_bad_arguments(args: list[str], message: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    run = CliRunner().invoke(app, ["profile", str(copy), *args])
    assert run.exit_code == 2
    assert message in " ".join(run.output.split())
    assert {path.name for path in copy.parent.iterdir()} == {"copy.gguf"}


def test_a_model_that_answers_nothing(smollm2: Path, tmp_path: Path) -> None:
    never = Example("r", "The lid of the box is blue.", "What is 17 times 23 minus 9?", "The result is", "lid of the box")
    with pytest.raises(ProfileError, match="answered none of the needle questions \\(r: 0 of 1\\)"):
        measure(smollm2, tmp_path / "part.jsonl", Plan((150,), (0.5,), (never,)), 2)


def test_shipped_profile_is_of_the_shipped_model(smollm2: Path) -> None:
    llm = Llama(str(smollm2), n_ctx=512, kv_policy="headkv-r2", kv_budget=50, n_threads=2, verbose=False)
    source = llm._kv_bound.shares.shape  # type: ignore[attr-defined]
    assert source == (30, 3)
    llm.close()


def test_write_gguf_refuses_the_model_itself(copy: Path, smollm2: Path) -> None:
    with pytest.raises(ProfileError, match="is the model itself"):
        write_gguf(copy, HeadScores({"r": np.ones((30, 9))}), smollm2)
