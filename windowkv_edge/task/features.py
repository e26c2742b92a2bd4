"""What the task classifier reads of a prompt; training and inference share this code.

Only the first `HEAD` and the last `TAIL` characters are read, because instructions stand at the start or
the end of a prompt, so that the cost of a call does not grow with the length. What is read is cut into
segments (sentences and lines). A first model, the gate, says how far a segment is addressed to the
assistant and how far it belongs to the text being worked on; the further the gate of a segment is
open, the more its words count for the label.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

__all__ = ["CLOSE", "HEAD", "OPEN", "TAIL", "Segment", "gate_features", "label_features", "segments"]

HEAD = 400
"""Characters read from the start of a prompt."""

TAIL = 800
"""Characters read from the end of a prompt."""

LEXICON = Path(__file__).parent / "data" / "lexicon.txt"
"""Groups of words that mean much the same for the task, so that a rare verb counts like its common sisters."""

OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around the context of a training prompt; anywhere else they only end a segment."""

# Turn markers differ between model families and say nothing about the task.
_MARKER = re.compile(
    r"<\|im_(?:start|end)\|>(?:system|user|assistant)?\n?"
    r"|<\|start_header_id\|>\w+<\|end_header_id\|>|<\|[\w ]{1,24}\|>"
    r"|<start_of_turn>(?:user|model)?\n?|<end_of_turn>|</?s>|<bos>|\[/?INST\]|<</?SYS>>"
    r"|^(?:user|human|assistant|ai|bot|model|system):|\bassistant:\s*$",
    re.IGNORECASE | re.MULTILINE,
)
_WRAPPED = re.compile(r"(?<=[^\n]{40})(?<![.?!:;])\n(?=[^\W\d_A-Z])")
_PARAGRAPH = re.compile(rf"([{OPEN}{CLOSE}]|\n[ \t]*\n\s*)")
_SENTENCE = re.compile(r"\n|(?<=[.!?:;])\s")
_WORD = re.compile(r"[^\W\d_]+|\d+|[?¿]|->|=>|[{}();=]")
_LABELLED = re.compile(r"^[ \t#*\d.)\-]*([^\W\d_][\w ,'()/]{0,30}?)[ \t]*(?::|->|=>|→|=|\|)[ \t]*\S", re.MULTILINE)
_UNFILLED = re.compile(r"(?:\w+|(?<=\s)|^)[:=|/>→-]{1,3}$")
_PROPER = re.compile(r"\s[A-Z][a-z]")
_IDENTIFIER = re.compile(r"\w_\w|\w\(\)|[a-z][A-Z]|\w\.\w|`")
_CODE = "{}();=<>[]_&|*"


@dataclass(frozen=True)
class Segment:
    """A sentence or line of the prompt.

    `words` are lower-case, numbers as "0"; `place` and `place_end` count segments from the start and from
    the end of what is read, `paragraph` and `paragraph_end` count paragraphs likewise, and `size` is the
    number of segments in the paragraph. `context` is known in training only.
    """

    text: str
    words: Sequence[str]
    place: int
    place_end: int
    paragraph: int
    paragraph_end: int
    size: int
    context: bool = False

    @cached_property
    def traits(self) -> frozenset[str]:
        """Kinds of characters in the text; both models read them."""
        return _traits(self.text)


def segments(text: str) -> list[Segment]:
    """Cut the head and the tail of `text` into segments, without turn markers and cut-off sentences."""
    if len(text) <= HEAD + TAIL:
        found = _cut(text)
    else:
        cut = len(text) - TAIL
        inside = text.rfind(OPEN, 0, cut) > text.rfind(CLOSE, 0, cut)
        head, tail = _cut(text[:HEAD]), _cut(OPEN * inside + text[cut:])
        head = head[:-1] or head
        tail = tail[1:] or tail
        found = head + [(line, words, context, number + len(text)) for line, words, context, number in tail]
    order = {number: place for place, number in enumerate(dict.fromkeys(part[3] for part in found))}
    sizes = Counter(part[3] for part in found)
    return [
        Segment(
            text=line,
            words=words,
            place=place,
            place_end=len(found) - 1 - place,
            paragraph=order[number],
            paragraph_end=len(order) - 1 - order[number],
            size=sizes[number],
            context=context,
        )
        for place, (line, words, context, number) in enumerate(found)
    ]


def _cut(part: str) -> list[tuple[str, list[str], bool, int]]:
    """Return (text, words, in the context, paragraph number) of every segment that has a word."""
    found: list[tuple[str, list[str], bool, int]] = []
    context, paragraph = False, 0
    for piece in _PARAGRAPH.split(_WRAPPED.sub(" ", _MARKER.sub("\n", part))):
        if piece == OPEN or piece == CLOSE:
            context = piece == OPEN
        elif not piece.strip():
            paragraph += bool(piece)
        else:
            for line in map(str.strip, _SENTENCE.split(piece)):
                words = ["0" if word[0].isdigit() else word for word in _WORD.findall(line.lower())]
                if words:
                    found.append((line, words, context, paragraph))
    return found


def gate_features(segment: Segment) -> set[str]:
    """Return where `segment` stands, how it begins and how it ends; only the label reads its other words."""
    words = segment.words
    last = "ends" + segment.text[-1] if segment.text[-1] in ".?:!" else "ends"
    place, place_end = f"place{min(segment.place, 2)}", f"place-{min(segment.place_end, 3)}"
    part, part_end = f"part{min(segment.paragraph, 1)}", f"part-{min(segment.paragraph_end, 2)}"
    size = f"size{min(segment.size, 4)}"
    first = "first" if segment.text[0].isalnum() else "first" + segment.text[0]
    found = {first, last, place, place_end, part, part_end, size, f"length{min(len(words) // 4, 8)}"}
    pairs = [(last, other) for other in (place, place_end, part, part_end)]
    pairs += [(size, part), (size, part_end), (part, part_end)]
    found.update(map("+".join, pairs))
    found.update("^" + " ".join(words[:count]) for count in (1, 2, 3))
    found.update("^@" + group for group in groups(words[0]))
    return found | segment.traits


def label_features(text: str, parts: Iterable[Segment], gates: Iterable[float]) -> dict[str, float]:
    """Return the layout of `text` and the n-grams of its segments, which weigh less as their gate closes.

    `gates` holds the probability of each segment to be an instruction. Gates count relative to the most
    open one, squared, so that stray sentences of a long context stay quiet beside a clear instruction.
    """
    pairs = list(zip(parts, gates, strict=True))
    top = max((gate for _, gate in pairs), default=0.0)
    found: dict[str, float] = {"#gate": top}
    vocabulary: dict[str, float] = {}
    for segment, gate in pairs:
        weight = (gate / max(top, 0.6)) ** 2
        if weight < 0.05:
            continue
        names = _ngrams(segment.words) | segment.traits
        if segment.text[-1] in "?:":
            names.add("#ends" + segment.text[-1])
        names.update(["^@" + group for group in groups(segment.words[0])])
        for name in names:
            if found.get(name, 0.0) < weight:
                found[name] = weight
        for word in segment.words:
            if vocabulary.get(word, 0.0) < weight:
                vocabulary[word] = weight
    for word, weight in vocabulary.items():
        for group in groups(word):
            name, many = "@" + group, "@@" + group
            found[name] = max(found.get(name, 0.0), weight)
            found[many] = min(found.get(many, 0.0) + weight / 3, 1.0)
    for name in _shape(text):
        found[name] = 1.0
        found[name + " alone"] = 1.0 - top
    return found


@lru_cache(maxsize=1 << 16)
def groups(word: str) -> frozenset[str]:
    """Return the groups of `data/lexicon.txt` that list the lower-case `word` or, with a `*`, its beginning."""
    lexicon = _lexicon()
    keys = [word] + [word[:length] + "*" for length in range(3, len(word) + 1)]
    return frozenset().union(*(lexicon[key] for key in keys if key in lexicon))


@cache
def _lexicon() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in LEXICON.read_text(encoding="utf-8").splitlines():
        group, words = line.split(": ")
        for word in words.split():
            found.setdefault(word, set()).add(group)
    return found


def _ngrams(words: Sequence[str]) -> set[str]:
    """Return words, pairs of neighbours (`^` and `.` stand for the two ends) and five-letter stems."""
    found = set(words)
    found.update(map(" ".join, zip(["^", *words], [*words, "."], strict=True)))
    found.update([word[:5] + "*" for word in words if len(word) > 5])
    return found


def _traits(line: str) -> frozenset[str]:
    found: set[str] = set()
    if _PROPER.search(line):
        found.add("#proper")
    if any(map(str.isdigit, line)):
        found.add("#digit")
    if '"' in line or "“" in line or "«" in line:
        found.add("#quote")
    if _IDENTIFIER.search(line):
        found.add("#identifier")
    if sum(map(line.count, _CODE)) > max(1, 0.06 * len(line)):
        found.add("#code")
    return frozenset(found)


def _shape(text: str) -> set[str]:
    """Return layout features: code at the start or the end, labelled lines that repeat as in few-shot prompts."""
    head = _MARKER.sub("", text[:HEAD]).strip()
    tail = _MARKER.sub("", text[-TAIL:]).strip()
    end = tail[-240:]
    found: set[str] = set()
    if sum(map(end.count, _CODE)) > max(6, 0.04 * len(end)):
        found.add("#code asks" if "?" in end else "#code states")
    if sum(map(head.count, _CODE)) > max(6, 0.04 * len(head)):
        found.add("#code head")
    labelled = Counter(match[1].lower() for match in _LABELLED.finditer(tail))
    if labelled and max(labelled.values()) >= 3:
        found.add("#labels repeat")
    last = _UNFILLED.search(tail[-60:])
    if last:
        filled = len(re.findall(rf"(?<!\w){re.escape(last[0].strip())}[ \t]*[^\s]", tail))
        found.update(f"#filled {count}" for count in (1, 2, 3) if filled >= count)
    return found
