"""The task classifier on prompts that its training has not seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from windowkv_edge import task
from windowkv_edge.task import classify, make_data, probability

DATA = Path(task.__file__).parent / "data"
CATEGORIES = {"qa", "multidoc_qa", "summary", "few_shot", "counting", "code", "chat", "extraction", "rewrite"}


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def heldout() -> list[dict[str, str]]:
    return read("heldout.jsonl")


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_accuracy_on_held_out_prompts(heldout: list[dict[str, str]]) -> None:
    assert len(heldout) >= 300
    assert {row["category"] for row in heldout} == CATEGORIES
    right = sum(classify(row["text"]) == row["label"] for row in heldout)
    assert right / len(heldout) >= 0.95


def test_no_held_out_prompt_was_trained_on(heldout: list[dict[str, str]]) -> None:
    seen: dict[tuple[str, ...], set[int]] = {}
    train = [grams(row.text) for row in make_data.rows()]
    for i, own in enumerate(train):
        for gram in own:
            seen.setdefault(gram, set()).add(i)
    for row in heldout:
        own = grams(row["text"])
        for i in set().union(*(seen.get(gram, set()) for gram in own)):
            overlap = len(own & train[i]) / len(own | train[i])
            assert overlap <= 0.5, row["text"]


def test_a_call_costs_as_much_as_a_short_loop() -> None:
    """0.62 ms on an idle core (the loop: 0.9), however long the prompt is. Beside other processes every core is slower, and so is the loop."""
    sentence, question = "The harbour was quiet and the boats lay in rows. ", "\n\nQuestion: Who owns the red boat?\nAnswer:"
    long, short = sentence * 2500 + question, sentence * 25 + question
    calls = {
        "loop": lambda: sum(i * i for i in range(32_000)),
        "long": lambda: classify(long),
        "short": lambda: classify(short),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(300):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in times.items()}
    assert len(long) > 120_000 and best["long"] < 1.3 * best["short"], best
    assert best["long"] < best["loop"], best


def test_odd_input() -> None:
    assert classify("") == classify("  \n") == "localization"
    with pytest.raises(TypeError):
        classify(b"What is this?")  # type: ignore[arg-type]
    assert 0.0 <= probability("Summarise the text above in three sentences.") <= 1.0
    assert probability("Summarise the text above.") == probability("Summarise the text above.")


def test_the_training_set_is_the_same_in_every_process(tmp_path: Path) -> None:
    """It is made where it is needed, so that no order of a set or of a hash may show in it."""
    for seed in ("0", "1"):
        command = [sys.executable, "-m", "windowkv_edge.task.make_data", tmp_path / seed]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    made = (tmp_path / "0").read_text(encoding="utf-8")
    assert made == (tmp_path / "1").read_text(encoding="utf-8") == make_data.dump(make_data.rows())
    assert len(made.splitlines()) > 10_000


def test_the_weights_are_those_of_the_data() -> None:
    run = subprocess.run([sys.executable, "-m", "windowkv_edge.task.train", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
