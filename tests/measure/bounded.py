"""Prompts that are read within a limit, beside those that are read with the full cache and compacted to it afterwards.

    python tests/measure/bounded.py MODEL [--length 7500] [--limit 1024] [--policy auto] [--count 1] [--depths 0.1,0.5,0.9]

Needles (windowkv_edge/eval/README.md) of every kind at every depth. `full` keeps all cells, `exact` compacts after the
prompt, `bounded` while it is read, `unasked` likewise but without the end of the prompt as observer (the prompt comes in
pieces, evaluated by hand). Only needles that `full` answers count. Cells are the most that were held at any time, per
head on average; seconds are those of the prompt, its compactions included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windowkv_edge import Llama, _native  # before llama_cpp
from windowkv_edge.bench.session import Model
from windowkv_edge.eval import prose
from windowkv_edge.eval.needle import KINDS, needle_cases
from windowkv_edge.eval.style import Style

N_ANSWER = 16


@dataclass
class Tally:
    """What one way of reading gave."""

    n_right: int = 0
    n_cells: float = 0.0
    seconds: list[float] = field(default_factory=list)


def read(llm: Llama, prompt: Sequence[int], in_pieces: bool) -> tuple[list[int], float, float]:
    """The first tokens of the answer, the most cells, the seconds of the prompt."""
    most, decode, context = [0.0], llm._ctx.decode, _native.Context(llm.ctx)

    def watched(batch: Any) -> None:
        decode(batch)
        most[0] = max(most[0], float(context.cells().mean()))

    llm.reset()
    llm._ctx.decode = watched  # type: ignore[method-assign]
    start = time.perf_counter()
    if in_pieces:
        for i in range(0, len(prompt), llm.n_batch):
            llm.eval(prompt[i : i + llm.n_batch])
        stream = llm.generate([], reset=False, temp=0.0)
        out = [llm.sample(temp=0.0)]
        seconds = time.perf_counter() - start
        stream.close()
        while len(out) < N_ANSWER:
            llm.eval(out[-1:])
            out.append(llm.sample(temp=0.0))
    else:
        stream = llm.generate(prompt, temp=0.0)
        out = [next(stream)]
        seconds = time.perf_counter() - start
        out += [next(stream) for _ in range(N_ANSWER - 1)]
        stream.close()
    llm._ctx.decode = decode  # type: ignore[method-assign]
    return out, most[0], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=7500)
    parser.add_argument("--limit", type=int, default=1024)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--depths", default="0.1,0.5,0.9")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    model = Model(args.model)
    hay = model.tokenize(prose(8 * args.length))[: args.length]
    depths = [float(depth) for depth in args.depths.split(",")]
    cases = list(needle_cases(Style(model), hay, [args.length], depths, args.kinds.split(","), args.count, 0, 1))
    model.close()

    n_ctx = max(len(case.prompt) for case in cases) + N_ANSWER
    common: dict[str, Any] = {"n_ctx": n_ctx, "n_threads": args.threads, "n_threads_batch": args.threads, "verbose": False}
    limited: dict[str, Any] = {"kv_policy": args.policy, "kv_limit": args.limit, **common}
    ways: dict[str, dict[str, Any]] = {
        "full": {"kv_policy": "full", **common},
        "exact": {"kv_prefill": "exact", **limited},
        "bounded": limited,
        "unasked": limited,
    }
    tallies = {way: Tally() for way in ways}
    n_counted = 0
    for case in cases:
        rights = []
        for way, kwargs in ways.items():
            llm = Llama(str(args.model), **kwargs)
            out, n_cells, seconds = read(llm, list(case.prompt), way == "unasked")
            text = llm.detokenize(out).decode("utf-8", "ignore")
            llm.close()
            rights.append(all(answer in text for answer in case.answers))
            tallies[way].n_cells = max(tallies[way].n_cells, n_cells)
            tallies[way].seconds.append(seconds)
            if not rights[0]:
                break
        if rights[0]:
            n_counted += 1
            for way, right in zip(ways, rights, strict=True):
                tallies[way].n_right += right
        print(case.key, dict(zip(ways, rights, strict=False)), flush=True)
    print(f"\n{args.policy}, {args.length} tokens, limit {args.limit}: {n_counted} of {len(cases)} needles that full answers")
    for way, own in tallies.items():
        mean = sum(own.seconds) / max(1, len(own.seconds))
        print(f"{way:8} {own.n_right:3} right, {own.n_cells:7.0f} cells at most, {mean:6.1f} s a prompt")


if __name__ == "__main__":
    main()
