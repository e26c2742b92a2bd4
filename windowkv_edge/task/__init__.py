"""Which kind of task a prompt asks for, as WindowKV (arXiv 2503.17922) adapts its window selection to it.

"localization": the answer stands in one or a few places of the text (question answering, extraction).
"aggregation": the answer needs the text as a whole (summaries, few-shot prompts, counting, rewriting).

The classifier is a logistic regression of our own over the words and the layout of the instruction. `python -m
windowkv_edge.task.train` trains it on prompts that `make_data` makes from the texts in `data/`. It labels 97 % of the
420 prompts of `data/heldout.jsonl` correctly; somebody who had not seen the training data wrote them, and no choice was
made by them. English is covered best, German, French and Spanish less; for other languages the label is little better
than a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

from .model import Model, sigmoid

__all__ = ["Task", "classify", "probability", "prompt_task"]

Task = Literal["localization", "aggregation"]

# tokens of the prompt's head and tail that are read; instructions stand there
_HEAD, _TAIL = 160, 320


def classify(text: str) -> Task:
    """Return the task of the prompt `text`: "aggregation" where its probability exceeds 0.5.

    Empty or blank text gives "localization", as does a tie.

    Raises:
        TypeError: `text` is not a str.
    """
    return "aggregation" if probability(text) > 0.5 else "localization"


def prompt_task(tokens: Sequence[int], detokenize: Callable[[list[int]], str]) -> Task:
    """Return the task of a prompt given as tokens."""
    ids = list(tokens)
    if len(ids) > _HEAD + _TAIL:
        ids = ids[:_HEAD] + ids[-_TAIL:]
    return classify(detokenize(ids))


def probability(text: str) -> float:
    """Return the probability, in [0, 1], that the prompt `text` is an aggregation task.

    `text` is the whole prompt, chat markers included, of any length: its first 400 and last 800 characters
    are read. Empty or blank text gives 0.5.

    Raises:
        TypeError: `text` is not a str.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be the prompt as a str, got {type(text).__name__}; decode bytes and tokens first")
    if not text[:400].strip() and not text[-800:].strip():
        return 0.5
    return sigmoid(_model().score(text))


@cache
def _model() -> Model:
    return Model.load()
