"""What the harness costs: branching beside evaluating again, and policies in Python beside native ones.

    python tests/measure/eval_costs.py MODEL [--length 4000] [--threads 2]

Six policies x four budgets, eight tokens decoded behind each compaction. Evaluating again is measured twice and
multiplied; compactions are medians of seven turns, taken by the native policy and its twin in NumPy alternately.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from windowkv_edge import POLICIES, SnapKV  # before llama_cpp
from windowkv_edge.bench.session import Model
from windowkv_edge.eval import Branches, prose

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "session")]
from test_python_policies import SnapKVTwin

NAMES = ("windowkv", "windowkv+adakv", "snapkv", "pyramidkv", "adakv", "streamingllm")
BUDGETS = (0.12, 0.06, 0.03, 0.015)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    model = Model(args.model)
    tokens = model.tokenize(prose(8 * args.length))[: args.length]
    own = Branches(model, args.length + 64, 32, threads=args.threads)

    def branch(name: str, budget: float) -> None:
        own.compact(POLICIES[name](), int(budget * args.length))
        own.greedy(8)

    def again() -> None:
        own.prompt = []
        own.prefill(tokens)

    prefill = statistics.median(seconds(again) for _ in range(2))
    branches = seconds(lambda: [branch(name, budget) for name in NAMES for budget in BUDGETS])
    n = len(NAMES) * len(BUDGETS)
    once, each = prefill + branches, n * prefill + branches
    print(f"prefill {prefill:.1f} s, {n} branches {branches:.1f} s")
    print(f"branching {once:.1f} s, evaluating again {each:.1f} s: {each / once:.1f} times")

    turns: dict[str, list[float]] = {"native": [], "Python": []}
    for _ in range(7):
        for what, policy in (("native", SnapKV()), ("Python", SnapKVTwin())):
            turns[what].append(seconds(lambda policy=policy: own.compact(policy, int(0.12 * args.length))))
    restore = statistics.median(seconds(own.restore) for _ in range(7))
    times = {what: statistics.median(own) - restore for what, own in turns.items()}
    print(f"compaction: native {1000 * times['native']:.1f} ms, Python {1000 * times['Python']:.1f} ms", end=": ")
    print(f"{100 * (times['Python'] / times['native'] - 1):+.1f} %")


if __name__ == "__main__":
    main()
