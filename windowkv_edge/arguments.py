"""Arguments of ``llama_cpp.Llama`` with which llama.cpp ends the process: checked before it sees them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import llama_cpp
from llama_cpp import _internals

from .budget import plain
from .errors import UnsupportedModelError
from .policies.base import at_least

__all__ = ["CheckedModel", "check_grammar", "check_numbers", "check_tokens", "need_tokenizer"]

_LEAST = {"n_ctx": 0, "n_batch": 1}

_NO_CELLS = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}  # tensors of these exist, cells do not


def check_numbers(kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for sizes and types of cells that there cannot be."""
    for name, low in _LEAST.items():
        if name in kwargs:
            at_least(name, plain(kwargs[name]), low)
    known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType if kind.name not in _NO_CELLS}
    for name in ("type_k", "type_v"):
        kind = plain(kwargs.get(name))
        if kind is not None and (isinstance(kind, bool) or kind not in known):
            usual = ", ".join(f"{value} ({known[value].lower()})" for value in (0, 1, 8, 2))
            raise ValueError(f"{name} is {kind!r}, expected None or a type of cells such as {usual}")


def check_tokens(tokens: Sequence[int], n_vocab: int) -> None:
    """Raise ValueError for ids outside of the vocabulary, TypeError for what is no id."""
    for i, token in enumerate(tokens):
        if not 0 <= operator.index(token) < n_vocab:
            raise ValueError(f"token {i} of {len(tokens)} is {token}, expected an id of 0 to {n_vocab - 1}")


def need_tokenizer(model: _internals.LlamaModel, what: str) -> None:
    """Raise UnsupportedModelError if the model has none."""
    if model.vocab_type() == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise UnsupportedModelError(
            f"{what}: {model.path_model} has no tokenizer; give Llama one, or call eval() and generate() with ids"
        )


def check_grammar(model: _internals.LlamaModel, grammar: Any) -> None:
    """Raise ValueError for a grammar that llama.cpp cannot read."""
    sampler = llama_cpp.llama_sampler_init_grammar(
        model.vocab, grammar._grammar.encode("utf-8"), grammar._root.encode("utf-8")
    )
    if not sampler:
        raise ValueError(
            f"the grammar {grammar._grammar[:80]!r} with the root {grammar._root!r} cannot be read, expected GBNF"
        )
    llama_cpp.llama_sampler_free(sampler)


class CheckedModel(_internals.LlamaModel):
    """The model of a session, which answers where llama.cpp would end the process."""

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        need_tokenizer(self, "tokenize()")
        return list(super().tokenize(text, add_bos, special))

    def detokenize(self, tokens: list[int], special: bool = False) -> bytes:
        need_tokenizer(self, "detokenize()")
        check_tokens(tokens, self.n_vocab())
        return bytes(super().detokenize(tokens, special))
