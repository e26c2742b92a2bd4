"""How texts and questions become prompts: plain completions, or turns of the model's chat template."""

from __future__ import annotations

import llama_cpp

from ..bench.session import Model
from .case import EvalError

__all__ = ["Style"]

_BODY, _REPLY, _NEXT = "<<body>>", "<<reply>>", "<<next>>"


class Style:
    """Prompts for one model.

    Args:
        model: the weights.
        chat: use the chat template of the model.

    Attributes:
        bos: the BOS token, if the model wants one.
        head: tokens in front of every prompt: the BOS token, if the model wants one, and the start of the first turn.

    Raises:
        EvalError: ``chat`` and the model has no chat template, or one that cannot be rendered.
    """

    def __init__(self, model: Model, chat: bool = False) -> None:
        self.model, self.chat = model, chat
        wants = llama_cpp.llama_vocab_get_add_bos(model.vocab)
        self.bos = [int(llama_cpp.llama_vocab_bos(model.vocab))] if wants else []
        self.head = self.bos
        if not chat:
            return
        template = model.metadata("tokenizer.chat_template").get("tokenizer.chat_template")
        if template is None:
            raise EvalError(
                f"{model.path.name} has no chat template, expected one in its metadata (tokenizer.chat_template); "
                "leave --chat out, prompts are plain completions then"
            )
        first = self._render(template, [("user", _BODY)])
        second = self._render(template, [("user", _BODY), ("assistant", _REPLY), ("user", _NEXT)])
        try:
            start, self._end = first.split(_BODY)
            between, end = second.split(_REPLY)[1].split(_NEXT)
        except (ValueError, IndexError):
            raise EvalError(
                f"the chat template of {model.path.name} changes what a user says; leave --chat out"
            ) from None
        if end != self._end:
            raise EvalError(f"the chat template of {model.path.name} ends its turns differently; leave --chat out")
        self.head, self._between = model.tokenize(start, special=True), between

    def _render(self, template: str, turns: list[tuple[str, str]]) -> str:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        def piece(token: int) -> str:
            return self.model.piece(token) if token >= 0 else ""

        eos = piece(llama_cpp.llama_vocab_eos(self.model.vocab))
        bos = piece(llama_cpp.llama_vocab_bos(self.model.vocab))
        try:
            formatter = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
            messages = [{"role": role, "content": content} for role, content in turns]
            return str(formatter(messages=messages).prompt)  # type: ignore[arg-type]
        except Exception as error:  # templates raise what they like
            raise EvalError(
                f"the chat template of {self.model.path.name} cannot be rendered: {error}; leave --chat out"
            ) from error

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, without special ones."""
        return self.model.tokenize(text)

    def ask(self, question: str, lead: str = "") -> list[int]:
        """Tokens behind a text: a question and the beginning of its answer."""
        if not self.chat:
            return self.tokenize(f"\n\nQuestion: {question}\nAnswer:" + (f" {lead}" if lead else ""))
        return self.tokenize(f"\n\n{question}") + self.model.tokenize(self._end + lead, special=True)

    def say(self, text: str, lead: str = "", *, first: bool = False) -> list[int]:
        """Tokens of a message of a conversation: the first one, or one behind the last token of a reply."""
        if not self.chat:
            message = f"User: {text}\nAssistant:" + (f" {lead}" if lead else "")
            return self.bos + self.tokenize(message) if first else self.tokenize(f"\n{message}")
        start = self.head if first else self.model.tokenize(self._between, special=True)
        return start + self.tokenize(text) + self.model.tokenize(self._end + lead, special=True)

    def ask_again(self, question: str, lead: str = "") -> list[int]:
        """Tokens of a further question, behind the last token of an answer."""
        if not self.chat:
            return self.ask(question, lead)
        return self.model.tokenize(self._between + question + self._end + lead, special=True)
