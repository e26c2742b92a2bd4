"""The demo's document and its facts: long enough, each fact stated once, spread over all depths."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import windowkv_edge

DATA = Path(windowkv_edge.__file__).parent / "data"
DOCUMENT = (DATA / "document.txt").read_text(encoding="utf-8")
FACTS: list[dict[str, Any]] = json.loads((DATA / "facts.json").read_text(encoding="utf-8"))

# SmolLM2 splits a text like this (GPT-2's pattern on ASCII, digits one by one) before it merges bytes, and merges never
# cross a piece. So the pieces are a lower bound of its tokens, whatever the vocabulary.
PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)|\d| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def test_the_document_has_the_length_that_the_demo_needs() -> None:
    assert DOCUMENT.isascii()
    assert len(PIECES.findall(DOCUMENT)) >= 3500
    assert len(DOCUMENT) / 4 < 4300  # English has more than 4 characters a token: an upper bound


def test_there_are_facts_at_all_depths_and_the_first_is_the_demos() -> None:
    depths = [fact["depth"] for fact in FACTS]
    assert len(FACTS) >= 12
    assert 0.3 <= depths[0] <= 0.7
    assert depths[1:] == sorted(depths[1:])
    assert min(depths) < 0.1 and max(depths) > 0.9
    for tenth in range(10):
        assert any(tenth <= depth * 10 <= tenth + 1 for depth in depths), f"no fact in tenth {tenth}"


def test_no_two_facts_are_alike() -> None:
    for field in ("question", "answer", "lead", "sentence"):
        values = [fact[field].lower() for fact in FACTS]
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: str(fact["answer"]).replace(" ", "-"))
def test_a_fact_is_stated_exactly_once(fact: dict[str, Any]) -> None:
    assert set(fact) == {"question", "answer", "lead", "sentence", "depth"}
    assert DOCUMENT.count(fact["sentence"]) == 1
    assert len(re.findall(re.escape(fact["answer"]), DOCUMENT, re.IGNORECASE)) == 1
    assert DOCUMENT.count(fact["lead"]) == 1
    assert fact["sentence"].startswith(fact["lead"] + " ")
    assert fact["answer"] in fact["sentence"][len(fact["lead"]) :]
    assert fact["depth"] == pytest.approx(DOCUMENT.index(fact["sentence"]) / len(DOCUMENT), abs=1e-4)
    assert fact["question"].endswith("?")
    assert fact["answer"].lower() not in fact["question"].lower()
    # The sentence stands alone and is short, so that a small model can repeat it.
    before = DOCUMENT[: DOCUMENT.index(fact["sentence"])]
    assert before.endswith((". ", "? ", "! ", '" ', ": ", "\n"))
    assert len(fact["sentence"]) < 90
