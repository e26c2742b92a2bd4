"""What a patch of the queue may hold. Each function returns the broken rules, one line each."""

from __future__ import annotations

import re
from collections import Counter

from strictdiff import Hunk, Patch, Tree

# Lines a hunk may add and remove, a replaced line counting as both. What it adds beyond that is ours and belongs in
# native/, what it removes beyond that makes the patch depend on how upstream is written
MAX_CHANGED = 10
FROZEN = {"src/llama-graph.h": "156 model files include it"}
PARAGRAPHS = ("Why", "Why not outside upstream", "When it can go")


def header_problems(patch: Patch) -> list[str]:
    head = f"{patch.name}: the header"
    problems = []
    if not re.match(r"Subject: [^\s<]", patch.header):
        problems.append(f"{head} starts with {patch.header[:30]!r}, expected 'Subject: WHAT IT DOES'; write it")
    for label in PARAGRAPHS:
        if not re.search(rf"\n\n{label}:[ ]*\n?[ ]*[^\s<]", patch.header):
            problems.append(f"{head} has no paragraph '{label}: ...' with a text of its own; write it")
    if noise := re.search(r"^(diff --git|index [0-9a-f]+\.\.).*", patch.header, re.MULTILINE):
        problems.append(f"{head} holds {noise[0]!r}, expected no lines of git's own; delete them")
    return problems


def hunk_problems(hunk: Hunk) -> list[str]:
    problems = []
    added, removed = ([line[1:] for line in hunk.lines if line[0] == sign] for sign in "+-")
    if len(added) + len(removed) > MAX_CHANGED:
        problems.append(
            f"adds {len(added)} and removes {len(removed)} lines, expected at most {MAX_CHANGED} in all; "
            "move the code to native/ and insert a call"
        )
    if dangling := next((line for line in added if re.search(r"(^ *|\} *)else *(//.*)?$", line)), None):
        problems.append(
            f"adds {dangling.strip()!r}, whose branch is the next line of upstream's whatever that will be; "
            "write 'else if (...) {' or choose with a call"
        )
    return problems


def content_problems(patch: Patch, before: Tree, after: Tree) -> list[str]:
    problems = []
    listed = re.findall(r"^Touches-Public-Header: *(\S+)", patch.header, re.MULTILINE)
    for diff in patch.diffs:
        where = f"{patch.name}: {diff.path}"
        if diff.path in FROZEN:
            problems.append(f"{where}: must stay as it is ({FROZEN[diff.path]}); declare in a header in native/")
        for number, hunk in enumerate(diff.hunks, 1):
            problems += [f"{where}: hunk {number} {problem}" for problem in hunk_problems(hunk)]
        if not re.fullmatch(r"(ggml/)?include/[^/]+\.h", diff.path):
            continue
        if diff.path not in listed:
            problems.append(
                f"{where}: got a changed public header, expected none; take the change out or, where there is no other "
                f"way, write 'Touches-Public-Header: {diff.path}' into the patch's header"
            )
        problems += [
            f"{where}: got a change in '{' '.join(body.split())[:50]}...', expected none: bindings mirror public "
            "structs by hand; keep the data in native/"
            for body in structs(before.get(diff.path, b"")) - structs(after.get(diff.path, b""))
        ]
    return problems


def structs(data: bytes) -> Counter[str]:
    """The texts of a header's outermost structs, unions and classes."""
    text = data.decode()
    code = re.sub(r"/\*.*?\*/|//[^\n]*", lambda match: " " * len(match[0]), text, flags=re.DOTALL)
    found: Counter[str] = Counter()
    end = 0
    for match in re.finditer(r"\b(?:struct|union|class)\b[^;{}()=]*\{", code):
        if match.start() >= end:
            depth, end = 1, match.end()
            while depth and end < len(code):
                depth += {"{": 1, "}": -1}.get(code[end], 0)
                end += 1
            found[text[match.start() : end]] += 1
    return found
