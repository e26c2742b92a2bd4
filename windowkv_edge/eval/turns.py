"""Many questions about one document, which is compacted behind the first one, or before any.

Behind it: others ask about other places of the document, then. This is the way that a chat takes: a short question does
not compact again (``kv_growth`` of :class:`windowkv_edge.Llama`). Here each of them is the second one;
``tests/measure/chat_turns.py`` asks them one behind the other. Before any: each of them is the first one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from .case import Case, place
from .needle import N_ANSWER, different_needles
from .style import Style

__all__ = ["turns_cases"]

KINDS = ("number", "word", "phrase", "paraphrased")


def turns_cases(
    style: Style, hay: Sequence[int], lengths: Sequence[int], count: int, n_turns: int, seed: int, first: int = 0
) -> Iterator[Case]:
    """Every length x document x question. A document has one fact per question, at random places.

    The cache is compacted on the first question (task "first"). Then comes its right answer, then one of the other
    questions (task "later"); each of them starts from the same compacted cache. And it is compacted behind the document
    alone; then comes one of all questions (task "before").

    Args:
        style: of the prompts.
        hay: tokens, at least as many as the largest length.
        lengths: tokens of the documents without their facts.
        count: documents per length.
        n_turns: questions per document, the first included.
        seed: of facts and places.
        first: number of the first document.
    """
    for length in lengths:
        for index in range(first, first + count):
            rng = random.Random(f"{seed}/turns/{length}/{index}")
            needles = different_needles(KINDS, range(100 * index, 100 * index + 99), n_turns, seed)
            depths = [(at + 0.5) / 40 for at in rng.sample(range(40), n_turns)]
            lines = [(at, style.tokenize(f"\n{own.sentences[0]}\n")) for at, own in zip(depths, needles, strict=True)]
            document = style.head + place(hay[:length], lines)
            opening, *others = needles
            prompt = document + style.ask(opening.question, opening.lead)
            yield Case("turns", "first", length, depths[0], index, prompt, opening.answers, "contains_all", N_ANSWER)
            said = style.tokenize(f" {opening.answers[0]}.")
            for i, needle in enumerate(others):
                follow = said + style.ask_again(needle.question, needle.lead)
                number = index * (n_turns - 1) + i
                yield Case(
                    "turns", "later", length, depths[i + 1], number, prompt, needle.answers, "contains_all", N_ANSWER,
                    follow_up=follow,
                )  # fmt: skip
            for i, needle in enumerate(needles):
                yield Case(
                    "turns", "before", length, depths[i], index * n_turns + i, document, needle.answers, "contains_all",
                    N_ANSWER, follow_up=style.ask(needle.question, needle.lead),
                )  # fmt: skip
