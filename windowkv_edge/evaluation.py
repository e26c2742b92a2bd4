"""How a session with a policy evaluates: what is a prompt, when it is compacted, what the cache holds after errors."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import llama_cpp
from llama_cpp.llama_tokenizer import LlamaTokenizer

from . import _native
from .arguments import check_grammar, check_tokens, need_tokenizer
from .errors import UnsupportedCallError, UnsupportedModelError
from .guard import Guard, Interrupts, interrupt_soon
from .policies import KVPolicy, Task
from .session import AfterPrompt, PolicyCache
from .task import prompt_task

__all__ = ["PolicyEvaluation"]


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A bound method that does not keep its object alive, so that dropping a session frees it at once."""
    weak = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        bound = weak()
        if bound is not None:
            bound(*args)

    return call


class PolicyEvaluation(llama_cpp.Llama):
    """``llama_cpp.Llama`` over the cache of a policy: ``eval`` and ``generate``; the rest of the class is
    :class:`windowkv_edge.Llama`.

    A session without a policy evaluates as stock does.
    """

    _kv_guard: Guard
    _kv_cache: PolicyCache | None
    _kv_when: AfterPrompt
    _kv_given: dict[str, Any]
    _kv_model: str

    def _start_evaluation(self) -> None:
        # the part of generate() that is running now: its first eval() is the prompt
        self._kv_step: Literal["prompt", "answer"] | None = None
        self._kv_known = 0  # positions of the cache when this class last changed it
        self._kv_failed: list[BaseException] = []  # inside llama_decode, to be raised by the next call

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens; a prompt is compacted afterwards (see the class).

        Raises:
            ValueError: a token is outside of the vocabulary.
            UnsupportedCallError: there is no room, positions that were compacted would have to be removed, or the
                session cannot be used now (see the class).
            NativeError: a computation failed or memory ran out.
            KeyboardInterrupt, Exception: Ctrl-C, or what the ``select`` of a policy in Python raised.

            After any of them ``n_tokens`` counts what the cache holds.
        """
        with self._use("eval()"):
            if self._kv_cache is None:
                super().eval(tokens)
                return
            check_tokens(tokens, self._n_vocab)
            is_prompt = self._kv_step == "prompt" or (self._kv_step is None and len(tokens) > 1)
            if self._kv_step == "prompt":
                self._kv_step = "answer"
            self._sync_positions()
            if len(tokens) > 1:
                self._kv_cache.kv.reserve(len(tokens))
            self._evaluate(self._kv_cache, tokens)
            if is_prompt:
                self._prompt_ended(self._kv_cache)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """See ``llama_cpp.Llama.generate``; what it evaluates first is the prompt.

        Raises:
            ValueError, UnsupportedCallError, NativeError, KeyboardInterrupt, Exception: see :meth:`eval`.
        """
        if self._kv_cache is not None:
            tokens = list(tokens)
            check_tokens(tokens, self._n_vocab)  # before anything of the last prompt goes
        own = super().generate(tokens, *args, **kwargs)
        step: Literal["prompt", "answer"] | None = "prompt"
        sent = None
        try:
            while True:
                # only while it runs: somebody may hold it for long, and evaluate another prompt meanwhile
                with self._use("generate()"):
                    before, self._kv_step = self._kv_step, step
                    try:
                        token = own.send(sent)
                    except StopIteration:
                        return
                    except BaseException:
                        if self._kv_cache is not None:
                            self._align()
                        raise
                    finally:
                        step, self._kv_step = self._kv_step, before
                sent = yield token
        finally:
            own.close()

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """See ``llama_cpp.Llama.sample``.

        Raises:
            UnsupportedCallError: there are no logits to sample from, or the session cannot be used now (see the class).
            AssertionError: nothing was evaluated (stock's).
        """
        with self._kv_guard.use("sample()", reads=True):
            idx = kwargs.get("idx")
            at = -1 if idx is None else idx - self.n_tokens
            if self.n_tokens > 0 and not llama_cpp.llama_get_logits_ith(self.ctx, at):
                raise UnsupportedCallError(
                    f"sample(): there are no logits {'of the last token' if idx is None else f'at idx={idx}'}; "
                    "evaluate tokens first (with logits_all=True for others than the last)"
                )
            return int(super().sample(*args, **kwargs))

    #
    # internals
    #

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("grammar") is not None:
            need_tokenizer(self._model, "a grammar")
            check_grammar(self._model, kwargs["grammar"])
        return super()._init_sampler(*args, **kwargs)

    def _use(self, call: str) -> AbstractContextManager[None]:
        self._raise_failed()
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

    def _task(self, cache: PolicyCache) -> Task:
        if not cache.policy.needs_task:
            return "localization"
        ids = self.input_ids[: self.n_tokens].tolist()
        return prompt_task(ids, lambda part: str(self.detokenize(part).decode("utf-8", "ignore")))

    #
    # what a saved session takes along beside its cache, tokens and budget: values of JSON
    #

    def _kv_noted(self) -> dict[str, Any]:
        return {"known": self._kv_known}

    def _kv_note(self, noted: Mapping[str, Any]) -> None:
        self._kv_known = int(noted["known"])

    #
    # what the cache holds
    #

    def _clear(self) -> None:
        with Interrupts():
            self._ctx.kv_cache_seq_rm(-1, 0, -1)
        self.n_tokens = self._kv_known = 0
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

    def _evaluate(self, cache: PolicyCache, tokens: Sequence[int]) -> None:
        kv = cache.kv
        _native.clear_error()
        try:
            # what is a prompt here is known better: a last batch of one token, drafts. A token that a user evaluates
            # may follow a prompt of others
            kv.watch(len(tokens) == 1 and self._kv_step is None)
            with self._aligned(), Interrupts() as interrupts:
                for i in range(0, max(1, len(tokens)), self.n_batch):  # as stock does
                    super().eval(tokens[i : i + self.n_batch])
                    interrupts.check()
                    self._raise_failed()
        except RuntimeError as error:
            status = re.fullmatch(r"llama_decode returned (-?\d+)", str(error))
            if status is None:
                raise
            raise _native.decode_error(int(status[1]), len(tokens)) from error
        finally:
            self._kv_known = self.n_tokens
            kv.watch(True)

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
        n_past = int(_native.Context(self._ctx.ctx).stats().n_past)
        if n_past == self.n_tokens:
            return
        self._requires_eval = True
        if n_past < self.n_tokens:
            self.n_tokens = n_past
        elif not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):  # recurrent layers cannot go back
            self._clear()

    def _prompt_ended(self, cache: PolicyCache) -> None:
        """Compact if the cache says that it is time; either way the prompt's last queries stay observed."""
        stats = cache.kv.stats()
        if not self._kv_when.is_due(stats.n_past, stats.n_boundary):
            cache.kv.prompt_done()
            return
        try:
            cache.compact(cache.n_cells(self._kv_when.budget), self._task(cache))
        except BaseException:
            cache.kv.prompt_done()
            raise

    def _prompt_below(self) -> None:
        """Inside ``llama_decode``: a single token follows a prompt that was not compacted."""
        if self._kv_cache is not None:
            with self._kv_guard.use("llama_decode()"):
                self._prompt_ended(self._kv_cache)

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
