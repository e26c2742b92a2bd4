"""Branches from one prompt: evaluated once with the full cache, compacted any number of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..bench.distributions import log_softmax
from ..bench.session import Model, Session
from ..policies import Full, KVPolicy
from ..replay import n_end
from ..stats import cell_types
from ..task import prompt_task

__all__ = ["Branches", "Read"]

N_BATCH = 512
"""Tokens evaluated at once, as in ``llama_cpp.Llama``: results depend on it in rounding."""

Read = Callable[[int, int], object]
"""``read(done, total)``: tokens of what is evaluated that were, and all of them; called behind every batch."""


class Branches:
    """A session whose uncompacted cache is kept, to go back to before every compaction.

    What a branch gives is what a fresh session with its policy gives, bit for bit: prompts are evaluated in the same
    batches; where attention is summed up in smaller ones, but for rounding. The copy of the cache takes as much memory
    as the cache itself; there is one.

    Args:
        model: the weights.
        n_ctx: positions, those decoded after the prompt included.
        n_observed: queries that are observed, the largest number that a policy asks for.
        cells: of K and V in the layers that policies compress, a name of :data:`windowkv_edge.budget.TYPES`; the cache
            of window layers stays f16. f16 where the heads' rows are no whole blocks of it: ``cells`` then says so.
        threads: CPU threads.
        accumulates: a policy scores by sums over the whole prompt, see :attr:`KVPolicy.accumulates`.
        read: see :data:`Read`.

    Raises:
        WindowKVError: see :class:`windowkv_edge.bench.session.Session`.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        n_observed: int,
        cells: str = "f16",
        threads: int = 2,
        accumulates: bool = False,
        read: Read | None = None,
    ) -> None:
        self.read = read
        n_observed = max(n_observed, N_BATCH) if accumulates else n_observed  # of a batch no query may be lost
        self.model, self.n_ctx, self.n_observed, self.accumulates = model, n_ctx, n_observed, accumulates
        self.session = Session(model, n_ctx, "f16", Full(), True, threads, N_BATCH, own_cells=cells)
        assert self.session.cache is not None
        self.cache = self.session.cache
        self.kv = self.session.kv
        self.kv.set_observed(n_observed)
        self.cells = cell_types(self.kv.stats())[0]
        self.type = int(self.kv.stats().type_k)
        """The same, as ``type_k`` and ``type_v`` of a session take it."""
        self.prompt: list[int] = []
        self.n_evaluated = 0
        """Tokens evaluated by prefill() so far; those that neighbouring prompts share are evaluated once."""
        self.decode_ms: float | None = None
        """Mean time per token of the last greedy() in ms, None if it decoded nothing."""
        self._bound: dict[int, tuple[KVPolicy, KVPolicy]] = {}

    def bind(self, policy: KVPolicy) -> KVPolicy:
        """The policy for this model.

        Raises:
            WindowKVError: see :meth:`Session.bind`.
        """
        if id(policy) not in self._bound:
            self._bound[id(policy)] = policy, self.session.bind(policy)
        return self._bound[id(policy)][1]

    def prefill(self, tokens: Sequence[int]) -> None:
        """Evaluate a prompt with the full cache and keep it; what it shares with the last one is reused.

        Raises:
            WindowKVError: there is no room, a computation failed or memory ran out.
        """
        tokens = list(tokens)
        if tokens == self.prompt:
            self.restore()
            return
        start = self._shared(tokens)
        if start == 0 or not self._go_back(start):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.session.ctx), True)
            start = 0
        self.prompt = []
        self.kv.reserve(len(tokens) - start)
        self.first = self.extend(tokens[start:])
        self.n_evaluated += len(tokens) - start
        self.kv.snapshot_drop()
        self.kv.snapshot_save()
        self.prompt = tokens

    def _shared(self, tokens: list[int]) -> int:
        """Whole batches that the last prompt shares with these tokens; the end's queries have to be observed anew."""
        n = min(len(tokens), len(self.prompt))
        same = np.array(tokens[:n], dtype=np.int64) == np.array(self.prompt[:n], dtype=np.int64)
        shared = n if same.all() else int(same.argmin())
        return max(0, min(shared, len(tokens) - max(1, self.n_observed))) // N_BATCH * N_BATCH

    def _go_back(self, start: int) -> bool:
        self.restore()
        if not llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.session.ctx), -1, start, -1):
            return False  # window and recurrent layers have moved on
        return True

    def restore(self) -> None:
        """Back to the full cache of the prompt.

        Raises:
            NativeError: there is no prompt, or memory ran out.
        """
        self.kv.snapshot_restore()

    def compact(self, policy: KVPolicy, n_cells: int) -> None:
        """Restore and compact to n_cells cells per (layer, kv head) on average.

        Raises:
            WindowKVError: there is no prompt, the policy cannot serve the model, a computation failed or memory ran
                out.
            Exception: what the ``select`` of a policy in Python raised.
        """
        self.restore()
        if not isinstance(policy, Full):
            if policy.replays:
                self._replay(len(self.prompt) - n_end(self.bind(policy), n_cells))
            task = prompt_task(self.prompt, self.model.detokenize) if policy.needs_task else "localization"
            self.cache.compact(n_cells, task, self.bind(policy))

    def _replay(self, stop: int) -> None:
        """Have the model repeat the prompt up to a position; what is kept has the scores of that then."""
        n_replayed = int(self.kv.stats().n_replayed)
        if n_replayed == stop:
            return
        if n_replayed > 0:  # as a session that begins here: pieces would be others
            prompt, self.prompt = self.prompt, []
            self.prefill(prompt)
        self.session.replay(self.prompt, stop)
        self.kv.snapshot_drop()
        self.kv.snapshot_save()

    def greedy(
        self,
        n: int,
        first: npt.NDArray[np.float32] | None = None,
        enough: Callable[[list[int]], bool] | None = None,
    ) -> list[int]:
        """The most likely continuation, n tokens at most, up to the end of the generation.

        Args:
            n: tokens.
            first: logits of the first one, float32 [n_vocab]; by default those of the prompt with the full cache.
            enough: says whether no more tokens are needed.

        Raises:
            WindowKVError: there is no room, a computation failed or memory ran out.
        """
        logits = self.first if first is None else first
        res: list[int] = []
        self.decode_ms = None
        times: list[float] = []
        while True:
            token = int(logits.argmax())
            if self.model.is_end(token):
                return res
            res.append(token)
            if len(res) >= n or (enough is not None and enough(res)):
                return res
            times.append(1000 * self.session.decode(res[-1:]))
            self.decode_ms = sum(times) / len(times)
            logits = self.session.logits()

    def extend(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Evaluate tokens behind what is there, without a compaction; the logits of the last: float32 [n_vocab].

        Raises:
            WindowKVError: there is no room, a computation failed or memory ran out.
        """
        for i in range(0, len(tokens), N_BATCH):
            batch = tokens[i : i + N_BATCH]
            if self.accumulates:
                stats = self.kv.stats()
                if int(stats.n_past) - int(stats.n_summed) + len(batch) > self.n_observed:
                    self.kv.accumulate()
            self.session.decode(batch)
            if self.read is not None:
                self.read(min(i + N_BATCH, len(tokens)), len(tokens))
        return self.session.logits()

    def log_probs(self, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
        """Log probabilities after each of the tokens, teacher-forced: float64 [len(tokens), n_vocab].

        Raises:
            ValueError, WindowKVError: see :meth:`Session.decode`.
        """
        return log_softmax(self.session.decode_all(tokens))

    def close(self) -> None:
        self.session.close()
