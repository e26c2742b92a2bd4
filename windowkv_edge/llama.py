"""``Llama``: llama-cpp-python's class with a KV policy."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from . import _native
from .budget import check_budget, n_cells
from .compaction import compact
from .errors import UnsupportedCallError, UnsupportedModelError
from .heads import ModelHeads
from .policies import Full, KVPolicy, Task, get_policy
from .stats import KVStats, cell_types
from .task import prompt_task

__all__ = ["Llama"]

DEFAULT_BUDGET = 0.12
DEFAULT_MIN_PROMPT = 256


def bind_policy(
    kv: _native.Context, policy: KVPolicy, path: str, metadata: Mapping[str, str], model: Any
) -> KVPolicy:
    """The policy for a model (a ctypes pointer), if model and backend serve it.

    Raises:
        UnsupportedModelError: they do not; says why.
        MissingProfileError, OSError, ValueError: see :meth:`ModelHeads.importance`.
    """
    try:
        kv.ready(policy.ragged)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from None
    stats = kv.stats()
    n_layer, n_head_kv = int(llama_cpp.llama_model_n_layer(model)), int(stats.n_head_kv)
    n_head = n_head_kv * int(stats.n_gqa)
    return policy.bind(ModelHeads(path, metadata, n_layer, n_head_kv, kv.layers(), n_head=n_head))


class Llama(llama_cpp.Llama):
    """``llama_cpp.Llama`` whose KV cache keeps only the cells that matter.

    Policies compress the layers that attend to all positions. Window layers (Gemma 3, gpt-oss) keep their window and
    recurrent layers (hybrids such as LFM2 or Granite 4) their state, as in stock llama.cpp.

    Takes every argument of ``llama_cpp.Llama`` and in addition:

    Args:
        kv_policy: None (stock behaviour), a name from :data:`windowkv_edge.POLICIES`, or a policy object.
        kv_budget: cells that stay after a prompt, per (layer, kv head) on average, observation window included:
            a float in (0, 1] is a fraction of the positions seen, an int counts cells. Default 0.12. With a policy that
            prefers cells of its own ("auto": q8_0) the fraction is one of the bytes that f16 cells of all positions
            take; ``type_k`` and ``type_v`` go before what the policy prefers.
        kv_min_prompt: with a fractional budget, sequences shorter than this many tokens are left whole
            (12 % of a 30-token chat would be 3 cells). Default 256.
        kv_exact: until something is evicted, f16 and f32 cells are attended to by stock's kernel, which gives stock's
            logits bit for bit. False = by ours, which rounds differently and is faster on the CPU.

    A prompt is evaluated with the full cache and compacted afterwards, so the first generated token comes from full
    attention. A prompt is what ``generate`` (and everything built on it) evaluates first, or one call of ``eval`` with
    more than one token.

    Raises:
        UnsupportedModelError: the model, backend or parameters cannot be served with a policy; says why.
        ValueError, TypeError: bad arguments.
    """

    def __init__(
        self,
        model_path: str,
        *,
        kv_policy: str | KVPolicy | None = None,
        kv_budget: float | int | None = None,
        kv_min_prompt: int = DEFAULT_MIN_PROMPT,
        kv_exact: bool = True,
        **kwargs: Any,
    ) -> None:
        # close() and __del__ need these even if the arguments are refused
        self._stack = ExitStack()
        self._kv: _native.Context | None = None

        if kv_policy is None and kv_budget is not None:
            raise ValueError(
                f"kv_budget={kv_budget!r} without kv_policy has no effect; name a policy, e.g. kv_policy='auto'"
            )
        if isinstance(kv_min_prompt, bool) or not isinstance(kv_min_prompt, int) or kv_min_prompt < 0:
            raise ValueError(f"kv_min_prompt is {kv_min_prompt!r}, expected an int of at least 0 tokens")

        self._kv_policy = None if kv_policy is None else get_policy(kv_policy)
        self._kv_budget = check_budget(DEFAULT_BUDGET if kv_budget is None else kv_budget)
        self._kv_min_prompt = kv_min_prompt
        self._kv_exact = bool(kv_exact)
        self._kv_bound = self._kv_policy or Full()
        self._kv_generating = 0
        self._kv_prompt_next = False

        if self._kv_policy is None:
            super().__init__(model_path, **kwargs)
            return

        for name, value, fix in (
            ("flash_attn", False, "leave it out, a policy turns it on"),
            ("embedding", True, "use a second session without a policy for embeddings"),
            ("vocab_only", True, "leave kv_policy out, there is no cache without weights"),
            ("swa_full", True, "leave it out, window layers keep their window and nothing else"),
        ):
            if kwargs.get(name) is value:
                raise ValueError(f"{name}={value} cannot be combined with kv_policy={self._kv_policy.name!r}; {fix}")
        kwargs.update(flash_attn=True, swa_full=False)

        # what the caller says about cells goes before what the policy prefers
        said = kwargs.get("type_k") is not None or kwargs.get("type_v") is not None
        try:
            with _native.pending(self._kv_policy.n_observed, None if said else self._kv_policy.cells):
                try:
                    super().__init__(model_path, **kwargs)
                except ValueError as error:
                    reason = _native.last_error()
                    if reason:
                        raise UnsupportedModelError(f"{model_path}: {reason}") from error
                    raise
            kv = _native.Context(self._ctx.ctx)
            self._kv_bound = self._bind(kv, self._kv_policy)
            kv.set_attention("auto" if kv_exact else "ragged")
        except BaseException:
            # the weights may be loaded, and whoever holds the error holds this session
            self.close()
            raise
        self._kv = kv

    #
    # policy and budget
    #

    @property
    def kv_policy(self) -> KVPolicy | None:
        """The policy, None without one.

        Setting it clears the session (another policy's cells are not its own); the next prompt is evaluated anew.
        A session that was created without a policy stays without one.
        """
        return self._kv_policy

    @kv_policy.setter
    def kv_policy(self, policy: str | KVPolicy) -> None:
        kv = self._need_kv("setting kv_policy")
        new = get_policy(policy)
        bound = self._bind(kv, new)
        self._clear()
        kv.set_window(new.n_observed)
        self._kv_policy, self._kv_bound = new, bound

    @property
    def kv_budget(self) -> float | int:
        """The budget; setting it takes effect at the next compaction."""
        return self._kv_budget

    @kv_budget.setter
    def kv_budget(self, budget: float | int) -> None:
        self._kv_budget = check_budget(budget)

    def kv_compact(self, kv_budget: float | int | None = None) -> KVStats:
        """Compact now, whatever ``kv_min_prompt`` says.

        Args:
            kv_budget: for this compaction only; None = the session's.

        Raises:
            UnsupportedCallError: the session has no policy.
        """
        kv = self._need_kv("kv_compact()")
        budget = self._kv_budget if kv_budget is None else check_budget(kv_budget)
        self._sync_positions()
        compact(kv, self._kv_bound, self._n_cells(budget), self._task())
        return self.kv_stats()

    def kv_stats(self) -> KVStats:
        """Cells, bytes and times of the cache now."""
        if self._ctx.ctx is None:
            raise UnsupportedCallError("kv_stats() needs an open session, this one was closed")
        ctx = _native.Context(self._ctx.ctx)
        stats = ctx.stats()
        if self._kv is not None:
            cells = self._kv.cells()
        else:
            cells = np.full((stats.n_layer, stats.n_head_kv), stats.n_past, dtype=np.int32)
        return KVStats(
            policy="stock" if self._kv_policy is None else self._kv_policy.name,
            n_past=stats.n_past,
            layers=ctx.layers(),
            cells=cells,
            cell_types=cell_types(stats),
            bytes_live=stats.bytes_live,
            bytes_full=stats.bytes_full,
            bytes_other=stats.bytes_other,
            bytes_peak=stats.bytes_peak,
            bytes_released=stats.bytes_released,
            n_compactions=stats.n_compactions,
            t_score_ms=stats.t_score_ms,
            t_compact_ms=stats.t_select_ms + stats.t_gather_ms,
        )

    def kv_positions(self, layer: int, head: int) -> npt.NDArray[np.int32]:
        """Positions that one kv head holds, ascending.

        Args:
            layer: 0-based among the compressed layers; ``kv_stats().layers`` has their indices in the model.
            head: kv head, 0-based.

        Returns:
            int32 [cells].
        """
        return self._need_kv("kv_positions()").positions(layer, head)

    #
    # llama_cpp.Llama
    #

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens; a prompt is compacted afterwards (see the class)."""
        if self._kv is None:
            super().eval(tokens)
            return

        is_prompt = self._kv_prompt_next or (self._kv_generating == 0 and len(tokens) > 1)
        self._kv_prompt_next = False

        self._sync_positions()
        if len(tokens) > 1:
            self._kv.reserve(len(tokens))
        super().eval(tokens)

        if is_prompt and len(tokens) > 0 and self._is_due():
            self.kv_compact()

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """See ``llama_cpp.Llama.generate``; what it evaluates first is the prompt."""
        with self._generating() if self._kv is not None else nullcontext():
            yield from super().generate(tokens, *args, **kwargs)

    def set_cache(self, cache: Any) -> None:
        """Refused with a policy: saved states of compacted caches are not supported yet."""
        if cache is not None:
            self._refuse("set_cache()", "the prefix of the last prompt is reused without it")
        super().set_cache(cache)

    def save_state(self) -> Any:
        """Refused with a policy: saved states of compacted caches are not supported yet."""
        self._refuse("save_state()", "keep the session open, or evaluate the prompt again")
        return super().save_state()

    def load_state(self, state: Any) -> None:
        """Refused with a policy: saved states of compacted caches are not supported yet."""
        self._refuse("load_state()", "evaluate the prompt instead")
        super().load_state(state)

    def reset(self) -> None:
        """Forget the sequence; with a policy its memory is released at once."""
        super().reset()  # type: ignore[no-untyped-call]
        if self._kv is not None:
            self._clear()

    def close(self) -> None:
        """Free the model and its cache; calling it again does nothing."""
        self._kv = None
        super().close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        if self._kv_policy is not None:
            state.update(
                kv_policy=self._kv_policy,
                kv_budget=self._kv_budget,
                kv_min_prompt=self._kv_min_prompt,
                kv_exact=self._kv_exact,
            )
        return state

    #
    # internals
    #

    def _need_kv(self, what: str) -> _native.Context:
        if self._kv is None:
            raise UnsupportedCallError(
                f"{what} needs a session with a policy; create it with Llama(..., kv_policy='auto')"
            )
        return self._kv

    def _bind(self, kv: _native.Context, policy: KVPolicy) -> KVPolicy:
        return bind_policy(kv, policy, self.model_path, self.metadata, self._model.model)

    def _refuse(self, what: str, instead: str) -> None:
        if self._kv_policy is not None:
            raise UnsupportedCallError(
                f"{what} is not supported with kv_policy={self._kv_policy.name!r} yet; {instead}"
            )

    def _clear(self) -> None:
        self._ctx.kv_cache_seq_rm(-1, 0, -1)
        self.n_tokens = 0
        self._requires_eval = True

    def _sync_positions(self) -> None:
        """Bring the native cache to ``n_tokens`` positions, as ``eval`` does before every decode."""
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            stats = _native.Context(self._ctx.ctx).stats()
            if self.n_tokens < stats.n_boundary:
                reason = f"positions below {stats.n_boundary} were compacted and cannot be removed one by one"
            else:
                reason = f"the window or recurrent layers moved on to {stats.n_past} and cannot go back that far"
            raise UnsupportedCallError(
                f"n_tokens was set to {self.n_tokens}, but {reason}; call reset() and evaluate the prompt again"
            )

    def _is_due(self) -> bool:
        if isinstance(self._kv_budget, int):
            return self.n_tokens > self._kv_budget
        return self.n_tokens >= self._kv_min_prompt and self._kv_budget < 1.0

    def _n_cells(self, budget: float | int) -> int:
        """Cells per (layer, kv head) that a budget stands for now."""
        assert self._kv is not None and self._kv_policy is not None
        types = () if self._kv_policy.cells is None else cell_types(self._kv.stats())
        return n_cells(budget, self.n_tokens, *types)

    def _task(self) -> Task:
        assert self._kv_policy is not None
        if not self._kv_policy.needs_task:
            return "localization"
        ids = self.input_ids[: self.n_tokens].tolist()
        return prompt_task(ids, lambda part: str(self.detokenize(part).decode("utf-8", "ignore")))

    @contextmanager
    def _generating(self) -> Iterator[None]:
        self._kv_generating += 1
        self._kv_prompt_next = True
        try:
            yield
        finally:
            self._kv_generating -= 1
            self._kv_prompt_next = False
