"""What it costs to have the model repeat what it has read (``kvzip``): seconds of a prompt, of its replay, and their ratio.

    python tests/measure/replay.py MODEL [--lengths 1000,4000] [--rounds 3] [--threads 2] [--cells f16]

Every round reads a text with the full cache in batches of 512, and repeats each of them before the next, as a session does with a
prompt that will be compacted. Medians; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from windowkv_edge.policies import get_policy  # before llama_cpp

import llama_cpp  # isort: skip

from windowkv_edge.bench.session import Model, Session
from windowkv_edge.eval.sources import hay_tokens
from windowkv_edge.replay import n_end

N_BATCH = 512


def seconds_of(session: Session, tokens: list[int]) -> tuple[float, float]:
    """Of the prompt, and of its replay."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(session.ctx), True)
    session.kv.reserve(len(tokens))
    assert session.cache is not None
    n = n_end(session.cache.bound, len(tokens) // 8)
    read = repeated = 0.0
    for i in range(0, len(tokens), N_BATCH):
        read += session.decode(tokens[i : i + N_BATCH])
        repeated += session.replay(tokens, min(i + N_BATCH, len(tokens) - n))
    return read, repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", default="1000,4000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", default="f16")
    args = parser.parse_args()
    model = Model(Path(args.model))
    print("tokens  prompt  replay  ratio   tokens/s of the prompt")
    for n in map(int, args.lengths.split(",")):
        tokens = hay_tokens(model, None, n, 0)[:n]
        session = Session(model, n + 512, args.cells, get_policy("kvzip"), True, args.threads, N_BATCH)
        found = [seconds_of(session, tokens) for _ in range(args.rounds)]
        session.close()
        read, repeated = (statistics.median(times) for times in zip(*found, strict=True))
        print(f"{n:6d}  {read:6.2f}  {repeated:6.2f}  {repeated / read:5.2f}   {n / read:.0f}", flush=True)


if __name__ == "__main__":
    main()
