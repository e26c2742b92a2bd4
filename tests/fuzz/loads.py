"""Loads every model named on the standard input and decodes a few tokens; says how it went, a line for each.

Each is loaded in a fork of this process: what kills it kills nothing else, and libraries are loaded once.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys

seconds, mib, policy = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if policy:
    from windowkv_edge import Llama, WindowKVError
else:
    from llama_cpp import Llama  # type: ignore[assignment]

    assert "windowkv_edge" not in sys.modules
    WindowKVError = ValueError  # type: ignore[assignment, misc]


def load(path: str) -> str:
    options = {"kv_policy": policy, "kv_budget": 8} if policy else {}
    try:
        llm = Llama(path, n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, **options)
        try:
            llm.eval([1, 2, 3] * 12)
            llm.eval([4])
        finally:
            llm.close()
        return "ok"
    except (WindowKVError, ValueError, RuntimeError, LookupError, MemoryError) as error:
        is_raw = isinstance(error, (UnicodeError, IndexError, KeyError))
        return f"raw {error!r}" if is_raw else "refused"
    except Exception as error:
        return f"raw {error!r}"


answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # ggml prints a backtrace when it aborts
print("ready", file=answers, flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (mib << 20, resource.RLIM_INFINITY))
        said = load(line.rstrip("\n"))
        gc.collect()  # what dies in a destructor dies of this model
        print(said.replace("\n", " "), file=answers, flush=True)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        print(f"died with {code}", file=answers, flush=True)
