"""Prose to hide things in: seeded, of any length, no two paragraphs alike.

Sentences are made from patterns and word lists, so that nobody else's text is needed. They never mention digits,
secrets or questions: needles are made of those.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

__all__ = ["prose"]

_SLOTS: dict[str, tuple[str, ...]] = {
    "person": (
        "Agnes", "Bertil", "Clara", "Dagmar", "Emil", "Frida", "Gustav", "Hedda", "Ivar", "Johanna", "Karl", "Lovisa",
        "Magnus", "Nora", "Olof", "Petra", "Ragnar", "Signe", "Tore", "Ulla", "Viktor", "Ylva",
    ),
    "trade": (
        "baker", "beekeeper", "bookbinder", "carpenter", "clockmaker", "cooper", "dyer", "ferryman", "gardener",
        "glazier", "librarian", "mason", "miller", "organist", "potter", "ropemaker", "saddler", "schoolteacher",
        "shepherd", "tailor", "thatcher", "weaver",
    ),
    "place": (
        "the harbour", "the upper village", "the old tannery", "the market square", "the mill pond",
        "the orchard wall", "the railway halt", "the reading room", "the salt barn", "the sheep track",
        "the station road", "the town hall",
        "the walled garden", "the western quay", "the windmill", "the churchyard", "the customs house",
        "the long meadow",
    ),
    "thing": (
        "a barrel of apples", "a bundle of slates", "a cartload of peat", "a coil of wet rope", "a crate of oranges",
        "a folded map", "a jar of honey", "a ladder without rungs", "a new iron stove", "a painted chest",
        "a pair of oars", "a roll of blue cloth", "a sack of barley", "a small brass bell", "a stack of letters",
        "a tin of lamp oil", "a wheel of cheese", "an empty birdcage", "an unfinished boat", "half a dozen chairs",
    ),
    "weather": (
        "a thin rain", "a low sun", "a north wind", "an early frost", "fog from the sea", "heavy snow", "slow thunder",
        "the first warm air", "the smell of hay", "the spring tide", "a week of drizzle", "a dry east wind",
    ),
    "season": ("spring", "early summer", "midsummer", "harvest time", "autumn", "late autumn", "winter", "the thaw"),
    "part": ("morning", "noon", "afternoon", "evening", "dusk", "night"),
    "did": (
        "argued about the price of timber", "counted the sheep twice", "forgot to wind the clock", "leaned on the gate",
        "looked for the lost key", "mended the fence", "painted the shutters green", "played the same tune again",
        "put the kettle on", "read the newspaper aloud", "sharpened the scythes", "swept the yard",
        "tried on a borrowed coat", "waited for the post", "whistled for the dog", "wrote a long reply",
    ),
    "mood": (
        "with great patience", "without much hope", "as if nothing had happened", "more carefully than before",
        "in a borrowed hat", "for the sake of peace", "to everyone's surprise", "with a pencil behind the ear",
        "out of habit", "like a man of importance", "before anybody could object", "half in jest",
    ),
    "truth": (
        "a roof is only as good as its worst slate", "bread tells you what the flour could not",
        "every bridge is a promise", "good neighbours are built slowly", "old tools remember their owners",
        "patience is cheaper than timber", "rivers keep their own accounts", "the sea gives nothing twice",
        "a garden is an argument with the weather", "most quarrels begin with a fence",
        "nobody regrets a dry cellar", "the shortest road is the one you know",
    ),
    "matter": (
        "the new roof", "the price of wool", "the choir's summer concert", "the broken pump", "the boundary stones",
        "the ferry timetable", "the school stove", "the flooded cellar", "the rights to the well", "the harvest supper",
        "the state of the bridge", "the lamp in the lane", "the missing ledger", "the colour of the doors",
    ),
    "result": (
        "and that was the end of it", "but nothing was written down", "and the matter rested until {season}",
        "and {person} never mentioned it again", "so the work began the next {part}", "though {person} disagreed",
        "and for once nobody was late", "but the {trade} had already left", "and the dog slept through all of it",
    ),
}  # fmt: skip

_PATTERNS = (
    "In {season} the {trade} came down to {place} with {thing}.",
    "{person} said that {truth}, and the {trade} nodded.",
    "By {part} there was {weather}, and people went home early.",
    "They talked about {matter} until {part}, {result}.",
    "Near {place} somebody had left {thing}, which {person} carried to {place}.",
    "{person} {did} {mood}.",
    "It was {person} who {did} while the {trade} {did}.",
    "Nobody at {place} remembered when {matter} had first been discussed.",
    "The {trade}'s daughter, {person}, wanted {thing} and was given {thing}.",
    "After {weather} the path to {place} was hard to find, {result}.",
    "“{truth}”, wrote {person} in a letter about {matter}.",
    "Every {season} the {trade} {did}, {mood}, and every {season} it helped a little.",
    "From {place} one could see {place}, and in {season} even further.",
    "The {trade} and the {trade} shared a workshop behind {place}, {result}.",
    "With {weather} came visitors, among them {person}, who asked about {matter}.",
    "{person} had once owned {thing}; now it stood in {place} under a cloth.",
    "When the {trade} {did}, {person} laughed, {result}.",
    "The meeting about {matter} was moved to {place} because of {weather}.",
    "What {person} liked best about {place} was the quiet at {part}.",
    "Some said that {truth}; {person} only {did}.",
    "Until {part} the children played around {place} with {thing}.",
    "There had been {weather} for days, and {matter} had to wait.",
    "The old {trade} taught {person} how to work {mood}.",
    "At {part} {person} walked from {place} to {place} and back, {mood}.",
)

_SPARE = 40  # patterns and words used this recently are passed over where others are left


def _fill(rng: random.Random, pattern: str, recent: list[str]) -> str:
    while "{" in pattern:
        name = pattern[pattern.index("{") + 1 : pattern.index("}")]
        fresh = [word for word in _SLOTS[name] if word not in recent and word not in pattern]
        word = rng.choice(fresh or _SLOTS[name])
        recent.append(word)
        pattern = pattern.replace("{" + name + "}", word, 1)
    del recent[:-_SPARE]
    return pattern


def _sentences(rng: random.Random) -> Iterator[str]:
    recent: list[str] = []
    patterns: list[str] = []
    while True:
        pattern = rng.choice([p for p in _PATTERNS if p not in patterns])
        patterns = [*patterns, pattern][-len(_PATTERNS) // 2 :]
        text = _fill(rng, pattern, recent)
        start = 1 if text[0] == "“" else 0
        yield text[:start] + text[start].upper() + text[start + 1 :]


def prose(n_chars: int, seed: int = 0) -> str:
    """English prose of at least n_chars characters in paragraphs of three to seven sentences."""
    rng = random.Random(seed)
    sentences = _sentences(rng)
    res: list[str] = []
    size = 0
    while size < n_chars:
        res.append(" ".join(next(sentences) for _ in range(rng.randint(3, 7))))
        size += len(res[-1]) + 1
    return "\n".join(res)
