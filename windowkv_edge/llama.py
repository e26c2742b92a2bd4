"""``Llama``: llama-cpp-python's class with a KV policy."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native
from .arguments import CheckedModel, check_numbers
from .budget import check_budget, plain
from .errors import NativeError
from .guard import Closed, Guard, Interrupts, interrupt_soon
from .policies import Full, KVPolicy, get_policy
from .policies.base import at_least, true_or_false
from .session import AfterPrompt, PolicyCache, ragged_cache
from .states import SavedStates, model_id
from .stats import KVStats

__all__ = ["Llama"]

DEFAULT_BUDGET = 0.12
DEFAULT_MIN_PROMPT = 256

REFUSED = (
    ("embedding", "use a second session without a policy for embeddings"),
    ("vocab_only", "leave kv_policy out, there is no cache without weights"),
    ("swa_full", "leave it out, window layers keep their window and nothing else"),
)
"""Arguments that cannot be True with a policy, and what to do instead."""

CHANGEABLE = ("seed", "chat_format", "chat_handler", "draft_model", "verbose")
"""Arguments of ``llama_cpp.Llama`` that its attributes or methods change later."""


class Llama(SavedStates):
    """``llama_cpp.Llama`` whose KV cache keeps only the cells that matter.

    Policies compress the layers that attend to all positions. Layers with a sliding window (Gemma 3, gpt-oss) keep it,
    and recurrent layers (hybrids such as LFM2 or Granite 4) their state, as in stock llama.cpp.

    Takes every argument of ``llama_cpp.Llama`` and in addition:

    Args:
        kv_policy: None (stock behaviour), a name from :data:`windowkv_edge.POLICIES`, or a policy object.
        kv_budget: cells that stay after a prompt, per (layer, kv head) on average, the observation window included:
            a float in (0, 1] is a fraction of the positions seen, an int counts cells. Default 0.12. If the policy
            prefers a type of cells ("auto": q8_0), the fraction is a share of the bytes that f16 cells of all positions
            take; ``type_k`` and ``type_v`` override what it prefers.
        kv_min_prompt: with a fractional budget, sequences shorter than this many tokens are left whole
            (12 % of a 30-token chat would be 3 cells). Default 256.
        kv_exact: attend to f16 and f32 cells with stock's kernel until something is evicted, which gives stock's logits
            bit for bit. False = with ours from the start, which rounds differently and is faster on the CPU.

    A prompt is evaluated with the full cache and compacted afterwards, so the first generated token comes from full
    attention. A prompt is what ``generate`` (and everything built on it) evaluates first, or one call of ``eval`` with
    more than one token. Libraries that decode on ``ctx`` themselves get their prompt compacted before the first single
    token that follows it.

    With a policy flash attention is on, whatever ``flash_attn`` says. A session serves one thread at a time, in the
    process that created it.

    Raises:
        UnsupportedModelError: the model, backend or parameters cannot be served with a policy; says why.
        NativeError: there was no memory for the cache.
        MissingProfileError: the policy needs head scores and the model has none.
        OSError: files that the policy needs cannot be read.
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
        if "_kv_guard" in self.__dict__:  # a second time: nothing else would free the first one's memory
            self.close()
        # close() and __del__ need these even if the arguments are refused; with a guard all of them are there
        self._stack = ExitStack()
        self._kv_cache: PolicyCache | None = None
        self._kv_freed = False
        self._kv_guard = Guard()

        if kv_policy is None and kv_budget is not None:
            raise ValueError(
                f"kv_budget={kv_budget!r} without kv_policy has no effect; name a policy, e.g. kv_policy='auto'"
            )
        kv_min_prompt, kv_exact = plain(kv_min_prompt), plain(kv_exact)
        at_least("kv_min_prompt", kv_min_prompt, 0)
        true_or_false("kv_exact", kv_exact)
        check_numbers(kwargs)
        policy = None if kv_policy is None else get_policy(kv_policy)
        if kv_budget is not None:
            kv_budget = check_budget(kv_budget)
        self._kv_when = AfterPrompt(DEFAULT_BUDGET if kv_budget is None else kv_budget, kv_min_prompt)

        # what is absent stays absent in a copy: it may be resolved otherwise there
        self._kv_given = {**kwargs, "kv_min_prompt": kv_min_prompt, "kv_exact": kv_exact}
        if kv_budget is not None:
            self._kv_given["kv_budget"] = kv_budget

        self._start_evaluation()
        if policy is None:
            super().__init__(model_path, **kwargs)
            self._model.__class__ = CheckedModel
            return
        self._kv_create(model_path, policy, kv_exact, kwargs)

    def _kv_create(self, model_path: str, policy: KVPolicy, exact: bool, kwargs: dict[str, Any]) -> None:
        for name, instead in REFUSED:
            if kwargs.get(name):
                raise ValueError(f"{name}=True cannot be combined with kv_policy={policy.name!r}; {instead}")
        if not kwargs.get("flash_attn", True):
            warnings.warn(
                f"flash_attn=False is stock's default and kv_policy={policy.name!r} needs flash attention: it is on",
                stacklevel=3,
            )
        kwargs = {**kwargs, "flash_attn": True, "swa_full": False}

        # what the caller says about cells goes before what the policy prefers
        said = kwargs.get("type_k") is not None or kwargs.get("type_v") is not None
        try:
            with ragged_cache(policy, model_path, None if said else policy.cells):
                with Interrupts():
                    super().__init__(model_path, **kwargs)
            self._model.__class__ = CheckedModel
            self._check_text(policy)
            cache = PolicyCache(
                self._ctx.ctx,
                policy,
                path=self.model_path,
                metadata=self.metadata,
                model=self._model.model,
                exact=exact,
                guard=self._kv_guard,
            )
            self._watch_context(cache)
            self._kv_model = model_id(self)
            self._kv_initial = super().__getstate__()  # type: ignore[no-untyped-call]
        except BaseException:
            # the weights may be loaded, and whoever holds the error holds this session
            self.close()
            raise
        self._kv_cache, self._kv_first = cache, policy

    #
    # policy and budget
    #

    @property
    def kv_policy(self) -> KVPolicy | None:
        """The policy; None if the session has none.

        Setting it clears the session (another policy's cells are not its own); the next prompt is evaluated anew.
        A session that was created without a policy stays without one.

        Raises:
            UnsupportedCallError: when set, the session has no policy or cannot be used now (see the class).
            UnsupportedModelError, MissingProfileError, OSError, ValueError, TypeError: when set, as when creating a
                session; the old policy stays.
        """
        return None if self._kv_cache is None else self._kv_cache.policy

    @kv_policy.setter
    def kv_policy(self, policy: str | KVPolicy) -> None:
        self._kv_failed.clear()  # what the old one raised
        with self._use("setting kv_policy"):
            cache = self._need_cache("setting kv_policy")
            new = get_policy(policy)
            self._check_text(new)
            bound = cache.bind(new)
            with self._aligned():
                self._clear()
                cache.set_policy(new, bound)

    @property
    def kv_budget(self) -> float | int:
        """The budget; setting it takes effect at the next compaction. A prompt that was compacted before is evaluated
        anew when it is asked again.

        Raises:
            TypeError, ValueError: when set, see the class.
        """
        return self._kv_when.budget

    @kv_budget.setter
    def kv_budget(self, budget: float | int) -> None:
        with self._use("setting kv_budget"):
            budget = check_budget(budget)
            before, self._kv_when.budget = self._kv_when.budget, budget
            self._kv_given["kv_budget"] = budget
            cache = self._kv_cache
            changed = (type(budget), budget) != (type(before), before)  # 1 is a cell, 1.0 all of them
            if cache is not None and changed and cache.kv.stats().n_boundary > 0:
                self._requires_eval = True

    def kv_compact(self, kv_budget: float | int | None = None) -> KVStats:
        """Compact now, whatever ``kv_min_prompt`` says.

        Compacts also what other libraries decoded on ``ctx``.

        Args:
            kv_budget: for this compaction only; None = the session's.

        Raises:
            UnsupportedCallError: the session has no policy or cannot be used now (see the class), or ``n_tokens`` and
                the cache disagree about what is there.
            NativeError: a computation failed or memory ran out.
            TypeError, ValueError: bad budget.
            Exception: what the ``select`` of a policy in Python raised; nothing was evicted.
        """
        with self._use("kv_compact()"):
            cache = self._need_cache("kv_compact()")
            budget = self.kv_budget if kv_budget is None else check_budget(kv_budget)
            self._agree(cache)
            cache.compact(cache.n_cells(budget), self._task(cache))
            try:
                return self.kv_stats()
            except NativeError as error:
                raise NativeError(f"the compaction is done, reading its statistics failed: {error}") from error

    def kv_stats(self) -> KVStats:
        """Cells, bytes and times of the cache now.

        Raises:
            UnsupportedCallError: the session was closed or cannot be used now (see the class).
        """
        with self._kv_guard.use("kv_stats()", reads=True):
            if self._kv_cache is None:
                return KVStats.read(_native.Context(self._ctx.ctx), None)
            return KVStats.read(self._kv_cache.kv, self._kv_cache.name)

    def kv_positions(self, layer: int, head: int) -> npt.NDArray[np.int32]:
        """Positions that one kv head holds, ascending.

        Args:
            layer: 0-based among the compressed layers; ``kv_stats().layers`` has their indices in the model.
            head: kv head, 0-based.

        Returns:
            int32 [cells].

        Raises:
            UnsupportedCallError: the session has no policy, was closed or cannot be used now (see the class).
            ValueError: there is no such layer or head.
        """
        with self._kv_guard.use("kv_positions()", reads=True):
            return self._need_cache("kv_positions()").kv.positions(layer, head)

    #
    # llama_cpp.Llama
    #

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """See ``llama_cpp.Llama.embed``; needs a session without a policy.

        Raises:
            RuntimeError: the session was not created with ``embedding=True``, or cannot be used now (see the class).
        """
        with self._use("embed()"):
            return super().embed(*args, **kwargs)

    def reset(self) -> None:
        """Forget the sequence; with a policy its memory is released at once.

        Raises:
            UnsupportedCallError: the session cannot be used now (see the class); a closed one has nothing to forget.
        """
        if self._kv_guard.closed:
            self.n_tokens = 0
            return
        self._kv_failed.clear()
        with self._use("reset()"):
            if self._kv_cache is not None:
                with self._aligned():
                    self._clear()
            super().reset()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Free the model and its cache; calling it again does nothing.

        Raises:
            UnsupportedCallError: another thread is inside a call, or a policy selects.
        """
        if "_kv_guard" not in self.__dict__ or self._kv_freed:  # without one: arguments that Python refused
            return
        if self._kv_guard.forked:  # whichever call the parent was inside
            self._free()
            return
        with self._kv_guard.use("close()", closes=True):
            self._free()

    def _free(self) -> None:
        self._kv_guard.closed = True
        if self._kv_cache is not None:
            self._kv_cache.kv.close()
        super().close()
        # their memory is gone, and stock's methods would read it
        gone: Any = Closed()
        self._ctx = self._model = self._batch = self.tokenizer_ = gone
        self._kv_freed = True

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        try:
            self.close()
        except KeyboardInterrupt:
            self.close()
            interrupt_soon()
        except Exception:
            if not is_finalizing():  # modules that closing needs may be gone; the memory goes with the process
                raise

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        if self._kv_cache is None:
            return state
        changed = {name: state[name] for name in CHANGEABLE if state[name] != self._kv_initial[name]}
        if self._kv_cache.policy is not self._kv_first:
            # cells were chosen for the first policy; another one may prefer others
            with self._kv_guard.use("copying a session whose policy was changed", reads=True):
                own = self._kv_cache.kv.stats()
            changed |= {"type_k": int(own.type_k), "type_v": int(own.type_v)}
        return {"model_path": self.model_path, **self._kv_given, **changed, "kv_policy": self._kv_cache.policy}

    #
    # internals
    #

    @property
    def _kv(self) -> _native.Context | None:
        return None if self._kv_cache is None or self._kv_guard.closed else self._kv_cache.kv

    @property
    def _kv_bound(self) -> KVPolicy:
        return Full() if self._kv_cache is None else self._kv_cache.bound
