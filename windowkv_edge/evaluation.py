"""How a session with a policy evaluates: what is a prompt, when it is compacted, what the cache holds after errors."""

from __future__ import annotations

import ctypes
import inspect
import re
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import llama_cpp
import numpy as np
from llama_cpp.llama_tokenizer import LlamaTokenizer

from . import _native
from .arguments import check_grammar, check_tokens, need_tokenizer
from .asking import find_asked
from .errors import FormatError, UnsupportedCallError, UnsupportedModelError
from .guard import Guard, Interrupts, interrupt_soon
from .pins import Pins, Range, n_system
from .policies import KVPolicy
from .progress import KVProgress, report
from .prompts import Prompts, Step, n_shared, why_missed
from .session import PolicyCache
from .shift import GivenUp, Shifting

__all__ = ["PolicyEvaluation"]

GENERATE = tuple(inspect.signature(llama_cpp.Llama.generate).parameters)[2:]
"""Names of what ``generate`` takes behind the tokens."""


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A bound method that does not keep its object alive, so that dropping a session frees it at once."""
    weak = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        bound = weak()
        if bound is not None:
            bound(*args)

    return call


def _range(own: Any) -> Range:
    """Positions that a saved session pinned."""
    if isinstance(own, list) and len(own) == 2 and all(type(at) is int for at in own) and 0 <= own[0] < own[1] < 2**31:
        return own[0], own[1]
    raise FormatError(f"it pins the positions {own!r}, expected a start and a stop")


class PolicyEvaluation(Shifting):
    """``llama_cpp.Llama`` over the cache of a policy: ``eval`` and ``generate``; the rest of the class is
    :class:`windowkv_edge.Llama`.

    A session without a policy evaluates as stock does.
    """

    _kv_guard: Guard
    _kv_cache: PolicyCache | None
    _kv_given: dict[str, Any]
    _kv_model: str
    _kv_progress: KVProgress | None

    def _start_evaluation(self) -> None:
        # the part of generate() that is running now: its first eval() is the prompt
        self._kv_step: Literal["prompt", "answer"] | None = None
        self._kv_known = 0  # positions of the cache when this class last changed it
        self._kv_failed: list[BaseException] = []  # inside llama_decode, to be raised by the next call
        self._kv_prompts = Prompts()
        self._kv_pins = Pins()
        self._kv_asked_text = ""  # of the last chat
        self._kv_asked: Range | None = None  # where it stands in the prompt
        self._kv_wording = None  # what asks the model to repeat, once it was needed
        self._kv_asks: list[int] = []  # its last tokens, which observe the answer
        self._kv_taken: set[str] = set()
        self._kv_back = None
        self._kv_lost = GivenUp()
        self._kv_moving = self._kv_sampler = None
        self._kv_settled = False  # the end of a prompt was compacted
        self._kv_kept_for, self._kv_is_over = "", False

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens. Several of them, in one call or in more, are a prompt (see the class); a single one behind
        them ends it.

        Raises:
            ValueError: a token is outside of the vocabulary, or what is pinned leaves nothing of the budget for others.
            UnsupportedCallError: there is no room, positions that were compacted would have to be removed, or the
                session cannot be used now (see the class).
            NativeError: a computation failed or memory ran out.
            KeyboardInterrupt, Exception: Ctrl-C, or what the ``select`` of a policy in Python raised.

            After any of them ``n_tokens`` counts what the cache holds.
        """
        with self._use("eval()"):
            step: Step = self._kv_step
            n_before, n_shifted = self.n_tokens, self._kv_prompts.n_shifted
            if step == "prompt":
                self._kv_step = "answer"
            elif step is None and len(tokens) > 1:
                step = "piece"
            try:
                if self._kv_cache is None:
                    self._eval_stock(tokens, step)
                else:
                    self._eval(self._kv_cache, tokens, step)
            finally:
                n_gone = self._kv_prompts.n_shifted - n_shifted
                self._kv_prompts.evaluated(step, max(0, self.n_tokens + n_gone - n_before), n_before)
            if step == "prompt" and self._kv_cache is not None:
                self._kv_ahead = 0, 0
                self._end_prompt(self._kv_cache, self._kv_asked)

    def _eval_stock(self, tokens: Sequence[int], step: Step) -> None:
        if self._kv_progress is None or step not in ("prompt", "piece"):
            super().eval(tokens)
            return
        for i in range(0, max(1, len(tokens)), self.n_batch):  # as stock does
            super().eval(tokens[i : i + self.n_batch])
            report(self._kv_progress, self._kv_guard, min(i + self.n_batch, len(tokens)), len(tokens))

    def _eval(self, cache: PolicyCache, tokens: Sequence[int], step: Step) -> None:
        check_tokens(tokens, self._n_vocab)
        if self.n_tokens < self._kv_known:  # set back: the last logits are of another position
            self._requires_eval = True
        self._sync_positions()
        if step not in ("prompt", "piece") and len(tokens) > 0 and self._kv_prompts.is_open:
            self._end_prompt(cache)
        if step == "piece" and not self._kv_prompts.is_open:
            self._ask_as_given(cache)  # what it asks is not known
        self._keep_beginning(cache, len(tokens), step)
        for piece in self._pieces(cache, tokens):
            self._evaluate(cache, piece, step)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """See ``llama_cpp.Llama.generate``; what it evaluates first ends the prompt. It goes on from what the session
        holds or from a checkpoint (``kv_checkpoints``), whichever saves more.

        Raises:
            ValueError, UnsupportedCallError, NativeError, KeyboardInterrupt, Exception: see :meth:`eval`.
        """
        tokens = list(tokens)
        if self._kv_cache is not None:
            check_tokens(tokens, self._n_vocab)  # before anything of the last prompt goes
        own: Any = None
        reset = kwargs.get("reset", args[6] if len(args) > 6 else True)
        step: Literal["prompt", "answer"] | None = "prompt"
        named = {**dict(zip(GENERATE[6:], args[6:], strict=False)), **kwargs}
        sent = token = None
        at = -1  # position of the token
        try:
            while True:
                # only while it runs: somebody may hold it for long, and evaluate another prompt meanwhile
                n_sent = len(sent or ())
                try:
                    with self._use("generate()"):
                        if own is None:
                            tokens = self._fit_prompt(tokens, reset)
                            own = super().generate(tokens, *args, **kwargs)
                            self._prompt_begins(tokens if reset else [], len(tokens))
                        elif token is not None and at + n_sent >= self._n_ctx and self._shifts:
                            own.close()
                            at = self._make_answer_room(at, 1 + n_sent)
                            follow = [token, *(sent or ())]
                            own, sent = super().generate(follow, *args[:6], **{**named, "reset": False}), None
                        token, step = self._send(own, sent, step, is_answer=at >= 0)
                        at = self.n_tokens if at < 0 else at + 1 + n_sent
                except StopIteration:
                    return
                sent = yield token
        finally:
            if own is not None:
                own.close()

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """See ``llama_cpp.Llama.sample``; a prompt that was evaluated by hand ends here (see the class).

        Raises:
            UnsupportedCallError: there are no logits to sample from, or the session cannot be used now (see the class).
            AssertionError: nothing was evaluated (stock's).
            NativeError, KeyboardInterrupt, Exception: the compaction failed, see :meth:`eval`.
        """
        with self._kv_guard.use("sample()", reads=True):
            idx = kwargs.get("idx")
            at = -1 if idx is None else idx - self.n_tokens

            def check_logits() -> None:
                if self.n_tokens > 0 and not llama_cpp.llama_get_logits_ith(self.ctx, at):
                    raise UnsupportedCallError(
                        f"sample(): there are no logits {'of the last token' if idx is None else f'at idx={idx}'}; "
                        "evaluate tokens first (with logits_all=True for others than the last)"
                    )

            check_logits()
            cache = self._kv_cache
            if cache is None:
                self._kv_prompts.is_open = False
            elif self._kv_prompts.is_open and cache.kv.stats().n_past == self.n_tokens:
                with self._use("sample()"):
                    self._end_prompt(cache)
                check_logits()  # tokens that repeat others leave those of the last one alone
            return int(super().sample(*args, **kwargs))

    #
    # internals
    #

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self._kv_sampler is not None:
            return self._kv_sampler
        if kwargs.get("grammar") is not None:
            need_tokenizer(self._model, "a grammar")
            check_grammar(self._model, kwargs["grammar"])
        return super()._init_sampler(*args, **kwargs)

    def _send(
        self, own: Any, sent: Any, step: Literal["prompt", "answer"] | None, *, is_answer: bool
    ) -> tuple[int, Any]:
        """The next token of stock's generator, and what it does after it."""
        before = self._kv_step
        try:
            self._kv_step = step
            if is_answer:
                self._kv_sampler = self._sampler  # if it is asked for, the answer goes on behind a shift
            return own.send(sent), self._kv_step
        except StopIteration:
            raise
        except BaseException:
            if self._kv_cache is not None:
                self._align()
            raise
        finally:
            self._kv_step, self._kv_sampler = before, None

    def _use(self, call: str) -> AbstractContextManager[None]:
        self._raise_failed()
        if not self._kv_guard.is_inside:
            self._kv_step = None  # left behind by a Ctrl-C while it was reset
        return self._kv_guard.use(call)

    def _raise_failed(self) -> None:
        """Raise what a compaction inside ``llama_decode`` raised since the last call."""
        if self._kv_failed:
            raise self._kv_failed.pop()

    def _need_cache(self, what: str) -> PolicyCache:
        if self._kv_cache is None:
            raise UnsupportedCallError(
                f"{what} needs a session with a policy; create it with Llama(..., kv_policy='auto')"
            )
        return self._kv_cache

    def _check_text(self, policy: KVPolicy) -> None:
        """Raise where a policy would read the prompt's text and there is no tokenizer: llama.cpp aborts then."""
        if not policy.needs_task or not isinstance(self.tokenizer_, LlamaTokenizer):
            return
        vocab = llama_cpp.llama_model_get_vocab(self._model.model)
        if llama_cpp.llama_vocab_type(vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            raise UnsupportedModelError(
                f"{self.model_path}: kv_policy={policy.name!r} reads the prompt's text to tell its task, and the model "
                "has no tokenizer; give the policy task='localization' or task='aggregation'"
            )

    #
    # what a saved session takes along beside its cache, tokens and budget: values of JSON
    #

    def _kv_noted(self) -> dict[str, Any]:
        pins = self._kv_pins
        return {
            "known": self._kv_known, "open": self._kv_prompts.is_open, "changed": self._kv_when.changed,
            "settled": self._kv_settled, "lost": self._kv_lost.noted(), "shifted": self._kv_prompts.n_shifted,
            "pins": [list(own) for own in pins.asked], "system": list(pins.system or ()), "asks": list(self._kv_asks),
            "query": "" if self._kv_cache is None else self._kv_cache.bound.query, "kept_for": self._kv_kept_for,
        }  # fmt: skip

    def _kv_note(self, noted: Mapping[str, Any]) -> None:
        pins = [_range(own) for own in noted["pins"]]
        system = _range(noted["system"]) if noted["system"] else None
        lost, asks = GivenUp.of(noted["lost"]), [int(token) for token in noted["asks"]]
        query, self._kv_kept_for, self._kv_is_over = noted["query"], noted["kept_for"], False
        self._kv_known, self._kv_prompts.is_open = int(noted["known"]), bool(noted["open"])
        self._kv_when.changed, self._kv_settled = bool(noted["changed"]), bool(noted["settled"])
        self._kv_pins.asked, self._kv_pins.system, self._kv_asks = pins, system, asks
        self._kv_prompts.forget()
        self._kv_taken.clear()
        self._kv_lost, self._kv_prompts.n_shifted = lost, max(0, int(noted["shifted"]))
        if (cache := self._kv_cache) is not None:
            self._ask_as_given(cache)
            if self._may_ask(cache, query):
                cache.ask(query)

    #
    # what the cache holds
    #

    def _clear(self) -> None:
        with Interrupts():
            self._ctx.kv_cache_seq_rm(-1, 0, -1)
        self.n_tokens = self._kv_known = 0
        self._requires_eval = True
        self._kv_settled = self._kv_when.changed = False
        self._kv_prompts.is_open = False
        self._kv_prompts.changed(0)
        self._kv_lost, self._kv_asks, self._kv_kept_for, self._kv_is_over = GivenUp(), [], "", False

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

    def _agree(self, cache: PolicyCache) -> None:
        """Before a compaction that was asked for: what ``n_tokens`` was set back to, or what others decoded."""
        n_past = int(cache.kv.stats().n_past)
        if n_past == self.n_tokens or n_past > self._kv_known == self.n_tokens:
            return
        if n_past != self._kv_known or self.n_tokens > n_past:
            raise UnsupportedCallError(
                f"n_tokens is {self.n_tokens} and the cache holds {n_past} positions; set n_tokens = {n_past} to "
                "compact these, or call reset() and evaluate the prompt again"
            )
        self._sync_positions()

    def _evaluate(self, cache: PolicyCache, tokens: Sequence[int], step: Step) -> None:
        kv, room = cache.kv, self._room(cache, len(tokens), step)
        n_front, n_behind = self._kv_ahead if step in ("prompt", "piece") else (0, 0)
        if room is not None and step in ("prompt", "piece"):
            self._say_bounded(cache, len(tokens), room)
        elif room is None and len(tokens) > 1:
            kv.reserve(len(tokens))
        _native.clear_error()
        self._kv_prompts.changed(self.n_tokens)
        self._kv_lost.cut(self.n_tokens)
        try:
            with self._decoding(len(tokens)), self._aligned(), Interrupts() as interrupts:
                n_batch = self._accumulated_at_once(cache)  # as stock does, if nothing is summed up
                i = 0
                while i < len(tokens) or i == 0:
                    n = n_batch
                    if room is not None and len(tokens) > 0:
                        n = self._make_room(cache, tokens[i:], step, room)
                    elif step == "prompt" and i > 0:
                        self._replay_ahead(cache, len(tokens) - i)
                    batch = tokens[i : i + n]
                    self._accumulate(cache, len(batch))
                    # What generate() evaluates is known better here, and so is a last batch of one token. Of what is
                    # evaluated by hand, one token may follow a prompt of others, and theirs may follow several tokens
                    kv.watch(self._kv_step is None and (len(batch) > 1 or len(tokens) == 1))
                    super().eval(batch)
                    interrupts.check()
                    self._raise_failed()
                    if step in ("prompt", "piece"):
                        n_done, n_all = n_front + i + len(batch), n_front + len(tokens) + n_behind
                        report(self._kv_progress, self._kv_guard, n_done, n_all)
                    i += n
        finally:
            self._kv_known = self.n_tokens
            kv.watch(True)

    @contextmanager
    def _decoding(self, n_tokens: int) -> Iterator[None]:
        """What llama-cpp-python says of a batch of n_tokens that failed becomes an error of ours."""
        try:
            yield
        except RuntimeError as error:
            status = re.fullmatch(r"llama_decode returned (-?\d+)", str(error))
            if status is None:
                raise
            raise _native.decode_error(int(status[1]), n_tokens) from error

    @contextmanager
    def _aligned(self) -> Iterator[None]:
        """After an error or Ctrl-C ``n_tokens`` and the cache agree, about the batches that were evaluated."""
        try:
            yield
        except BaseException:
            self._requires_eval = True
            self._align()
            raise

    def _align(self) -> None:
        if self._kv_cache is not None:
            self._kv_cache.kv.end_observing()
        self._finish_move()
        n_past = int(_native.Context(self._ctx.ctx).stats().n_past)
        if n_past == self.n_tokens:
            return
        self._requires_eval = True
        if n_past < self.n_tokens:
            self.n_tokens = n_past
        elif not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):  # recurrent layers cannot go back
            self._clear()

    def _prompt_begins(self, tokens: Sequence[int], n_prompt: int) -> None:
        """Before ``generate`` evaluates n_prompt tokens; of ``tokens``, the first ones may be there."""
        cache, prompts, ahead = self._kv_cache, self._kv_prompts, (self._kv_n_read, self._kv_miss)
        self._kv_asked = None
        if cache is not None and self.n_tokens < self._kv_known:  # set back: the last logits are of another position
            self._requires_eval = True
        n_same = n_shared(tokens, self.input_ids[: self.n_tokens])
        n_boundary = 0 if cache is None else int(cache.kv.stats().n_boundary)
        is_known = prompts.logits(n_same) is not None
        why = why_missed(n_prompt, n_same, self.n_tokens, n_boundary, self._kv_when.changed, is_known)
        if cache is not None and len(tokens) != n_prompt:
            self._ask(cache, self.n_tokens + n_prompt, self.n_tokens)
        if cache is None or len(tokens) != n_prompt or n_prompt == 0:  # stock, or behind what is there
            prompts.begin(n_prompt, n_same, why if n_same > 0 else "", *ahead)
            return
        n_saved, n_most, more = self._go_back(cache, tokens)
        reasons = [why] * (n_saved < n_same - 1) + [more] * (more != "")
        prompts.begin(n_prompt, max(n_same, n_most), "; ".join(reasons), *ahead)
        self._find_messages(tokens)
        self._ask(cache, n_prompt, self._n_live(cache, np.array(tokens, dtype=np.intc)))

        # the same prompt again: below the boundary nothing can be removed, so that its last token cannot be evaluated
        # again for its logits, as stock does
        logits = prompts.logits(n_prompt)
        row = None if logits is None else llama_cpp.llama_get_logits_ith(self.ctx, -1)
        if logits is None or not row or n_saved < n_prompt:
            return
        with self._aligned():
            self._requires_eval = True
            if self._ctx.kv_cache_seq_rm(-1, n_prompt, -1):
                self.n_tokens = self._kv_known = n_prompt
                ctypes.memmove(row, logits.ctypes.data, logits.nbytes)
                self._requires_eval = False

    def _find_messages(self, tokens: Sequence[int]) -> None:
        def piece(token: int) -> bytes:
            return bytes(self._model.detokenize([token], True))

        pins = self._kv_pins
        n = n_system(pins.text, tokens, piece) if pins.text else 0
        pins.system = (0, n) if n > 0 else None
        self._kv_asked = find_asked(self._kv_asked_text, tokens, piece) if self._kv_asked_text else None

    def _prompt_below(self) -> None:
        """Inside ``llama_decode``: a single token follows a prompt that was not compacted."""
        if self._kv_cache is not None:
            with self._kv_guard.use("llama_decode()"):
                self._kv_taken.add("whole")  # no state is saved in there
                # else nothing observes, and nothing can be evaluated in there
                if self._kv_cache.kv.stats().n_queries > 0:
                    self._ask_as_given(self._kv_cache)
                    self._prompt_ended(self._kv_cache, can_repeat=False)

    def _failed_below(self, error: BaseException) -> None:
        """What :meth:`_prompt_below` raised, which C cannot pass on."""
        if isinstance(error, KeyboardInterrupt):
            interrupt_soon()
            return
        self._kv_failed[:] = [error]
        warnings.warn(
            f"a prompt was decoded on ctx and its compaction failed, the full cache stays: {error!r}", stacklevel=2
        )

    def _watch_context(self, cache: PolicyCache) -> None:
        """Compact what others decode on the context, see :meth:`_prompt_below`."""
        cache.kv.on_prompt(_weakly(self._prompt_below), _weakly(self._failed_below))
