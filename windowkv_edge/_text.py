"""Text from outside (files' names, headers, answers of models), made harmless for the place where it is shown.

The page of a report escapes HTML by itself (jinja2), and takes :func:`for_terminal` for control characters.
"""

from __future__ import annotations

import re

from rich.markup import escape

__all__ = ["for_file_name", "for_markdown", "for_markup", "for_plot", "for_terminal"]

_TITLE = 200  # characters; matplotlib lays out a longer line for minutes, or refuses the picture

# control characters (the escape sequences of terminals begin with one), separators of lines, what turns the direction
# of a line, and halves of characters, which cannot be encoded
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _named(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def for_terminal(text: str, keep: str = "") -> str:
    """Control characters as Python writes them (``\\x1b``), except those in ``keep``."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else _named(match), text)


def for_markup(text: str, keep: str = "") -> str:
    """For rich, inside of a text with markup or in the cell of a table."""
    return escape(for_terminal(text, keep))


def for_plot(text: str) -> str:
    """For titles and labels of matplotlib, which reads formulas between dollars and hides labels that begin with _."""
    shown = for_terminal(text if len(text) <= _TITLE else text[: _TITLE - 1] + "…").replace("$", r"\$")
    return " " + shown if shown.startswith("_") else shown


def for_file_name(text: str) -> str:
    """For a part of a file's name: letters, digits and a few signs, not too many."""
    return re.sub(r"[^\w.+-]+", "_", text)[:100]


def for_markdown(text: str) -> str:
    """For Markdown, inside of a line or in the cell of a table: neither its markup nor HTML."""
    safe = for_terminal(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", safe)
