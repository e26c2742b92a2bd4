"""What a long answer still knows of the document: the likelihood of the right answer behind a thought of some hundred tokens.

    python tests/measure/thinking.py MODEL [--length 1500] [--limit 384] [--thought 500] [--policies auto,windowkv]

Needles (windowkv_edge/eval/README.md) are hidden in a text, a chat's message asks for one behind it, and then a thought is evaluated token by token,
as if the model had generated it: text that has nothing to do with the question. Behind it stand the question and the beginning of its answer; "nll" is the mean negative
log-likelihood of a token of the right one. The full cache is first; each policy is measured as sessions do it, where the question's last tokens
observe again in every compaction, and without that. "ms" is the time of a token of the thought, compactions included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from windowkv_edge import Llama  # before llama_cpp

import llama_cpp  # isort: skip
import numpy as np

from windowkv_edge.bench.distributions import log_softmax
from windowkv_edge.cli.common import open_model
from windowkv_edge.eval import prose
from windowkv_edge.eval.case import place
from windowkv_edge.eval.needle import Needle, make_needle


def nll(llm: Llama, tokens: Sequence[int]) -> float:
    """Of these tokens behind what was evaluated, the mean."""
    res = []
    for token in tokens:
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(1, llm.n_vocab()))
        res.append(float(-log_softmax(row)[0, token]))
        llm.eval([token])
    return float(np.mean(res))


def read(llm: Llama, body: str, thought: list[int], needle: Needle, asks: bool) -> tuple[float, float]:
    """The nll of the right answer, and seconds for a token of the thought."""
    llm.reset()
    llm.create_chat_completion([{"role": "user", "content": f"{body}\n{needle.question}"}], max_tokens=1, temperature=0.0)
    if not asks:
        llm._kv_asks = []
    start = time.perf_counter()
    for token in thought:
        llm.eval([token])
    seconds = time.perf_counter() - start
    lead = f"\n\nNow the question: {needle.question} {needle.lead}"
    for token in llm.tokenize(lead.encode(), add_bos=False):
        llm.eval([token])
    return nll(llm, llm.tokenize(f" {needle.answers[0]}".encode(), add_bos=False)), seconds / len(thought)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a file, or smollm2")
    parser.add_argument("--length", type=int, default=1500)
    parser.add_argument("--limit", type=int, default=384)
    parser.add_argument("--thought", type=int, default=500)
    parser.add_argument("--policies", default="auto,windowkv,snapkv")
    parser.add_argument("--kinds", default="number,word,multi-key")
    parser.add_argument("--depths", default="0.2,0.6")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    print("| policy | question observes | nll | " + args.kinds.replace(",", " | ") + " | ms |\n" + "| --- " * (4 + args.kinds.count(",") + 1) + "|")
    for policy in ["full", *args.policies.split(",")]:
        limits = {} if policy == "full" else {"kv_limit": args.limit}
        llm = Llama(
            str(open_model(args.model).path), n_ctx=args.length + args.thought + 512, kv_policy=policy, verbose=False, n_threads=args.threads,
            n_threads_batch=args.threads, **limits,
        )  # fmt: skip
        text = llm.tokenize(prose(8 * (args.length + args.thought)).encode(), add_bos=False)
        hay, thought = text[: args.length], text[args.length : args.length + args.thought]
        for asks in (True,) if policy == "full" else (True, False):
            found: dict[str, list[float]] = {}
            times = []
            for kind in args.kinds.split(","):
                for depth in map(float, args.depths.split(",")):
                    for index in range(1, args.count + 1):
                        needle = make_needle(kind, index)
                        lines = [llm.tokenize(f"\n{line}\n".encode(), add_bos=False) for line in needle.sentences]
                        others = [(0.1 + 0.8 * i / len(lines), line) for i, line in enumerate(lines[1:], 1)]
                        body = llm.detokenize(place(hay, [(depth, lines[0]), *others])).decode("utf-8", "ignore")
                        value, seconds = read(llm, body, thought, needle, asks)
                        found.setdefault(kind, []).append(value)
                        times.append(seconds)
            values = [float(np.mean(own)) for own in found.values()]
            cells = " | ".join(f"{value:.2f}" for value in [float(np.mean(values)), *values])
            said = "" if policy == "full" else "yes" if asks else "no"
            print(f"| {policy} | {said} | {cells} | {1000 * float(np.mean(times)):.1f} |", flush=True)
        llm.close()


if __name__ == "__main__":
    main()
