"""Prove and measure the GPU kernels on the GPU of this machine; one file of results per GPU.

    python -m tests.gpu.check [--source DIR] [--steps build,ops,identities,sanitizer,speed,sessions]

Every step writes what it found into tests/gpu/results/<gpu>.json at once, so that steps may be run by several calls:

build        the libraries and test programs for this GPU, in --build; without network --source names a folder with the
             pinned llama.cpp: CMakeLists.txt, LICENSE, cmake, ggml, include, licenses, src and vendor
ops          all cases of the op against a reference in double precision
identities   a session with a policy that evicts nothing gives stock's logits, compaction moves the right rows
sanitizer    compute-sanitizer (memory, races, barriers) over cases of the op
speed        the op beside ggml_flash_attn_ext, and the share of the speed at which the device copies
sessions     `windowkv-edge bench` with all layers on the GPU, 16k and 128k positions with random cells, a prompt of 32k: needs
             the package, built for it

``--table`` prints the table of all results and what they say about the targets, ``--readme FILE`` writes the table into a README.
Needs Python alone.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
STEPS = ("build", "ops", "identities", "sanitizer", "speed", "sessions")
BEGIN, END = "<!-- hardware: written by python -m tests.gpu.check --readme tests/gpu/README.md -->", "<!-- end of hardware -->"

# few cells each: a sanitizer is some hundred times slower
SANITIZED = ("n_tokens=8,lens=[45", "n_tokens=1,lens=[38", "n_gqa=8,n_tokens=40,lens=[9]", "lens=[0,0,0]")

Json = dict[str, Any]


class Failed(Exception):
    """A step found something wrong; its message says what."""


class Check:
    """The steps on one machine.

    Args:
        build: folder of the build.
        programs: folder of the test programs.
        backend: ggml's name of the device, such as CUDA0.
        source: llama.cpp of the pinned version; None = download.
        results: file of the results.
    """

    def __init__(self, build: Path, programs: Path, backend: str, source: Path | None, results: Path) -> None:
        self.folder, self.programs, self.backend, self.source, self.file = build, programs, backend, source, results
        self.results: Json = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}

    def run(self, command: Sequence[str | Path], timeout: float = 3600) -> str:
        """Output of a command that has to succeed."""
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            lines = [line for line in done.stdout.splitlines() if "FAIL" in line] or done.stdout.splitlines()[-5:]
            raise Failed(f"{command[0]} gave {done.returncode}: " + "\n".join([*lines[:20], done.stderr[-2000:]]))
        return done.stdout

    def step(self, name: str) -> bool:
        """Run a step and record it; whether it found nothing wrong."""
        action: Callable[[], Json] = getattr(self, name)
        try:
            found = {"ok": True, **action()}
        except (Failed, OSError, subprocess.TimeoutExpired) as error:
            found = {"ok": False, "error": str(error)}
        found["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        found["commit"] = _commit()
        self.results = {
            **self.results,
            name: found,
            "gpu": gpu_name(),
            "backend": self.backend,
            "host": platform.platform(),
        }
        self.results["targets"] = targets(self.results)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {'ok' if found['ok'] else 'FAILED: ' + found['error']}", flush=True)
        return bool(found["ok"])

    #
    # steps
    #

    def build(self) -> Json:
        options = ["-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"] if sys.platform != "darwin" else []
        if self.source:
            options.append(f"-DLLAMA_CPP_SOURCE_DIR={self.source.resolve()}")
        self.run(
            ["cmake", "-S", ROOT, "-B", self.folder, "-DCMAKE_BUILD_TYPE=Release", "-DWINDOWKV_TESTS=ON", *options]
        )
        jobs = str(os.cpu_count() or 4)
        self.run(["cmake", "--build", self.folder, "-j", jobs, "--target", "test-backend-ops-ragged", "test-ragged"])
        return {}

    def ops(self) -> Json:
        text = self.run([self.programs / "test-backend-ops-ragged", "test", "-b", self.backend])
        tested, failed, refused = (int(n) for n in re.findall(r"\d+", text.splitlines()[-1]))
        worst = max(float(x) for x in re.findall(r"OK \(([0-9.e+-]+)\)", text))
        return {"tested": tested, "failed": failed, "not_supported": refused, "worst_nmse": worst}

    def identities(self) -> Json:
        models = sorted((self.folder / "models").glob("*.gguf"))
        if not models:
            models = _write_models(self.folder / "models")
        layers = "0" if self.backend == "CPU" else "99"
        for model in models:
            if self.run([self.programs / "test-ragged", model, layers]).strip() != "ok":
                raise Failed(f"test-ragged {model.name} did not say ok")
        return {"models": [model.name for model in models]}

    def sanitizer(self) -> Json:
        if not shutil.which("compute-sanitizer"):
            raise Failed("compute-sanitizer is not there, it comes with the CUDA toolkit")
        for tool in ("memcheck", "racecheck", "synccheck"):
            for case in SANITIZED:
                program = [self.programs / "test-backend-ops-ragged", "test", "-b", self.backend, "-p", case]
                self.run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program])
        return {"tools": ["memcheck", "racecheck", "synccheck"], "cases": list(SANITIZED)}

    def speed(self) -> Json:
        text = self.run([self.programs / "test-backend-ops-ragged", "perf", "-b", self.backend])
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
        ]
        if len(rows) < 3:
            raise Failed("perf printed no rows")
        return {"columns": rows[0], "rows": rows[2:]}

    def sessions(self) -> Json:
        if importlib.util.find_spec("windowkv_edge") is None or shutil.which("windowkv-edge") is None:
            raise Failed(
                "the package is not installed; install it with CMAKE_ARGS='-DLLAMA_BUILD=OFF -DGGML_CUDA=ON' pip install ."
            )
        common = ["--gpu-layers", "-1", "--policies", "auto,windowkv,headkv-r2", "--budgets", "12%", "--json"]
        filled = self.run(["windowkv-edge", "bench", "llama-8b", "--lengths", "16k,128k", "--fill", *common])
        prompt = ["--lengths", "32k", "--prefill", "--baselines", "f16", "--references", "", "--rounds", "8"]
        return {
            "filled": json.loads(filled),
            "prompt": json.loads(self.run(["windowkv-edge", "bench", "llama-8b", *prompt, *common])),
        }


def _rows(results: Json, step: str, key: str) -> list[Json]:
    """Rows of a bench run, [] if it was not run."""
    found = results.get(step, {})
    return list(found[key]["rows"]) if found.get("ok") else []


def targets(results: Json) -> list[Json]:
    """What the measurements of one GPU say about our targets: name, value, bound, met. Values are ratios.

    The targets are those of an H100, batch 1: decoding reads the cells at 80 % (f16) and 60 % (q8_0) of the speed at which the
    device copies, a token at 128k positions with 12 % of the cells is hardly slower than one at 16k with all, compaction is 2 % of
    the time of its prompt, and what the device holds is what kv_stats reports and stock's other buffers.
    """
    res: list[Json] = []

    def add(name: str, value: float, bound: float, at_least: bool) -> None:
        met = value >= bound if at_least else value <= bound
        res.append({"name": name, "value": round(value, 4), "bound": bound, "at_least": at_least, "met": met})

    if results.get("speed", {}).get("ok"):
        for size, kind, heads, n_tokens, cells, *_, share in results["speed"]["rows"]:
            bound = {"f16": 0.8, "q8_0": 0.6}.get(kind)
            if (size, n_tokens, cells.split()[0]) == ("128", "1", str(8 * 131072)) and heads.startswith("8 ") and bound:
                add(f"{kind} cells of {cells}: share of read speed", float(share.split()[0]) / 100, bound, True)

    filled = _rows(results, "sessions", "filled")
    stock = {row["length"]: row for row in filled if row["session"] == "stock f16"}
    for row in filled:
        if row["budget"] is None or row["length"] not in stock:
            continue
        if row["length"] == 131072:
            value = stock[16384]["decode_ms"] / row["decode_ms"]
            add(f"{row['session']}: speed at 128k by stock's at 16k", value, 0.9, True)
        own, others = row["device_bytes"], stock[row["length"]]
        want = row["kv_bytes_start"] + others["device_bytes"] - others["kv_bytes_start"]
        add(f"{row['session']} at {row['length']}: device bytes by those reported", own / want, 1.02, False)
    for row in _rows(results, "sessions", "prompt"):
        if row["compaction_ms"] is not None:
            value = row["compaction_ms"] / (1000 * row["length"] / row["prefill_tokens_per_s"])
            add(f"{row['session']}: compaction by prefill", value, 0.02, False)
    return res


def _commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _write_models(folder: Path) -> list[Path]:
    """Tiny models with random weights, of head sizes that GPU kernels know; needs gguf."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        import tiny_model
    except ImportError as error:
        raise Failed(f"no models in {folder} and {error}; copy them there, or install gguf and numpy") from error
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"gqa2-64": (4, 2, 64), "mqa-128": (3, 1, 128), "mha-64": (4, 4, 64)}
    return [
        tiny_model.write_llama(folder / f"{name}.gguf", n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim)
        for name, (n_head, n_head_kv, head_dim) in shapes.items()
    ]


def gpu_name() -> str:
    """As its driver says, or this machine's processor."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() + " GPU"
    return "no GPU"


def default_backend() -> str:
    """ggml's name of the first GPU."""
    if sys.platform == "darwin":
        return "MTL0"
    if gpu_name() == "no GPU":
        raise SystemExit("no GPU here: nvidia-smi names none. Run this on a machine with one, or give --backend CPU")
    return "CUDA0"


def table(results: Sequence[Json]) -> str:
    """Markdown: one line per GPU, one column per step; "not run" where there is nothing."""

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
        return "ok"

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


def all_results(folder: Path = RESULTS) -> list[Json]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def write_readme(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    file.write_text(f"{head}{BEGIN}\n{table(all_results())}\n{END}{tail}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--source", type=Path)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--programs", type=Path, help="folder of built test programs; default: the build's")
    parser.add_argument("--backend", help="ggml's name of the device; default: the first GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--readme", type=Path)
    args = parser.parse_args(argv)
    if args.table:
        found = all_results(args.results)
        print(table(found))
        print(target_lines(found))
        return 0
    if args.readme:
        write_readme(args.readme)
        return 0
    steps = args.steps.split(",")
    if unknown := [name for name in steps if name not in STEPS]:
        raise SystemExit(f"--steps has {', '.join(unknown)}, expected some of {', '.join(STEPS)}")
    name = re.sub(r"[^a-z0-9]+", "-", gpu_name().lower()).strip("-")
    check = Check(
        args.build,
        args.programs or args.build / "bin",
        args.backend or default_backend(),
        args.source,
        args.results / f"{name}.json",
    )
    return 0 if all([check.step(name) for name in steps]) else 1


if __name__ == "__main__":
    sys.exit(main())
