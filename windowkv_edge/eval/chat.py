"""Conversations: facts told and documents pasted along the way, and questions about all of it, some turns later.

A conversation goes on with the session's own replies, as a chat does, so that a policy also lives with what it said.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .case import EvalError, place
from .metrics import score
from .needle import N_ANSWER, Needle, different_needles
from .run import FULL
from .style import Style

__all__ = ["MIN_TURNS", "Conversation", "Replies", "Turn", "conversations", "rows"]

KINDS = ("number", "word", "phrase", "paraphrased")
PASTED, TOLD = 0.15, 0.2  # shares of the turns
MIN_TURNS, MAX_TURNS = 4, 64
N_REPLY = 12  # tokens of a reply that nobody scores
METRIC = "contains_all"


@dataclass(frozen=True)
class Turn:
    """A message of the user.

    Attributes:
        tokens: of the message, behind the last token of the reply before it, with the beginning of the reply.
        answers: what the reply has to contain, all of them; empty if nothing is asked.
        task: how what is asked became known: "told" or "pasted".
        ago: turns since then.
    """

    tokens: Sequence[int]
    answers: tuple[str, ...] = ()
    task: str = ""
    ago: int = 0


@dataclass(frozen=True)
class Conversation:
    """Its turns, and its number."""

    index: int
    turns: Sequence[Turn]

    def key(self, at: int) -> str:
        """Of the question in turn ``at``."""
        return f"chat/{self.turns[at].task}/{len(self.turns)}/{self.depth(at):g}/{self.index}.{at}"

    def depth(self, at: int) -> float:
        """Share of the conversation between a question and what it is about, in quarters."""
        return math.ceil(4 * self.turns[at].ago / len(self.turns)) / 4

    @property
    def questions(self) -> list[int]:
        return [at for at, turn in enumerate(self.turns) if turn.answers]

    @property
    def n_positions(self) -> int:
        """At most, with all replies."""
        return sum(len(turn.tokens) + N_ANSWER for turn in self.turns)


def conversations(
    style: Style, hay: Sequence[int], n_turns: int, count: int, document: int, seed: int, first: int = 0
) -> Iterator[Conversation]:
    """Conversations of n_turns turns.

    The first turn pastes a document. Of the others, in random order, about 15 % paste another one, 20 % tell a fact,
    and the rest ask about a fact that nobody has asked about yet.

    Args:
        style: of the prompts.
        hay: tokens, ``document`` at least; each document is a part of it.
        n_turns: MIN_TURNS to 64.
        count: conversations.
        document: tokens of a document without its facts.
        seed: of facts, order and places.
        first: number of the first conversation.

    Raises:
        EvalError: ``n_turns`` is out of range.
    """
    if not MIN_TURNS <= n_turns <= MAX_TURNS:
        raise EvalError(f"a conversation of {n_turns} turns, expected {MIN_TURNS} to {MAX_TURNS}")
    n_paste, n_tell = max(1, round(PASTED * n_turns)), max(1, round(TOLD * n_turns))
    n_ask = n_turns - n_paste - n_tell
    n_each = -(-max(1, n_ask - n_tell) // n_paste)  # facts of a document
    for index in range(first, first + count):
        rng = random.Random(f"{seed}/chat/{n_turns}/{index}")
        facts = _facts(n_paste * n_each + n_tell, index, seed)
        todo = ["paste"] * (n_paste - 1) + ["tell"] * n_tell + ["ask"] * n_ask
        rng.shuffle(todo)
        known: list[tuple[Needle, str, int]] = []
        turns: list[Turn] = []
        while len(turns) < n_turns:
            at = len(turns)
            # nothing can be asked that is not known
            kind = "paste" if at == 0 else todo.pop(next(i for i, own in enumerate(todo) if own != "ask" or known))
            if kind == "ask":
                needle, task, since = known.pop(rng.randrange(len(known)))
                tokens = style.say(needle.question, needle.lead)
                turns.append(Turn(tokens, needle.answers, task, at - since))
            elif kind == "tell":
                needle = facts.pop()
                known.append((needle, "told", at))
                turns.append(Turn(style.say(f"Please remember this: {needle.sentences[0]}")))
            else:
                own = [facts.pop() for _ in range(n_each)]
                known += [(needle, "pasted", at) for needle in own]
                lines = [(rng.random(), style.tokenize(f"\n{needle.sentences[0]}\n")) for needle in own]
                start = rng.randrange(max(1, len(hay) - document))
                text = style.model.detokenize(place(hay[start : start + document], lines))
                turns.append(Turn(style.say(f"Please read this.\n\n{text}", first=at == 0)))
        yield Conversation(index, turns)


def _facts(n: int, index: int, seed: int) -> list[Needle]:
    """Facts with different questions."""
    res = different_needles(KINDS, range(1000 * index, 1000 * index + 999), n, seed)
    if len(res) < n:
        raise EvalError(f"there are {len(res)} facts, expected {n}; ask for fewer turns")
    return res


class Replies:
    """A session that holds conversations.

    Args:
        llm: a :class:`windowkv_edge.Llama`.
        about: what its results say of it: policy, budget and cells.
    """

    def __init__(self, llm: Any, about: dict[str, Any]) -> None:
        self.llm, self.about = llm, about

    def hold(self, conversation: Conversation) -> dict[int, dict[str, Any]]:
        """Results by turn, of those that ask something."""
        self.llm.reset()
        history: list[int] = []
        res: dict[int, dict[str, Any]] = {}
        for at, turn in enumerate(conversation.turns):
            history += turn.tokens
            got, cells, times = self._reply(history, N_ANSWER if turn.answers else N_REPLY)
            history += got
            if turn.answers:
                text = self.llm.detokenize(got).decode("utf-8", "replace")
                res[at] = {
                    **self.about,
                    **cells,
                    "score": round(score(METRIC, text, turn.answers, ()), 4),
                    "decode_ms": 1e3 * sum(times) / len(times) if times else None,
                    "n_evaluated": self.llm.kv_stats().n_evaluated_last,
                    "output": text,
                }
        return res

    def _reply(self, history: list[int], n: int) -> tuple[list[int], dict[str, Any], list[float]]:
        """Greedy tokens up to the end of the reply, what the cache held when it began, and the seconds of each but the
        first."""
        got: list[int] = []
        times: list[float] = []
        cells: dict[str, Any] = {}
        stream = self.llm.generate(history, temp=0.0)
        vocab = self.llm._model.vocab
        try:
            start = time.perf_counter()
            for token in stream:
                if not cells:
                    stats = self.llm.kv_stats()
                    n_bytes = stats.bytes_full if stats.policy == "stock" else stats.bytes_live
                    cells = {"n_cells": float(stats.cells.mean()), "kv_bytes": n_bytes}
                else:
                    times.append(time.perf_counter() - start)
                is_over = _is_end(vocab, token) or b"\n" in self.llm.detokenize([token])
                if is_over or len(got) == n:
                    break
                got.append(token)
                start = time.perf_counter()
        finally:
            stream.close()
        return got, cells, times


def _is_end(vocab: Any, token: int) -> bool:
    import llama_cpp

    return bool(llama_cpp.llama_vocab_is_eog(vocab, token))


def rows(conversation: Conversation, found: Sequence[dict[int, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Records of the questions; one that the full cache does not answer has its result alone.

    Args:
        conversation: the conversation.
        found: what :meth:`Replies.hold` gave, first with the full cache.
    """
    for at in conversation.questions:
        turn, results = conversation.turns[at], [own[at] for own in found]
        assert results[0]["policy"] == FULL
        yield {
            "case": conversation.key(at),
            "suite": "chat",
            "task": turn.task,
            "length": len(conversation.turns),
            "depth": conversation.depth(at),
            "index": conversation.index,
            "answers": turn.answers,
            "metric": METRIC,
            "results": results if results[0]["score"] > 0 else results[:1],
        }
