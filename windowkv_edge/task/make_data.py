"""Make the training set: instructions from `data/templates.txt` set into passages from `data/passages.txt`, and
whole prompts, written by hand, from `data/prompts.txt` and `data/prompts.jsonl`.

    python -m windowkv_edge.task.make_data FILE       # writes it down, to be read; nothing needs the file

It takes less than a second, so that it is made where it is needed. The held-out set is written by hand and has no
part in this.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from .._files import write_text
from .features import CLOSE, OPEN

__all__ = ["DATA", "Row", "dump", "main", "rows"]

DATA = Path(__file__).parent / "data"
SEED = 2503
COPIES = {"*": 5, "": 1}
"""Renderings of a template: with a leading `*` it is mostly slots."""

LOCAL = "localization"

SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant. Answer the user's questions.",
    "You are a careful assistant. Keep to the text that the user gives you.",
    "You are an assistant for documents. Be concise.",
    "Respond in the language of the user.",
    "You read long texts and do what is asked.",
)
QUESTION = ("Question: {}\nAnswer:", "Q: {}\nA:", "Question: {}", "{}\nAnswer:", "Query: {}", "QUESTION: {}\nANSWER:")
LEADS = (
    "The name is", "It was", "The number mentioned is", "According to the text, it is", "They met in", "The code is",
)  # fmt: skip
REQUEST = ("Instruction: {}", "Task: {}\nResult:", "{}\nOutput:", "{}\nResponse:", "Request: {}", "{}\n\nAnswer:")
CUES = {
    "summary": ("Summary:", "Overview:", "Main points:", "Abstract:"),
    "rewrite": ("New version:", "Translation:", "Rewritten:", "Corrected text:"),
    "counting": ("Answer:", "The final answer is:", "Count:", "Total:"),
    "extraction": ("JSON:", "Extracted:", "Value:", "Answer:"),
}
FRAMES = (
    "{}", "{}", "{}", "Text:\n{}", "Context:\n{}", "Document:\n{}", '"""\n{}\n"""', "### Input\n{}",
    "<document>\n{}\n</document>", "Article: {}", "---\n{}\n---", "Here it is:\n\n{}", "[Start]\n{}\n[End]",
)  # fmt: skip
LAYOUTS = (
    "Passage: {c} Question: {a} Answer:", "Text: {c}\nTask: {a}", "## Context\n{c}\n\n## Request\n{a}", "{a} \"{c}\"",
    "<context>\n{c}\n</context>\n<query>{a}</query>", "<text>{c}</text>\n\n{a}",
    "<prompt>{a}</prompt>\n<input>{c}</input>", "**Context:** {c}\n\n**Prompt:** {a}\n\n**Output:**",
    "[TEXT]\n{c}\n[/TEXT]\n[TASK]\n{a}\n[/TASK]", "{a}\n\nInput: {c}\nOutput:",
    "# Request\n{a}\n\n# Material\n{c}\n\n# Response", "{c}\n\n----\n{a}", "{a} Here is the text: {c}",
    "Material:\n{c}\n\nRequest: {a}\n", "Context: {c}\n{a}", "{c}\n=> {a}", "{a}\n\nBEGIN\n{c}\nEND\n\nAnswer:",
    "INPUT\n{c}\n\nPROMPT\n{a}\n\nOUTPUT\n",
)  # fmt: skip
KINDS: dict[str, tuple[str, ...]] = {
    "qa": ("prose", "prose", "prose", "foreign", "dialogue"),
    "multidoc_qa": ("data", "prose", "prose"),
    "extraction": ("data", "data", "prose", "dialogue", "foreign"),
    "summary": ("prose", "prose", "prose", "foreign", "dialogue", "data"),
    "few_shot": ("prose",),
    "counting": ("prose", "prose", "data", "data", "dialogue", "foreign"),
    "code": ("code",),
    "chat": ("dialogue", "prose", "prose", "data", "foreign"),
    "rewrite": ("prose", "prose", "foreign", "dialogue", "data"),
}


@dataclass(frozen=True)
class Row:
    """One training prompt; `group` numbers the template it came from, so that a fold gets all renderings of a template.

    `context` is None if nobody marked it; the gate does not learn from such a prompt, the label does.
    """

    text: str
    label: str
    category: str
    context: tuple[int, int] | None
    group: int


def rows(seed: int = SEED) -> list[Row]:
    """Return the training set in file order; the same seed gives the same rows on every platform."""
    rng = random.Random(seed)
    passages = _sections((DATA / "passages.txt").read_text(encoding="utf-8"), "\n\n")
    templates = _sections((DATA / "templates.txt").read_text(encoding="utf-8"), "\n")
    slots = _slots()
    made: list[Row] = []
    group = 0
    for heading, lines in templates.items():
        category, label = heading.split()
        for line in lines:
            star = "*" * line.startswith("*")
            for _ in range(COPIES[star]):
                ask = _frame(rng, _fill(rng, line.removeprefix("*"), slots), slots)
                made.append(_row(_prompt(rng, ask, category, label, passages), label, category, group))
            group += 1
    for shots in passages["shots"]:
        for _ in range(3):
            made.append(_row(_wrap(rng, _few_shot(rng, shots), 0.15), "aggregation", "few_shot", group))
        group += 1
    for code in passages["code"]:
        for _ in range(12):
            made.append(_row(_cut(rng, code, passages["code"]), "aggregation", "code", group))
        group += 1
    for heading, prompts in _sections((DATA / "prompts.txt").read_text(encoding="utf-8"), "\n").items():
        category, label = heading.split()
        for prompt in prompts:
            made.append(_row(prompt, label, category, group))
            made.append(_row(_wrap(rng, prompt, 0.4), label, category, group))
            group += 1
    texts = passages["prose"] + passages["dialogue"] + passages["foreign"]
    for text in texts:
        for _ in range(3):
            made.append(_row(_cut(rng, text, texts), "aggregation", "chat", group))
        group += 1
    for line in (DATA / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        written = json.loads(line)
        made.append(Row(written["text"], written["label"], written["category"], None, group))
        group += 1
    unique = {row.text: row for row in made}
    return list(unique.values())


def dump(made: list[Row]) -> str:
    """Return the JSON lines of the training set (text, label, category, context)."""
    fields = ("text", "label", "category", "context")
    return "".join(json.dumps({f: getattr(row, f) for f in fields}, ensure_ascii=False) + "\n" for row in made)


def _row(marked: str, label: str, category: str, group: int) -> Row:
    start = max(marked.find(OPEN), 0)
    stop = max(marked.rfind(CLOSE) - 1, 0)
    return Row(marked.replace(OPEN, "").replace(CLOSE, ""), label, category, (start, stop), group)


def _sections(text: str, separator: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    parts = re.split(r"^\[([a-z_]+(?: [a-z]+)?)\]\n", text, flags=re.MULTILINE)[1:]
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        found[heading] = [_unescape(part.strip()) for part in body.split(separator) if part.strip()]
    return found


def _unescape(text: str) -> str:
    return text.replace("\\\\n", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\n")


def _slots() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DATA / "slots.txt").read_text(encoding="utf-8").splitlines():
        name, values = line.split(": ", 1)
        found[name] = values.split(" | ")
    return found


def _fill(rng: random.Random, template: str, slots: dict[str, list[str]]) -> str:
    """Fill every `{slot}`; `{slotlow}` starts in lower case, `{slot2}` is a further value of the same slot."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in slots and name.endswith("2"):
            name = name[:-1]
        if name in slots:
            return rng.choice(slots[name])
        text = rng.choice(slots[name.removesuffix("low")])
        return text[0].lower() + text[1:]

    filled = template
    while (once := re.sub(r"(?<!\{)\{([a-z]+(?:_[a-z]{2})?[12]?(?:low)?)\}(?!\})", value, filled)) != filled:
        filled = once
    filled = filled.replace("{{", "{").replace("}}", "}")
    return filled[0].upper() + filled[1:] if template[0] == "{" else filled


def _frame(rng: random.Random, ask: str, slots: dict[str, list[str]]) -> str:
    """Put neutral sentences, the same for both labels, before and after some instructions."""
    if rng.random() < 0.15:
        ask = _fill(rng, "{preamble} ", slots) + ask
    if rng.random() < 0.12:
        ask += _fill(rng, " {postscript}", slots)
    return ask


def _prompt(rng: random.Random, ask: str, category: str, label: str, passages: dict[str, list[str]]) -> str:
    if category == "few_shot":
        shots = _few_shot(rng, rng.choice(passages["shots"]))
        return _wrap(rng, rng.choice((f"{ask}\n\n{shots}", f"{shots}\n\n{ask}", f"{ask}\n{shots}\n{ask}")), 0.3)
    context = _context(rng, category, passages)
    decorated = _decorate(rng, ask, category, label)
    place = rng.choices(("before", "after", "both", "layout", "only"), (16, 20, 6, 10, 48))[0]
    gap = rng.choices(("\n\n", "\n", " "), (74, 20, 6))[0]
    if place == "before":
        text = f"{ask}{gap}{context}"
        if rng.random() < 0.2:
            text += "\n\n" + (rng.choice(CUES[category]) if category in CUES else "Answer:")
    elif place == "after":
        text = f"{context}{gap}{decorated}"
    elif place == "layout":
        text = rng.choice(LAYOUTS).replace("{c}", context).replace("{a}", ask)
    elif place == "both":
        text = f"{ask}{gap}{context}{gap}{decorated}"
    else:
        text = decorated
    if place in ("after", "both") and rng.random() < 0.12:
        return _turns(rng, context.replace(OPEN, "").replace(CLOSE, ""), category, label, decorated, passages)
    return _wrap(rng, text, 0.4)


def _decorate(rng: random.Random, ask: str, category: str, label: str) -> str:
    roll = rng.random()
    question = ask.rstrip().endswith("?")
    if roll < (0.03, 0.06, 0.1, 0.4)[2 * (label == LOCAL) + question]:
        return rng.choice(QUESTION).format(ask)
    if label == LOCAL and question and roll < 0.46:
        return f"Question: {ask}\nAnswer: {rng.choice(LEADS)}"
    if roll < 0.55:
        return rng.choice(REQUEST).format(ask) if roll > 0.45 else ask
    if roll < 0.68 and category in CUES:
        return f"{ask}\n\n{rng.choice(CUES[category])}"
    return ask


def _context(rng: random.Random, category: str, passages: dict[str, list[str]]) -> str:
    kind = rng.choice(KINDS[category])
    count = rng.choices((1, 2, 3), (55, 30, 15))[0]
    parts = rng.sample(passages[kind], count)
    if category == "multidoc_qa" and kind == "prose":
        mark = rng.choice(("Passage {}:\n{}", "Document {}: {}", "[{}] {}", "Source {}\n{}"))
        parts = [mark.format(i + 1, part) for i, part in enumerate(parts)]
    body = "\n\n".join(parts)
    if kind in ("prose", "foreign"):
        if rng.random() < 0.25:
            body = body[rng.randint(1, 120) :]
        if rng.random() < 0.25:
            body = body[: -rng.randint(1, 120)]
        if rng.random() < 0.3:
            width = rng.choice((56, 66, 72, 80))
            body = "\n\n".join(textwrap.fill(part, width) for part in body.split("\n\n"))
    if kind == "code" and rng.random() < 0.5:
        return f"{OPEN}```\n{body}\n```{CLOSE}"
    return OPEN + rng.choice(FRAMES).format(body) + CLOSE


def _wrap(rng: random.Random, text: str, chance: float) -> str:
    """Put `text` into the turn markers of some chat format with probability `chance`."""
    if rng.random() >= chance:
        return text
    system = rng.choice(SYSTEM)
    forms = (
        "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        "[INST] {text} [/INST]",
        "<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n",
        "{system}\n\nUser: {text}\nAssistant:",
        "### Instruction:\n{text}\n\n### Response:\n",
        "<|user|>\n{text}</s>\n<|assistant|>\n",
    )
    return rng.choice(forms).replace("{system}", system).replace("{text}", text)


def _turns(
    rng: random.Random, context: str, category: str, label: str, ask: str, passages: dict[str, list[str]]
) -> str:
    """Return a conversation whose first turn asks for the other kind of task; the last turn decides."""
    local = ("What is this place called?", "Who wrote this?", "When was this?", "Find the date in this text.")
    whole = ("Summarize this.", "Translate this into Dutch.", "What do you think of this?", "Explain all of this.")
    first = rng.choice(whole if label == LOCAL else local)
    reply = rng.choice(passages["prose"]).split(". ")[0] + "."
    if category == "code":
        reply = "Sure, here you are."
    return (
        f"<|im_start|>user\n{OPEN}{first}\n\n{context}<|im_end|>\n<|im_start|>assistant\n{reply}{CLOSE}<|im_end|>\n"
        f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n"
    )


def _few_shot(rng: random.Random, shots: str) -> str:
    """Render one labelled set as a few-shot prompt that ends in an open label."""
    names, *pairs = shots.split(";")
    left, right = names.split("|")
    chosen = rng.sample([tuple(pair.split("|")) for pair in pairs], rng.randint(4, len(pairs)))
    form = rng.choice(
        ("{l}: {a}\n{r}: {b}\n\n", "{l}: {a}\n{r}: {b}\n", "{a} -> {b}\n", "{a} => {b}\n", "{a}\n{r}: {b}\n\n")
    )
    lines = [form.format(l=left, r=right, a=a, b=b) for a, b in chosen[:-1]]
    last = form.format(l=left, r=right, a=chosen[-1][0], b="\0").split("\0")[0].rstrip()
    return OPEN + "".join(lines) + last + CLOSE


def _cut(rng: random.Random, passage: str, others: list[str]) -> str:
    """Return a text or code without any instruction, which begins and breaks off anywhere: it is to be continued."""
    text = passage[: rng.randint(len(passage) // 2, len(passage))] if rng.random() < 0.6 else passage
    if rng.random() < 0.6:
        before = "\n\n".join(rng.sample(others, rng.randint(1, 3)))
        text = f"{before[rng.randint(0, len(before) // 2):]}\n\n{text}"
    elif rng.random() < 0.4:
        text = text[rng.randint(0, len(text) // 2) :]
    return OPEN + text + CLOSE + rng.choice(("", "\n", "\n    "))


def main(argv: list[str] | None = None) -> int:
    """Write the training set to a file; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the training set of the task classifier as JSON lines.")
    parser.add_argument("file", metavar="FILE", type=Path, help="file to write")
    options = parser.parse_args(argv)
    made = rows()
    write_text(options.file, dump(made))
    print(f"{options.file}: {len(made)} prompts from {len({row.group for row in made})} templates")
    return 0


if __name__ == "__main__":
    sys.exit(main())
