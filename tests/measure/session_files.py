"""How much processor time a saved session takes to load, beside reading its file, and to save.

python tests/measure/session_files.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from windowkv_edge import Llama, _native, models


def measured(call: Callable[[], object], n: int = 21) -> float:
    """Milliseconds of processor time, the median of n calls: the same on a machine that has other work."""
    times = []
    for _ in range(n):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def main() -> None:
    llm = Llama(
        str(models.fetch_smollm2()), n_ctx=8192, n_threads=2, verbose=False, kv_policy="streamingllm", kv_budget=512
    )
    _native.Context(llm.ctx).fill(4096)
    llm.n_tokens = llm._kv_known = 4096
    llm.input_ids[:4096] = 5
    llm.kv_compact()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        llm.kv_save(path)
        n_bytes = path.stat().st_size
        read, load = measured(path.read_bytes), measured(lambda: llm.kv_load(path))
        print(
            f"{n_bytes / 2**20:.1f} MiB: reading {read:.1f} ms, kv_load {load:.1f} ms, kv_save {measured(lambda: llm.kv_save(path)):.1f} ms"
        )
    llm.close()


if __name__ == "__main__":
    main()
