"""How well a text is read within a limit: the next tokens that a model expects in it, against those that it expects with the full cache.

    python tests/measure/reading.py MODEL [--length 3700] [--limit 512] [--batch 256] [--last 1600] [--ways WAY ...]

The text and the ways are those of bounded.py, but for what a way may say of the needle or of its question (observers=end or none, as many as
the policy asks for). One needle is in it, whose question observes. KL is the mean divergence of the next token's
distribution from the full cache's over the text's last tokens, nll what the right token loses. The text is made of phrases that come
again, so that much of it can be copied from what was read, by a model that still has it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from bounded import Reader, Tally, Way

from windowkv_edge.bench.distributions import divergence, log_softmax
from windowkv_edge.bench.session import Model
from windowkv_edge.eval import prose
from windowkv_edge.eval.case import place
from windowkv_edge.eval.needle import make_needle
from windowkv_edge.eval.style import Style

HERE = ("observers", "target", "scores", "step", "recent", "first", "middle")
"""What a way may say here."""


def read(
    reader: Reader, body: list[int], ask: list[int], n_last: int, way: Way | None
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Read the body; of its last tokens the position and the logits [n, n_vocab] of each step. Without a way nothing is evicted."""
    reader.clear()
    if way is None:
        reader.kv.reserve(len(body))
    prompt, i, first = body + ask, 0, len(body) - n_last
    tally = Tally()
    asks = [] if way is None or way.observers == "none" else prompt[-reader.n_observed :]
    while i < len(body):
        n = reader.batch
        if way is not None:
            n, n_cells = reader.next_step(i, len(prompt), len(asks), way)
            if n_cells is not None:
                reader.compact_between(n_cells, asks, None, way, tally)
        n = min(n, (len(body) if i >= first else first) - i)
        if i >= first:
            yield i, reader.session.decode_all(body[i : i + n])
        else:
            reader.session.decode(body[i : i + n])
        i += n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=3700)
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--last", type=int, default=1600)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--cells", help="type of the cells; default: what the policy prefers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--ways", nargs="*", default=["", "observers=none", "middle=streamingllm"])
    args = parser.parse_args()
    ways = [Way.parse(text) for text in args.ways]
    for text, way in zip(args.ways, ways, strict=True):
        if way.observers not in ("end", "none") or replace(way, **{name: getattr(Way, name) for name in HERE}) != Way():
            raise SystemExit(f"--ways has {text!r}, expected observers=end, observers=none and {', '.join(HERE[1:])} alone")

    model = Model(args.model, args.gpu_layers)
    style, needle = Style(model, False), make_needle("word", 1)
    hay = model.tokenize(prose(8 * args.length))[: args.length]
    body = style.head + place(hay, [(0.3, style.tokenize(f"\n{needle.sentences[0]}\n"))])
    ask, n_last = style.ask(needle.question, needle.lead), min(args.last, len(body))
    policies = list(dict.fromkeys([args.policy, *(way.middle for way in ways if way.middle)]))
    reader = Reader(model, policies, len(body) + 512, args.limit, args.batch, args.cells, args.threads)

    def nll(i: int, logits: npt.NDArray[np.float32]) -> list[float]:
        right = body[i + 1 : i + 1 + len(logits)]
        return [float(-row[token]) for row, token in zip(log_softmax(logits), right, strict=False)]

    full = np.zeros((n_last, model.n_vocab), dtype=np.float16)
    of_full: list[float] = []
    for i, logits in read(reader, body, ask, n_last, None):
        full[i + n_last - len(body) :][: len(logits)] = logits
        of_full += nll(i, logits)
    print(f"{args.policy}, {args.length} tokens, limit {args.limit}, batches of {args.batch}: nll {np.mean(of_full):.3f} with the full cache\n")
    print("| way | KL | nll + | s |\n| --- | --- | --- | --- |")
    for text, way in zip(args.ways, ways, strict=True):
        start, kl, own = time.perf_counter(), [], []
        for i, logits in read(reader, body, ask, n_last, way):
            kl += divergence(log_softmax(full[i + n_last - len(body) :][: len(logits)]), log_softmax(logits)).tolist()
            own += nll(i, logits)
        seconds = time.perf_counter() - start
        print(f"| {text or 'as sessions do'} | {np.mean(kl):.3f} | {np.mean(own) - np.mean(of_full):.3f} | {seconds:.0f} |", flush=True)
    reader.close()
    model.close()


if __name__ == "__main__":
    main()
