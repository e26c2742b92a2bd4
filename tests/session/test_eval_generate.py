"""``eval generate``: what it measures of long answers, and that its files and tables say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import TOKENS
from typer.testing import CliRunner

from windowkv_edge import get_policy
from windowkv_edge.bench.session import Model
from windowkv_edge.cli import app
from windowkv_edge.eval import GenerateCase, Generator, Plan, Records
from windowkv_edge.eval.generate import Sampler, Writer, repeats
from windowkv_edge.eval.page import html
from windowkv_edge.eval.pictures import png
from windowkv_edge.eval.results import load
from windowkv_edge.eval.tables import markdown

CELLS, INTERVAL = 96, 16
NAMES = ("snapkv", "h2o", "corm", "streamingllm")
CASE = GenerateCase("story", 0, TOKENS[:48], 300, 200, INTERVAL, 1.0, 3)
HEADER = {"model": "tiny", "model_sha256": "0" * 64, "package": "1", "seed": 3, "interval": INTERVAL, "temperature": 1.0}


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[Model]:
    own = Model(tiny)
    yield own
    own.close()


@pytest.fixture(scope="module")
def records(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "answers.jsonl"
    plan = Plan({name: get_policy(name) for name in NAMES}, (CELLS,), ("own",), 1)
    said: list[str] = []
    with Records(path, HEADER) as out:
        Generator(model, plan, out, lambda what, n=0: said.append(what)).run([CASE])
    assert any("300 tokens" in what for what in said)
    return path


def test_pieces_are_read_as_one_by_one(model: Model) -> None:
    """A piece ends where a compaction would come: the same cells, and logits that differ in rounding."""
    for name in NAMES:
        found = []
        for n in (INTERVAL, 1):
            own = Writer(model, get_policy(name), CASE, CELLS, 1)
            found.append(np.concatenate([own.read(TOKENS[48 + i : 48 + i + n]) for i in range(0, 160, n)]))
            assert own.most_cells == CELLS and len(own.compact_ms) == (160 - (CELLS - 48)) // INTERVAL
            found.append(own.kv.positions(1, 1))
            own.close()
        np.testing.assert_allclose(found[0], found[2], atol=2e-2)
        assert len(set(found[1].tolist()) & set(found[3].tolist())) >= 0.97 * len(found[1])


def test_results(records: Path) -> None:
    (res,) = load([records])
    assert res.is_generate and res.budgets == [CELLS]
    row = res.rows[0]
    full, *others = row["results"]
    assert full["kl"] == 0 and full["top1"] == 1 and full["n_cells"] == 48 + 300
    for own in others:
        assert own["kl"] > 0 and own["n_cells"] == CELLS
        assert len(own["kl_by_part"]) == 8
        assert np.mean(own["kl_by_part"]) == pytest.approx(own["kl"], rel=0.1)
        assert own["kl_by_part"][0] < 1e-4 < own["kl_by_part"][-1]  # nothing is evicted yet
        assert own["decode_ms"] > 0 and own["n_compactions"] == -((48 + 200 - CELLS) // -INTERVAL)
        assert own["ms_by_part"][6] is None  # 200 of 300 tokens
        assert set(own["repeats"]) == {"4", "5", "6", "7", "8"}


def test_its_report(records: Path) -> None:
    results = load([records])
    text = markdown(results)
    assert "1 answers of 300 tokens, compacted every 16 tokens, temperature 1.0" in text
    for name in ("KL by position", "Own texts", "ms per compaction"):
        assert name in text
    (drawn,) = [png(res) for res in results]
    assert list(drawn) == ["answers"] and drawn["answers"].startswith(b"\x89PNG")
    assert "KL by position" in html(results, [drawn])


def test_sampling_is_seeded(model: Model) -> None:
    logits = np.random.default_rng(0).normal(size=model.n_vocab).astype(np.float32)
    first, again = (Sampler(model, CASE) for _ in range(2))
    assert [first(logits) for _ in range(20)] == [again(logits) for _ in range(20)]
    greedy = Sampler(model, GenerateCase("story", 0, TOKENS[:8], 8, 0, 4, 0.0, 0))
    assert {greedy(logits) for _ in range(5)} == {int(logits.argmax())}


def test_repeated_n_grams() -> None:
    assert repeats(list(range(50))) == {str(n): 0.0 for n in range(4, 9)}
    assert repeats([1, 2, 3, 4, 5] * 4)["4"] == pytest.approx(1 - 5 / 17)
    assert repeats([1, 2]) == {str(n): 0.0 for n in range(4, 9)}


def command(*args: str) -> Any:
    return CliRunner().invoke(app, ["eval", "generate", *args])


def test_the_command(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    args = [str(smollm2), "--tokens", "40", "--cells", "32", "--free", "12", "--policies", "streamingllm", "--out", str(out)]
    done = command(*args)
    assert done.exit_code == 0, done.output
    assert "KL by position" in done.output and "streamingllm" in done.output
    assert load([out])[0].rows[0]["interval"] == 4
    assert command(*args).exit_code == 0  # it has all of it


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--cells", "32", "--interval", "32"], "expected less than the 32 --cells"),
        (["--prompts", "poem"], "expected some of story"),
        (["--tokens", "1k,2k"], "expected one number"),
    ],
)
def test_bad_arguments(smollm2: Path, args: list[str], text: str) -> None:
    done = command(str(smollm2), *args)
    assert done.exit_code != 0 and text in " ".join(done.output.split())
