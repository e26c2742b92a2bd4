"""How long a prompt takes within a limit, and in stock llama.cpp: the one is linear in its length, the other is not.

    python tests/measure/prefill.py SHAPE [--length 64k] [--limit 4096] [--policy auto] [--depths 9] [--batches 12] [--stock f16]

SHAPE is a model file, or a shape with random weights (`llama-1b`; windowkv_edge/bench/shapes.py). Stock reads one batch at
each of several depths of a cache that was filled with random cells; its time for the whole prompt is the sum of what lies
between. Ours reads a prompt of random tokens until its cells reach the limit, and so many batches more, with their
compactions; what is left of the prompt takes as long as these. Decode: the median of tokens behind `limit` cells in stock,
and behind the prompt in ours. Bytes are those of the K and V pools and of all that lies beside them, at the peak.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from windowkv_edge import Llama  # before llama_cpp

import llama_cpp  # isort: skip
import numpy as np

from windowkv_edge.bench import SHAPES, fetch_shape
from windowkv_edge.bench.session import Model, Session
from windowkv_edge.cli.common import parse_lengths

N_BATCH, N_DECODED = 512, 24


def stock_times(
    model: Model, cells: str, length: int, depths: int, limit: int, threads: int
) -> tuple[list[int], list[float], float, int]:
    """Depths, seconds of a batch behind each, seconds of a token behind ``limit`` cells, bytes of the cache."""
    session = Session(model, length + N_BATCH, cells, None, True, threads, N_BATCH)
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, N_BATCH).tolist()
    memory = llama_cpp.llama_get_memory(session.ctx)
    at = sorted({int(depth) // N_BATCH * N_BATCH for depth in np.linspace(0, length - N_BATCH, depths)})
    seconds = []
    session.decode(tokens)  # reserves its graph
    for depth in at:
        llama_cpp.llama_memory_clear(memory, True)
        if depth > 0:
            session.fill(depth)
        seconds.append(session.decode(tokens))
        print(f"stock, a batch behind {depth:7,}: {seconds[-1]:7.2f} s", flush=True)
    llama_cpp.llama_memory_clear(memory, True)
    session.fill(limit)
    decode = statistics.median(session.decode(tokens[:1]) for _ in range(N_DECODED))
    n_bytes = int(session.kv.stats().bytes_live) * length // (length + N_BATCH)
    session.close()
    return at, seconds, decode, n_bytes


def our_times(path: Path, length: int, limit: int, policy: str, batches: int, threads: int) -> tuple[float, float, int, int]:
    """Seconds of the whole prompt, of a token behind it, bytes at the peak, and the tokens that were read for that."""
    n_read = min(length, limit + batches * N_BATCH)
    ends: list[tuple[int, float]] = []
    llm = Llama(
        str(path), kv_policy=policy, kv_limit=limit, n_ctx=length + N_BATCH, n_batch=N_BATCH, n_threads=threads,
        n_threads_batch=threads, kv_progress=lambda done, total: ends.append((done, time.perf_counter())), verbose=False,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, llm.n_vocab(), n_read).tolist()
    start = time.perf_counter()
    stream = llm.generate(tokens, temp=0.0)
    next(stream)
    last = time.perf_counter()
    ends.insert(0, (0, start))
    for (before, then), (done, now) in zip(ends, ends[1:], strict=False):
        print(f"ours, {done - before} tokens behind {before:7,}: {now - then:7.2f} s", flush=True)
    total = last - start
    if n_read < length:
        # as what was read with compactions
        first = next(i for i, (done, _) in enumerate(ends) if done >= limit + N_BATCH)
        total += (ends[-1][1] - ends[first][1]) / (ends[-1][0] - ends[first][0]) * (length - n_read)
    times = []
    for _ in range(N_DECODED):
        start = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - start)
    stream.close()
    n_bytes = llm.kv_stats().bytes_peak
    llm.close()
    return total, statistics.median(times), n_bytes, n_read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--length", default="64k")
    parser.add_argument("--limit", default="4096")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--depths", type=int, default=9, help="where stock reads a batch")
    parser.add_argument("--batches", type=int, default=12, help="that ours reads with compactions")
    parser.add_argument("--stock", default="f16", choices=("f16", "q8_0", "q4_0"), help="cells of stock")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    (length,), (limit,) = parse_lengths(args.length, "--length"), parse_lengths(args.limit, "--limit")
    if length < limit + 2 * N_BATCH or args.depths < 2 or args.batches < 2:
        raise SystemExit(f"--length is {length}, expected at least --limit and two batches ({limit + 2 * N_BATCH})")
    path = fetch_shape(args.shape) if args.shape in SHAPES else Path(args.shape)

    model = Model(path)
    at, seconds, stock_decode, stock_bytes = stock_times(model, args.stock, length, args.depths, limit, args.threads)
    model.close()
    stock = float(np.interp(np.arange(0, length, N_BATCH), at, seconds).sum())
    ours, our_decode, our_bytes, n_read = our_times(path, length, limit, args.policy, args.batches, args.threads)

    print(f"\n{args.shape}, {length:,} tokens, limit {limit:,}, {args.policy}, {args.threads} threads; ours read {n_read:,}")
    print(f"| | stock, {args.stock} | ours | |")
    print("| --- | --- | --- | --- |")
    print(f"| prompt, s | {stock:.0f} | {ours:.0f} | {stock / ours:.2f} x faster |")
    print(f"| token behind {limit:,} cells, ms | {1e3 * stock_decode:.1f} | {1e3 * our_decode:.1f} | "
          f"{stock_decode / our_decode:.2f} x faster |")  # fmt: skip
    print(f"| KV at the peak, MiB | {stock_bytes / 2**20:.1f} | {our_bytes / 2**20:.1f} | 1/{stock_bytes / our_bytes:.1f} |")


if __name__ == "__main__":
    main()
