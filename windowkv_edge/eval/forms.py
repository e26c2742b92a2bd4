"""Where the question stands: chats about one document in five forms, by sessions as anybody has them.

Most templates of retrieval put the question last, but not all do; and what stands behind it is what a policy sees that
goes by the end of the prompt.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .case import EvalError, place
from .metrics import score
from .needle import different_needles
from .run import FULL
from .style import Style

__all__ = ["FORMS", "FormCase", "ask", "form_cases", "row"]

FORMS = ("last", "system", "first", "rules", "examples")
"""The question behind the document; the document in the system message; the question in front of it; 60 words of rules
behind the question; examples of answers behind it."""

KINDS = ("number", "word", "phrase", "paraphrased")
N_FACTS = 8
N_ANSWER = 28  # no beginning of an answer is given, as it would name the question once more
METRIC = "contains_all"

RULES = (
    "Follow these rules. Answer in one short sentence. Use only what the text says and nothing else. Do not repeat the "
    "question. Do not explain how you found the answer. If the text does not say it, answer that you do not know. "
    "Write numbers in digits. Keep names as they are written in the text, and do not add anything behind the answer."
)
EXAMPLES = (
    'Answer in one sentence, as in these answers to other questions: "The capital of France is Paris." "A spider has '
    'eight legs." "Hamlet was written by William Shakespeare." "The longest river of Europe is the Volga, which flows '
    'into the Caspian Sea."'
)


@dataclass(frozen=True)
class FormCase:
    """A chat of one question.

    Attributes:
        form: one of :data:`FORMS`.
        length: tokens of the document without its facts.
        depth: share of the document in front of what is asked for.
        index: number of the document.
        messages: the chat.
        answers: what the reply has to contain, all of them.
        n_positions: of the prompt and the reply, at most.
    """

    form: str
    length: int
    depth: float
    index: int
    messages: Sequence[dict[str, str]]
    answers: tuple[str, ...]
    n_positions: int

    @property
    def key(self) -> str:
        return f"forms/{self.form}/{self.length}/-/{self.index}"


def form_cases(
    style: Style,
    hay: Sequence[int],
    lengths: Sequence[int],
    forms: Sequence[str],
    count: int,
    seed: int,
    first: int = 0,
) -> Iterator[FormCase]:
    """Every length x document x form. A document has eight facts at random places, of which one is asked for.

    Args:
        style: of the model, with its chat template.
        hay: tokens, at least as many as the largest length.
        lengths: tokens of the documents without their facts.
        forms: of :data:`FORMS`.
        count: documents per length.
        seed: of facts and places.
        first: number of the first document.

    Raises:
        EvalError: the style has no chat template.
    """
    if not style.chat:
        raise EvalError(f"{style.model.path.name}: forms of chats need a chat template; give a model that has one")
    for length in lengths:
        for index in range(first, first + count):
            rng = random.Random(f"{seed}/forms/{length}/{index}")
            needles = different_needles(KINDS, range(100 * index, 100 * index + 99), N_FACTS, seed)
            depths = [(at + 0.5) / 40 for at in rng.sample(range(40), N_FACTS)]
            lines = [(at, style.tokenize(f"\n{own.sentences[0]}\n")) for at, own in zip(depths, needles, strict=True)]
            start = rng.randrange(max(1, len(hay) - length))
            document = style.model.detokenize(place(hay[start : start + length], lines)).strip()
            asked = index % N_FACTS
            for form in forms:
                messages = _messages(form, document, needles[asked].question)
                n = len(style.head) + sum(len(style.tokenize(own["content"])) + 32 for own in messages) + N_ANSWER
                yield FormCase(form, length, depths[asked], index, messages, needles[asked].answers, n)


def _messages(form: str, document: str, question: str) -> list[dict[str, str]]:
    said = {
        "last": f"{document}\n\n{question}",
        "system": question,
        "first": f"{question} Find the answer in this text.\n\n{document}",
        "rules": f"{document}\n\n{question}\n\n{RULES}",
        "examples": f"{document}\n\n{question}\n\n{EXAMPLES}",
    }[form]
    user = {"role": "user", "content": said}
    if form != "system":
        return [user]
    return [{"role": "system", "content": f"Answer questions about this text.\n\n{document}"}, user]


def ask(llm: Any, case: FormCase, about: dict[str, Any]) -> dict[str, Any]:
    """The result of one session.

    Args:
        llm: a :class:`windowkv_edge.Llama`.
        case: the chat.
        about: what its result says of it: policy, budget and cells.
    """
    llm.reset()
    with warnings.catch_warnings():  # a system message with a document is longer than what stays
        warnings.filterwarnings("ignore", message="the system prompt is not pinned")
        reply = llm.create_chat_completion(list(case.messages), max_tokens=N_ANSWER, temperature=0.0)
    text, stats = reply["choices"][0]["message"]["content"] or "", llm.kv_stats()
    return {
        **about,
        "n_cells": float(stats.cells.mean()),
        "kv_bytes": stats.bytes_full if stats.policy == "stock" else stats.bytes_live,
        "query": stats.query,
        "n_prompt": reply["usage"]["prompt_tokens"],
        "score": round(score(METRIC, text, case.answers, ()), 4),
        "decode_ms": None,
        "output": text,
    }


def row(case: FormCase, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Record of a chat; one that the full cache does not answer has its result alone.

    Args:
        case: the chat.
        results: what :func:`ask` gave, first with the full cache.
    """
    assert results[0]["policy"] == FULL
    return {
        "case": case.key,
        "suite": "forms",
        "task": case.form,
        "length": case.length,
        "depth": case.depth,
        "index": case.index,
        "n_prompt": results[0]["n_prompt"],
        "answers": case.answers,
        "metric": METRIC,
        "results": list(results),
    }
