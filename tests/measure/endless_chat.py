"""A chat of many times its context, whose history llama-cpp-python's own handler renders anew at every turn.

    python tests/measure/endless_chat.py MODEL [--ctx 1024] [--times 10] [--policy auto] [--budget 0.5] [--limit N]
                                               [--threads 1]

The system prompt holds a fact, and is pinned. At every turn something is told and asked, and the model answers. Printed
are, of quarters of the chat, the tokens that a turn brought and those that it evaluated, bytes of the cells and of the
process; then whether the fact is still answered. Fails if a turn evaluates anything twice, or ends with an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import psutil

from windowkv_edge import Llama  # before llama_cpp
from windowkv_edge.cli.common import open_model

CODE = "7319"
SYSTEM = f"You are a helpful assistant. The secret code is {CODE}. If somebody asks for the secret code, answer {CODE}."
TOPICS = ("rivers", "bridges", "clocks", "apples", "ships", "mountains", "letters", "gardens", "trains", "candles", "maps")
ASKS = "What is the secret code?"


class _Rendered(Exception):
    pass


def prompt(llm: Llama, messages: list[dict[str, str]]) -> list[int]:
    """Tokens that the handler makes of the messages."""

    def stop(prompt: list[int], **_: Any) -> None:
        raise _Rendered(prompt)

    own: Any = llm.create_completion
    llm.create_completion = stop  # type: ignore[method-assign, assignment]
    try:
        llm.create_chat_completion(messages)
    except _Rendered as rendered:
        return list(rendered.args[0])
    finally:
        llm.create_completion = own  # type: ignore[method-assign]
    raise SystemExit("the chat handler completes nothing")


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Talk:
    """A chat and what the session read of it."""

    def __init__(self, llm: Llama) -> None:
        self.llm = llm
        self.messages = [{"role": "system", "content": SYSTEM}]
        self.read: list[int] = []  # every token that was evaluated of what the last turns rendered

    def say(self, text: str, n_answer: int) -> tuple[str, int, int]:
        """The answer, the tokens that are new, and those that were evaluated for the prompt."""
        self.messages.append({"role": "user", "content": text})
        rendered = prompt(self.llm, self.messages)
        n_new = len(rendered) - common(rendered, self.read)
        out: Any = self.llm.create_chat_completion(self.messages, max_tokens=n_answer, temperature=0.0)
        answer = out["choices"][0]["message"]
        self.messages.append({"role": "assistant", "content": answer["content"]})
        stats = self.llm.kv_stats()
        # what the session holds at its end is what it read last; the token that ended the answer was not evaluated
        n_behind = self.llm.n_tokens + stats.n_shifted - len(rendered)
        self.read = [*rendered, *self.llm.input_ids[self.llm.n_tokens - n_behind : self.llm.n_tokens].tolist()]
        return answer["content"], n_new, stats.n_evaluated_last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    llm = Llama(
        str(open_model(args.model).path), n_ctx=args.ctx, kv_policy=args.policy, kv_budget=args.budget,
        kv_limit=args.limit, kv_shift="shift", n_threads=args.threads, n_threads_batch=args.threads, verbose=False,
    )  # fmt: skip
    talk, process = Talk(llm), psutil.Process()
    n_total, rows = int(args.times * args.ctx), []
    print(f"{'positions':>10} {'turns':>6} {'new':>5} {'evaluated':>9} {'MiB cells':>9} {'MiB process':>11}")
    quarter, n_turns = 1, 0
    n_new = n_evaluated = 0
    while (seen := llm.n_tokens + llm.kv_stats().n_shifted) < n_total:
        topic = TOPICS[n_turns % len(TOPICS)]
        _, new, evaluated = talk.say(f"Number {n_turns}: I have been thinking about {topic}. What do you like about them?", 48)
        if evaluated > new:
            raise SystemExit(f"turn {n_turns}: {evaluated} tokens evaluated for {new} new ones ({llm.kv_stats().miss})")
        n_turns, n_new, n_evaluated = n_turns + 1, n_new + new, n_evaluated + evaluated
        if seen >= quarter * n_total / 8:
            stats = llm.kv_stats()
            rows.append((stats.bytes_live, process.memory_info().rss))
            print(
                f"{seen:10,} {n_turns:6} {n_new:5} {n_evaluated:9} {stats.bytes_live / 2**20:9.2f} "
                f"{process.memory_info().rss / 2**20:11.1f}"
            )
            quarter, n_new, n_evaluated = quarter + 1, 0, 0
    answer, new, evaluated = talk.say(ASKS, 24)
    print(f"{ASKS} {answer!r}: {'right' if CODE in answer else 'wrong'}; {evaluated} of {new} new tokens evaluated")
    stats = llm.kv_stats()
    print(f"{n_turns + 1} turns, {stats.n_shifted:,} positions given up, peak {stats.bytes_peak / 2**20:.2f} MiB of cells")


if __name__ == "__main__":
    main()
