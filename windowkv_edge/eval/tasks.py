"""Files in LongBench's format (arXiv 2308.14508): JSON lines with context, input, answers and dataset.

Prompts are worded plainly (context, question, "Answer:"), not as the benchmark words them, so that scores compare
policies with each other and not with published tables.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import _json
from .._json import shown
from .case import Case, EvalError
from .metrics import DATASETS, FIRST_LINE
from .style import Style

__all__ = ["tasks_cases"]

_CODE = {"lcc", "repobench-p"}
_ASKS = {
    "gov_report": "Summarize the report.",
    "multi_news": "Summarize the news.",
    "qmsum": "",
    "passage_retrieval_en": "Which paragraph does this summary come from? Name its number.",
    "passage_count": "How many different paragraphs are there?",
}

MAX_BYTES = 1 << 30
_BROKEN = "not JSON"
_MAX_REASONS = 20  # a file may name any number of datasets


def _reason(row: Any) -> str | None:
    """Why a line cannot be scored."""
    if not isinstance(row, dict):
        return "not a JSON object"
    for key, kind in (("context", str), ("input", str), ("answers", list), ("dataset", str)):
        if not isinstance(row.get(key), kind):
            return f"{key!r} is missing or not a {kind.__name__}"
    if not row["answers"] or not all(isinstance(answer, str) for answer in row["answers"]):
        return "'answers' is empty or not a list of strings"
    name, classes = row["dataset"].removesuffix("_e"), row.get("all_classes")
    if name not in DATASETS:
        return f"dataset {shown(row['dataset'])} has no metric here"
    if DATASETS[name][0] == "accuracy" and not (
        isinstance(classes, list) and classes and all(isinstance(label, str) for label in classes)
    ):
        return "'all_classes' is missing or not a list of strings"
    return None


def _lines(path: Path) -> list[bytes]:
    try:
        data = _json.read_bytes(path, MAX_BYTES, EvalError)
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}; give the path of a file of JSON lines") from error
    if not data.strip():
        raise EvalError(f"{path} is empty, expected LongBench's JSON lines; give another file")
    return data.split(b"\n")


def _question(style: Style, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens in front of a line's context, and behind it."""
    name = row["dataset"].removesuffix("_e")
    if name in _CODE or name in FIRST_LINE:  # they are continued as they are
        return style.bos, style.tokenize(row["input"])
    return style.head, style.ask(" ".join(part for part in (_ASKS.get(name, ""), row["input"]) if part))


def _context(style: Style, text: str, n_beside: int, n_ctx: int) -> list[int]:
    """Tokens of a context; one that is too long loses its middle, as in the benchmark.

    Args:
        style: of the prompts.
        text: the context.
        n_beside: tokens of the question and the answer.
        n_ctx: positions.
    """
    body, room = style.tokenize(text), n_ctx - n_beside
    if room < 2:
        raise EvalError(f"the questions alone fill the context; give a larger --n-ctx than {n_ctx}")
    return body if len(body) <= room else body[: room // 2] + body[len(body) - (room - room // 2) :]


def tasks_cases(
    style: Style, path: Path, n_ctx: int, limit: int | None = None, before: bool = False
) -> tuple[list[Case], Counter[str]]:
    """Prompts of a file, and how many lines were skipped, by reason.

    Args:
        style: of the prompts.
        path: the file.
        n_ctx: positions, the answer included.
        limit: lines at most.
        before: contexts are compacted before their questions are read (SCBench's shared contexts, arXiv 2412.10319):
            lines of one context come one behind the other, and it is read once.

    Raises:
        EvalError: no line can be used.
    """
    found: list[tuple[dict[str, Any], list[int], list[int]]] = []
    skipped: Counter[str] = Counter()
    first_broken = ""
    for number, line in enumerate(_lines(path), 1):
        if limit is not None and len(found) >= limit:
            break
        if not line.strip():
            continue
        try:
            row = _json.loads(line, f"{path}: line {number}", EvalError)
        except EvalError as error:
            first_broken = first_broken or str(error).removeprefix(f"{path}: ")
            skipped[_BROKEN] += 1
            continue
        reason = _reason(row)
        if reason is not None:
            skipped[reason if reason in skipped or len(skipped) < _MAX_REASONS else "other reasons"] += 1
            continue
        head, end = _question(style, row)
        if before and not end:
            skipped["nothing stands behind its context, which asks about it"] += 1
            continue
        found.append((row, head, end))
    if _BROKEN in skipped:
        skipped[f"{_BROKEN} ({first_broken})"] = skipped.pop(_BROKEN)
    if not found:
        reasons = "; ".join(f"{n} x {why}" for why, n in skipped.most_common(3)) or "it has no lines"
        raise EvalError(f"{path} holds nothing to score ({reasons}); expected LongBench's JSON lines")
    return list(_cases(style, found, n_ctx, before)), skipped


def _cases(
    style: Style, found: Sequence[tuple[dict[str, Any], list[int], list[int]]], n_ctx: int, before: bool
) -> Iterator[Case]:
    """Of lines, with the tokens in front of their contexts and behind them."""
    count: Counter[str] = Counter()
    groups: dict[Any, list[tuple[dict[str, Any], list[int], list[int]]]] = defaultdict(list)
    for i, own in enumerate(found):
        groups[(own[0]["context"], tuple(own[1])) if before else i].append(own)
    for group in groups.values():
        n_beside = max(
            len(head) + len(end) + DATASETS[row["dataset"].removesuffix("_e")][1] for row, head, end in group
        )
        body = _context(style, group[0][0]["context"], n_beside, n_ctx)
        for row, head, end in group:
            name = row["dataset"].removesuffix("_e")
            metric, max_tokens = DATASETS[name]
            classes = tuple(row["all_classes"]) if metric == "accuracy" else ()
            prompt, follow_up = (head + body, end) if before else (head + body + end, [])
            yield Case(
                "tasks", name, 0, None, count[name], prompt, tuple(row["answers"]), metric, max_tokens, follow_up,
                classes, name in FIRST_LINE,
            )  # fmt: skip
            count[name] += 1
