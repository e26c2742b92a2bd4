"""Prefill and decode speed of a policy beside stock f16, q8_0 and q4_0 in the same run.

    python tests/measure/speed.py MODEL [--depth 4096] [--cells 512] [--threads 2] [--check]

First the gate: with a budget that evicts nothing the greedy answer has to be stock's. Then the sessions take turns at
every chunk of the prompt and at every decoded token, so that a slow moment of the machine meets all of them.
With --check the exit status tells whether the project's targets hold.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from statistics import median

from windowkv_edge import Full, Llama  # before llama_cpp

import llama_cpp
from rich.console import Console
from rich.table import Table

CHUNK = 512
FAST = "full, kv_exact=False"
TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}


def gate(model: Path, text: str, threads: int) -> None:
    """Exit unless a budget that evicts nothing gives stock's answer."""
    answers = []
    for policy in (None, Full()):
        llm = Llama(str(model), n_ctx=1024, flash_attn=True, kv_policy=policy, n_threads=threads, verbose=False)
        answers.append(llm(text[:2000], max_tokens=32, temperature=0.0)["choices"][0]["text"])
        llm.close()
    if answers[0] != answers[1]:
        raise SystemExit(f"gate: stock answers {answers[0]!r}, the ragged cache {answers[1]!r}; no speed is reported")


def timed(llm: Llama, tokens: list[int]) -> float:
    """Seconds of one evaluation without compaction."""
    start = time.perf_counter()
    llama_cpp.Llama.eval(llm, tokens)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--text", type=Path, default=Path(sys.modules["windowkv_edge"].__file__ or "").parent / "data/document.txt"
    )
    parser.add_argument("--depth", type=int, default=4096)
    parser.add_argument("--cells", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=64, help="decoded tokens")
    parser.add_argument(
        "--no-quantised", action="store_true", help="leave out stock q8_0 and q4_0 (they prefill slowly)"
    )
    parser.add_argument("--policy", default="windowkv")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()

    text = args.text.read_text(encoding="utf-8")
    gate(args.model, text, args.threads)

    def session(**kwargs: object) -> Llama:
        return Llama(
            str(args.model), n_ctx=args.depth + 1024, n_batch=CHUNK, n_threads=args.threads, n_threads_batch=args.threads,
            flash_attn=True, verbose=False, **kwargs,
        )  # fmt: skip

    stock = {
        f"stock {name}": session(type_k=t, type_v=t)
        for name, t in TYPES.items()
        if name == "f16" or not args.no_quantised
    }
    ours = session(kv_policy=args.policy)
    fast = session(kv_policy="full", kv_exact=False)
    shallow = session()
    tokens = shallow.tokenize(text.encode(), add_bos=False)
    tokens = (tokens * (args.depth // len(tokens) + 1))[: args.depth]

    assert ours._kv is not None
    ours._kv.reserve(args.depth)
    deep = {**stock, args.policy: ours, FAST: fast}
    prefill = dict.fromkeys(deep, 0.0)
    for i in range(0, args.depth, CHUNK):
        order = list(deep.items())
        for name, llm in order if i // CHUNK % 2 == 0 else reversed(order):
            prefill[name] += timed(llm, tokens[i : i + CHUNK])
    timed(shallow, tokens[: args.cells])

    full = {name: llm.kv_stats() for name, llm in deep.items()}
    ours._kv.snapshot_save()
    compactions = []
    for _ in range(3):
        ours._kv.snapshot_restore()
        stats = ours.kv_compact(args.cells)
        compactions.append((stats.t_score_ms + stats.t_compact_ms) / 1000)
    ours._kv.snapshot_drop()
    compaction = median(compactions)

    empty = session()
    timed(empty, tokens[:2])
    nothing = "stock f16 at depth 2"
    everyone = {**deep, f"stock f16 at depth {args.cells}": shallow, nothing: empty}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for _ in range(args.rounds):
        for name, llm in everyone.items():
            times[name].append(timed(llm, [tokens[7]]))
    decode = {name: 1000 * median(t) for name, t in times.items()}

    console = Console()
    console.print(
        f"{args.model.name}, {platform.machine()}, {args.threads} threads, depth {args.depth}, "
        f"{args.policy} with {args.cells} cells per head"
    )
    table = Table("session", "prefill tok/s", "decode ms/token", "KV MiB for the prompt", "KV MiB while decoding")
    for name in everyone:
        speed = f"{args.depth / prefill[name]:.1f}" if name in prefill else ""
        at_prompt = f"{full[name].bytes_full / 2**20:.1f}" if name in full else ""
        held = everyone[name].kv_stats()
        now = held.bytes_live if name in (args.policy, FAST) else held.bytes_full
        table.add_row(name, speed, f"{decode[name]:.2f}", at_prompt, f"{now / 2**20:.1f}")
    console.print(table)

    ratios = {
        f"decode, {args.policy} at depth {args.depth} / stock at depth {args.cells}": (
            decode[args.policy] / decode[f"stock f16 at depth {args.cells}"], "<=", 1.10),
        f"decode, stock f16 at depth {args.depth} / {args.policy}": (decode["stock f16"] / decode[args.policy], ">=", 3.5),
        f"prefill, {args.policy} / stock f16": (prefill[args.policy] / prefill["stock f16"], "<=", 1.03),
        "scoring and compaction / prefill": (compaction / prefill[args.policy], "<=", 0.02),
        f"decode, stock f16 at depth {args.depth} / {FAST}": (decode["stock f16"] / decode[FAST], ">=", 2.0),
        f"prefill, {FAST} / stock f16": (prefill[FAST] / prefill["stock f16"], "<=", 1.0),
    }  # fmt: skip
    missed = []
    for what, (value, sign, bound) in ratios.items():
        ok = value <= bound if sign == "<=" else value >= bound
        missed += [] if ok else [what]
        console.print(f"{what}: {value:.3f} (target {sign} {bound}) {'ok' if ok else 'MISSED'}")
    console.print(
        f"with no cells at all decoding would be {decode['stock f16'] / decode[nothing]:.3f} times as fast as stock f16 "
        f"at depth {args.depth}: what is left then are the weights"
    )
    if args.check and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
