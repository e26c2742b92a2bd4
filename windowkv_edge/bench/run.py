"""Measure sessions side by side: a gate first, then prompts and tokens in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import fmean, median

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import psutil

from .._memory import device_memory, rss
from ..budget import n_cells
from ..errors import WindowKVError
from ..gguf_info import GGUFInfo
from ..heads import HeadScores
from ..policies import Full, KVPolicy
from ..replay import N_ROOM
from ..policies.headkv import ByImportance
from .distributions import divergence, log_softmax
from .session import Model, Session

__all__ = ["Bench", "GateError", "Plan", "Report", "Row", "fits"]

Report = Callable[[str, int], None]
"""``report(what, steps)``: so many steps of the total were done."""

CHUNK = 512  # tokens evaluated at once, llama.cpp's own default
STOCK = "stock"
STOCK_TYPES = ("f16", "q8_0", "q4_0")

N_GATE_PROMPT, N_GATE_ANSWER = 128, 16
# Mean KL divergence between the next-token distributions of two kernels that differ in rounding alone: this much, and
# twice what the rounding of the cells themselves does. SmolLM2 Q4_1 and Gemma Q4_K_M, whose weights amplify rounding:
# 0.001 to 0.006 with f16 cells; q4_0 up to 0.24, where stock q4_0 is 0.31 from stock f16
GATE_KL = 0.02
# the same with layers on a GPU, whose products of quantised weights round more: of SmolLM2 on an H200 stock is 0.013
# from the CPU, ours 0.016, and the two are 0.020 (1,024 tokens) to 0.030 (the gate's 128) apart
GATE_KL_GPU = 0.06


class GateError(WindowKVError, RuntimeError):
    """A session that evicted nothing answers differently from stock, so no speed is reported."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        lengths: positions in the cache when decoding begins.
        policies: by name.
        budgets: for every policy but "full", see :class:`windowkv_edge.Llama`.
        types: cells of the policies.
        baselines: cells of the stock sessions.
        references: depths of further stock sessions with f16 cells that decode in the same turns; 0 = none.
        rounds: tokens that each session decodes; every other turn goes through the sessions backwards.
        threads: CPU threads.
        fill: random cells instead of an evaluated prompt.
        exact: with f16 and f32 cells, policies attend with stock's kernel until something is evicted. Not "full",
            which would be stock then.
    """

    lengths: tuple[int, ...]
    policies: dict[str, KVPolicy]
    budgets: tuple[float | int, ...]
    types: tuple[str, ...] = ("f16",)
    baselines: tuple[str, ...] = STOCK_TYPES
    references: tuple[int, ...] = (2, 512)
    rounds: int = 64
    threads: int = 2
    fill: bool = False
    exact: bool = True


@dataclass
class Row:
    """One session at one length. Bytes are those of live buffers; see :class:`windowkv_edge.KVStats`."""

    session: str  # such as "stock f16" or "windowkv 12 % f16"
    policy: str  # "stock" or the policy's name
    cell_type: str
    length: int  # positions of the sessions that took turns
    depth: int  # positions of this one when decoding began: the same, unless it is a reference
    budget: float | int | None = None
    n_cells: float = 0.0  # mean per (layer, kv head) when decoding begins
    prefill_tokens_per_s: float | None = None  # None: the cache was filled
    compaction_ms: float | None = None  # scoring, selection and gather
    decode_ms: float = 0.0  # median
    decode_ms_best: float = 0.0
    decode_ms_mean: float = 0.0  # with the tokens at which pools grow
    kv_bytes_peak: int = 0  # transients of growth and compaction included
    kv_bytes_start: int = 0  # when decoding begins, as the two below
    kv_bytes: int = 0  # behind the last token, window and recurrent layers included; stock's has room for all of n_ctx
    rss_bytes: int = (
        0  # by which the process grew for this session's cache until decoding began, compute buffers left out
    )
    device_bytes: int = 0  # by which what is taken of GPUs grew for this session until then, compute buffers included

    @property
    def is_reference(self) -> bool:
        """Whether it is a stock session at another depth, for comparison."""
        return self.depth != self.length


@dataclass
class _Entry:
    row: Row
    session: Session
    seconds: float = 0.0
    times: list[float] | None = None


class Bench:
    """One model, one plan.

    Args:
        model: the weights.
        info: its header.
        plan: what to measure.
        tokens: the prompt, repeated where a length needs more; random ones for a model without a tokenizer.
        is_random: whether the weights are random; then heads get made-up scores if a policy needs some.
        report: called with what is being done and how many of :attr:`n_steps` that is.
    """

    def __init__(
        self,
        model: Model,
        info: GGUFInfo,
        plan: Plan,
        tokens: Sequence[int] = (),
        is_random: bool = False,
        report: Report = lambda what, steps: None,
    ) -> None:
        rng = np.random.default_rng(0)
        self.model, self.info, self.plan, self.report = model, info, plan, report
        self.tokens = list(tokens) or rng.integers(0, model.n_vocab, 4096).tolist()
        self.policies = dict(plan.policies)
        for name, policy in self.policies.items():
            if is_random and isinstance(policy, ByImportance) and policy.importance is None:
                scores = rng.pareto(1.0, (info.n_layer, info.n_head[0]))  # a few heads hold most, as in real models
                heads = HeadScores({"r": scores, "r2": scores}, "made up for random weights")
                self.policies[name] = replace(policy, importance=heads)

    @property
    def n_steps(self) -> int:
        """Steps of the whole run: chunks of prompts, and decoded tokens of all sessions."""
        res = self._n_gate_steps()
        for length in self.plan.lengths:
            rows = self._rows(length)
            own = sum(not row.is_reference for row in rows)
            res += own * (1 if self.plan.fill else -(-length // CHUNK)) + self.plan.rounds * len(rows)
        return res

    def run(self) -> list[Row]:
        """The gate, then every length; raises what :meth:`groups` raises."""
        return [row for rows in self.groups() for row in rows]

    def groups(self) -> Iterator[list[Row]]:
        """The gate, then the rows of one length after the other.

        Raises:
            GateError: a session answers differently from stock.
            UnsupportedModelError, MissingProfileError: a policy cannot serve the model.
            WindowKVError: the memory is too small; says what would fit.
        """
        self._check_types()
        for length in self.plan.lengths:
            self._check_memory(length)
        self.gate()
        for length in self.plan.lengths:
            yield self._group(length)

    #
    # gate
    #

    def _n_gate_steps(self) -> int:
        return len(set(self.plan.types)) * (1 + len(self.policies))

    def gate(self) -> None:
        """While nothing is evicted, every policy has to answer as stock does: bit for bit with stock's attention
        kernel, up to rounding with ours (if the device has ours; else stock's is checked twice).

        The first check finds any cell that does not belong to the prompt. The second one finds gross faults only: one
        wrong token of the prompt moves SmolLM2 by 0.01, rounding moves it by 0.001, and neither moves a random model
        much. The tests of the op show that our kernel is right: case by case, against stock's kernel and a reference in
        double precision.
        """
        for cells in dict.fromkeys(self.plan.types):
            tokens, want = self._answer(None, cells, "stock", [])
            f16 = want if cells == "f16" else self._answer(None, "f16", "stock", tokens)[1]
            on_gpu = self.model.n_gpu_layers and llama_cpp.llama_supports_gpu_offload()
            bound = (GATE_KL_GPU if on_gpu else GATE_KL) + 2 * divergence(log_softmax(f16), log_softmax(want)).mean()
            self.report(f"gate: stock {cells}", 1)
            for name, policy in self.policies.items():
                _, exact = self._answer(policy, cells, "stock", tokens)
                if not np.array_equal(exact, want):
                    raise GateError(
                        f"{name} with {cells} cells and nothing evicted does not give stock's logits (difference "
                        f"{np.abs(exact - want).max():.3g}); no speed is reported"
                    )
                _, ours = self._answer(policy, cells, "ragged", tokens)
                if not (kl := divergence(log_softmax(want), log_softmax(ours)).mean()) <= bound:
                    raise GateError(
                        f"{name} with {cells} cells, nothing evicted and our attention kernel: KL divergence {kl:.3g} "
                        f"from stock, expected at most {bound:.3g}; no speed is reported"
                    )
                self.report(f"gate: {name} {cells}", 1)

    def _answer(
        self, policy: KVPolicy | None, cells: str, attention: str, answer: list[int]
    ) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Tokens after the gate's prompt, greedy or given, and the logits in front of each: [n, n_vocab]."""
        session = self._session(N_GATE_PROMPT + N_GATE_ANSWER, cells, policy)
        try:
            if policy is not None:
                session.kv.set_attention(attention)
            session.decode(self._prompt(N_GATE_PROMPT))
            tokens, rows = list(answer), [session.logits()]
            for i in range(N_GATE_ANSWER - 1):
                if not answer:
                    tokens.append(int(rows[-1].argmax()))
                session.decode(tokens[i : i + 1])
                rows.append(session.logits())
            return tokens, np.array(rows)
        finally:
            session.close()

    #
    # one length
    #

    def _rows(self, length: int) -> list[Row]:
        plan = self.plan
        rows = [Row(f"{STOCK} {cells}", STOCK, cells, length, length) for cells in plan.baselines]
        for cells in plan.types:
            for name in self.policies:
                if name == Full.name:
                    rows.append(Row(f"{name} {cells}", name, cells, length, length))
                    continue
                for budget in plan.budgets:
                    label = f"{name} {budget_name(budget)} {cells}"
                    rows.append(Row(label, name, cells, length, length, budget))
        for depth in plan.references:
            if 0 < depth != length:
                rows.append(Row(f"{STOCK} f16 at {depth:,}", STOCK, "f16", length, depth))
        return rows

    def _group(self, length: int) -> list[Row]:
        with ExitStack() as stack:
            entries = []
            for row in self._rows(length):
                entries.append(self._open(row, stack))
            if not self.plan.fill:
                self._prefill([entry for entry in entries if not entry.row.is_reference], length)
            self._decode(entries)
            return [entry.row for entry in entries]

    def _session(self, n_ctx: int, cells: str, policy: KVPolicy | None) -> Session:
        exact = self.plan.exact and not isinstance(policy, Full)
        return Session(self.model, n_ctx, cells, policy, exact, self.plan.threads, CHUNK)

    def _open(self, row: Row, stack: ExitStack) -> _Entry:
        """A session with room for its prompt. If no prompt is to be evaluated, it is filled and compacted."""
        before, before_device = rss(), device_memory()
        policy = None if row.policy == STOCK else self.policies[row.policy]
        n_more = N_ROOM if policy is not None and policy.replays else 0
        session = self._session(row.depth + self.plan.rounds + 1 + n_more, row.cell_type, policy)
        stack.callback(session.close)
        if policy is not None:
            session.kv.reserve(row.depth)
        entry = _Entry(row, session)
        if self.plan.fill or row.is_reference:
            session.fill(row.depth)
            if not row.is_reference:
                self.report(f"{row.length:,} positions: {row.session}", 1)
        row.rss_bytes, row.device_bytes = rss() - before, device_memory() - before_device
        if self.plan.fill:
            self._compact(entry)
        return entry

    def _prefill(self, entries: list[_Entry], length: int) -> None:
        tokens = self._prompt(length)
        for turn, i in enumerate(range(0, length, CHUNK)):
            for entry in entries if turn % 2 == 0 else reversed(entries):
                entry.seconds += entry.session.decode(tokens[i : i + CHUNK])
                self.report(f"{length:,} positions: {entry.row.session}", 1)
        for entry in entries:
            entry.row.prefill_tokens_per_s = length / entry.seconds
            self._compact(entry)

    def _compact(self, entry: _Entry) -> None:
        row, session = entry.row, entry.session
        if row.budget is None:
            return
        before, before_device = rss(), device_memory()
        seconds = session.compact(row.budget, [] if self.plan.fill else self._prompt(row.length))
        stats = session.kv.stats()
        row.compaction_ms = 1000 * seconds + stats.t_score_ms + stats.t_select_ms + stats.t_gather_ms
        row.rss_bytes += rss() - before
        row.device_bytes += device_memory() - before_device

    def _decode(self, entries: list[_Entry]) -> None:
        """Median time of a token. The sessions take turns, so that a slow moment of the machine slows all of them."""
        token = self.tokens[:1]
        for entry in entries:
            stats = entry.session.kv.stats()
            row = entry.row
            row.kv_bytes_start = stats.bytes_live + stats.bytes_other
            row.n_cells = float(entry.session.kv.cells().mean()) if row.policy != STOCK else float(stats.n_past)
            entry.session.decode(token)  # builds the graph
            entry.times = []
        for turn in range(self.plan.rounds):
            for entry in entries if turn % 2 == 0 else reversed(entries):
                assert entry.times is not None
                entry.times.append(1000 * entry.session.decode(token))
            self.report("decoding", len(entries))
        for entry in entries:
            assert entry.times is not None
            row, stats = entry.row, entry.session.kv.stats()
            row.decode_ms, row.decode_ms_best, row.decode_ms_mean = (
                median(entry.times),
                min(entry.times),
                fmean(entry.times),
            )
            row.kv_bytes = stats.bytes_live + stats.bytes_other
            row.kv_bytes_peak = stats.bytes_peak + stats.bytes_other

    #
    # what there is
    #

    def _prompt(self, length: int) -> list[int]:
        return (self.tokens * (length // len(self.tokens) + 1))[:length]

    def _check_types(self) -> None:
        """Raise WindowKVError if a row of K or V is not a whole number of blocks of a type."""
        for cells in (*self.plan.types, *self.plan.baselines):
            if not fits(self.info, cells):
                raise WindowKVError(
                    f"{cells} cells come in blocks of {_block(cells)[0]} values, but heads of {self.info.path} have "
                    f"{self.info.head_dim_k} (K) and {self.info.head_dim_v} (V); leave {cells} out of --types and "
                    "--baselines"
                )

    def _check_memory(self, length: int) -> None:
        """Raise WindowKVError unless all sessions of a length fit into the host's memory beside the weights."""
        if self.model.n_gpu_layers:
            return
        position = sum(self.info.layer_bytes(il) for il in self.info.compressed_layers)
        steady, prompt = 0.0, 0.0
        for row in self._rows(length):
            block, n_bytes = _block(row.cell_type)
            room = row.depth + self.plan.rounds
            full = position * room * n_bytes / block / 2  # the header's bytes are those of f16
            kept = full if row.budget is None else full * min(1.0, n_cells(row.budget, row.depth) / row.depth)
            steady += kept if self.plan.fill else full
            prompt = max(prompt, full - kept if self.plan.fill else 0.0)
        need, have = steady + prompt, psutil.virtual_memory().available - self.info.file_size
        if need > have:
            raise WindowKVError(
                f"the caches of {length:,} positions take {need / 2**30:.1f} GiB together, {have / 2**30:.1f} GiB are "
                "free beside the weights; ask for shorter --lengths, or fewer --baselines, --policies, --budgets or "
                "--types"
            )


def _block(cells: str) -> tuple[int, int]:
    """Values and bytes of a block."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[cells.upper()]]


def fits(info: GGUFInfo, cells: str) -> bool:
    """Whether the rows of a model's heads are whole blocks of a type."""
    return info.head_dim_k % _block(cells)[0] == info.head_dim_v % _block(cells)[0] == 0


def budget_name(budget: float | int) -> str:
    """``12 %`` or ``512``."""
    return f"{budget:,}" if isinstance(budget, int) else f"{100 * budget:g} %"
