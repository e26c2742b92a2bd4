"""What the results of tests.gpu.check say: targets, and tables of all GPUs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
STEPS = ("build", "ops", "sanitizer", "speed", "identities", "sessions", "profile", "model")
BEGIN, END = (
    "<!-- hardware: written by python -m tests.gpu.check --readme tests/gpu/README.md -->",
    "<!-- end of hardware -->",
)

Json = dict[str, Any]


def _rows(results: Json, step: str, key: str) -> list[Json]:
    """Rows of a bench run, [] if it was not run. A step that failed has those that it measured before."""
    return list(results.get(step, {}).get(key, {}).get("rows", []))


def targets(results: Json) -> list[Json]:
    """What the measurements of one GPU say about our targets: name, value, bound, met. Values are ratios.

    The targets are those of an H100, batch 1: decoding reads the cells at 80 % (f16) and 60 % (q8_0) of the speed at which the
    device copies, a token at 128k positions with 12 % of the cells is hardly slower than one at 16k with all, compaction is 2 % of
    the time of its prompt, what the device holds is what kv_stats reports and stock's other buffers, and a small model's token
    takes no longer than stock's.
    """
    res: list[Json] = []

    def add(name: str, value: float, bound: float, at_least: bool) -> None:
        met = value >= bound if at_least else value <= bound
        res.append({"name": name, "value": round(value, 4), "bound": bound, "at_least": at_least, "met": met})

    for size, kind, heads, n_tokens, cells, *_, share in results.get("speed", {}).get("rows", []):
        bound = {"f16": 0.8, "q8_0": 0.6}.get(kind)
        if (
            (size, n_tokens, cells.split()[0]) == ("128", "1", str(8 * 131072))
            and heads.startswith("8 ")
            and bound
            and share
        ):
            add(f"{kind} cells of {cells}: share of read speed", float(share.split()[0]) / 100, bound, True)

    filled = _rows(results, "sessions", "filled")
    stock = {row["length"]: row for row in filled if row["session"] == "stock f16"}
    for row in filled:
        if row["budget"] is None or row["length"] not in stock:
            continue
        if row["length"] == 131072 and 16384 in stock:
            value = stock[16384]["decode_ms"] / row["decode_ms"]
            add(f"{row['session']}: speed at 128k by stock's at 16k", value, 0.9, True)
        if "device_bytes" not in row:
            continue  # noted by hand
        own, others = row["device_bytes"], stock[row["length"]]
        want = row["kv_bytes_start"] + others["device_bytes"] - others["kv_bytes_start"]
        add(f"{row['session']} at {row['length']}: device bytes by those reported", own / want, 1.02, False)
    for row in _rows(results, "sessions", "prompt"):
        if row["compaction_ms"] is not None and "prefill_tokens_per_s" in row:
            value = row["compaction_ms"] / (1000 * row["length"] / row["prefill_tokens_per_s"])
            add(f"{row['session']}: compaction by prefill", value, 0.02, False)

    own_rows = _rows(results, "model", "speed")
    for row in own_rows:
        base = next(
            (other for other in own_rows if other["session"] == "stock f16" and other["length"] == row["length"]), None
        )
        if row["budget"] is not None and base:
            value = row["decode_ms"] / base["decode_ms"]
            add(f"{results['model']['model']}, {row['session']}: time of a token by stock's", value, 1.0, False)
    return res


def table(results: Sequence[Json]) -> str:
    """Markdown: one line per GPU, one column per step; "not run" where there is nothing."""

    def needles(found: Json) -> str:
        of = found["needles"]["found"]
        shared = found.get("cells_shared")
        lines = [
            f"{name}: {of[name]} of {found['needles']['n']} needles" for name in ("full", "auto 12%") if name in of
        ]
        return "; ".join([*lines, *([f"{shared['mean']:.0%} of the CPU's cells"] if shared else [])])

    def cell(res: Json, name: str) -> str:
        found = res.get(name)
        if not found:
            return "not run"
        if not found["ok"]:
            return "failed"
        if name == "ops":
            return f"{found['tested']} cases, worst NMSE {found['worst_nmse']:.0e}"
        if name == "speed":
            best = [row for row in found["rows"] if row[-1].endswith("%")]
            return (
                "; ".join(f"{row[1]}, {row[4]} cells: {row[-1]}" for row in best if "1048576" in row[4]) or "measured"
            )
        return needles(found) if name == "model" else "ok"

    names = [name for name in STEPS if name != "build"]
    lines = ["| GPU | " + " | ".join(names) + " | targets met | commit |", "| --- " * (len(names) + 3) + "|"]
    for res in results:
        commits = sorted({res[name]["commit"] for name in STEPS if name in res})
        met = [target["met"] for target in res["targets"]]
        n_met = f"{sum(met)} of {len(met)}" if met else "not run"
        steps = " | ".join(cell(res, name) for name in names)
        lines.append(f"| {res['gpu']} | {steps} | {n_met} | {' '.join(commits)} |")
    for gpu in ("NVIDIA (CUDA)", "Apple (Metal)"):
        if not any((gpu.startswith("NVIDIA")) == res["backend"].startswith("CUDA") for res in results):
            lines.append(f"| {gpu} | " + " | ".join("not run" for _ in [*names, "targets"]) + " | |")
    return "\n".join(lines)


def target_lines(results: Sequence[Json]) -> str:
    """One line per target and GPU."""
    lines = []
    for res in results:
        for target in res["targets"]:
            sign, verdict = ">=" if target["at_least"] else "<=", "met" if target["met"] else "MISSED"
            lines.append(f"{res['gpu']}: {target['name']}: {target['value']} ({sign} {target['bound']}): {verdict}")
    return "\n".join(lines)


def file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def _has_data(found: Json) -> bool:
    """Whether a step measured anything."""

    def is_empty(value: Any) -> bool:
        if isinstance(value, dict | list):
            return all(map(is_empty, value.values() if isinstance(value, dict) else value))
        return False

    about = {"ok", "error", "date", "commit", "seconds", "model"}
    return not is_empty({key: value for key, value in found.items() if key not in about})


def take(file: Path, folder: Path = RESULTS) -> tuple[Path, list[str]]:
    """Write the steps of a results file, such as one from another machine, into the results of its GPU.

    A step that the file does not have stays as it was measured before, and so does one that failed before it measured anything.

    Returns:
        the file of the results, and the failed steps that were left out.
    """
    new = json.loads(file.read_text(encoding="utf-8"))
    if "gpu" not in new:
        raise SystemExit(f"{file} is no file of results: it names no GPU")
    path = folder / file_name(new["gpu"])
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    left_out = [
        name
        for name in STEPS
        if name in new and not new[name]["ok"] and not _has_data(new[name]) and _has_data(old.get(name, {}))
    ]
    merged = {**old, **{name: found for name, found in new.items() if name not in left_out}}
    merged["targets"] = targets(merged)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    return path, left_out


def all_results(folder: Path = RESULTS) -> list[Json]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def write_readme(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    file.write_text(f"{head}{BEGIN}\n{table(all_results())}\n{END}{tail}", encoding="utf-8")
