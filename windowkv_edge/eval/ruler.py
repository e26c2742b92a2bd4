"""Generators for the task families of RULER (arXiv 2404.06654), of any length; texts and word lists are our own.

============  =======================================================================================================
task          asks for
============  =======================================================================================================
niah-single   the one number in the text
niah-key      the number of one key among four
niah-value    all four numbers of one key
niah-query    the numbers of two keys among four, in one answer
vt            the variables that hold a value, through a chain of assignments (variable tracking)
cwe           the three words that occur most often in a list (common words)
fwe           the two most frequent made-up words of a text with Zipf frequencies (frequent words)
qa            a fact about one of many people, each with an article of their own
============  =======================================================================================================

The score is the share of the expected strings that the answer holds, RULER's own recall. Prompts end with the beginning
of the answer, as RULER's do.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from .case import Case, place
from .needle import _ADJECTIVES, _OBJECTS, _WORDS, _number
from .prose import _SLOTS
from .style import Style

__all__ = ["TASKS", "ruler_cases"]

Maker = Callable[[random.Random, Style, Sequence[int], int], "tuple[list[int], tuple[str, ...]]"]
"""``maker(rng, style, hay, length)``: the prompt and what the answer has to hold."""

N_ANSWER = 32


def _niah(n_keys: int, n_values: int, n_asked: int) -> Maker:
    def make(rng: random.Random, style: Style, hay: Sequence[int], length: int) -> tuple[list[int], tuple[str, ...]]:
        keys = [f"{a} {o}" for a, o in zip(rng.sample(_ADJECTIVES, n_keys), rng.sample(_OBJECTS, n_keys), strict=True)]
        values = {key: [_number(rng) for _ in range(n_values)] for key in keys}
        lines = [f"One of the magic numbers of the {key} is {v}." for key in keys for v in values[key]]
        depths = rng.sample(range(1, 40), len(lines))
        asked = keys[:n_asked]
        names = " and the ".join(asked)
        many = "numbers" if n_values * n_asked > 1 else "number"
        plural = many == "numbers"
        question = f"What {'are all' if plural else 'is the'} magic {many} of the {names}?"
        end = style.ask(question, f"The magic {many} of the {names} {'are' if plural else 'is'}")
        inserts = [(at / 40, style.tokenize(f"\n{line}\n")) for at, line in zip(depths, lines, strict=True)]
        answers = tuple(v for key in asked for v in values[key])
        room = length - len(end) - sum(len(tokens) for _, tokens in inserts)
        return place(hay[: max(0, room)], inserts) + end, answers

    return make


def _variables(rng: random.Random, style: Style, hay: Sequence[int], length: int) -> tuple[list[int], tuple[str, ...]]:
    """A chain of four hops and one that leads elsewhere."""
    letters = rng.sample("ABCDEFGHKLMNPRSTUVWXYZ", 10)
    names = [f"{a}{b}{c}" for a, b, c in zip(letters, rng.sample(letters, 10), rng.sample(letters, 10), strict=True)]
    chains = names[:5], names[5:]
    lines = []
    for chain in chains:
        value = str(rng.randint(10_000, 99_999))
        steps = [f"VAR {chain[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in zip(chain, chain[1:], strict=False)]
        depths = sorted(rng.sample(range(1, 40), len(steps)))
        lines += [(at / 40, f"\n{step}\n") for at, step in zip(depths, steps, strict=True)]
        if chain is chains[0]:
            asked = value
    question = f"Which five variables hold the value {asked}?"
    end = style.ask(question, f"The variables that hold the value {asked} are {chains[0][0]},")
    inserts = [(at, style.tokenize(line)) for at, line in lines]
    room = length - len(end) - sum(len(tokens) for _, tokens in inserts)
    return place(hay[: max(0, room)], inserts) + end, tuple(chains[0][1:])


def _numbered(style: Style, words: Sequence[str], length: int, head: str, tail: list[int]) -> list[int]:
    """Words as a numbered list, as many as fit."""
    start = style.tokenize(head)
    res: list[int] = []
    for i, word in enumerate(words):
        item = style.tokenize(f" {i + 1}. {word}")
        if len(start) + len(res) + len(item) + len(tail) > length:
            break
        res += item
    return start + res + tail


def _common(rng: random.Random, style: Style, hay: Sequence[int], length: int) -> tuple[list[int], tuple[str, ...]]:
    """Half of the list is three words, the other half all the others in turn."""
    pool = sorted({*_WORDS, *_OBJECTS, *_ADJECTIVES, *(w.split()[-1] for w in _SLOTS["thing"]), *_SLOTS["trade"]})
    common = rng.sample(pool, 3)
    rare = [word for word in pool if word not in common]
    head = "Below is a numbered list of words. Some words occur far more often than the others.\n"
    end = style.ask("Which three words occur most often in the list?", "The three words that occur most often are")
    n = max(1, length // 5)  # an item takes four tokens or more
    words = [common[i % 3] if i % 2 else rare[i // 2 % len(rare)] for i in range(n)]
    rng.shuffle(words)
    return _numbered(style, words, length, head, end), tuple(common)


def _frequent(rng: random.Random, style: Style, hay: Sequence[int], length: int) -> tuple[list[int], tuple[str, ...]]:
    """Made-up words with Zipf frequencies of exponent 2."""
    syllables = ("ba", "do", "fi", "gu", "ka", "lo", "mi", "nu", "pe", "ra", "so", "ti", "vo", "xa", "zu")
    words = list(dict.fromkeys("".join(rng.sample(syllables, 3)) for _ in range(60)))
    weights = [1 / (i + 1) ** 2 for i in range(len(words))]
    head = "Read the following coded text and keep track of the words.\n"
    end = style.ask("Which two coded words occur most often?", "The two coded words that occur most often are")
    start = style.tokenize(head)
    room = length - len(start) - len(end)
    text: list[int] = []
    count: Counter[str] = Counter()
    while True:
        drawn = rng.choices(words, weights, k=8)
        part = style.tokenize(" " + " ".join(drawn) + " .")
        if len(text) + len(part) > room:
            break
        text += part
        count.update(drawn)
    best = [word for word, _ in count.most_common(3)]
    if count[best[1]] == count[best[2]]:  # a tie has no answer
        return _frequent(rng, style, hay, length)
    return start + text + end, tuple(best[:2])


def _qa(rng: random.Random, style: Style, hay: Sequence[int], length: int) -> tuple[list[int], tuple[str, ...]]:
    """One article among many of the same form."""
    people = [
        f"{a} {b}son" for a in _SLOTS["person"] for b in ("Ander", "Berg", "Carl", "Elia", "Fin", "Gustaf", "Holm")
    ]
    rng.shuffle(people)

    def article(name: str) -> tuple[str, str, str, str]:
        trade, word, place_ = rng.choice(_SLOTS["trade"]), rng.choice(_OBJECTS), rng.choice(_SLOTS["place"])
        text = f"{name} worked as a {trade} near {place_} for many years. In the end {name} became known for building "
        return text + f"a {rng.choice(_ADJECTIVES)} {word}. ", trade, word, place_

    asked = people[0]
    own, trade, word, where = article(asked)
    wants = rng.random() < 0.5
    # what decides comes behind the first token, which is the full cache's
    question = f"What did {asked} work as, and where?" if wants else f"What did {asked} become known for building?"
    lead = f"{asked} worked as a {trade} near" if wants else f"{asked} became known for building a"
    end = style.ask(question, lead)
    needle = style.tokenize(own)
    others: list[int] = []
    for name in people[1:]:
        part = style.tokenize(article(name)[0])
        if len(others) + len(part) + len(needle) + len(end) > length // 2:
            break
        others += part
    # long prompts are filled with prose around the articles
    room = length - len(others) - len(needle) - len(end)
    half = len(others) // 2
    inserts = [(rng.random(), others[:half]), (rng.random(), needle), (rng.random(), others[half:])]
    return place(hay[: max(0, room)], inserts) + end, (where if wants else word,)


TASKS: dict[str, Maker] = {
    "niah-single": _niah(1, 1, 1),
    "niah-key": _niah(4, 1, 1),
    "niah-value": _niah(1, 4, 1),
    "niah-query": _niah(4, 1, 2),
    "vt": _variables,
    "cwe": _common,
    "fwe": _frequent,
    "qa": _qa,
}


def ruler_cases(
    style: Style,
    hay: Sequence[int],
    lengths: Sequence[int],
    tasks: Sequence[str],
    count: int,
    seed: int,
    first: int = 0,
) -> Iterator[Case]:
    """Every length x task x index; prompts have at most that many tokens, questions included.

    Args:
        style: of the prompts.
        hay: tokens, at least as many as the largest length.
        lengths: tokens of the whole prompt.
        tasks: of :data:`TASKS`.
        count: prompts of each task.
        seed: of everything random.
        first: number of the first prompt.
    """
    for length in lengths:
        for task in tasks:
            for index in range(first, first + count):
                rng = random.Random(f"{seed}/{task}/{length}/{index}")
                prompt, answers = TASKS[task](rng, style, hay, length - len(style.head))
                yield Case("ruler", task, length, None, index, style.head + prompt, answers, "contains_share", N_ANSWER)
