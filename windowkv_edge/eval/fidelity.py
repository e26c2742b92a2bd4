"""Windows of texts and what follows them, for teacher-forced distances from the full cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .case import EvalError
from .run import FidelityCase
from .sources import Text
from .style import Style

__all__ = ["fidelity_cases"]


def fidelity_cases(
    style: Style, texts: Sequence[Text], lengths: Sequence[int], n_follow: int, n_windows: int
) -> Iterator[FidelityCase]:
    """Up to n_windows windows per text and length, evenly spread and without overlap.

    Args:
        style: of the prompts; only its BOS token is used.
        texts: names and contents.
        lengths: tokens of a window in front of the compaction.
        n_follow: tokens behind it that are forced.
        n_windows: windows at most.

    Raises:
        EvalError: a text is too short for one window.
    """
    names = [name for name, _ in texts]
    if len(set(names)) < len(names):
        raise EvalError(f"two texts have the same name ({', '.join(sorted(names))}); rename one")
    for name, text in texts:
        tokens = style.tokenize(text)
        for length in lengths:
            need = length + n_follow
            fits = len(tokens) // need
            if fits == 0:
                raise EvalError(
                    f"{name} has {len(tokens):,} tokens, expected at least {need:,} (window and what follows); "
                    "give a longer --text, or shorter --lengths"
                )
            n = min(n_windows, fits)
            for i in range(n):
                start = i * (len(tokens) - need) // max(1, n - 1) if n > 1 else 0
                window = tokens[start : start + need]
                yield FidelityCase(name, i, style.bos + window[:length], window[length:])
