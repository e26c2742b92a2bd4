"""Questions about one document, one after the other in one session, as a chat asks them.

    python tests/measure/chat_turns.py MODEL [--policies auto,headkv-r2,stock] [--budgets 0.12,0.25] [--growth 1,1.5] [--query auto]

The documents and facts of `windowkv-edge eval turns`. Every question comes behind the answers that the session gave to
those before it. Counted are the questions from the second on, all and those that stock llama.cpp answers; then the
compactions and the evaluated tokens of a document, and the most cells per head that were held when an answer began.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from windowkv_edge import Llama  # before llama_cpp
from windowkv_edge.bench.session import Model
from windowkv_edge.eval.metrics import score
from windowkv_edge.eval.needle import N_ANSWER
from windowkv_edge.eval.sources import hay_tokens
from windowkv_edge.eval.style import Style
from windowkv_edge.eval.turns import turns_cases
from windowkv_edge.replay import N_ROOM

Chat = list[tuple[list[int], tuple[str, ...]]]
"""Tokens of each question, behind the document or the last answer, and what its answer has to contain."""


def chats(model: Model, args: argparse.Namespace) -> list[Chat]:
    style = Style(model)
    hay = hay_tokens(model, args.haystack, args.length, args.seed)
    res: list[Chat] = []
    for case in turns_cases(style, hay, [args.length], args.count, args.questions, args.seed):
        if case.task == "first":
            res.append([(list(case.prompt), case.answers)])
            said = len(style.tokenize(f" {case.answers[0]}."))
        elif case.task == "later":
            res[-1].append((list(case.follow_up[said:]), case.answers))
    return res


def run(llm: Llama, chat: Chat) -> tuple[list[bool], float]:
    """Which answers were right, and the most cells that were held when one began."""
    llm.reset()
    history: list[int] = []
    right: list[bool] = []
    most = 0.0
    for question, answers in chat:
        history += question
        got: list[int] = []
        stream = llm.generate(history, temp=0.0)
        for token in stream:
            if not got:
                most = max(most, float(llm.kv_stats().cells.mean()))
            if token == llm.token_eos() or b"\n" in llm.detokenize([token]) or len(got) == N_ANSWER:
                break
            got.append(token)
        stream.close()
        history += got
        right.append(score("contains_all", llm.detokenize(got).decode("utf-8", "replace"), answers, ()) == 1)
    return right, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--policies", default="auto,headkv-r2")
    parser.add_argument("--budgets", default="0.12,0.25")
    parser.add_argument("--growth", default="1,1.5")
    parser.add_argument("--query", default="auto", help="kv_query; here auto is last, as prompts are no chat's.")
    parser.add_argument("--length", type=int, default=1200, help="Tokens of a document without its facts.")
    parser.add_argument("--count", type=int, default=3, help="Documents.")
    parser.add_argument("--questions", type=int, default=10, help="Per document.")
    parser.add_argument("--haystack", type=Path, help="A text; default: generated prose.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    model = Model(args.model)
    all_chats = chats(model, args)
    model.close()
    print(f"{len(all_chats)} documents, the first prompts: {[len(chat[0][0]) for chat in all_chats]} tokens")

    variants: list[dict[str, object]] = [{}]
    for policy in filter(None, args.policies.split(",")):
        for budget in args.budgets.split(","):
            variants += [
                {"kv_policy": policy, "kv_budget": float(budget), "kv_growth": float(growth), "kv_query": args.query}
                for growth in args.growth.split(",")
            ]
    known: list[bool] = []  # which later questions stock answers
    for kwargs in variants:
        n_ctx = max(sum(len(tokens) + N_ANSWER for tokens, _ in chat) for chat in all_chats) + N_ROOM
        threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
        llm = Llama(str(args.model), n_ctx=n_ctx, verbose=False, **threads, **kwargs)  # type: ignore[arg-type]
        rows: Sequence[tuple[list[bool], float]] = [run(llm, chat) for chat in all_chats]
        later = [one for right, _ in rows for one in right[1:]]
        known = known or later
        both = sum(a and b for a, b in zip(later, known, strict=True))
        stats, n = llm.kv_stats(), len(rows)
        print(
            f"{kwargs or 'stock'}: first {sum(right[0] for right, _ in rows)} of {n}, later {sum(later)} of {len(later)}, "
            f"of those that stock answers {both} of {sum(known)}; per document {stats.n_compactions / n:.1f} compactions, {stats.n_evaluated / n:.0f} tokens evaluated, "
            f"at most {max(most for _, most in rows):.0f} cells per head",
            flush=True,
        )
        llm.close()


if __name__ == "__main__":
    main()
