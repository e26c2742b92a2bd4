"""Train the task classifier on the prompts that `make_data` makes and judge it on `data/heldout.jsonl`.

    python -m windowkv_edge.task.train                 # writes data/weights.npz, prints the held-out results
    python -m windowkv_edge.task.train --check         # exit status 1 if weights or accuracy are not as they should be
    python -m windowkv_edge.task.train --folds 5       # cross validation on the training set, for choosing settings

Both models are convex (L2-regularised logistic regression, solved by Newton steps), so the data alone
determine the weights; there is no random start.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from .features import CLOSE, OPEN, gate_features, label_features, segments
from .make_data import DATA, Row, rows
from .model import BIAS, WEIGHTS, Model

__all__ = ["DATA", "Example", "accuracy", "difference", "fit", "main", "read", "table"]

FLOOR = 0.95
"""Held-out accuracy below which `--check` fails."""

TOLERANCE = 0.05
"""Largest difference of a weight that `--check` accepts: float16 rounding, pruning and the order of sums
move a weight by less than 0.03, and a changed prompt moves some weight by more."""

PRUNE = 0.02
"""Weights smaller than this are not stored."""

RARE = 2
"""Features seen in fewer prompts (label) or segments (gate) are left out."""

GATE_PENALTY, LABEL_PENALTY = 3.0, 0.3
"""Half the weight of the squared norm in the two objectives; chosen by cross validation."""

Floats: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"


@dataclass(frozen=True)
class Example:
    """A labelled prompt.

    `context` is the span (start, stop) in characters that is not the instruction, None if unknown.
    """

    text: str
    label: str
    category: str
    context: tuple[int, int] | None = None

    @property
    def marked(self) -> str:
        start, stop = self.context or (0, 0)
        if stop <= start:
            return self.text
        return f"{self.text[:start]}{OPEN}{self.text[start:stop]}{CLOSE}{self.text[stop:]}"

    @property
    def target(self) -> float:
        return float(self.label == "aggregation")


def read(path: Path) -> list[Example]:
    """Return the examples of a JSON lines file. Raises ValueError on a line with an unknown label."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if row["label"] not in ("localization", "aggregation"):
            raise ValueError(f"{path}:{number}: label must be localization or aggregation, got {row['label']!r}")
        context = row.get("context")
        found.append(Example(row["text"], row["label"], row["category"], (context[0], context[1]) if context else None))
    return found


class _Rows:
    """A sparse matrix of feature values, one row per example, with a constant last column."""

    def __init__(self, rows: Sequence[Mapping[str, float]], columns: Mapping[str, int]) -> None:
        index: list[int] = []
        value: list[float] = []
        starts: list[int] = []
        for row in rows:
            starts.append(len(index))
            for name, x in row.items():
                if name in columns:
                    index.append(columns[name])
                    value.append(x)
            index.append(len(columns))
            value.append(1.0)
        self.width = len(columns) + 1
        self._index = np.array(index)
        self._value = np.array(value)
        self._starts = np.array(starts)
        self._row = np.repeat(np.arange(len(rows)), np.diff([*starts, len(index)]))

    def times(self, w: Floats) -> Floats:
        return np.add.reduceat(w[self._index] * self._value, self._starts)

    def transposed_times(self, r: Floats) -> Floats:
        return np.bincount(self._index, self._value * r[self._row], self.width).astype(np.float64)


def _logistic(
    rows: Sequence[Mapping[str, float]], y: Floats, penalty: float, balanced: bool = False
) -> dict[str, float]:
    """Return the weights, by name, that minimise log loss + penalty / 2 * |w|^2 (truncated Newton).

    `balanced` weighs the rarer class up until both count the same.
    """
    seen = Counter(name for row in rows for name in row)
    names = sorted(name for name, count in seen.items() if count >= RARE)
    x = _Rows(rows, {name: column for column, name in enumerate(names)})
    w = np.zeros(x.width)
    rate = float(y.mean())
    weight = np.where(y > 0, max(1.0, (1 - rate) / rate), max(1.0, rate / (1 - rate))) if balanced else np.ones_like(y)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x.times(w)))
        gradient = x.transposed_times(weight * (p - y)) + penalty * w
        size = float(np.linalg.norm(gradient))
        if size < 1e-4:
            break
        w = w + _newton_step(x, weight * p * (1 - p), penalty, gradient, min(0.1, size**0.5) * size)
    stored = {name: float(v) for name, v in zip(names, w[:-1], strict=True) if abs(v) >= PRUNE}
    return {**stored, BIAS: float(w[-1])}


def _newton_step(x: _Rows, curvature: Floats, penalty: float, gradient: Floats, accuracy: float) -> Floats:
    """Return the solution of Hessian * step = -gradient by conjugate gradients."""
    step = np.zeros_like(gradient)
    rest = -gradient
    direction = rest.copy()
    square = float(rest @ rest)
    for _ in range(500):
        image = x.transposed_times(curvature * x.times(direction)) + penalty * direction
        length = square / float(direction @ image)
        step += length * direction
        rest -= length * image
        before, square = square, float(rest @ rest)
        if square**0.5 < accuracy:
            break
        direction = rest + (square / before) * direction
    return step


def fit(examples: Sequence[Example]) -> Model:
    """Return the model of `examples`: the gate from their segments, then the label with that gate."""
    cut = [segments(example.marked) for example in examples]
    flat = [segment for example, parts in zip(examples, cut, strict=True) if example.context for segment in parts]
    gate = _logistic(
        [dict.fromkeys(gate_features(segment), 1.0) for segment in flat],
        np.array([float(not segment.context) for segment in flat]),
        GATE_PENALTY,
    )
    half = Model(gate, {})
    rows = [
        label_features(example.text, parts, map(half.open, parts))
        for example, parts in zip(examples, cut, strict=True)
    ]
    return Model(gate, _logistic(rows, np.array([example.target for example in examples]), LABEL_PENALTY, True))


def _right(model: Model, examples: Iterable[Example]) -> Iterator[tuple[Example, bool]]:
    for example in examples:
        yield example, (model.score(example.text) > 0) == bool(example.target)


def accuracy(model: Model, examples: Sequence[Example]) -> float:
    """Return the share, in [0, 1], of `examples` that `model` labels correctly."""
    return sum(right for _, right in _right(model, examples)) / len(examples)


def table(model: Model, examples: Sequence[Example]) -> str:
    """Return the confusion matrix as text, a line per category and label: examples and what they were called."""
    counts: Counter[tuple[str, str, bool]] = Counter()
    for example, right in _right(model, examples):
        counts[example.category, example.label, right] += 1
    lines = [f"{'category':<12} {'label':<13} {'localization':>12} {'aggregation':>11}"]
    for category, label in sorted({key[:2] for key in counts}):
        hits, misses = counts[category, label, True], counts[category, label, False]
        local, whole = (hits, misses) if label == "localization" else (misses, hits)
        lines.append(f"{category:<12} {label:<13} {local:>12} {whole:>11}")
    return "\n".join(lines)


def difference(a: Model, b: Model) -> float:
    """Return the largest difference of a weight; a weight that one of the models lacks counts as 0 there."""
    return max(
        abs(one.get(name, 0.0) - two.get(name, 0.0))
        for one, two in ((a.gate, b.gate), (a.label, b.label))
        for name in one.keys() | two.keys()
    )


def _examples(made: Sequence[Row]) -> list[Example]:
    return [Example(row.text, row.label, row.category, row.context) for row in made]


def _cross_validate(folds: int) -> None:
    """Print the accuracy on left-out templates: renderings of one template stay in one fold."""
    made = rows()
    examples = _examples(made)
    pairs = list(zip(examples, made, strict=True))
    right = 0
    for fold in range(folds):
        model = fit([example for example, row in pairs if row.group % folds != fold])
        left_out = [example for example, row in pairs if row.group % folds == fold]
        print(f"fold {fold}: {accuracy(model, left_out):.4f} of {len(left_out)}")
        right += round(accuracy(model, left_out) * len(left_out))
    print(f"cross validation: {right / len(examples):.4f} of {len(examples)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, check or cross-validate as the options say; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m windowkv_edge.task.train", description="Train the task classifier."
    )
    parser.add_argument(
        "--check", action="store_true", help="retrain and compare with the shipped weights, write nothing"
    )
    parser.add_argument("--folds", type=int, default=0, metavar="N", help="cross-validate on the training set only")
    options = parser.parse_args(argv)
    if options.folds:
        _cross_validate(options.folds)
        return 0
    model = fit(_examples(rows()))
    if not options.check:
        model.save()
    shipped = Model.load()
    heldout = read(DATA / "heldout.jsonl")
    score = accuracy(shipped, heldout)
    print(table(shipped, heldout))
    print(f"held-out accuracy {score:.4f} of {len(heldout)}; weights {WEIGHTS.stat().st_size} bytes")
    failed = False
    if options.check:
        apart = difference(model, shipped)
        print(f"largest difference to the shipped weights {apart:.4f} (at most {TOLERANCE})")
        if apart > TOLERANCE:
            print(
                "the shipped weights are not those of the data; run python -m windowkv_edge.task.train",
                file=sys.stderr,
            )
            failed = True
        if score < FLOOR:
            print(f"held-out accuracy is under {FLOOR}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
