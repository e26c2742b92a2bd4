"""A long chat over a pasted document within a limit: what every turn evaluates, and what going back costs.

    python tests/measure/chat_limit.py MODEL [--turns 40] [--document 4000] [--limit 1024] [--policy auto]

llama-cpp-python's own chat handler renders the whole history at every turn. "New" are the tokens of a prompt behind those that it
shares with what was evaluated by the end of the turn before; no turn should evaluate more than these and 5 %. Afterwards the last
answer is asked for again, the last message is edited, and turns are taken back, as far as checkpoints reach: each should evaluate
its own message alone. MiB of the cells are after the answer, those of checkpoints are host memory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from windowkv_edge import Llama  # before llama_cpp
from windowkv_edge.eval import prose
from windowkv_edge.prompts import n_shared

QUESTIONS = (
    "What is this text about?", "Which people are named in it?", "What happens first?", "What happens last?",
    "Where does it take place?", "Which numbers are in it?", "What surprised you?", "Give one sentence of it.",
    "What is left unsaid?", "How would you call it?", "Who could have written it?", "Say that in other words.",
)  # fmt: skip


class Chat:
    """The conversation, and what its last prompt cost."""

    def __init__(self, llm: Llama, n_reply: int) -> None:
        self.llm, self.n_reply = llm, n_reply
        self.messages: list[Any] = []
        self.prompt: list[int] = []
        self.begins: list[int] = []  # of every turn the tokens in front of its message
        self.copies: list[tuple[float, int]] = []  # ms and bytes of every checkpoint
        own = llm.generate

        def generate(tokens: Any, *args: Any, **kwargs: Any) -> Any:
            self.prompt = list(tokens)
            return own(tokens, *args, **kwargs)

        llm.generate = generate  # type: ignore[method-assign]
        keep = llm._keep_checkpoint

        def timed(*args: Any, **kwargs: Any) -> None:
            start, before = time.process_time(), {id(own) for own in llm._kv_checkpoints.held}
            keep(*args, **kwargs)
            ms = 1e3 * (time.process_time() - start)
            self.copies += [(ms, own.n_bytes) for own in llm._kv_checkpoints.held if id(own) not in before]

        llm._keep_checkpoint = timed  # type: ignore[method-assign]

    def ask(self, messages: list[Any]) -> tuple[int, int]:
        """Have the last message answered: tokens of the prompt, and those that were evaluated."""
        reply: Any = self.llm.create_chat_completion(messages, max_tokens=self.n_reply, temperature=0.0)
        self.messages = [*messages, reply["choices"][0]["message"]]
        return len(self.prompt), self.llm.kv_stats().n_evaluated_last

    def say(self, text: str) -> tuple[int, int, int]:
        """The next message: tokens of the prompt, those that are new, those that were evaluated."""
        known = self.llm.input_ids[: self.llm.n_tokens].copy()
        n, n_evaluated = self.ask([*self.messages, {"role": "user", "content": text}])
        self.begins.append(n_shared(self.prompt, known))
        return n, n - self.begins[-1], n_evaluated

    def back(self, n_turns: int, text: str) -> tuple[int, int]:
        """Another message instead of the last n_turns: its tokens, and those that were evaluated."""
        n, n_evaluated = self.ask([*self.messages[: -2 * n_turns], {"role": "user", "content": text}])
        return n - self.begins[-n_turns], n_evaluated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--document", type=int, default=4000, help="Tokens of the text in the first message.")
    parser.add_argument("--limit", type=int, default=1024)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--reply", type=int, default=32, help="Tokens of a reply.")
    parser.add_argument("--ctx", type=int, default=8192)
    parser.add_argument("--checkpoints", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    threads: dict[str, Any] = {"n_threads": args.threads, "n_threads_batch": args.threads}
    given: dict[str, Any] = {"kv_policy": args.policy, "kv_limit": args.limit, "kv_checkpoints": args.checkpoints}
    llm = Llama(str(args.model), n_ctx=args.ctx, verbose=False, **given, **threads)
    text = llm.detokenize(llm.tokenize(prose(8 * args.document).encode(), add_bos=False)[: args.document])
    chat = Chat(llm, args.reply)
    worst = 0.0
    print("turn  prompt   new  evaluated  MiB live  MiB checkpoints")
    for i in range(args.turns):
        question = QUESTIONS[i % len(QUESTIONS)]
        n, n_new, n_evaluated = chat.say(f"{text.decode('utf-8', 'ignore')}\n\n{question}" if i == 0 else question)
        own = llm.kv_stats()
        mib = own.bytes_live / 2**20, own.bytes_checkpoints / 2**20
        print(f"{i + 1:4} {n:7} {n_new:5} {n_evaluated:10} {mib[0]:9.1f} {mib[1]:9.1f} in {own.n_checkpoints} {own.miss}", flush=True)
        worst = max(worst, n_evaluated / n_new)
    print(f"at most {100 * (worst - 1):.1f} % more than the new tokens; peak {own.bytes_peak / 2**20:.1f} MiB, {own.n_compactions} compactions")
    if chat.copies:
        ms, n_bytes = zip(*chat.copies)
        data = np.zeros(int(np.median(n_bytes)), dtype=np.uint8)
        start = time.process_time()
        for _ in range(20):
            data.copy()
        took = 1e3 * (time.process_time() - start) / 20
        print(
            f"{len(ms)} checkpoints made, {len(data) / 2**20:.1f} MiB and {np.median(ms):.1f} ms of processor time each (medians); "
            f"so many bytes are copied in {took:.1f} ms"
        )

    last = chat.messages[-2]["content"]
    reply = chat.messages[-1]["content"]
    _, n_evaluated = chat.ask(chat.messages[:-1])
    print(f"again: {n_evaluated} evaluated, {'the same' if chat.messages[-1]['content'] == reply else 'another'} answer")
    for n_turns in range(1, min(args.turns, 8)):
        before = list(chat.messages)
        n_new, n_evaluated = chat.back(n_turns, f"In short: {last}")
        print(f"another message {n_turns} turn(s) back: {n_new} tokens, {n_evaluated} evaluated {llm.kv_stats().miss}", flush=True)
        chat.messages = before
        if n_evaluated > n_new:
            break  # the others are read from the beginning, too
    llm.close()


if __name__ == "__main__":
    main()
