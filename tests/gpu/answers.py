"""Needles of windowkv_edge.eval and the cells that a compaction keeps as JSON, for tests.gpu.check: a process of its own.

    python answers.py '{"model": FILE, "gpu_layers": N, "work": FOLDER, "kept": KEPT, "name": NAME, "needles": NEEDLES}'

KEPT has the length of a prompt, a policy, a budget, the file for the positions that stay, and "compare": the file of an earlier
run, or none. NEEDLES has lengths, depths, policies, budgets and, if not all are asked for, kinds. Writes lines: how many of the
cells the earlier run has, ``{"cells_shared": {...}}``, and ``{NAME: {"n": N, "found": {...}}}`` after every prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sessions import N_THREADS, load_backends

from windowkv_edge import get_policy
from windowkv_edge.bench.session import Model
from windowkv_edge.budget import n_cells
from windowkv_edge.eval import Branches, Case, Plan, Records, Runner, Style, hay_tokens, needle_cases, read_records
from windowkv_edge.eval.needle import KINDS

Json = dict[str, Any]

FIRST = 100  # needles that no choice of ours has seen


def cases_of(model: Model, wanted: Json) -> list[Case]:
    hay = hay_tokens(model, None, max(wanted["lengths"]), 0)
    kinds = wanted.get("kinds", KINDS)
    return list(needle_cases(Style(model), hay, wanted["lengths"], wanted["depths"], kinds, 1, 0, FIRST))


def keep(model: Model, wanted: Json) -> None:
    """Write the positions that stay: an array per layer and kv head."""
    policy = get_policy(wanted["policy"])
    n = wanted["length"]
    branches = Branches(model, n + 8, policy.n_observed, "f16", N_THREADS)
    try:
        branches.prefill(hay_tokens(model, None, n, 0)[:n])
        branches.compact(policy, n_cells(wanted["budget"], n, "f16"))
        stats = branches.kv.stats()
        kept = {
            f"{layer}/{head}": branches.kv.positions(layer, head)
            for layer in range(stats.n_layer)
            for head in range(stats.n_head_kv)
        }
    finally:
        branches.close()
    np.savez(wanted["file"], **kept)
    if "compare" in wanted:
        about = {key: wanted[key] for key in ("length", "policy", "budget")}
        print(json.dumps({"cells_shared": {**about, **compare(wanted["file"], wanted["compare"])}}), flush=True)


def ask(model: Model, wanted: Json, work: Path, name: str) -> None:
    """Found needles by policy and budget; those that the full cache does not find are not asked with less."""
    policies = {name: get_policy(name) for name in wanted["policies"]}
    cases = cases_of(model, wanted)
    n_ctx = max(len(case.prompt) + case.max_tokens + 1 for case in cases)
    plan = Plan(policies, tuple(wanted["budgets"]), ("f16",), N_THREADS)
    file = work / f"{name}.jsonl"
    with Records(file, {}) as records, Runner(model, plan, n_ctx, records, lambda what: None) as runner:
        for case in cases:
            runner.run([case])
            print(json.dumps({name: tally(read_records(file)[1])}), flush=True)


def tally(rows: list[Json]) -> Json:
    found: dict[str, int] = {}
    for row in rows:
        for own in row["results"]:
            name = own["policy"] if own["budget"] is None else f"{own['policy']} {own['budget']:.0%}"
            found[name] = found.get(name, 0) + (own["score"] == 1)
    return {"n": len(rows), "found": found}


def compare(first: str, second: str) -> Json:
    """How many cells of the first file are in the second: of all, and of the head that shares least."""
    with np.load(first) as one, np.load(second) as other:
        if set(one) != set(other):
            raise ValueError("the files have other heads")
        shared = [np.isin(one[name], other[name]).mean() for name in one]
        n_all = sum(len(one[name]) for name in one)
        mean = sum(float(share) * len(one[name]) for share, name in zip(shared, one)) / n_all
    return {"mean": round(mean, 4), "least_head": round(float(min(shared)), 4)}


def main(text: str) -> None:
    wanted = json.loads(text)
    load_backends()
    model = Model(Path(wanted["model"]), wanted["gpu_layers"])
    try:
        keep(model, wanted["kept"])
        ask(model, wanted["needles"], Path(wanted["work"]), wanted["name"])
    finally:
        model.close()


if __name__ == "__main__":
    main(sys.argv[1])
