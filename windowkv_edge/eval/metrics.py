"""Scores of an answer, 0 to 1: substring recall, and LongBench's metrics (arXiv 2308.14508, table 1) by their datasets.

F1 follows SQuAD's normalisation (lower case, no punctuation, no articles); ROUGE-L comes from rouge-score, edit
similarity from rapidfuzz.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from .case import EvalError

__all__ = ["DATASETS", "FIRST_LINE", "METRICS", "RECALL", "score"]

Metric = Callable[[str, Sequence[str], Sequence[str]], float]
"""``metric(output, answers, classes)``"""


def _words(text: str) -> list[str]:
    text = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def contains_all(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1 if the output contains every answer, else 0; case does not count."""
    return float(all(answer.lower() in output.lower() for answer in answers))


def contains_share(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the answers that the output contains (RULER's recall)."""
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)


def f1(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Best F1 of words over the answers (SQuAD)."""

    def one(answer: str) -> float:
        got, want = _words(output), _words(answer)
        same = sum((Counter(got) & Counter(want)).values())
        return 2 * same / (len(got) + len(want)) if same else 0.0

    return max(map(one, answers))


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise EvalError('ROUGE-L needs rouge-score; pip install "windowkv-edge[eval]"') from None
    return RougeScorer(["rougeL"])


def rouge_l(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Best F-measure of ROUGE-L over the answers."""
    return max(float(_rouge().score(answer, output)["rougeL"].fmeasure) for answer in answers)


def accuracy(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Of the classes named in the output, the share that is right; names inside the right one's name do not count."""
    right = answers[0]
    named = [name for name in classes if name in output and not (name in right and name != right)]
    return 1 / len(named) if right in named else 0.0


def number(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the output that are the answer's; "Paragraph 3" and "3" are the same."""
    got = re.findall(r"\d+", output)
    want = re.findall(r"\d+", answers[0])
    return sum(value == want[0] for value in got) / len(got) if got and want else 0.0


def edit(output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Best similarity by edit distance of the first line of code over the answers."""
    try:
        from rapidfuzz import fuzz
    except ModuleNotFoundError:
        raise EvalError('edit similarity needs rapidfuzz; pip install "windowkv-edge[eval]"') from None
    lines = [line for line in output.lstrip("\n").split("\n") if not re.search(r"`|#|//", line)]
    line = lines[0] if lines else ""
    return max(float(fuzz.ratio(line, answer)) / 100 for answer in answers)


METRICS: dict[str, Metric] = {
    "contains_all": contains_all,
    "contains_share": contains_share,
    "f1": f1,
    "rouge_l": rouge_l,
    "accuracy": accuracy,
    "number": number,
    "edit": edit,
}

RECALL = {"contains_all", "contains_share"}
"""Metrics that more output never lowers."""

DATASETS: dict[str, tuple[str, int]] = {
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), ("f1", 32)),
    "multifieldqa_en": ("f1", 64),
    **dict.fromkeys(("narrativeqa", "qasper"), ("f1", 128)),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), ("rouge_l", 512)),
    "samsum": ("rouge_l", 128),
    "trec": ("accuracy", 64),
    **dict.fromkeys(("passage_retrieval_en", "passage_count"), ("number", 32)),
    **dict.fromkeys(("lcc", "repobench-p"), ("edit", 64)),
}
"""LongBench's English and code datasets: metric and greedy tokens. Its Chinese ones need a word segmenter."""

FIRST_LINE = {"trec", "triviaqa", "samsum"}
"""Datasets of few-shot examples: the answer is the first line."""


def score(metric: str, output: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Score of an output, 0 to 1."""
    return METRICS[metric](output, answers, classes)
