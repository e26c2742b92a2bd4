"""How a text will be read, said before it is."""

from __future__ import annotations

from windowkv_edge import Llama

__all__ = ["cells_text", "how_read", "shifts", "why_too_long"]


def shifts(llm: Llama) -> bool:
    """Whether the session goes on behind its context."""
    return llm.kv_shift == "shift"


def cells_text(limit: int | str) -> str:
    """A limit in words."""
    return f"at most {limit:,} cells per head" if isinstance(limit, int) else f"at most {limit}"


def why_too_long(llm: Llama, n_tokens: int) -> str | None:
    """Why so many tokens cannot follow what the session has read; None if they can."""
    if shifts(llm):
        return None
    left = llm.n_ctx() - llm.n_tokens
    if n_tokens < left:  # a token of the answer has to follow
        return None
    return (
        f"the context holds {llm.n_ctx():,} positions, of which {left:,} are left; send less, /reset, or start with a "
        "larger --ctx"
    )


def how_read(llm: Llama, n_tokens: int) -> str:
    """With the full cache, or within which bound."""
    if llm.n_tokens + n_tokens >= llm.n_ctx():  # it shifts
        return f"it is longer than what is left of {llm.n_ctx():,} positions: the oldest text is given up for it"
    room = llm.kv_room(n_tokens)
    if room is None:
        return f"it will be read with the full cache, {llm.n_tokens + n_tokens:,} of {llm.n_ctx():,} positions"
    return f"it will be read within {room:,} cells per head and a batch, as your message asks"
