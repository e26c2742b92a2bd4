"""What a compaction takes: time by step, and memory at its peak.

    python tests/measure/compaction.py MODEL [--lengths 4k,32k] [--policies auto,windowkv,headkv-r2,adakv]
        [--budget 0.12] [--threads 2] [--rounds 3] [--prefill]

MODEL is a name or file as for `windowkv-edge bench`. Caches are filled with random cells, or with an evaluated prompt
(--prefill, whose seconds are then printed beside). Times are medians. Bytes are what live buffers reached during the
compaction beyond what they were before, cells are those of all heads. `cpu` is the time of all threads together, which
a busy machine makes longer by less than the others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from windowkv_edge.bench.run import CHUNK, Bench, Plan  # before llama_cpp

import llama_cpp
from windowkv_edge.bench.session import Model, Session
from windowkv_edge.bench.shapes import SHAPES, fetch_shape
from windowkv_edge.cli.common import open_model, parse_lengths, parse_policies
from windowkv_edge.gguf_info import read_info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", default="4k")
    parser.add_argument("--policies", default="auto,windowkv,headkv-r2,adakv")
    parser.add_argument("--budget", type=float, default=0.12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", action="store_true")
    args = parser.parse_args()

    info = read_info(fetch_shape(args.model)) if args.model in SHAPES else open_model(args.model)
    model = Model(info.path)
    lengths = parse_lengths(args.lengths)
    plan = Plan(tuple(lengths), parse_policies(args.policies), (args.budget,), threads=args.threads)
    bench = Bench(model, info, plan, is_random=args.model in SHAPES)

    print(
        f"{'positions':>9} {'policy':<16} {'score':>8} {'select':>8} {'gather':>8} {'all':>8} {'cpu':>8} ms {'bytes/cell':>10}"
    )
    for length in lengths:
        for name, policy in bench.policies.items():
            cells = policy.cells or "f16"
            session = Session(model, length + 1, cells, policy, True, args.threads, CHUNK)
            found, seconds = [], []
            for _ in range(args.rounds):
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(session.ctx), True)
                session.kv.reserve(length)
                if args.prefill:
                    tokens = [bench.tokens[i % len(bench.tokens)] for i in range(length)]
                    seconds.append(sum(session.decode(tokens[i : i + CHUNK]) for i in range(0, length, CHUNK)))
                else:
                    session.fill(length)
                before = session.kv.stats()
                n_cells = int(session.kv.cells().sum())
                start = time.process_time()
                session.compact(args.budget)
                cpu = 1000 * (time.process_time() - start)
                after = session.kv.stats()
                # the peak is that of the compaction if it exceeds what was live before it
                peak = after.bytes_peak - before.bytes_live
                found.append((after.t_score_ms, after.t_select_ms, after.t_gather_ms, cpu, peak / n_cells))
            session.close()
            score, select, gather, cpu, peak = (statistics.median(x) for x in zip(*found, strict=True))
            whole = statistics.median(sum(x[:3]) for x in found)
            line = f"{length:>9,} {name:<16} {score:>8.1f} {select:>8.1f} {gather:>8.1f} {whole:>8.1f} {cpu:>8.1f} {peak:>13.2f}"
            if seconds:
                line += (
                    f"   prefill {statistics.median(seconds):.2f} s: {whole / 10 / statistics.median(seconds):.2f} %"
                )
            print(line)
            sys.stdout.flush()
    model.close()


if __name__ == "__main__":
    main()
