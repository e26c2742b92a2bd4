"""One llama_context on a model that several contexts share: no Python between the call and the clock."""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._logger import llama_log_callback

from .. import _native
from ..budget import TYPES
from ..errors import UnsupportedCallError, WindowKVError
from ..heads import METADATA_KEY
from ..policies import KVPolicy
from ..replay import Wording, n_at_once, n_end, replay
from ..session import PolicyCache, ragged_cache

__all__ = ["TYPES", "Model", "Session"]

_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR

# llama.cpp's errors while a model is measured; its other lines would only break the progress bar
_errors: deque[str] = deque(maxlen=1)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_error(level: int, text: bytes, data: object) -> None:
    if level == _LOG_ERROR:
        _errors.append(text.decode("utf-8", "replace").strip())


def _reason(fallback: str) -> str:
    """What llama.cpp said last, forgotten with this call."""
    return _errors.pop() if _errors else fallback


@contextmanager
def _one_kind() -> Iterator[None]:
    """What a policy says about its arguments and files is one kind of error for the command line."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, WindowKVError):
            raise
        raise WindowKVError(str(error)) from error


class Model:
    """Weights and vocabulary. Until :meth:`close` llama.cpp logs nothing in this process.

    Raises:
        WindowKVError: the model cannot be loaded.
    """

    def __init__(self, path: Path, n_gpu_layers: int = 0) -> None:
        llama_cpp.llama_log_set(_keep_error, None)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        self.path, self.n_gpu_layers = path, n_gpu_layers
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            self.close()
            raise WindowKVError(f"cannot load {path}: {_reason('the file may be damaged, or the memory too small')}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        # without a tokenizer llama.cpp aborts where it is asked for text
        self.has_text = llama_cpp.llama_vocab_type(self.vocab) != llama_cpp.LLAMA_VOCAB_TYPE_NONE

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Tokens of a text; [] if the model has no tokenizer.

        Args:
            text: the text.
            special: the names of special tokens in it stand for these.
        """
        data = text.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 8))()
        if not self.has_text:
            return []
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), False, special)
        return list(tokens[: max(0, n)])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones; what is not UTF-8 is replaced. "" if the model has no tokenizer."""
        if not self.has_text:
            return ""
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        data = ctypes.create_string_buffer(16 * len(tokens) + 16)
        n = llama_cpp.llama_detokenize(self.vocab, ids, len(ids), data, len(data), False, False)
        if n < 0:
            data = ctypes.create_string_buffer(-n)
            n = llama_cpp.llama_detokenize(self.vocab, ids, len(ids), data, len(data), False, False)
        return data.raw[:n].decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        """Text of one token, special ones by their names. "" if the model has no tokenizer."""
        if not self.has_text:
            return ""
        data = ctypes.create_string_buffer(256)
        n = llama_cpp.llama_token_to_piece(self.vocab, token, data, len(data), 0, True)
        return data.raw[: max(0, n)].decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether a token ends a generation."""
        return self.has_text and bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def metadata(self, key: str) -> dict[str, str]:
        """The value of one string key, if it is there."""
        size = llama_cpp.llama_model_meta_val_str(self.model, key.encode(), ctypes.create_string_buffer(1), 0)
        if size < 0:
            return {}
        value = ctypes.create_string_buffer(size + 1)
        llama_cpp.llama_model_meta_val_str(self.model, key.encode(), value, size + 1)
        return {key: value.value.decode("utf-8", "replace")}

    def about(self) -> dict[str, str]:
        """The metadata that policies look at."""
        arch = self.metadata("general.architecture")
        keys = [f"{name}.rope.{key}" for name in arch.values() for key in ("freq_base", "dimension_count")]
        found = [self.metadata(key) for key in ("general.name", METADATA_KEY, *keys)]
        return {**arch, **{key: value for part in found for key, value in part.items()}}

    def close(self) -> None:
        if self.model:
            llama_cpp.llama_model_free(self.model)
            self.model = None
        llama_cpp.llama_log_set(llama_log_callback, None)


class Session:
    """A context with stock's cache (policy None) or a ragged one.

    Args:
        model: the weights.
        n_ctx: positions.
        cells: a name of :data:`TYPES`, for K and V.
        policy: None or a policy.
        exact: attend as stock does until something is evicted.
        threads: CPU threads.
        n_batch: tokens evaluated at once.
        own_cells: of the layers that the policy compresses, where they fit, instead of ``cells``.

    Raises:
        UnsupportedModelError: the model, backend or parameters cannot be served with the policy.
        WindowKVError: there is no memory, or what the policy needs cannot be read or does not fit.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        cells: str,
        policy: KVPolicy | None,
        exact: bool,
        threads: int,
        n_batch: int,
        own_cells: str | None = None,
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = TYPES[cells]
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.swa_full = False
        params.no_perf = True

        self.model, self.policy, self.n_batch = model, policy, n_batch
        self.cache: PolicyCache | None = None
        _errors.clear()  # of other sessions
        with ragged_cache(policy, str(model.path), own_cells):
            self.ctx = llama_cpp.llama_init_from_model(model.model, params)
            if not self.ctx:
                raise WindowKVError(
                    f"no context of {n_ctx:,} positions, {cells} cells: {_reason('is there enough memory?')}"
                )
        self.kv = _native.Context(self.ctx)
        if policy is not None:
            try:
                with _one_kind():
                    self.cache = PolicyCache(
                        self.ctx,
                        policy,
                        path=str(model.path),
                        metadata=model.about(),
                        model=model.model,
                        exact=exact,
                    )
            except BaseException:
                self.close()
                raise

    @property
    def n_past(self) -> int:
        """Positions that the sequence has seen."""
        return int(self.kv.stats().n_past)

    def bind(self, policy: KVPolicy) -> KVPolicy:
        """The policy for this model; see :meth:`windowkv_edge.session.PolicyCache.bind`.

        Raises:
            WindowKVError: the policy cannot serve the model, or what it needs cannot be read or does not fit.
        """
        with _one_kind():
            return self._ragged("bind()").bind(policy)

    def decode(self, tokens: Sequence[int]) -> float:
        """Evaluate up to ``n_batch`` tokens; seconds.

        Raises:
            ValueError: no tokens or too many, for which llama.cpp would abort.
            WindowKVError: there is no room, a computation failed or memory ran out.
        """
        self._check_batch(len(tokens))
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch only points to it
        batch = llama_cpp.llama_batch_get_one(ids, len(ids))
        _native.clear_error()
        start = time.perf_counter()
        status = llama_cpp.llama_decode(self.ctx, batch)
        llama_cpp.llama_synchronize(self.ctx)
        res = time.perf_counter() - start
        if status != 0:
            raise _native.decode_error(status, len(tokens))
        return res

    def decode_all(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Evaluate up to ``n_batch`` tokens at once; the logits of each: float32 [len(tokens), n_vocab].

        Raises:
            ValueError, WindowKVError: see :meth:`decode`.
        """
        self._check_batch(len(tokens))
        n, n_past = len(tokens), self.n_past
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, n_past + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            _native.clear_error()
            status = llama_cpp.llama_decode(self.ctx, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise _native.decode_error(status, n)
        rows = llama_cpp.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(rows, shape=(n, self.model.n_vocab)).copy()

    def _check_batch(self, n_tokens: int) -> None:
        if not 1 <= n_tokens <= self.n_batch:
            raise ValueError(f"a batch of {n_tokens} tokens, expected 1 to {self.n_batch} (n_batch)")

    def fill(self, n_tokens: int) -> None:
        """Random cells for this many positions.

        Raises:
            ValueError: the cache is not empty, or does not hold as many.
            NativeError: memory ran out.
        """
        self.kv.fill(n_tokens)

    def logits(self) -> npt.NDArray[np.float32]:
        """Of the last token: float32 [n_vocab]."""
        pointer = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,)).copy()

    def compact(self, budget: float | int, tokens: Sequence[int] = ()) -> float:
        """Select and gather, as a prompt of ``n_past`` tokens is compacted.

        Args:
            budget: cells that stay.
            tokens: the prompt, which is repeated if the policy goes by that; empty = token 0, where nothing was read.

        Returns:
            Seconds that the repetition took, which no statistics know of.

        Raises:
            NativeError: a computation failed or memory ran out.
        """
        cache = self._ragged("compact()")
        n_cells = cache.n_cells(budget)
        bound, n = cache.bound, self.n_past
        res = self.replay(tokens or [0] * n, n - n_end(bound, n_cells)) if bound.replays else 0.0
        cache.compact(n_cells)
        return res

    def replay(self, tokens: Sequence[int], stop: int) -> float:
        """Have the model repeat the positions up to ``stop`` that nobody has repeated, as a session does; seconds.

        Args:
            tokens: those of the positions.
            stop: behind the last one.

        Raises:
            NativeError: a computation failed or memory ran out.
        """
        wording = Wording.of(self.model.tokenize) if self.model.has_text else Wording((), ())
        seconds = 0.0

        def decode(own: list[int]) -> None:
            nonlocal seconds
            for i in range(0, len(own), self.n_batch):
                seconds += self.decode(own[i : i + self.n_batch])

        n_room = int(llama_cpp.llama_n_ctx(self.ctx)) - self.n_past
        for _ in replay(self.kv, tokens, stop, wording, min(n_at_once(wording, self.n_batch), n_room), decode):
            pass
        return seconds

    def _ragged(self, what: str) -> PolicyCache:
        if self.cache is None:
            raise UnsupportedCallError(f"{what} needs a session with a policy, this one has stock's cache")
        return self.cache

    def close(self) -> None:
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
            self.ctx = None
