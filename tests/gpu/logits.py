"""How far next tokens are from the CPU's, with stock's attention and with ours, as JSON, for tests.gpu.check: a process of its own.

    python logits.py '{"model": FILE, "gpu_layers": N, "length": N, "tokens": N, "file": FILE}'

A text of ``length`` tokens is read with f16 cells, nothing evicted, and then so many single ones of it. Writes the logits into the file.
With "compare", the file of an earlier run, it prints ``{"divergence": {...}}``: mean KL divergences of this run's stock and ours from that run's
stock, and of ours from stock.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sessions import N_THREADS, load_backends

from windowkv_edge import KVPolicy, get_policy
from windowkv_edge.bench.distributions import divergence, log_softmax
from windowkv_edge.bench.session import Model, Session
from windowkv_edge.eval import hay_tokens

Json = dict[str, Any]
N_BATCH = 512


def logits(model: Model, policy: KVPolicy | None, tokens: list[int], n_prompt: int) -> npt.NDArray[np.float32]:
    """Behind the prompt and each of the other tokens: float32 [1 + others, n_vocab]."""
    session = Session(model, len(tokens) + 8, "f16", policy, True, N_THREADS, N_BATCH)
    try:
        if policy is not None:
            session.kv.set_attention("ragged")
        for i in range(0, n_prompt, N_BATCH):
            session.decode(tokens[i : min(i + N_BATCH, n_prompt)])
        rows = [session.logits()]
        for token in tokens[n_prompt:]:
            session.decode([token])
            rows.append(session.logits())
        return np.array(rows)
    finally:
        session.close()


def main(text: str) -> None:
    wanted = json.loads(text)
    load_backends()
    model = Model(Path(wanted["model"]), wanted["gpu_layers"])
    try:
        n = wanted["length"] + wanted["tokens"]
        tokens = hay_tokens(model, None, n, 0)[:n]
        stock = logits(model, None, tokens, wanted["length"])
        ours = logits(model, get_policy("windowkv"), tokens, wanted["length"])
    finally:
        model.close()
    np.savez(wanted["file"], stock=stock, ours=ours)
    if "compare" in wanted:
        p, q = log_softmax(stock), log_softmax(ours)
        with np.load(wanted["compare"]) as cpu:
            p_cpu, q_cpu = log_softmax(cpu["stock"]), log_softmax(cpu["ours"])
        found = {
            "stock_to_cpu": divergence(p_cpu, p),
            "ours_to_cpu": divergence(p_cpu, q),
            "ours_to_stock": divergence(p, q),
            "ours_to_stock_on_cpu": divergence(p_cpu, q_cpu),
        }
        print(json.dumps({"divergence": {name: round(float(value.mean()), 6) for name, value in found.items()}}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
