"""The steps of tests.gpu.check: what each runs, and what it found as JSON."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

Json = dict[str, Any]

TOOLS = ("memcheck", "racecheck", "synccheck")
# few cells each: a sanitizer is some hundred times slower
SANITIZED = (
    "n_tokens=8,n_cells=[45",
    "n_tokens=1,n_cells=[38",
    "n_gqa=8,n_tokens=40,n_cells=[9]",
    "n_cells=[0,0,0]",
    "type_k=q8_0,type_v=q8_0,n_gqa=8,n_tokens=1,n_cells=[313,",
    "type_k=q4_0,type_v=q4_0,n_gqa=4,n_tokens=1,n_cells=[326,",
)

# ncu's names, and ours
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "smsp__issue_active.avg.per_cycle_active": "issued_per_cycle",
}
# ncu prints when the program has ended, so the launches of a kernel that it looks at have to be few: of a case about 40
N_LAUNCHES = 10


class Failed(Exception):
    """A step found something wrong; its message says what.

    Attributes:
        found: what it had found before.
    """

    def __init__(self, message: str, found: Json | None = None, output: str = "") -> None:
        super().__init__(message)
        self.found, self.output = found or {}, output


class Skipped(Exception):
    """A step was not run: this machine lacks something. What was measured before stays."""


@dataclass(frozen=True)
class Sizes:
    """How much the steps do.

    Attributes:
        ops: cases of the op whose description has this text; "" = all.
        speed: measured cases, likewise.
        n_models: tiny models of the step identities.
        sessions: plans for windowkv_edge.bench; the weights are random, so no head scores but made-up ones.
        model: plans for a real model: its speed, needles on the device and on the CPU, a compaction whose cells are
            compared, and a text whose next tokens are.
        profiled: measured cases of the step profile; a text selects one of them, as grids do not tell sizes apart.
    """

    ops: str
    speed: str
    n_models: int
    sessions: Json
    model: Json
    profiled: tuple[str, ...] = (
        "hs=64,type=f16,n_tokens=1,n_cells=16384",
        "hs=128,type=f16,n_tokens=1,n_cells=16384,n_threads=1,ragged=1",
        "hs=128,type=f16,n_tokens=1,n_cells=131072,n_threads=1,ragged=0",
        "hs=128,type=q8_0,n_tokens=1,n_cells=131072,n_threads=1,ragged=0",
        "hs=128,type=q4_0,n_tokens=1,n_cells=131072,n_threads=1,ragged=0",
    )


FULL = Sizes(
    ops="",
    speed="",
    n_models=3,
    sessions={
        "model": "llama-8b",
        "plans": {
            "filled": {"lengths": [16384, 131072], "fill": True},
            "prompt": {"lengths": [32768], "baselines": ["f16"], "references": [], "rounds": 8},
            "filled_q8_0": {
                "lengths": [16384],
                "fill": True,
                "types": ["q8_0"],
                "baselines": ["q8_0"],
                "references": [],
            },
        },
        "common": {"policies": ["auto", "windowkv", "headkv-r2"], "budgets": [0.12]},
    },
    model={
        "speed": {
            "lengths": [4096],
            "policies": ["auto", "windowkv"],
            "budgets": [0.12],
            "baselines": ["f16"],
            "references": [],
        },
        "needles": {
            "lengths": [2048, 4000],
            "depths": [0.25, 0.75],
            "policies": ["auto", "windowkv"],
            "budgets": [0.12, 0.03],
        },
        "needles_cpu": {"lengths": [2048], "depths": [0.5], "policies": ["auto", "windowkv"], "budgets": [0.12]},
        "kept": {"length": 2000, "policy": "auto", "budget": 0.06},
        "logits": {"length": 1000, "tokens": 32},
    },
)

SMALL = Sizes(
    ops="n_tokens=8,n_cells=[45",
    speed="hs=64,type=q8_0,n_tokens=1,n_cells=16384,n_threads=1",
    n_models=1,
    sessions={
        "model": "tiny",
        "plans": {
            "filled": {"lengths": [256, 512], "fill": True},
            "prompt": {"lengths": [300]},
        },
        "common": {
            "policies": ["auto", "windowkv"],
            "budgets": [0.25],
            "baselines": ["f16"],
            "rounds": 2,
            "references": [],
        },
    },
    model={
        "speed": {
            "lengths": [64],
            "policies": ["auto"],
            "budgets": [0.5],
            "baselines": ["f16"],
            "references": [],
            "rounds": 2,
        },
        "needles": {"lengths": [80], "depths": [0.5], "kinds": ["number"], "policies": ["auto"], "budgets": [0.5]},
        "needles_cpu": {"lengths": [80], "depths": [0.5], "kinds": ["number"], "policies": ["auto"], "budgets": [0.5]},
        "kept": {"length": 120, "policy": "auto", "budget": 0.25},
        "logits": {"length": 60, "tokens": 4},
    },
)


@dataclass
class Target:
    """What the steps run, and where.

    Attributes:
        programs: folder of the test programs.
        package: gives the folder for PYTHONPATH with the package, when a step needs it.
        backend: ggml's name of the device, such as CUDA0.
        folder: for files of the run.
        model: a real model, or None.
        sizes: how much to do.
        python_path: folders of Python packages that all steps may import.
        needed: libraries that must be there at run time; the loader is told where they are.
        log: a file for every command and what it wrote.
        deadline: when the step that runs now has to be over, time.monotonic().
    """

    programs: Path
    package: Callable[[], Path]
    backend: str
    folder: Path
    model: Path | None = None
    sizes: Sizes = FULL
    python_path: Sequence[Path] = ()
    needed: Sequence[str] = ()
    log: Path | None = None
    deadline: float = field(default=float("inf"))

    @property
    def on_device(self) -> bool:
        return self.backend != "CPU"

    @property
    def op(self) -> Path:
        return self.programs / "test-backend-ops-ragged"

    def run(self, command: Sequence[str | Path], env: Mapping[str, str | None] | None = None) -> str:
        """Output of a command that has to succeed before the deadline; it and its children end with it.

        Args:
            command: program and arguments.
            env: added to the environment; None takes a variable away.
        """
        words = [str(part) for part in command]
        values = {**os.environ, **self._library_path(), **(env or {})}
        left = self.deadline - time.monotonic()
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={name: value for name, value in values.items() if value is not None},
        ) as process:  # fmt: skip
            try:
                out, errors = process.communicate(timeout=None if left == float("inf") else max(0.1, left))
            except subprocess.TimeoutExpired:
                _end(process)
                out, errors = process.communicate()
                self._write_log(words, "ended", out, errors)
                raise Failed(
                    f"{Path(words[0]).name} was not done after {left:.0f} s and was ended", output=out
                ) from None
            except BaseException:
                _end(process)
                raise
        self._write_log(words, f"gave {process.returncode}", out, errors)
        if process.returncode != 0:
            lines = [line for line in out.splitlines() if "FAIL" in line] or out.splitlines()[-5:]
            text = "\n".join([*lines[:20], errors[-2000:]])
            raise Failed(f"{words[0]} gave {process.returncode}: {text}", output=out)
        return out

    def _write_log(self, words: Sequence[str], end: str, out: str, errors: str) -> None:
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"$ {shlex.join(words)}\n# {end}\n{out}\n# stderr\n{errors}\n")

    def _library_path(self) -> dict[str, str]:
        folders = [str(path) for name in self.needed if (path := folder_of_library(name)) is not None]
        before = [part for part in (os.environ.get("LD_LIBRARY_PATH"),) if part]
        return {"LD_LIBRARY_PATH": os.pathsep.join([*dict.fromkeys(folders), *before])} if folders else {}

    def python(self, script: str, wanted: Json, env: Mapping[str, str | None] | None = None) -> Json:
        """What a script of this folder found; the last of several values of a name counts.

        Raises:
            Failed: it failed; with what it had found before.
        """
        command = [sys.executable, HERE / script, json.dumps(wanted)]
        try:
            return _json_lines(self.run(command, {"PYTHONPATH": path_of([self.package()]), **(env or {})}))
        except Failed as error:
            raise Failed(str(error), _json_lines(error.output)) from error


def path_of(folders: Sequence[Path]) -> str:
    """A PYTHONPATH that begins with these folders."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _json_lines(text: str) -> Json:
    res: Json = {}
    for line in text.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):  # a line that was cut off
                res |= json.loads(line)
    return res


def folder_of_library(name: str) -> Path | None:
    """Where a library of CUDA lies that the loader does not find by itself; None: it does, or the library is nowhere."""
    if shutil.which("ldconfig"):
        listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
        if f"\t{name} " in listed:
            return None
    folders = [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    for entry in sys.path:  # wheels of CUDA that are installed, with PyTorch for example
        folders += Path(entry).glob("nvidia/*/lib")
    for top in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))):
        if top:
            folders += [Path(top, "lib64"), Path(top, "lib"), *Path(top).glob("targets/*/lib")]
    folders += [Path("/usr/local/nvidia/lib64"), Path("/usr/local/nvidia/lib")]
    return next((folder for folder in folders if (folder / name).exists()), None)


#
# the steps
#


def ops(target: Target) -> Json:
    """All cases of the op against a reference in double precision."""
    command = [target.op, "test", "-b", target.backend, "-p", target.sizes.ops]
    try:
        found = _counts(target.run(command))
    except Failed as error:
        raise Failed(str(error), _counts(error.output) or _counts_so_far(error.output)) from error
    if not found:
        raise Failed("the cases were not counted")
    return found


def _counts(text: str) -> Json:
    """The last line of the cases and the worst error, {} if they did not end."""
    last = re.search(r"^(\d+) tested, (\d+) failed, (\d+) not supported$", text, re.M)
    if last is None:
        return {}
    counts = {"tested": int(last[1]), "failed": int(last[2]), "not_supported": int(last[3])}
    return {**counts, "worst_nmse": _worst(text)}


def _counts_so_far(text: str) -> Json:
    """Of cases that did not end, {} if there are none."""
    ends = re.findall(r": (OK|FAIL) \(", text)
    return {"tested": len(ends), "failed": ends.count("FAIL"), "worst_nmse": _worst(text)} if ends else {}


def _worst(text: str) -> float:
    return max((float(x) for x in re.findall(r"OK \(([0-9.e+-]+)\)", text)), default=0.0)


def speed(target: Target) -> Json:
    """The op beside ggml_flash_attn_ext, and the share of the speed at which the device copies."""
    try:
        found = _table(target.run([target.op, "perf", "-b", target.backend, "-p", target.sizes.speed]))
    except Failed as error:
        raise Failed(str(error), _table(error.output)) from error
    if not found:
        raise Failed("perf printed no rows")
    return found


def _table(text: str) -> Json:
    """Columns and rows of a Markdown table; a last line that was cut off is left out."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    if len(rows) < 3:
        return {}
    return {"columns": rows[0], "rows": [row for row in rows[2:] if len(row) == len(rows[0])]}


def sessions(target: Target) -> Json:
    """What ``windowkv-edge bench`` measures, with all layers on the GPU."""
    wanted = target.sizes.sessions
    if wanted["model"] == "tiny":
        wanted = {**wanted, "model": str(tiny_models(target)[0])}
    return target.python("sessions.py", {**wanted, "gpu_layers": -1 if target.on_device else 0})


def model(target: Target) -> Json:
    """A real model: next tokens and needles on the device and on the CPU, how many of the CPU's cells the device chooses, and at last
    its speed, which the bench's gate may refuse to measure."""
    if target.model is None:
        raise Skipped("no --model FILE: it needs a GGUF file of a small chat model, such as SmolLM2-135M-Instruct")
    plans, found = target.sizes.model, {"model": target.model.name}
    layers = -1 if target.on_device else 0
    with tempfile.TemporaryDirectory() as work:
        device, cpu = (str(Path(work) / f"kept-{where}.npz") for where in ("device", "cpu"))
        common = {"model": str(target.model), "work": work}
        on_device = {**common, "gpu_layers": layers, "name": "needles", "needles": plans["needles"]}
        on_device["kept"] = {**plans["kept"], "file": device}
        on_cpu = {**common, "gpu_layers": 0, "name": "needles_cpu", "needles": plans["needles_cpu"]}
        on_cpu["kept"] = {**plans["kept"], "file": cpu, "compare": device}
        # neither layers nor large products go to the GPU then
        no_device: dict[str, str | None] = {"CUDA_VISIBLE_DEVICES": "", "GGML_BACKEND_PATH": None}
        own_speed = {"model": str(target.model), "gpu_layers": layers, "plans": {"speed": plans["speed"]}, "common": {}}
        first, second = (str(Path(work) / f"logits-{where}.npz") for where in ("cpu", "device"))
        logits = {"model": str(target.model), **plans["logits"]}
        for script, wanted, env in (
            ("answers.py", on_device, None),
            ("logits.py", {**logits, "gpu_layers": 0, "file": first}, no_device),
            ("logits.py", {**logits, "gpu_layers": layers, "file": second, "compare": first}, None),
            ("answers.py", on_cpu, no_device),
            ("sessions.py", own_speed, None),
        ):
            try:
                found |= target.python(script, wanted, env)
            except Failed as error:
                raise Failed(str(error), {**found, **error.found}) from error
    return found


def tiny_models(target: Target) -> list[Path]:
    """Models with random weights, of head sizes that GPU kernels know; needs gguf and numpy."""
    shapes = {"gqa2-64": (4, 2, 64), "mqa-128": (3, 1, 128), "mha-64": (4, 4, 64)}
    folder = target.folder / "models"
    wanted = [folder / f"{name}.gguf" for name in list(shapes)[: target.sizes.n_models]]
    if not all(path.exists() for path in wanted):
        folder.mkdir(parents=True, exist_ok=True)
        script = (
            "import json, sys; from pathlib import Path; import tiny_model\n"
            "for path, (n_head, n_head_kv, head_dim) in json.loads(sys.argv[1]):\n"
            "    part = Path(path + '.part')\n"
            "    tiny_model.write_llama(part, n_head=n_head, n_head_kv=n_head_kv, head_dim=head_dim)\n"
            "    part.rename(path)\n"
        )
        made = json.dumps([(str(path), shapes[path.stem]) for path in wanted])
        target.run([sys.executable, "-c", script, made], {"PYTHONPATH": path_of([HERE.parent, *target.python_path])})
    return wanted


def identities(target: Target) -> Json:
    """A session with a policy that evicts nothing gives stock's logits, compaction moves the right rows."""
    layers = "99" if target.on_device else "0"
    models = tiny_models(target)
    for path in models:
        if target.run([target.programs / "test-ragged", path, layers]).strip() != "ok":
            raise Failed(f"test-ragged {path.name} did not say ok")
    return {"models": [path.name for path in models]}


def _cuda_tool(target: Target, name: str) -> str:
    """The path of a tool of the CUDA toolkit."""
    if not target.backend.startswith("CUDA"):
        raise Skipped(f"the tool is for CUDA, the device is {target.backend}")
    folders = ["/usr/local/cuda/bin", *map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*")))]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise Skipped(f"{name} is not there, it comes with the CUDA toolkit")
    return found


def sanitizer(target: Target) -> Json:
    """compute-sanitizer (memory, races, barriers) over cases of the op: tools without an error, and what all of them said."""
    sanitizer_here = _cuda_tool(target, "compute-sanitizer")
    found: Json = {"tools": [], "said": {}}
    failed, end = [], target.deadline
    for i, tool in enumerate(TOOLS):
        now = time.monotonic()
        target.deadline = now + (end - now) / (len(TOOLS) - i)  # a slow tool leaves time to the next
        said: list[str] = []
        found["said"][tool] = said
        try:
            for case in SANITIZED:
                program = [target.op, "test", "-b", target.backend, "-p", case]
                said += _said(target.run([sanitizer_here, "--tool", tool, "--error-exitcode", "9", *program]))
            found["tools"].append(tool)
        except Failed as error:
            said += _said(error.output)
            failed.append(f"{tool}, {case}: {error}")
    target.deadline = end
    if failed:
        raise Failed("\n".join(failed), found)
    return {**found, "cases": list(SANITIZED)}


def _said(text: str) -> list[str]:
    """The lines that are compute-sanitizer's; of many errors the first and the sum."""
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    return lines if len(lines) <= 60 else [*lines[:50], "...", *lines[-9:]]


def profile(target: Target) -> Json:
    """Time, bandwidth, occupancy and registers of the kernels of a token, ours and stock's, by ncu."""
    ncu = _cuda_tool(target, "ncu")
    found: Json = {"cases": {}}
    for case in target.sizes.profiled:
        command = [
            ncu, "--csv", "--print-units", "base", "--clock-control", "none", "--metrics", ",".join(METRICS),
            "--kernel-name", "regex:flash_attn", "--filter-mode", "per-launch-config", "--launch-count", str(N_LAUNCHES),
            target.op, "perf", "-b", target.backend, "-p", case,
        ]  # fmt: skip
        try:
            found["cases"][case] = kernels(target.run(command))
        except Failed as error:
            raise Failed(str(error), found) from error
    return found


def kernels(text: str) -> list[Json]:
    """Medians over the launches of each kernel and grid, from ncu's CSV."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise Failed("ncu profiled no kernel: " + " ".join(lines[-3:]))
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        name = METRICS.get(row["Metric Name"])
        if name is None:
            continue
        own = values.setdefault((row["Kernel Name"], row["Grid Size"]), {})
        with contextlib.suppress(ValueError):  # n/a
            value = float(row["Metric Value"].replace(",", ""))
            own.setdefault(name, []).append(value)
    return [
        {
            "kernel": kernel,
            "grid": grid,
            "n": len(own.get("ns", [])),
            **{key: statistics.median(of) for key, of in own.items()},
        }
        for (kernel, grid), own in values.items()
    ]
