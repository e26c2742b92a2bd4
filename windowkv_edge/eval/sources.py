"""Texts: files, folders, or generated prose."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from .._files import open_regular
from ..bench.session import Model
from .case import EvalError
from .prose import prose

__all__ = ["Text", "fingerprint", "hay_tokens", "read_texts"]

Text = tuple[str, str]
"""Name and content."""

_CHARS_PER_TOKEN = 8  # more than any text has on average


def read_text(path: Path) -> str:
    """Content of a UTF-8 text file that is not empty."""
    try:
        with open_regular(path) as file:
            text = TextIOWrapper(file, encoding="utf-8").read()
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror or error}; give the path of a text file") from error
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or give another file") from error
    if not text.strip():
        raise EvalError(f"{path} is empty, expected a text; give another file")
    return text


def read_texts(path: Path) -> list[Text]:
    """A file, or the .txt and .md files of a folder in the order of their names."""
    if not path.is_dir():
        return [(path.name, read_text(path))]
    files = sorted(file for file in path.iterdir() if file.suffix in (".txt", ".md"))
    if not files:
        raise EvalError(f"{path} holds no .txt or .md file; give a folder of texts, or one file")
    return [(file.name, read_text(file)) for file in files]


def fingerprint(texts: Sequence[Text]) -> str:
    """Hash of names and contents."""
    return hashlib.sha256("\0".join(part for text in texts for part in text).encode()).hexdigest()


def hay_tokens(model: Model, haystack: Path | None, n_tokens: int, seed: int) -> list[int]:
    """At least n_tokens tokens of the haystack, files of a folder joined; None = generated prose.

    Raises:
        EvalError: the text is too short.
    """
    if haystack is None:
        return model.tokenize(prose(n_tokens * _CHARS_PER_TOKEN, seed))
    res = model.tokenize("\n".join(text for _, text in read_texts(haystack)))
    if len(res) < n_tokens:
        raise EvalError(
            f"{haystack} has {len(res):,} tokens, expected at least {n_tokens:,}; "
            "give a longer --haystack, or shorter --lengths"
        )
    return res
