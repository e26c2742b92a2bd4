"""Rows of windowkv_edge.bench as JSON, for tests.gpu.check: a process of its own, and nothing of the command line.

    python sessions.py '{"model": MODEL, "gpu_layers": N, "plans": {NAME: PLAN}, "common": PLAN}'

MODEL is a file or a shape with random weights; PLAN has fields of :class:`windowkv_edge.bench.Plan`, "policies" by their names.
Writes a line ``{NAME: {"rows": [...]}}`` after every length of a plan, with the rows of the lengths before: the last one counts.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from windowkv_edge import get_policy
from windowkv_edge.bench import SHAPES, fetch_shape
from windowkv_edge.bench.run import Bench, Plan
from windowkv_edge.bench.session import Model
from windowkv_edge.gguf_info import read_info

N_THREADS = psutil.cpu_count(logical=False) or 1
if hasattr(os, "sched_getaffinity"):  # taskset, or a container with some of the cores
    N_THREADS = min(N_THREADS, len(os.sched_getaffinity(0)))


def load_backends() -> None:
    """Also the one that GGML_BACKEND_PATH names, which only programs that ask for all of them get."""
    if "GGML_BACKEND_PATH" in os.environ:
        from llama_cpp import llama_cpp as low

        low._lib.ggml_backend_load_all()


def plan_of(fields: dict[str, Any]) -> Plan:
    """A plan from JSON: lists are tuples, policies by name, as many threads as there are cores."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    policies = {name: get_policy(name) for name in values.pop("policies")}
    return Plan(policies=policies, **{"threads": N_THREADS, **values})


def main(text: str) -> None:
    wanted = json.loads(text)
    name = wanted["model"]
    load_backends()
    info = read_info(fetch_shape(name) if name in SHAPES else Path(name))
    model = Model(info.path, wanted["gpu_layers"])
    try:
        for key, fields in wanted["plans"].items():
            plan = plan_of({**wanted["common"], **fields})
            bench = Bench(model, info, plan, is_random=name in SHAPES or not model.has_text)
            rows: list[dict[str, Any]] = []
            for group in bench.groups():
                rows += map(asdict, group)
                print(json.dumps({key: {"rows": rows}}), flush=True)
    finally:
        model.close()


if __name__ == "__main__":
    main(sys.argv[1])
