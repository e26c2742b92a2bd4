"""Memory that runs out while a session is saved and loaded: every allocation of libllama and ggml fails once.

    LD_PRELOAD=.../failing-alloc.so python tests/session/state_allocations.py MODEL SCRATCH

Prints how many were tried, and ends with an error at what must not be: a call that neither works nor says that memory ran out, or a
session that is not what it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from failing_alloc import Allocator  # noqa: E402

from windowkv_edge import Llama, NativeError  # noqa: E402

COMMON = {"n_ctx": 256, "n_batch": 64, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


ABORTS = ("ggml_init", "ggml_backend_alloc_ctx_tensors_from_buft")
"""Functions of upstream's that end the process if they get no memory, in stock too: see test_allocations.py."""


def main(model: str, scratch: str) -> None:
    llm = Llama(model, kv_policy="snapkv(window_size=6)", kv_budget=24, **COMMON)
    path = Path(scratch) / "saved"
    llm.eval([*range(60)])
    llm.eval([5])
    llm.kv_save(path)
    saved = llm.save_state()
    llm.reset()
    llm.eval([*range(30, 80)])
    other = llm.save_state()

    allocator = Allocator()

    def every(call: Callable[[], object], done: bytes, restore: Callable[[], object]) -> int:
        """The session is as before or, if the call worked, as ``done``."""
        n_tried = 0
        restore()
        allocator.arm(0)
        call()
        stacks = allocator.stacks(range(allocator.disarm()))
        for n, (_, frames) in enumerate(stacks, 1):
            if allocator.where(frames, 1) in ABORTS:
                continue
            n_tried += 1
            restore()
            allocator.arm(n)
            try:
                call()
                want = done
            except (NativeError, MemoryError) as error:
                assert "memory" in str(error), error
                want = other.llama_state
            allocator.disarm()
            got = llm.save_state()
            assert got.llama_state == want, f"{n}: the session is another one"
            assert got.n_tokens == llm.kv_stats().n_past
        return n_tried

    counts = [
        every(lambda: llm.kv_load(path), saved.llama_state, lambda: llm.load_state(other)),
        every(lambda: llm.load_state(saved), saved.llama_state, lambda: llm.load_state(other)),
        every(llm.save_state, other.llama_state, lambda: llm.load_state(other)),
        every(lambda: llm.kv_save(Path(scratch) / "again"), other.llama_state, lambda: llm.load_state(other)),
    ]
    llm.eval([1, 2])
    llm.close()
    print(*counts)


if __name__ == "__main__":
    main(*sys.argv[1:])
