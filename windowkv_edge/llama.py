"""``Llama``: llama-cpp-python's class with a KV policy."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native
from .arguments import CheckedModel, check_numbers
from .asking import asked_text
from .budget import check_budget, plain
from .checkpoints import Checkpoints, check_checkpoints
from .errors import NativeError
from .guard import Closed, Guard, Interrupts, interrupt_soon
from .pins import n_pinned, system_text
from .policies import Full, KVPolicy, get_policy
from .limit import PREFILLS, Limit, Prefill, check_interval, check_limit
from .limited import Limited
from .policies.base import at_least, number_of, one_of, true_or_false
from .progress import KVProgress
from .repeating import ASKED_QUERIES, AskedQuery
from .session import AfterPrompt, PolicyCache, ragged_cache
from .shift import SHIFTS, Shift
from .states import model_id
from .stats import KVStats

__all__ = ["Llama"]

DEFAULT_BUDGET = 0.12
DEFAULT_MIN_PROMPT = 256
DEFAULT_GROWTH = 1.5

REFUSED = (
    ("embedding", "use a second session without a policy for embeddings"),
    ("vocab_only", "leave kv_policy out, there is no cache without weights"),
    ("swa_full", "leave it out, window layers keep their window and nothing else"),
)
"""Arguments that cannot be True with a policy, and what to do instead."""

CHANGEABLE = ("seed", "chat_format", "chat_handler", "draft_model", "verbose")
"""Arguments of ``llama_cpp.Llama`` that its attributes or methods change later."""


class Llama(Limited):
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
        kv_growth: after the first compaction, a prompt is compacted if something grew by more than this factor: the
            cells held, compared with what ``kv_budget`` grants for the positions seen; or, with a fractional budget,
            these positions, compared with those at the last compaction. Default 1.5; 1 compacts after every prompt.
        kv_limit: bound of the cells at every moment: cells per (layer, kv head) on average (4096), or bytes ("512MiB").
            Behind a prompt there are no more, and while an answer grows neither; while a prompt is read, the peak is
            the limit and one batch. None = none. With a limit, ``kv_budget`` is 1.0 by default: what fits stays. What
            others decode on ``ctx`` is not bounded, nor is what :meth:`kv_load` brings until the next token.
        kv_prefill: how a long prompt is evaluated. "exact": with the full cache, which the limit bounds afterwards.
            "auto": within the limit, or without one within the memory that is free; the full cache as long as it fits.
            "bounded": also within what ``kv_budget`` grants for the whole prompt, so that the peak is that and one
            batch. Where the next tokens find no room, what was read so far is compacted, as what is asked attends to
            it: the end of a chat's last user message, else the prompt's last tokens. They are evaluated behind it, and
            taken back; of a prompt that is evaluated by hand they are not known.
        kv_interval: tokens between two compactions of an answer that grows, in chats less those of the question that
            observe. With a limit, so many cells become free whenever it is reached; None = an eighth of them. Without
            one, an answer holds what ``kv_budget`` grants for the positions seen and this many tokens at most; None =
            it grows without end.
        kv_shift: what happens at the end of ``n_ctx``. "refuse": an error, as without a policy. "shift": the oldest
            positions are given up, half of those that can go, and the others move down; the first four and those that
            are pinned stay. So a chat goes on without an end. Its history, sent as a whole at every turn, is known,
            what was given up included, and only what is new is evaluated. A prompt that is longer than the context is
            read in pieces; what is given up of it is gone. ``max_tokens=None`` stands for ``n_ctx`` tokens then.
            Budgets are about the positions that are there.
        kv_checkpoints: host memory for states to go back to: a message that was edited, a turn that was taken back and
            an answer that is asked for again cost the tokens that are new, where cells that were compacted, windows or
            recurrent layers could not go back. "auto": compressed states only, together no more than four times what
            the session itself takes at that moment. Bytes ("256MiB"): as many, and the whole cells of a prompt before
            its compaction too, if they fit: another question about the same text costs the question. 0 or None: none.
            The least recently used ones go first, all of them with :meth:`reset` and with another policy. Not with
            ``logits_all=True``.
        kv_query: which question cells are kept for. "last": the one that the prompt's end asks. "any": whatever will be
            asked about what was read, for which the model repeats it before cells go; that takes about as long as
            reading it. "both": half of the cells each, or the policy's ``replay_share``. "auto": what the policy is
            made for; the policy "auto" then keeps cells for both in chats (:meth:`create_chat_completion`) that have no
            ``kv_limit``, ``kv_interval`` or ``kv_prefill="bounded"``. Only the policy "auto" can do all three; another
            one raises ValueError for what it does not do. ``kv_stats().query`` says what cells are kept for. An
            attribute, too, which can be set.
        kv_pin_system: in chats, the system prompt always stays, see :meth:`kv_pin`; where it takes more than half of
            the budget it does not, and a warning says so. Default True.
        kv_progress: called behind every batch of a prompt with two numbers of tokens: those of it that were evaluated,
            and those that it evaluates in all. It may raise, which ends the call as Ctrl-C does; it may not change the
            session. An attribute, too, which can be set; copies of the session have none.
        kv_exact: attend to f16 and f32 cells with stock's kernel until something is evicted, which gives stock's logits
            bit for bit. False = with ours from the start, which rounds differently and is faster on the CPU.

    A prompt is evaluated with the full cache and compacted afterwards, so the first generated token comes from full
    attention. A prompt is what ``generate`` (and everything built on it) evaluates first. By hand it is what calls of
    ``eval`` with more than one token evaluate; it ends with :meth:`sample`, :meth:`kv_compact` or a single token.
    Libraries that decode on ``ctx`` themselves get their prompt compacted before the first single token that follows.

    The first prompt is compacted if it exceeds the budget, later ones (a chat's turns) if the cache grew, see
    ``kv_growth``: no more than ``kv_growth`` times the budget's cells are held when an answer begins. All cells compete
    then, those of earlier turns with those of a document, observed by the newest prompt's end. The cells of an answer
    come on top, unless ``kv_limit`` or ``kv_interval`` bounds them. Then it is compacted while it grows: its end
    observes, in a chat with the end of the question, and the newest tokens take the policy's ``answer_share`` of the
    cells that stay.

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
        kv_growth: float = DEFAULT_GROWTH,
        kv_pin_system: bool = True,
        kv_exact: bool = True,
        kv_limit: int | str | None = None,
        kv_prefill: Prefill = "auto",
        kv_progress: KVProgress | None = None,
        kv_checkpoints: str | int | None = "auto",
        kv_interval: int | None = None,
        kv_shift: Shift = "refuse",
        kv_query: AskedQuery = "auto",
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
        if kv_policy is None and (kv_limit is not None or kv_prefill != "auto"):
            raise ValueError(
                f"kv_limit={kv_limit!r} and kv_prefill={kv_prefill!r} without kv_policy have no effect; name a policy, "
                "e.g. kv_policy='auto'"
            )
        if kv_policy is None and kv_interval is not None:
            raise ValueError(f"kv_interval={kv_interval!r} without kv_policy has no effect; name a policy, e.g. 'auto'")
        one_of("kv_query", kv_query, ASKED_QUERIES)
        if kv_policy is None and kv_query != "auto":
            raise ValueError(f"kv_query={kv_query!r} without kv_policy has no effect; name a policy, e.g. 'auto'")
        self._kv_query = kv_query
        one_of("kv_prefill", kv_prefill, PREFILLS)
        kv_interval = plain(kv_interval)
        if kv_interval is not None:
            at_least("kv_interval", kv_interval, 1)
        self._kv_interval = kv_interval
        one_of("kv_shift", kv_shift, SHIFTS)
        if kv_shift == "shift" and kv_policy is None:
            raise ValueError("kv_shift='shift' needs a policy: kv_policy='full' keeps every cell")
        self._kv_shift = kv_shift
        self._kv_limit = None if kv_limit is None else Limit(check_limit(kv_limit), kv_interval)
        self._kv_prefill = kv_prefill
        self._kv_checkpoints = Checkpoints(check_checkpoints(kv_checkpoints, kv_policy))
        self.kv_progress = kv_progress
        kv_min_prompt, kv_growth, kv_exact = plain(kv_min_prompt), plain(kv_growth), plain(kv_exact)
        at_least("kv_min_prompt", kv_min_prompt, 0)
        number_of("kv_growth", kv_growth, 1)
        kv_pin_system = plain(kv_pin_system)
        true_or_false("kv_pin_system", kv_pin_system)
        true_or_false("kv_exact", kv_exact)
        check_numbers(kwargs)
        policy = None if kv_policy is None else get_policy(kv_policy)
        if policy is not None:
            check_interval(kv_interval, policy)
            if kv_query != "auto":
                policy.for_query(kv_query)  # before the weights are read
        if kv_budget is not None:
            kv_budget = check_budget(kv_budget)
        default = DEFAULT_BUDGET if kv_limit is None else 1.0
        self._kv_when = AfterPrompt(default if kv_budget is None else kv_budget, kv_min_prompt, kv_growth)

        # what is absent stays absent in a copy: it may be resolved otherwise there
        own = {"kv_min_prompt": kv_min_prompt, "kv_growth": kv_growth, "kv_pin_system": kv_pin_system}
        self._kv_given = {**kwargs, **own, "kv_exact": kv_exact}
        if kv_budget is not None:
            self._kv_given["kv_budget"] = kv_budget
        if kv_shift != "refuse":
            self._kv_given["kv_shift"] = kv_shift
        if kv_query != "auto":
            self._kv_given["kv_query"] = kv_query
        if kv_limit is not None:
            self._kv_given["kv_limit"] = kv_limit
        if kv_prefill != "auto":
            self._kv_given["kv_prefill"] = kv_prefill
        if kv_checkpoints != "auto":
            self._kv_given["kv_checkpoints"] = kv_checkpoints
        if kv_interval is not None:
            self._kv_given["kv_interval"] = kv_interval

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
            self._ask_as_given(cache)
            if self._kv_limit is not None:
                self._kv_limit.check(cache.kv.stats(), cache.bound, self._n_repeating_least(cache.bound))
            self._check_shift(cache)
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
            check_interval(self._kv_interval, new)
            self._check_text(new)
            bound = cache.bind(new)
            asks = cache.of_query(new, bound, self._given_query)
            n_least = self._n_repeating_least(asks)
            if self._kv_limit is not None:
                self._kv_limit.check(cache.kv.stats(), asks, n_least)
            with self._aligned():
                self._clear()
                self._kv_checkpoints.clear()
                before = cache.policy, cache.own
                cache.set_policy(new, bound)
                try:
                    if self._kv_limit is not None:
                        # with the queries that this one observes
                        self._kv_limit.check(cache.kv.stats(), asks, n_least)
                except ValueError:
                    cache.set_policy(*before)
                    raise
                finally:
                    self._ask_as_given(cache)

    @property
    def kv_budget(self) -> float | int:
        """The budget; setting it takes effect at the next prompt's end, whatever ``kv_growth`` says. A prompt that was
        compacted before is evaluated anew when it is asked again, unless there is a checkpoint of it with this budget.

        Raises:
            TypeError, ValueError: when set, see the class.
        """
        return self._kv_when.budget

    @kv_budget.setter
    def kv_budget(self, budget: float | int) -> None:
        with self._use("setting kv_budget"):
            budget = check_budget(budget)
            n = n_pinned(self._kv_pins.asked)
            if isinstance(budget, int) and 0 < n >= budget:
                raise ValueError(
                    f"kv_budget={budget} leaves nothing for cells other than the {n} pinned ones; give more, or call "
                    "kv_unpin()"
                )
            before, self._kv_when.budget = self._kv_when.budget, budget
            self._kv_given["kv_budget"] = budget
            cache = self._kv_cache
            changed = (type(budget), budget) != (type(before), before)  # 1 is a cell, 1.0 all of them
            if cache is not None and changed and cache.kv.stats().n_boundary > 0:
                self._kv_when.changed = self._requires_eval = True
                self._kv_prompts.changed(0)

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
            was_open, self._kv_prompts.is_open = self._kv_prompts.is_open, False
            if was_open:
                self._kv_asks = []
            try:
                n_cells = cache.n_cells(budget)
                if cache.bound.replays and float(cache.kv.cells().mean()) > n_cells:
                    self._replay(cache, self._n_to_replay(cache, n_cells), n_cells)
                self._compact(cache, n_cells)
            except BaseException:
                self._kv_prompts.is_open = was_open
                raise
            self._kv_settled = True
            if kv_budget is None:
                self._kv_when.changed = False
            self._bound_checkpoints(cache)
            try:
                self._keep_logits(cache)
                return self.kv_stats()
            except NativeError as error:
                raise NativeError(f"the compaction is done, reading its statistics failed: {error}") from error

    def kv_stats(self) -> KVStats:
        """Cells, bytes and times of the cache now, and what was evaluated of the prompts.

        Raises:
            UnsupportedCallError: the session was closed or cannot be used now (see the class).
        """
        with self._kv_guard.use("kv_stats()", reads=True):
            if self._kv_cache is None:
                return KVStats.read(_native.Context(self._ctx.ctx), None, "", self._kv_prompts, self._kv_checkpoints)
            kv, name, query = self._kv_cache.kv, self._kv_cache.name, self._kv_cache.bound.query
            return KVStats.read(kv, name, query, self._kv_prompts, self._kv_checkpoints)

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

    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """See ``llama_cpp.Llama.create_chat_completion``; the system prompt is pinned (``kv_pin_system``), and the last
        user message observes the chat while that is read within a limit, and the answer where that is compacted.

        Raises:
            ValueError, RuntimeError: see :meth:`generate`, and llama-cpp-python's.
        """
        if self._kv_cache is None:
            return super().create_chat_completion(messages, *args, **kwargs)
        texts = system_text(messages) if self._kv_given["kv_pin_system"] else "", asked_text(messages)
        with self._chatting(*texts):
            res = super().create_chat_completion(messages, *args, **kwargs)
        return res if isinstance(res, dict) else self._streaming(res, *texts)

    @contextmanager
    def _chatting(self, system: str, asked: str) -> Iterator[None]:
        """A prompt that begins meanwhile is that of a chat with these texts."""
        self._kv_pins.text, self._kv_asked_text, self._kv_is_chat = system, asked, True
        try:
            yield
        finally:
            self._kv_pins.text, self._kv_asked_text, self._kv_is_chat = "", "", False

    def _streaming(self, own: Any, *texts: str) -> Iterator[Any]:
        """The chunks of a chat, whose prompt begins with the first one."""
        own = iter(own)
        while True:
            with self._chatting(*texts):
                try:
                    chunk = next(own)
                except StopIteration:
                    return
            yield chunk

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """See ``llama_cpp.Llama.embed``; needs a session without a policy.

        Raises:
            RuntimeError: the session was not created with ``embedding=True``, or cannot be used now (see the class).
        """
        with self._use("embed()"):
            return super().embed(*args, **kwargs)

    def reset(self) -> None:
        """Forget the sequence and all checkpoints; with a policy the memory is released at once.

        Raises:
            UnsupportedCallError: the session cannot be used now (see the class); a closed one has nothing to forget.
        """
        if self._kv_guard.closed:
            self.n_tokens = 0
            return
        self._kv_failed.clear()
        with self._use("reset()"):
            self._kv_prompts.is_open = False
            if self._kv_step is None:
                self._kv_pins.system = self._kv_asked = None
                self._kv_checkpoints.clear()
            if self._kv_cache is not None:
                with self._aligned():
                    self._clear()
                if self._kv_step is None:
                    self._ask_as_given(self._kv_cache)
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
            self._kv_checkpoints.clear()
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
