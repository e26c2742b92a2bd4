"""Who should observe a prompt that is read within a limit, and down to how many cells should its parts be compacted?

    python tests/measure/bounded.py MODEL [--length 1000] [--limit 256] [--batch 256] [--chat] [--ways WAY ...]

Needles (windowkv_edge/eval/README.md) of several kinds at several depths; only those count that the full cache answers. A
way is a list of settings such as observers=question,recent=64. Before every step that finds no room, some tokens are evaluated
behind what was read, their attention chooses, and they are taken back:

    observers  end       the prompt's last tokens, with what a template puts behind the question
               question  the last tokens of the question alone
               all       the question and all that follows it
               ahead     the question, evaluated once in front of everything: its queries are kept, and turned by RoPE to
                         where the next token would be; f16 cells only
               none      nobody: the last tokens that were read choose
    target     limit     every compaction goes down to the limit, and what a step leaves of a batch
               share     to the share of the limit that was read of the prompt
               half      between the two
    scores     now       what chooses is the attention of these tokens
               most      the most that they gave a cell in this compaction and in earlier ones
               mean      the mean of what they gave it in all compactions
               half      half of that, and half of what chose in the compaction before
    step       tokens of the prompt that are evaluated at once, 0 = as sessions do (windowkv_edge/limit.py), or a batch with
               another target; there are never more cells than the limit and a batch, so that fewer are evicted at a time
    asks       tokens that are evaluated to observe; the policy's windows are the last ones of them
    recent     positions at the end of what was read that stay in any case, besides what the policy keeps there
    first      positions at the beginning that stay in any case, as StreamingLLM's sinks do (arXiv 2309.17453)
    pins       none
               needle    the needle stays in every head
    start      positions at the beginning that are read with the full cache, whatever the limit
    middle     the policy of these compactions, such as auto(omega=8), as it is; without it --policy as sessions take it between
               batches (windowkv_edge/compaction.py). The last one, behind the prompt, is always --policy's
    read       bounded   as said
               before    the full cache is compacted to the limit once, observed in the same way, in front of the question
               chosen    the cells that a bounded reading chose last, but of a full cache, and the question behind them: what it
                         loses is lost by the choice of cells, what only a bounded reading loses by what was read with few cells

`exact` reads with the full cache and compacts once, to the limit. Without --chat a question ends with the beginning of its
answer; with it the template's tokens stand behind it. Cells are the most that were held, seconds those of the prompt; "nll" is the
mean negative log-likelihood of a token of the right answer, which tells ways apart that say the same.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

from windowkv_edge import _native  # before llama_cpp

import llama_cpp  # isort: skip
import numpy as np
import numpy.typing as npt

from windowkv_edge.bench.distributions import log_softmax
from windowkv_edge.bench.session import Model, Session
from windowkv_edge.cli.common import parse_policy
from windowkv_edge.compaction import in_prompt
from windowkv_edge.eval import prose
from windowkv_edge.eval.needle import KINDS, N_ANSWER, make_needle
from windowkv_edge.eval.case import place
from windowkv_edge.eval.style import Style
from windowkv_edge.heads import ModelHeads
from windowkv_edge.limit import Limit, slack
from windowkv_edge.policies import ExpectedAttention, Full, KVPolicy
from windowkv_edge.policies.parts import Parts

CHOICES = {
    "observers": ("end", "question", "all", "ahead", "none"),
    "target": ("limit", "share", "half"),
    "scores": ("now", "most", "mean", "half"),
    "read": ("bounded", "before", "chosen"),
    "pins": ("none", "needle"),
}

Heads = list[list[npt.NDArray[np.float32]]]
"""Scores per layer and kv head, float32 [cells]."""


@dataclass
class Tally:
    """What one way of reading gave."""

    n_right: int = 0
    n_also: int = 0  # of what exact has right
    n_compactions: int = 0
    n_cells: float = 0.0
    nll: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Way:
    """How a prompt is read, see above; middle = "" is the policy of the last compaction."""

    observers: str = "end"
    target: str = "limit"
    scores: str = "now"
    step: int = 0
    asks: int = 0
    recent: int = 0
    first: int = 0
    start: int = 0
    pins: str = "none"
    middle: str = ""
    read: str = "bounded"

    @classmethod
    def parse(cls, text: str) -> Way:
        values: dict[str, object] = {}
        for part in filter(None, re.split(r",(?![^(]*\))", text)):  # not those within parentheses
            name, _, value = part.partition("=")
            if name not in {own.name for own in fields(cls)} or (name in CHOICES and value not in CHOICES[name]):
                raise SystemExit(f"--ways has {part!r}, see --help for what a way may have")
            values[name] = int(value) if isinstance(getattr(cls, name), int) else value
        return cls(**values)  # type: ignore[arg-type]


class Reader:
    """One session, and the ways to read a prompt.

    Args:
        model: the weights.
        policies: of the last compaction first.
        n_ctx: positions.
        limit: cells per head.
        batch: tokens evaluated at once.
        cells: type of the cells; None = what the policy prefers.
        threads: CPU threads.
    """

    def __init__(
        self,
        model: Model,
        policies: Sequence[str],
        n_ctx: int,
        limit: int,
        batch: int,
        cells: str | None,
        threads: int,
    ) -> None:
        self.model, self.limit, self.batch = model, limit, batch
        own = {name: parse_policy(name) for name in policies}
        first = own[policies[0]]
        self.session = Session(
            model, n_ctx, "f16", Full(), True, threads, batch, own_cells=cells or first.cells or "f16"
        )
        self.kv = self.session.kv
        self.n_observed = max(policy.n_observed for policy in own.values())
        self.kv.set_observed(self.n_observed)
        bound: dict[str, KVPolicy] = {name: self.session.bind(policy) for name, policy in own.items()}
        self.policies = {name: policy.parts("localization") for name, policy in bound.items()}
        self.parts = self.policies[policies[0]]
        self.memory = llama_cpp.llama_get_memory(self.session.ctx)
        self._before: list[list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]] = []
        self._times: list[list[npt.NDArray[np.float32]]] = []
        self._n_read = 0
        self.needle = 0, 0
        """Where it stands in the prompt."""

    def held(self) -> float:
        return float(self.kv.cells().mean())

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        self._before, self._times = [], []

    def decode(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        for i in range(0, len(tokens), self.batch):
            self.session.decode(tokens[i : i + self.batch])
        return self.session.logits()

    def answer(self, logits: npt.NDArray[np.float32]) -> str:
        res: list[int] = []
        while len(res) < N_ANSWER and not self.model.is_end(token := int(logits.argmax())):
            res.append(token)
            logits = self.decode([token])
        return self.model.detokenize(res)

    def nll(self, logits: npt.NDArray[np.float32], answer: Sequence[int]) -> float:
        """Mean negative log-likelihood of these tokens behind what was read, which stays as it is."""
        n_past, res = int(self.kv.stats().n_past), []
        for token in answer:
            res.append(float(-log_softmax(logits[None])[0, token]))
            logits = self.decode([token])
        llama_cpp.llama_memory_seq_rm(self.memory, -1, n_past, -1)
        return float(np.mean(res))

    def _between(self, way: Way) -> Parts:
        """The policy of a compaction that more of the prompt comes behind."""
        if way.middle:
            return self.policies[way.middle]
        return self.parts if way.read == "before" else in_prompt(self.parts)

    def compact(self, parts: Parts, n_cells: int, n_observers: int = 0, way: Way = Way()) -> None:  # noqa: B008 (it is frozen)
        if n_observers:
            parts = parts.observed_by(n_observers)
        n_past = int(self.kv.stats().n_past)
        first = min(way.first, n_past - way.recent)
        pinned = [(0, first), (max(0, n_past - way.recent), n_past)]
        if way.pins == "needle":
            pinned.append((self.needle[0], min(n_past, self.needle[1])))
        self.kv.set_pinned([span for span in pinned if span[0] < span[1]])
        if way.scores != "now":
            n = n_observers or self.parts.scoring.n_observed
            self.kv.compact_custom(
                min(n, self.n_observed), n_cells, lambda *of: self._choose(parts, self._remembered(way, *of), *of)
            )
        else:
            self.kv.compact(_native.policy_struct(parts), n_cells)

    def full(self, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """Read with the full cache, and keep it."""
        self.clear()
        self.kv.reserve(len(prompt))
        logits = self.decode(prompt)
        self.kv.snapshot_drop()
        self.kv.snapshot_save()
        return logits

    def exact(self) -> None:
        self.kv.snapshot_restore()
        self.compact(self.parts, self.limit - slack(self.limit))

    def read(
        self, prompt: list[int], question: tuple[int, int], way: Way, tally: Tally
    ) -> npt.NDArray[np.float32]:
        """Read within the limit; the logits of the last token."""
        start = time.perf_counter()
        first, stop = question
        n = way.asks or self.n_observed
        asks = {
            "end": prompt[-n:], "question": prompt[max(first, stop - n) : stop], "all": prompt[first:], "ahead": [], "none": []
        }[way.observers]  # fmt: skip
        if way.read == "before":
            logits = self._read_before(prompt, first, asks, way, tally)
        else:
            self.clear()
            ahead = self._ahead(prompt[first:stop]) if way.observers == "ahead" else None
            logits = self._read_bounded(prompt, asks, ahead, way, tally)
            if way.read == "chosen":
                logits = self._read_chosen(prompt, first)
        if self.held() > self.limit:
            self._n_read = len(prompt)
            self.compact(self.parts, self.limit - slack(self.limit))
        tally.seconds.append(time.perf_counter() - start)
        return logits

    def _read_bounded(
        self,
        prompt: list[int],
        asks: list[int],
        ahead: list[list[npt.NDArray[np.float64]]] | None,
        way: Way,
        tally: Tally,
    ) -> npt.NDArray[np.float32]:
        i = min(way.start, len(prompt) - 1)
        if i > 0:
            self.kv.reserve(len(prompt))
            self.decode(prompt[:i])
        while i < len(prompt):
            n, n_cells = self.next_step(i, len(prompt), len(asks), way)
            if n_cells is not None:
                self.compact_between(n_cells, asks, ahead, way, tally)
            logits = self.decode(prompt[i : i + n])
            tally.n_cells = max(tally.n_cells, self.held())
            i += n
        return logits

    def _read_chosen(self, prompt: list[int], first: int) -> npt.NDArray[np.float32]:
        """The cells in front of the question that are held now, of a full cache; then the question."""
        stats = self.kv.stats()
        held = [[self.kv.positions(il, ih) for ih in range(stats.n_head_kv)] for il in range(stats.n_layer)]
        self.clear()
        self.kv.reserve(len(prompt))
        self.decode(prompt[:first])

        def choose(budget: int, positions: _native.Cache, scores: _native.Cache, keep: _native.Cache) -> None:
            for il, layer in enumerate(positions):
                for ih, at in enumerate(layer):
                    keep[il][ih][np.isin(at, held[il][ih])] = 1

        self.kv.compact_custom(1, self.limit + self.batch, choose)
        return self.decode(prompt[first:])

    def next_step(self, n_read: int, n_prompt: int, n_observers: int, way: Way) -> tuple[int, int | None]:
        """Tokens that come next, and the cells that a compaction leaves before them, None if they find room."""
        held, n_left = self.held(), n_prompt - n_read
        if not way.step and way.target == "limit":
            return Limit.next_step(self.limit, self.batch, held, n_left, n_observers)
        n = min(way.step or self.batch, n_left)
        room = self.limit + self.batch - n - (n_observers if n < n_left else 0)
        share = {"limit": 1.0, "share": n_read / n_prompt, "half": 0.5 + 0.5 * n_read / n_prompt}[way.target]
        room = max(2 * self.n_observed, int(room * share))
        return n, room if n_read > 0 and held > room else None

    def _read_before(
        self, prompt: list[int], first: int, asks: list[int], way: Way, tally: Tally
    ) -> npt.NDArray[np.float32]:
        """The full cache of what stands in front of the question, compacted to the limit; then the question."""
        self.clear()
        self.kv.reserve(len(prompt))
        self.decode(prompt[:first])
        tally.n_cells = max(tally.n_cells, self.held())
        self.compact_between(self.limit, asks or prompt[-self.n_observed :], None, way, tally)
        return self.decode(prompt[first:])

    def compact_between(
        self,
        n_cells: int,
        asks: list[int],
        ahead: list[list[npt.NDArray[np.float64]]] | None,
        way: Way,
        tally: Tally,
    ) -> None:
        tally.n_compactions += 1
        self._n_read = int(self.kv.stats().n_past)
        if ahead is not None:
            self._compact_for(self._between(way), ahead, n_cells)
            return
        if asks:
            with self.kv.observing():
                self.decode(asks)
        self.compact(self._between(way), n_cells, len(asks), way)

    #
    # queries from in front of the prompt
    #

    def _ahead(self, question: Sequence[int]) -> list[list[npt.NDArray[np.float64]]]:
        """Queries of the question in an empty cache, as if at position 0: [layer][query head] float64 [tokens, head_dim]."""
        self.decode(question[-self.n_observed :])
        stats = self.kv.stats()
        res = []
        for il in range(stats.n_layer):
            queries = (self.kv.queries(il, ih) for ih in range(stats.n_head_kv * stats.n_gqa))
            res.append([self._turn(rows.astype(np.float64), -at.astype(np.float64)) for at, rows in queries])
        self.clear()
        return res

    @cached_property
    def _rope(self) -> ExpectedAttention:
        res = ExpectedAttention().bind(ModelHeads(str(self.model.path), self.model.about(), 1, 1, (0,)))
        assert isinstance(res, ExpectedAttention)
        return res

    def _turn(self, rows: npt.NDArray[np.float64], at: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return self._rope._turn(rows, at)

    def _compact_for(self, parts: Parts, ahead: list[list[npt.NDArray[np.float64]]], n_cells: int) -> None:
        n_past = int(self.kv.stats().n_past)

        def choose(budget: int, positions: _native.Cache, scores: _native.Cache, keep: _native.Cache) -> None:
            own: Heads = []
            for il, layer in enumerate(positions):
                n_gqa = len(ahead[il]) // len(layer)
                own.append([])
                for ih in range(len(layer)):
                    keys = self.kv.rows(il, ih, "k").astype(np.float64)
                    of_heads = []
                    for rows in ahead[il][ih * n_gqa : (ih + 1) * n_gqa]:
                        turned = self._turn(rows, n_past + np.arange(len(rows), dtype=np.float64))
                        logits = turned @ keys.T / np.sqrt(keys.shape[1])
                        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                        of_heads.append((weights / weights.sum(axis=1, keepdims=True)).mean(axis=0))
                    own[-1].append(np.mean(of_heads, axis=0).astype(np.float32))
            self._choose(parts, own, budget, positions, scores, keep)

        self.kv.compact_custom(1, n_cells, choose)

    #
    # selections with scores of our own
    #

    def _remembered(
        self, way: Way, budget: int, positions: _native.Cache, scores: _native.Cache, keep: _native.Cache
    ) -> Heads:
        """Scores of this compaction and of earlier ones, which are remembered."""
        res, times = [], []
        for il, layer in enumerate(positions):
            res.append([])
            times.append([])
            for ih, at in enumerate(layer):
                own, n = scores[il][ih].copy(), np.ones(len(at), dtype=np.float32)
                if self._before:
                    old_at, old = self._before[il][ih]
                    _, here, there = np.intersect1d(at, old_at, assume_unique=True, return_indices=True)
                    n[here] += self._times[il][ih][there]
                    if way.scores == "most":
                        own[here] = np.maximum(own[here], old[there])
                    else:
                        new = 1 / n[here] if way.scores == "mean" else 0.5
                        own[here] = new * own[here] + (1 - new) * old[there]
                res[-1].append(own)
                times[-1].append(n)
        # positions of those who observe will be those of the next tokens
        read = [[at < self._n_read for at in layer] for layer in positions]
        self._before = [
            [(at[own], score[own]) for at, score, own in zip(*layer, strict=True)]
            for layer in zip(positions, res, read, strict=True)
        ]
        self._times = [[n[own] for n, own in zip(*layer, strict=True)] for layer in zip(times, read, strict=True)]
        return res

    def _choose(
        self,
        parts: Parts,
        own: Heads,
        budget: int,
        positions: _native.Cache,
        scores: _native.Cache,
        keep: _native.Cache,
    ) -> None:
        """As the native selection does with these scores."""
        tokens = own if parts.scoring.token_window_size else None
        cells = np.array([[len(head) for head in layer] for layer in positions])
        budgets = _native.budgets(parts, cells, budget, positions, own, tokens)
        chosen = _native.select(parts, budgets, positions, own, tokens)
        for il, layer in enumerate(chosen):
            for ih, stays in enumerate(layer):
                keep[il][ih][stays] = 1

    def close(self) -> None:
        self.session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--cells", help="type of the cells; default: what the policy prefers")
    parser.add_argument(
        "--chat", action="store_true", help="ask through the model's template, without a beginning of the answer"
    )
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--depths", default="0.1,0.5,0.9")
    parser.add_argument(
        "--ways",
        nargs="*",
        default=["", "observers=question", "observers=none", "target=share", "target=half", "read=before"],
    )
    parser.add_argument("--trust", action="store_true", help="count all needles, and read nothing with the full cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--first", type=int, default=1, help="number of the first needle")
    parser.add_argument("--gpu-layers", type=int, default=0)
    args = parser.parse_args()
    ways = [Way.parse(text) for text in args.ways]

    model = Model(args.model, args.gpu_layers)
    style = Style(model, args.chat)
    hay = model.tokenize(prose(8 * args.length))[: args.length]
    policies = list(dict.fromkeys([args.policy, *(way.middle for way in ways if way.middle)]))
    reader = Reader(model, policies, args.length + 512, args.limit, args.batch, args.cells, args.threads)
    tallies = {text or "as sessions do": Tally() for text in args.ways}
    n_cases = n_counted = n_exact = 0
    nll: list[float] = []
    for depth in map(float, args.depths.split(",")):
        for index in range(args.first, args.first + args.count):
            for kind in args.kinds.split(","):
                needle = make_needle(kind, index)
                others = needle.sentences[1:]
                inserts = [
                    (depth, needle.sentences[0]),
                    *(((i + 0.5) / len(others), own) for i, own in enumerate(others)),
                ]
                body = style.head + place(hay, [(at, style.tokenize(f"\n{line}\n")) for at, line in inserts])
                prompt = body + style.ask(needle.question, "" if args.chat else needle.lead)
                asked = f"\n\n{needle.question}" if args.chat else f"\n\nQuestion: {needle.question}"
                line = style.tokenize(f"\n{needle.sentences[0]}\n")
                at = next(i for i in range(len(body)) if body[i : i + len(line)] == line)
                reader.needle = at, at + len(line)
                question = len(body), len(body) + len(style.tokenize(asked))

                n_cases += 1
                right, said, is_exact = style.tokenize(f" {needle.answers[0]}"), {}, False
                if not args.trust:
                    logits = reader.full(prompt)
                    if not all(answer in reader.answer(logits) for answer in needle.answers):
                        print(f"{kind}, {depth}, {index}: not with the full cache", flush=True)
                        continue
                    reader.exact()
                    nll.append(reader.nll(logits, right))
                    text = reader.answer(logits)
                    is_exact = all(answer in text for answer in needle.answers)
                    said |= {} if is_exact else {"exact": text}
                n_counted += 1
                n_exact += is_exact
                for (name, tally), way in zip(tallies.items(), ways, strict=True):
                    logits = reader.read(prompt, question, way, tally)
                    tally.nll.append(reader.nll(logits, right))
                    text = reader.answer(logits)
                    if all(answer in text for answer in needle.answers):
                        tally.n_right += 1
                        tally.n_also += is_exact
                    else:
                        said[name] = text
                print(f"{kind}, {depth}, {index}: {needle.answers}; wrong: {said}; nll {[round(own.nll[-1], 3) for own in tallies.values()]}", flush=True)
    reader.close()
    model.close()
    chat = ", chat" if args.chat else ""
    print(f"\n{args.policy}, {args.length} tokens, limit {args.limit}, batches of {args.batch}{chat}: ", end="")
    if args.trust:
        print(f"{n_cases} needles, none read with the full cache")
    else:
        print(f"the full cache answers {n_counted} of {n_cases}, exact {n_exact} (nll {np.mean(nll or [0]):.3f})")
    print("| way | right | of exact's | nll | s a prompt | compactions | most cells |\n| --- | --- | --- | --- | --- | --- | --- |")
    for name, own in tallies.items():
        mean = sum(own.seconds) / max(1, len(own.seconds))
        print(f"| {name} | {own.n_right} | {own.n_also} | {np.mean(own.nll or [0]):.3f} | {mean:.1f} | {own.n_compactions} | {own.n_cells:.0f} |")


if __name__ == "__main__":
    main()
