"""What memory may run out in: a load, a prompt, a compaction and 64 tokens, by the C interface and by sessions."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.ctypeslib

__all__ = ["PHASES", "Limited", "Native", "Session", "Steps"]

N_CTX, N_UBATCH, N_PROMPT, N_CELLS, N_TOKENS = 256, 32, 80, 24, 64
N_VOCAB = 128  # of tiny_model
TOKENS = np.random.default_rng(7).integers(0, N_VOCAB, N_PROMPT + 2 * N_TOKENS).tolist()
PHASES = ("load", "prompt", "compaction", "tokens")


class Refused(Exception):
    """A call that reported a failure; says which way."""


class Steps:
    """The phases, and what is held between them."""

    HELD = ("positions", "cells", "stats", "logits")

    n_done = 0
    """Tokens evaluated behind the prompt."""

    n_wanted = 0
    """Tokens that :meth:`tokens` goes on to."""

    def load(self) -> None: ...
    def prompt(self) -> None: ...
    def compaction(self) -> None: ...
    def tokens(self) -> None: ...
    def clear(self) -> None: ...
    def close(self) -> None: ...

    def held(self) -> tuple[Any, ...]:
        """What has to be as in a run without a failure, in the order of HELD."""
        raise NotImplementedError

    def check(self, phase: str, said: str, before: tuple[Any, ...] | None, ours: bool) -> Iterator[str]:
        """What is wrong right behind a failure; ``ours`` if it was in a function of ours."""
        raise NotImplementedError


def _said(phase: str, said: str, before: Any, n_pos: int, cells: Any, n_done: int) -> Iterator[str]:
    """What is wrong about a message, and about what it does not say."""
    if "memory" not in said:
        yield "the message does not name memory"
    if phase == "tokens" and n_pos != N_PROMPT + n_done and not (n_pos == 0 and "was cleared" in said):
        yield f"{n_pos} positions behind {N_PROMPT + n_done} tokens"
    if phase == "compaction" and cells != before[1] and not re.search("compaction is (half )?done", said):
        yield f"cells before {before[1]}, behind {cells}"


def _logits(ctx: Any) -> bytes:
    """Of the last token; b"" if no token's were computed, as behind a part of a prompt."""
    import llama_cpp

    row = llama_cpp.llama_get_logits_ith(ctx, -1)
    return numpy.ctypeslib.as_array(row, shape=(N_VOCAB,)).tobytes() if row else b""


class Native(Steps):
    """The C interface, as a program would use it. Without ``policy`` stock's functions alone."""

    def __init__(self, model: str, policy: Any) -> None:
        import llama_cpp

        self.low, self.path, self.policy = llama_cpp, model, policy
        self.model = self.ctx = self.kv = None
        if policy is not None:
            from windowkv_edge import _native

            self.last_error = _native.last_error
            for name in ("struct wkv_policy *", "struct wkv_stats *", "struct llama_context *", "double *", "int32_t[]"):
                _native.ffi.typeof(name)  # parsed once, not in every child
        self._no_log = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self._no_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def load(self) -> None:
        low = self.low
        params = low.llama_model_default_params()
        params.n_gpu_layers, params.use_mmap = 0, False  # read into memory: more that can fail
        self.model = self.model or low.llama_model_load_from_file(self.path.encode(), params)
        if not self.model:
            raise Refused("llama_model_load_from_file gave NULL")
        own = low.llama_context_default_params()
        own.n_ctx, own.n_batch, own.n_ubatch, own.n_threads, own.n_threads_batch = N_CTX, N_PROMPT, N_UBATCH, 1, 1
        own.flash_attn_type = 1
        if self.policy is None:
            self.ctx = low.llama_init_from_model(self.model, own)
        else:
            from windowkv_edge import _native

            with _native.pending(self.policy.n_observed):
                self.ctx = low.llama_init_from_model(self.model, own)
        if not self.ctx:
            raise Refused("llama_init_from_model gave NULL")
        if self.policy is not None:
            self.kv = _native.Context(self.ctx)
            self.kv.ready(True)

    def _decode(self, tokens: list[int]) -> None:
        ids = (self.low.llama_token * len(tokens))(*tokens)
        status = self.low.llama_decode(self.ctx, self.low.llama_batch_get_one(ids, len(ids)))
        if status:
            raise Refused(f"llama_decode returned {status}: {'' if self.kv is None else self.last_error()}")

    def prompt(self) -> None:
        if self.kv is not None:
            self.kv.reserve(N_PROMPT)
        self._decode(TOKENS[:N_PROMPT])
        self.n_done = 0

    def compaction(self) -> None:
        from windowkv_edge import _native

        assert self.kv is not None
        self.kv.compact(_native.policy_struct(self.policy.parts("localization")), N_CELLS)

    def tokens(self) -> None:
        while self.n_done < self.n_wanted:
            self._decode([TOKENS[N_PROMPT + self.n_done]])
            self.n_done += 1

    def clear(self) -> None:
        self.low.llama_memory_clear(self.low.llama_get_memory(self.ctx), True)

    def close(self) -> None:
        if self.ctx:
            self.low.llama_free(self.ctx)
        if self.model:
            self.low.llama_model_free(self.model)

    def n_pos(self) -> int:
        return int(self.low.llama_memory_seq_pos_max(self.low.llama_get_memory(self.ctx), 0)) + 1

    def held(self) -> Any:
        n_pos, logits = self.n_pos(), _logits(self.ctx)
        if self.kv is None:
            return n_pos, None, None, logits
        own = self.kv.stats()
        stats = (own.n_past, own.n_boundary, own.n_observed, own.bytes_live, own.bytes_pool, own.bytes_other)
        return n_pos, self.kv.cells().tolist(), stats, logits

    def check(self, phase: str, said: str, before: Any, ours: bool) -> Iterator[str]:
        if self.policy is None or (phase == "load" and not ours):
            return
        if phase == "load":
            if "memory" not in f"{said} {self.last_error()}":
                yield f"the message does not name memory: {self.last_error()}"
            return
        n_pos, cells, stats, _ = self.held()
        if n_pos != stats[0]:
            yield f"llama_memory_seq_pos_max says {n_pos} positions, wkv_get_stats {stats[0]}"
        if phase == "prompt" and n_pos % N_UBATCH and n_pos != N_PROMPT:
            yield f"{n_pos} positions behind a part of a prompt"
        yield from _said(phase, said, before, n_pos, cells, self.n_done)


class Session(Steps):
    """``windowkv_edge.Llama``; what it says has to be an exception that names memory."""

    def __init__(self, model: str, policy: Any) -> None:
        import windowkv_edge

        self.package, self.path, self.policy, self.llm = windowkv_edge, model, policy, None

    OPTIONS: ClassVar[dict[str, Any]] = {"kv_budget": 1.0, "n_batch": N_PROMPT, "n_ubatch": N_UBATCH}

    def load(self) -> None:
        self.llm = self.package.Llama(
            self.path, kv_policy=self.policy, n_ctx=N_CTX, n_threads=1, n_threads_batch=1, verbose=False, **self.OPTIONS
        )

    def _own(self) -> Any:
        assert self.llm is not None
        self.llm._kv_guard._pid = os.getpid()  # one thread: this child may go on
        return self.llm

    def prompt(self) -> None:
        self._own().eval(TOKENS[:N_PROMPT])
        self.n_done = 0

    def compaction(self) -> None:
        self._own().kv_compact(N_CELLS)

    def tokens(self) -> None:
        while self.n_done < self.n_wanted:
            self._own().eval([TOKENS[N_PROMPT + self.n_done]])
            self.n_done += 1

    def clear(self) -> None:
        self._own().reset()

    def close(self) -> None:
        if self.llm is not None:
            self._own().close()
        self.llm = None
        gc.collect()  # what errors and their frames hold

    def held(self) -> Any:
        llm = self._own()
        stats = llm.kv_stats()
        own = (stats.n_past, stats.bytes_live, stats.bytes_other)
        return llm.n_tokens, stats.cells.tolist(), own, _logits(llm.ctx) if llm.n_tokens else b""

    def check(self, phase: str, said: str, before: Any, ours: bool) -> Iterator[str]:
        kind = said.split(": ", 1)[0]
        if phase == "load" and not ours:
            return
        if kind not in ("MemoryError", "NativeError"):
            yield f"a {kind} was raised, expected MemoryError or NativeError"
        if phase == "load":
            yield from () if "memory" in said else ("the message does not name memory",)
            return
        n_tokens, cells, stats, _ = self.held()
        if n_tokens != stats[0]:
            yield f"n_tokens is {n_tokens}, kv_stats().n_past {stats[0]}"
        yield from _said(phase, said, before, n_tokens, cells, self.n_done)


class Limited(Session):
    """The same with ``kv_limit``: compactions between the batches of the prompt, which its last tokens observe, and between those
    that are generated; of these positions some are given up on the way."""

    OPTIONS: ClassVar[dict[str, Any]] = {"kv_limit": 40, "kv_shift": "shift", "n_batch": 16, "n_ubatch": 16}

    SHIFTS_AT = 6
    """Tokens behind the prompt."""

    has_shifted = False

    def prompt(self) -> None:
        stream = self._own().generate(TOKENS[:N_PROMPT], temp=0.0)
        try:
            next(stream)
        finally:
            stream.close()
        self.n_done, self.has_shifted = 0, False

    def tokens(self) -> None:
        n_wanted = self.n_wanted
        if n_wanted >= self.SHIFTS_AT > self.n_done or self.n_done == self.SHIFTS_AT and not self.has_shifted:
            self.n_wanted = self.SHIFTS_AT
            try:
                super().tokens()
            finally:
                self.n_wanted = n_wanted
            llm = self._own()
            llm._give_up(llm._kv_cache, 8)
            self.has_shifted = True
        super().tokens()

    def held(self) -> Any:
        """Positions that were given up count."""
        n_tokens, cells, (n_past, *others), logits = super().held()
        n = self._own().kv_stats().n_shifted
        return n_tokens + n, cells, (n_past + n, *others), logits
