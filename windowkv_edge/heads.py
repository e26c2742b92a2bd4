"""Head scores: how much each attention head of a model contributes to its answers (HeadKV, arXiv 2410.19258).

``windowkv-edge profile MODEL`` measures them. They live in a JSON file, or in the model's GGUF metadata as the string
``windowkv.head_scores``; the score files of HeadKV's authors load as well.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from . import _json, head_files
from ._files import write_text
from .errors import HeadScoresError, MissingProfileError
from .head_files import FORMAT, KINDS, MAX_SCORE, VERSION

__all__ = ["METADATA_KEY", "HeadScores", "Kind", "ModelHeads", "profile_beside"]

Kind = Literal["r", "r2"]
METADATA_KEY = "windowkv.head_scores"


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of the query heads of one model.

    Attributes:
        scores: by kind ("r": retrieval, "r2": retrieval and reasoning) float64 [n_layer, n_head], not negative, any
            scale. A file that does not say its kind serves as both.
        source: where they come from, for messages.
        about: what is known of their measurement (model, command, date, counts).

    Raises:
        HeadScoresError: other kinds or shapes, or scores that are negative, not numbers or above 1e100.
    """

    scores: Mapping[str, npt.NDArray[np.float64]]
    source: str = "memory"
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows_of = {kind: np.asarray(rows, dtype=np.float64) for kind, rows in self.scores.items()}
        object.__setattr__(self, "scores", rows_of)
        if not self.scores or not set(self.scores) <= set(KINDS):
            raise HeadScoresError(
                f"{self.source}: kinds of scores are {sorted(self.scores)}, expected 'r', 'r2' or both"
            )
        shapes = {np.shape(rows) for rows in self.scores.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise HeadScoresError(
                f"{self.source}: scores have the shapes {sorted(shapes)}, expected one [n_layer, n_head]"
            )
        for kind, rows in self.scores.items():
            if not ((rows >= 0) & (rows <= MAX_SCORE)).all():
                raise HeadScoresError(
                    f"{self.source}: scores of kind {kind} are negative or not numbers, or above {MAX_SCORE:g}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """(n_layer, n_head)."""
        n_layer, n_head = next(iter(self.scores.values())).shape
        return int(n_layer), int(n_head)

    def kv_heads(self, kind: Kind, n_head_kv: int, reduce: Literal["mean", "max"] = "mean") -> npt.NDArray[np.float64]:
        """Scores of the kv heads, each from the query heads that share it; they sum to 1.

        Args:
            kind: "r" or "r2".
            n_head_kv: kv heads per layer, a divisor of n_head.
            reduce: "mean" or "max" over the query heads of a kv head.

        Returns:
            float64 [n_layer, n_head_kv].

        Raises:
            ValueError: there are no scores of this kind, or n_head_kv does not divide n_head.
        """
        if kind not in self.scores:
            raise ValueError(f"{self.source}: holds scores of kind {', '.join(self.scores)}, expected {kind}")
        n_layer, n_head = self.shape
        if n_head_kv < 1 or n_head % n_head_kv:
            raise ValueError(f"{self.source}: {n_head} query heads cannot share {n_head_kv} kv heads")
        groups = self.scores[kind].reshape(n_layer, n_head_kv, -1)
        res = groups.mean(axis=2) if reduce == "mean" else groups.max(axis=2)
        total = res.sum()
        return res / total if total > 0 else np.full_like(res, 1 / res.size)

    #
    # files
    #

    @classmethod
    def parse(cls, text: str, source: str) -> HeadScores:
        """Read our JSON, or the authors' one line ``{"layer-head": [scores], ...}``.

        Raises:
            HeadScoresError: the text is neither. It is a ValueError.
        """
        scores, about = head_files.parse(text, source)
        return cls(scores, source, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadScores:
        """Read a file.

        Raises:
            OSError: it cannot be read.
            HeadScoresError: it holds no head scores. It is a ValueError.
        """
        return cls.parse(head_files.read(path), str(path))

    def dumps(self) -> str:
        """The JSON text of a file, also the value of the GGUF metadata key."""
        # six digits are more than the measurement has
        scores = {kind: [[float(f"{x:.6g}") for x in row] for row in rows] for kind, rows in self.scores.items()}
        return _json.dumps({"format": FORMAT, "version": VERSION, "about": dict(self.about), "scores": scores})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; an interrupted write leaves what was there.

        Raises:
            OSError: it cannot be written.
        """
        write_text(path, self.dumps() + "\n")


def profile_beside(model: str | os.PathLike[str]) -> Path:
    """Where ``windowkv-edge profile`` puts the scores of a model file by default: MODEL.heads.json beside it."""
    path = Path(model)
    return path.with_name(path.name.removesuffix(".gguf") + ".heads.json")


@cache
def _shipped() -> dict[str, HeadScores]:
    """Profiles that come with the package, by the name in the model's metadata."""
    res = {}
    for entry in (resources.files(__package__) / "data" / "heads").iterdir():
        if entry.name.endswith(".json"):
            scores = HeadScores.parse(entry.read_text(encoding="utf-8"), f"windowkv_edge/data/heads/{entry.name}")
            res[str(scores.about["model"])] = scores
    return res


@dataclass(frozen=True)
class ModelHeads:
    """A model as policies see it.

    Attributes:
        path: its GGUF file.
        metadata: its string metadata.
        n_layer: layers, of any kind.
        n_head_kv: kv heads per layer of the compressible layers.
        layers: indices of the layers that the cache compresses.
        n_head: query heads per layer of these; None if unknown.
        has_ragged: whether the devices of these layers attend to heads of different lengths at once.
    """

    path: str
    metadata: Mapping[str, str]
    n_layer: int
    n_head_kv: int
    layers: tuple[int, ...]
    n_head: int | None = None
    has_ragged: bool = True

    def find(self, given: HeadScores | str | os.PathLike[str] | None) -> HeadScores:
        """Head scores of this model: given ones, else those in its metadata, beside its file, or in the package.

        Raises:
            MissingProfileError: there are none.
            OSError, ValueError: what was given or found cannot be read.
        """
        if isinstance(given, HeadScores):
            return given
        if given is not None:
            if not isinstance(given, (str, os.PathLike)):  # an int would be read as a file descriptor
                raise ValueError(f"importance is {given!r}, expected HeadScores or the path of a file of them")
            return HeadScores.load(given)
        if METADATA_KEY in self.metadata:
            return HeadScores.parse(self.metadata[METADATA_KEY], f"{self.path}, metadata {METADATA_KEY}")
        beside = profile_beside(self.path)
        if beside.is_file():
            return HeadScores.load(beside)
        name = self.metadata.get("general.name", "")
        if name in _shipped():
            return _shipped()[name]
        raise MissingProfileError(
            f"{self.path}: the policy divides cells by head scores and this model has none: not given "
            f"(importance=...), not in its metadata ({METADATA_KEY}), not in {beside}. "
            f"Measure them: windowkv-edge profile {self.path}"
        )

    def importance(
        self,
        given: HeadScores | str | os.PathLike[str] | None,
        kind: Kind,
        reduce: Literal["mean", "max"],
    ) -> npt.NDArray[np.float64]:
        """Scores of the kv heads of the compressible layers, summing to 1: float64 [len(layers), n_head_kv].

        Raises:
            MissingProfileError, OSError, ValueError: see :meth:`find`; ValueError also for scores of another model.
        """
        scores = self.find(given)
        n_head = scores.shape[1] if self.n_head is None else self.n_head
        if scores.shape != (self.n_layer, n_head) or n_head % self.n_head_kv:
            own = "" if self.n_head is None else f" of {self.n_head} query heads"
            raise ValueError(
                f"{scores.source}: scores of {scores.shape[0]} layers x {scores.shape[1]} query heads do not fit "
                f"{self.path} with {self.n_layer} layers{own} and {self.n_head_kv} kv heads; measure them with: "
                f"windowkv-edge profile {self.path}"
            )
        res = scores.kv_heads(kind, self.n_head_kv, reduce)[list(self.layers)]
        total = float(res.sum())
        return res / total if total > 0 and math.isfinite(total) else np.full_like(res, 1 / res.size)
