"""What one prompt asks and what counts as its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import WindowKVError

__all__ = ["Case", "EvalError", "place"]


class EvalError(WindowKVError, ValueError):
    """An evaluation cannot be run as asked: what was got, what was expected, what to do."""


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        suite: the command that made it.
        task: its kind within the suite.
        length: tokens of the haystack that were asked for; 0 if the prompt is given as a whole.
        depth: share of the haystack in front of the needle; None if there is no needle.
        index: number within the kind.
        prompt: tokens; the cache is compacted after them.
        answers: what the output has to contain, or to be.
        metric: a name of :data:`windowkv_edge.eval.metrics.METRICS`.
        max_tokens: greedy tokens that are scored.
        follow_up: tokens evaluated between the compaction and the answer (a second question).
        classes: for the metric "accuracy", what the answer could be.
        first_line: only the first line of the output counts.
    """

    suite: str
    task: str
    length: int
    depth: float | None
    index: int
    prompt: Sequence[int]
    answers: tuple[str, ...]
    metric: str
    max_tokens: int
    follow_up: Sequence[int] = ()
    classes: tuple[str, ...] = ()
    first_line: bool = False

    @property
    def key(self) -> str:
        depth = "-" if self.depth is None else f"{self.depth:g}"
        return f"{self.suite}/{self.task}/{self.length}/{depth}/{self.index}"


def place(hay: Sequence[int], inserts: Sequence[tuple[float, Sequence[int]]]) -> list[int]:
    """Tokens of the haystack with inserts at their depths; those of one depth stay in the order given.

    Args:
        hay: tokens.
        inserts: (share of the haystack in front of it, tokens).
    """
    res: list[int] = []
    done = 0
    for depth, tokens in sorted(inserts, key=lambda insert: insert[0]):
        at = int(len(hay) * depth)
        res += [*hay[done:at], *tokens]
        done = at
    return res + list(hay[done:])
