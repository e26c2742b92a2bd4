"""Needles: facts hidden at a depth of a long text, and the question behind it.

Six kinds, seeded: a number, a password of two words, a phrase, one of several keys, all values of one key, and a fact
that the question words differently. The test is Kamradt's idea (2023), several keys and values are RULER's (arXiv
2404.06654).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .case import Case, place
from .style import Style

__all__ = ["KINDS", "Needle", "different_needles", "make_needle", "needle_cases"]

N_ANSWER = 16  # greedy tokens, as in the needle tests of the papers
N_KEYS, N_VALUES = 4, 3

_ADJECTIVES = (
    "amber", "black", "blue", "broken", "copper", "crimson", "golden", "green", "hollow", "ivory", "little", "purple",
    "rusty", "scarlet", "silver", "striped", "violet", "white", "wooden", "yellow",
)  # fmt: skip
_OBJECTS = (
    "anchor", "bicycle", "camera", "compass", "engine", "globe", "harp", "lantern", "locket", "microscope", "piano",
    "printer", "radio", "rocket", "sledge", "submarine", "telescope", "tractor", "trumpet", "typewriter",
)  # fmt: skip
_ROLES = (
    "admiral", "astronomer", "chess champion", "chief engineer", "coast guard", "court jester", "head cook",
    "museum guide", "night guard", "opera singer", "palace doctor", "pilot", "river judge", "stable boy",
    "stage manager", "tax inspector",
)  # fmt: skip
_WORDS = (
    "artichoke", "avalanche", "bamboo", "cinnamon", "dolphin", "emerald", "flamingo", "gazelle", "hazelnut", "jasmine",
    "kangaroo", "lavender", "marigold", "nutmeg", "octopus", "papaya", "quartz", "rosemary", "sapphire", "tangerine",
    "umbrella", "walnut", "zebra",
)  # fmt: skip
_CITIES = (
    "Bergen", "Bilbao", "Cardiff", "Dresden", "Florence", "Geneva", "Hobart", "Izmir", "Kyoto", "Lisbon", "Lyon",
    "Montreal", "Naples", "Ottawa", "Porto", "Quito", "Riga", "Seville", "Tallinn", "Utrecht", "Vienna", "Zagreb",
)  # fmt: skip
# (what to do, the word that tells it was found)
_DEEDS = (
    ("ride the old yellow tram to the end of the line", "tram"),
    ("feed the ducks behind the cathedral and eat pancakes", "ducks"),
    ("rent a rowing boat and drift under the bridges", "boat"),
    ("climb the bell tower with a bag of cherries", "tower"),
    ("watch the chess players in the covered arcade", "chess"),
    ("visit the puppet museum and drink hot chocolate", "puppet"),
    ("walk along the aqueduct with a borrowed dog", "aqueduct"),
    ("sit in the botanical garden and draw the cactus house", "garden"),
    ("listen to the brass band on the fish market", "band"),
    ("take the cable car and look for the lighthouse", "cable"),
)
# (a fact, the same asked in other words, the beginning of the answer, the word that tells it was found)
_PARAPHRASES = (
    (
        "For twenty years the widow Almqvist has hidden her savings inside the {object}.",
        "Where does Mrs Almqvist keep her money?",
        "Mrs Almqvist keeps her money in the",
    ),
    (
        "Old Brandt learned his trade from a travelling {role}.",
        "Who taught Mr Brandt his profession?",
        "Mr Brandt was taught by a",
    ),
    (
        "When the judge retired, he moved to {city} and never came back.",
        "In which city does the former judge live?",
        "The former judge lives in",
    ),
    (
        "The winner of the regatta was given {a_object} instead of a cup.",
        "What prize did the fastest boat receive?",
        "The fastest boat received",
    ),
    (
        "The ambassador's parrot can say only one thing, and that is {word}.",
        "Which word does the ambassador's bird repeat?",
        "The ambassador's bird repeats the word",
    ),
    (
        "The twins were born on a night train to {city}.",
        "Where was the train going on which the twins came into the world?",
        "The train was going to",
    ),
)

KINDS = ("number", "word", "phrase", "multi-key", "multi-value", "paraphrased")


@dataclass(frozen=True)
class Needle:
    """A fact and its question.

    Attributes:
        kind: one of :data:`KINDS`.
        sentences: the first is the needle; others, if there are any, are spread over the text.
        question: asked behind the text.
        lead: the beginning of the answer, which the model continues.
        answers: words that the continuation has to contain, all of them.
    """

    kind: str
    sentences: tuple[str, ...]
    question: str
    lead: str
    answers: tuple[str, ...]


def _number(rng: random.Random) -> str:
    return str(rng.randint(100_000, 999_999))


def make_needle(kind: str, index: int, seed: int = 0) -> Needle:
    """The index-th needle of a kind.

    Args:
        kind: one of :data:`KINDS`.
        index: any number; different ones give different facts.
        seed: of all needles.
    """
    rng = random.Random(f"{seed}/{kind}/{index}")
    if kind == "number" or kind == "multi-key":
        n = N_KEYS if kind == "multi-key" else 1
        keys = [f"{a} {o}" for a, o in zip(rng.sample(_ADJECTIVES, n), rng.sample(_OBJECTS, n), strict=True)]
        values = [_number(rng) for _ in keys]
        lines = tuple(f"The registration number of the {k} is {v}." for k, v in zip(keys, values, strict=True))
        asked = f"registration number of the {keys[0]}"
        return Needle(kind, lines, f"What is the {asked}?", f"The {asked} is", (values[0],))
    if kind == "word":
        # two words: the first token comes from the full cache, as in every session, and would decide a single one
        role, words = rng.choice(_ROLES), f"{rng.choice(_ADJECTIVES)} {rng.choice(_WORDS)}"
        asked = f"secret password of the {role}"
        return Needle(kind, (f"The {asked} is {words}.",), f"What is the {asked}?", f"The {asked} is", (words,))
    if kind == "phrase":
        day = rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))
        deed, word = rng.choice(_DEEDS)
        asked = f"best way to spend a rainy {day} in {rng.choice(_CITIES)}"
        return Needle(kind, (f"The {asked} is to {deed}.",), f"What is the {asked}?", f"The {asked} is to", (word,))
    if kind == "multi-value":
        role = rng.choice(_ROLES)
        values = rng.sample(_WORDS, N_VALUES)
        lines = tuple(f"One of the secret words of the {role} is {value}." for value in values)
        asked = f"secret words of the {role}"
        return Needle(kind, lines, f"What are the {N_VALUES} {asked}?", f"The {N_VALUES} {asked} are", tuple(values))
    if kind == "paraphrased":
        fact, question, lead = _PARAPHRASES[index % len(_PARAPHRASES)]
        adjective, noun = rng.choice(_ADJECTIVES), rng.choice(_OBJECTS)
        fills = {
            "object": f"{adjective} {noun}",
            "a_object": f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {noun}",
            "role": rng.choice(_ROLES),
            "city": rng.choice(_CITIES),
            "word": rng.choice(_WORDS),
        }
        used = next(name for name in fills if "{" + name + "}" in fact)
        word = noun if "object" in used else fills[used]
        return Needle(kind, (fact.format(**fills),), question, lead, (word,))
    raise ValueError(f"the kind of needle is {kind!r}, expected one of {', '.join(KINDS)}")


def different_needles(kinds: Sequence[str], numbers: Iterable[int], n: int, seed: int) -> list[Needle]:
    """The first n needles of these numbers, in turn of each kind, that ask different questions; fewer if there are."""
    res: list[Needle] = []
    for number in numbers:
        own = make_needle(kinds[number % len(kinds)], number, seed)
        if len(res) < n and own.question not in {needle.question for needle in res}:
            res.append(own)
    return res


def needle_cases(
    style: Style,
    hay: Sequence[int],
    lengths: Sequence[int],
    depths: Sequence[float],
    kinds: Sequence[str],
    count: int,
    seed: int,
    first: int = 0,
) -> Iterator[Case]:
    """Every length x depth x kind x index, deepest first, so that neighbours share as much of the text as possible.

    Each needle has a line of its own. If there are several keys or values, the others stand at fixed depths.

    Args:
        style: of the prompts.
        hay: tokens, at least as many as the largest length.
        lengths: tokens of the haystack.
        depths: shares of the haystack in front of the needle.
        kinds: of :data:`KINDS`.
        count: needles of each kind.
        seed: of the needles.
        first: index of the first needle.
    """
    for length in lengths:
        for depth in sorted(depths, reverse=True):
            for index in range(first, first + count):
                for kind in kinds:
                    needle = make_needle(kind, index, seed)
                    others = needle.sentences[1:]
                    inserts = [(depth, needle.sentences[0])]
                    inserts += [((i + 0.5) / len(others), line) for i, line in enumerate(others)]
                    lines = [(at, style.tokenize(f"\n{line}\n")) for at, line in inserts]
                    prompt = style.head + place(hay[:length], lines) + style.ask(needle.question, needle.lead)
                    yield Case("needle", kind, length, depth, index, prompt, needle.answers, "contains_all", N_ANSWER)
