"""The two linear models of the task classifier and their file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .._files import writing
from .features import Segment, gate_features, label_features, segments

__all__ = ["BIAS", "WEIGHTS", "Model", "sigmoid"]

BIAS = "#bias"
"""Name under which the constant term of a model is stored."""

WEIGHTS = Path(__file__).parent / "data" / "weights.npz"


@dataclass(frozen=True)
class Model:
    """Weights by feature name: `gate` finds the instruction, `label` tells what it asks for.

    Both are logistic regressions. Features without a weight count nothing.
    """

    gate: Mapping[str, float]
    label: Mapping[str, float]

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Model:
        """Read the file that `save` wrote. Raises OSError if it cannot be read."""
        with np.load(path, allow_pickle=False) as arrays:
            names = {kind: arrays[kind + "_names"].tobytes().decode().split("\n") for kind in ("gate", "label")}
            return cls(*(dict(zip(names[kind], arrays[kind].tolist(), strict=True)) for kind in ("gate", "label")))

    def save(self, path: Path = WEIGHTS) -> None:
        """Write the names (UTF-8, one a line, as uint8) and the weights (float16, same order) of both models."""
        arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {}
        for name, weights in (("gate", self.gate), ("label", self.label)):
            arrays[name + "_names"] = np.frombuffer("\n".join(weights).encode(), np.uint8)
            arrays[name] = np.array(list(weights.values()), np.float16)
        with writing(path) as part:
            np.savez_compressed(part, **arrays)  # type: ignore[arg-type]

    def score(self, text: str) -> float:
        """Return the log odds of "aggregation" against "localization" for the prompt `text`."""
        parts = segments(text)
        found = label_features(text, parts, map(self.open, parts))
        weight = self.label.get
        return self.label[BIAS] + sum(weight(name, 0.0) * value for name, value in found.items())

    def open(self, segment: Segment) -> float:
        """Return the probability that `segment` is part of the instruction."""
        return sigmoid(self.gate[BIAS] + _total(self.gate, gate_features(segment)))


def _total(weights: Mapping[str, float], names: Iterable[str]) -> float:
    weight = weights.get
    return sum(weight(name, 0.0) for name in names)


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
