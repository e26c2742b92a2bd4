"""Needle accuracy and fidelity of every policy after one prefill per prompt.

    python tests/measure/needles.py MODEL --text FILE [--text FILE] [--lengths 1000 2000 4000] [--out results.jsonl]
    python tests/measure/needles.py MODEL --text FILE --types f16 q8_0 q4_0 --fidelity 96    # equal bytes, more cells

A needle stands on a line of its own at a depth of the text, the question and the start of the answer follow the text.
A prompt counts where the full cache answers: the expected word stands in the first 16 greedy tokens. Every policy and
budget branches from a copy of the same uncompacted cache; the first token comes from full attention.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterator

from windowkv_edge import POLICIES, AdaKV, Full, KVPolicy, Llama, SnapKV, WindowKV  # before llama_cpp
from windowkv_edge._native import policy_struct
from windowkv_edge.budget import n_cells

import llama_cpp
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

N_ANSWER = 16
TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}
BITS = {"q8_0": 8.5, "q4_0": 4.5}  # per value, scales included
DEPTHS = (0.9, 0.7, 0.5, 0.3, 0.1)
BUDGETS = (0.25, 0.12, 0.06, 0.03, 0.015)


@dataclass(frozen=True)
class Needle:
    kind: str
    sentence: str
    question: str
    lead: str
    word: str


NEEDLES = (
    Needle(
        "number",
        "The registration number of the blue bicycle is 627415.",
        "What is the registration number of the blue bicycle?",
        "The registration number of the blue bicycle is",
        "627415",
    ),
    Needle(
        "word",
        "The secret word of the night guard is marigold.",
        "What is the secret word of the night guard?",
        "The secret word of the night guard is",
        "marigold",
    ),
    Needle(
        "phrase",
        "The best way to spend a rainy Sunday in Lisbon is to ride the old yellow tram to the end of the line.",
        "What is the best way to spend a rainy Sunday in Lisbon?",
        "The best way to spend a rainy Sunday in Lisbon is",
        "tram",
    ),
    Needle(
        "name",
        "The painter of the ceiling in the town hall was Ottilie Brandt.",
        "Who was the painter of the ceiling in the town hall?",
        "The painter of the ceiling in the town hall was",
        "Brandt",
    ),
    Needle(
        "year",
        "The old stone bridge at Velmora was rebuilt in 1847.",
        "When was the old stone bridge at Velmora rebuilt?",
        "The old stone bridge at Velmora was rebuilt in",
        "1847",
    ),
    Needle(
        "code",
        "The access code of the eastern archive is K7-291.",
        "What is the access code of the eastern archive?",
        "The access code of the eastern archive is",
        "K7-291",
    ),
)


def table_policies() -> dict[str, KVPolicy]:
    """Every shipped policy with its defaults, and the published WindowKV settings."""
    res: dict[str, KVPolicy] = {name: cls() for name, cls in POLICIES.items() if name != "full"}
    res["snapkv alpha=16"] = SnapKV(alpha=16)
    res["adakv alpha=16"] = AdaKV(alpha=16)
    published = {"omega": 8, "alpha": 16, "carry": 0, "suffix": 1.0, "scope": "layer", "budget": "arithmetic"}
    res["windowkv published"] = WindowKV(gamma=5, **published)
    res["windowkv published gamma=1"] = WindowKV(gamma=1, **published)
    return res


class Branches:
    """One session whose uncompacted cache is kept and branched from."""

    def __init__(self, model: Path, n_ctx: int, n_window: int, n_threads: int, cells: str = "f16") -> None:
        self.llm = Llama(
            str(model), n_ctx=n_ctx, kv_policy=Full(), n_threads=n_threads, n_threads_batch=n_threads, verbose=False,
            type_k=TYPES[cells], type_v=TYPES[cells],
        )  # fmt: skip
        # at equal bytes a budget buys more cells of a smaller type
        self.more_cells = 1.0 if cells == "f16" else 16 / BITS[cells]
        assert self.llm._kv is not None
        self.kv = self.llm._kv
        self.kv.set_window(n_window)
        self.n_prompt = 0

    def logits(self, i: int = -1) -> npt.NDArray[np.float32]:
        pointer = llama_cpp.llama_get_logits_ith(self.llm.ctx, i)
        return np.ctypeslib.as_array(pointer, shape=(self.llm.n_vocab(),))

    def prefill(self, tokens: list[int]) -> int:
        """Evaluate tokens with the full cache, reusing what the last prompt shares; returns the greedy next token."""
        shared = 0
        if self.n_prompt:
            self.restore()
            same = np.array(tokens[: self.n_prompt]) == self.llm.input_ids[: min(self.n_prompt, len(tokens))]
            shared = int(same.size if same.all() else same.argmin())
            shared = min(shared, len(tokens) - 1)
            # the ring still has to observe a whole window behind the shared part
            shared = max(0, min(shared, len(tokens) - 64))
        self.llm.n_tokens = shared
        self.llm.eval(tokens[shared:])
        self.n_prompt = len(tokens)
        self.kv.snapshot_save()
        return int(self.logits().argmax())

    def log_probs(self, tokens: list[int]) -> npt.NDArray[np.float64]:
        """Log probabilities after each of the tokens, [len(tokens), n_vocab]."""
        rows = []
        for token in tokens:
            self.llm.eval([token])
            logits = self.logits().astype(np.float64)
            rows.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
        return np.array(rows)

    def restore(self) -> None:
        self.kv.snapshot_restore()
        self.llm.n_tokens = self.n_prompt

    def compact(self, policy: KVPolicy, budget: float) -> None:
        bound = self.llm._bind(self.kv, policy)
        fields = policy_struct(bound.native("localization"))
        self.kv.compact(fields, n_cells(min(1.0, budget * self.more_cells), self.n_prompt))

    def answer(self, first: int, word: str) -> bool:
        """Greedy continuation; True when the word stands in it."""
        tokens = [first]
        while len(tokens) < N_ANSWER:
            self.llm.eval(tokens[-1:])
            tokens.append(int(self.logits().argmax()))
            if word in self.llm.detokenize(tokens).decode("utf-8", "ignore"):
                return True
        return word in self.llm.detokenize(tokens).decode("utf-8", "ignore")


def needle_prompts(
    llm: Llama, text: str, length: int, needles: tuple[Needle, ...]
) -> Iterator[tuple[Needle, float, list[int]]]:
    """Deepest first, so that neighbouring prompts share as much of the text as possible."""
    hay = llm.tokenize(text.encode(), add_bos=False)
    if len(hay) < length:
        raise SystemExit(
            f"the text has {len(hay)} tokens, expected at least {length}; give a longer --text or shorter --lengths"
        )
    for depth in DEPTHS:
        for needle in needles:
            at = int(length * depth)
            inside = llm.tokenize(f"\n{needle.sentence}\n".encode(), add_bos=False)
            tail = llm.tokenize(f"\n\nQuestion: {needle.question}\nAnswer: {needle.lead}".encode(), add_bos=False)
            yield needle, depth, hay[:at] + inside + hay[at:length] + tail


def run_needles(
    branches: Branches,
    texts: list[Path],
    lengths: list[int],
    needles: tuple[Needle, ...],
    policies: dict[str, KVPolicy],
    budgets: list[float],
    out: Any,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("needles", total=len(texts) * len(lengths) * len(DEPTHS) * len(needles))
        for text in texts:
            for length in lengths:
                for needle, depth, tokens in needle_prompts(branches.llm, text.read_text(), length, needles):
                    first = branches.prefill(tokens)
                    key = {"text": text.name, "length": length, "depth": depth, "needle": needle.kind}
                    result = {**key, "policy": "full", "budget": 1.0, "ok": branches.answer(first, needle.word)}
                    rows.append(result)
                    out.write(json.dumps(result) + "\n")
                    if result["ok"]:
                        for name, policy in policies.items():
                            for budget in budgets:
                                branches.restore()
                                branches.compact(policy, budget)
                                ok = branches.answer(first, needle.word)
                                rows.append({**key, "policy": name, "budget": budget, "ok": ok})
                                out.write(json.dumps(rows[-1]) + "\n")
                    out.flush()
                    progress.advance(task)
    return rows


def print_needles(rows: list[dict[str, Any]], console: Console) -> None:
    count: dict[tuple[str, float], list[bool]] = defaultdict(list)
    for row in rows:
        count[row["policy"], row["budget"]].append(row["ok"])
    full = count.pop(("full", 1.0))
    console.print(f"full cache answers {sum(full)} of {len(full)} prompts; of these the policies answer:")
    budgets = sorted({b for _, b in count}, reverse=True)
    table = Table("policy", *(f"{b:.1%}" for b in budgets))
    for name in dict.fromkeys(name for name, _ in count):
        table.add_row(name, *(f"{sum(count[name, b])}/{len(count[name, b])}" for b in budgets))
    console.print(table)


def run_fidelity(
    branches: Branches,
    texts: list[Path],
    length: int,
    n_next: int,
    policies: dict[str, KVPolicy],
    budgets: list[float],
    reference: dict[tuple[str, int], npt.NDArray[np.float64]],
) -> dict[tuple[str, float], list[float]]:
    """KL divergence of the next-token distributions from those of the full cache, teacher-forced, one value a token.

    The full cache is that of the first cell type, which `reference` keeps for the others.
    """
    res: dict[tuple[str, float], list[float]] = defaultdict(list)
    llm = branches.llm
    for text in texts:
        tokens = llm.tokenize(text.read_text().encode(), add_bos=False)
        for start in range(0, len(tokens) - length - n_next, length):
            branches.n_prompt = 0
            llm.reset()
            branches.prefill(tokens[start : start + length])
            follow = tokens[start + length : start + length + n_next]

            if (text.name, start) not in reference:
                reference[text.name, start] = branches.log_probs(follow)
            want = reference[text.name, start]
            for name, policy in policies.items():
                for budget in budgets:
                    branches.restore()
                    branches.compact(policy, budget)
                    got = branches.log_probs(follow)
                    res[name, budget] += list((np.exp(want) * (want - got)).sum(axis=1))
    return res


def print_fidelity(kl: dict[tuple[str, float], list[float]], console: Console) -> None:
    budgets = sorted({b for _, b in kl}, reverse=True)
    table = Table("KL to the full cache", *(f"{b:.1%}" for b in budgets))
    for name in dict.fromkeys(name for name, _ in kl):
        table.add_row(name, *(f"{np.mean(kl[name, b]):.3f}" for b in budgets))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--needles", nargs="+", default=[n.kind for n in NEEDLES])
    parser.add_argument(
        "--needle-file", type=Path, help="other needles: JSON lines with kind, sentence, question, lead and word"
    )
    parser.add_argument("--policies", nargs="+", help="names of the table, or expressions such as WindowKV(omega=4)")
    parser.add_argument(
        "--fidelity", type=int, default=0, metavar="N", help="also KL over N tokens after each 2000-token window"
    )
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=["f16"], help="cells, compared at equal bytes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("needles.jsonl"))
    args = parser.parse_args()

    known = table_policies()
    scope = {cls.__name__: cls for cls in POLICIES.values()}
    policies = known if not args.policies else {p: known[p] if p in known else eval(p, scope) for p in args.policies}

    console = Console()
    n_window = max(p.window for p in policies.values())

    start = time.perf_counter()
    with args.out.open("w") as out:
        if args.needle_file:
            chosen = tuple(Needle(**json.loads(line)) for line in args.needle_file.read_text().splitlines())
        else:
            chosen = tuple(n for n in NEEDLES if n.kind in args.needles)
        meta = {
            "model": args.model.name,
            "policies": {n: repr(p) for n, p in policies.items()},
            "needles": [asdict(n) for n in chosen],
        }
        out.write(json.dumps(meta) + "\n")
        reference: dict[tuple[str, int], npt.NDArray[np.float64]] = {}
        for cells in args.types:
            branches = Branches(args.model, max(args.lengths + [2048]) + 512, n_window, args.threads, cells)
            console.print(f"{cells} cells, budgets in bytes of f16 cells")
            rows = run_needles(branches, args.text, args.lengths, chosen, policies, args.budgets, out)
            print_needles(rows, console)
            if args.fidelity:
                kl = run_fidelity(branches, args.text, 2000, args.fidelity, policies, args.budgets, reference)
                print_fidelity(kl, console)
            branches.llm.close()
    console.print(f"{time.perf_counter() - start:.0f} s, results in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
