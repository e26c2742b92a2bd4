"""Loads every model named on the standard input and decodes a few tokens; says how it went, a line for each."""

from __future__ import annotations

import gc
import resource
import sys

mib, policy = int(sys.argv[1]), sys.argv[2]
if policy:
    from windowkv_edge import Llama, WindowKVError
else:
    from llama_cpp import Llama  # type: ignore[assignment]

    assert "windowkv_edge" not in sys.modules
    WindowKVError = ValueError  # type: ignore[assignment, misc]

resource.setrlimit(resource.RLIMIT_AS, (mib << 20, resource.RLIM_INFINITY))
print("ready", flush=True)
for line in sys.stdin:
    options = {"kv_policy": policy, "kv_budget": 8} if policy else {}
    try:
        llm = Llama(line.rstrip("\n"), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, **options)
        try:
            llm.eval([1, 2, 3] * 12)
            llm.eval([4])
        finally:
            llm.close()
        said = "ok"
    except (WindowKVError, ValueError, RuntimeError, LookupError, MemoryError) as error:
        said = "refused" if not isinstance(error, (UnicodeError, IndexError, KeyError)) else f"raw {error!r}"
    except Exception as error:
        said = f"raw {error!r}"
    llm = None
    gc.collect()  # what dies in a destructor dies of this model
    print(said.replace("\n", " "), flush=True)
