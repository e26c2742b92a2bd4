"""Text features of the task classifier: the same code serves training and inference.

Only the first `HEAD` and the last `TAIL` characters of a prompt are read, because instructions stand
at its start or its end. That bounds the cost of a call whatever the length of the prompt.
"""

from __future__ import annotations

import re
from collections import Counter

__all__ = ["END", "HEAD", "TAIL", "features", "window"]

HEAD = 400
"""Characters read from the start of the prompt."""

TAIL = 800
"""Characters read from the end of the prompt."""

END = 240
"""Characters at the very end whose words also count as features of their own."""

# Turn markers differ between model families and say nothing about the task.
_MARKER = re.compile(
    r"<\|im_(?:start|end)\|>(?:system|user|assistant)?\n?"
    r"|<\|(?:start|end)_header_id\|>|<\|[\w ]{1,24}\|>"
    r"|</?start_of_turn>(?:user|model)?\n?|<end_of_turn>|</?s>|<bos>|\[/?INST\]|<</?SYS>>"
)
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[?¿]|[.!:;]\s|\n|->|=>|[{}();=]")
_LABEL = re.compile(r"^[\s#*\d.)\-]*([^\W\d_][\w ,'()/]{0,30}?)\s*(:|->|=>|→|\|)[ \t]*(.*)$")
_BREAKS = frozenset(("\n", ". ", "! ", ": ", "; ", ".\n", "!\n", ":\n", ";\n", ".\t", ":\t"))
_CODE_SYMBOLS = "{}();=<>[]_&|*"


def window(text: str) -> tuple[str, str]:
    """Return the head and the tail of `text` that the classifier reads, turn markers removed.

    The tail is empty where the whole text fits into the head; the two never overlap.
    """
    head = _MARKER.sub("", text[:HEAD]).strip()
    tail = _MARKER.sub("", text[max(HEAD, len(text) - TAIL) :]).strip()
    return head, tail


def features(text: str) -> set[str]:
    """Return the binary features of `text`: word n-grams, those of the end, and the shape of the end."""
    head, tail = window(text)
    if not tail:
        end = head[-END:]
    else:
        end = tail[-END:]
    found = _ngrams(head)
    found |= _ngrams(tail)
    found |= {"$" + name for name in _ngrams(end)}
    found |= _shape(head, tail or head)
    return found


def _ngrams(text: str) -> set[str]:
    """Return unigrams, bigrams and five-letter stems; `^` stands for the start of a sentence or line."""
    words: list[str] = ["^"]
    for token in _TOKEN.findall(text.lower()):
        if token in _BREAKS:
            if words[-1] != "^":
                words.append("^")
        else:
            words.append("0" if token[0].isdigit() else token)
    found = set(words)
    found.update(f"{a} {b}" for a, b in zip(words, words[1:]))
    found.update(word[:5] + "*" for word in words if len(word) > 5)
    return found


def _shape(head: str, tail: str) -> set[str]:
    """Return features of layout: question marks, code, and labelled lines that repeat as in few-shot prompts."""
    end = tail[-END:]
    asks = "?" in end
    found: set[str] = set()
    dense = sum(map(end.count, _CODE_SYMBOLS)) > 0.04 * len(end)
    if dense:
        found.add("#code asks" if asks else "#code states")
    if sum(map(head.count, _CODE_SYMBOLS)) > 0.04 * len(head):
        found.add("#code head")
    matches = [m for m in map(_LABEL.match, tail.split("\n")) if m]
    filled = Counter(m[1].strip().lower() if m[2] == ":" else m[2] for m in matches if m[3])
    if matches and not matches[-1][3] and tail.endswith(matches[-1][0].strip()):
        last = matches[-1]
        if filled[last[1].strip().lower() if last[2] == ":" else last[2]] >= 1:
            found.add("#open label repeats")
    if filled and max(filled.values()) >= 3:
        found.add("#labels repeat")
    return found
