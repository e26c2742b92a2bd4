"""Prove and measure the GPU kernels on the GPU of this machine; one file of results per GPU.

    python -m tests.gpu.check [--source DIR] [--steps build,ops,identities,sanitizer,speed,sessions]

Every step writes what it found into tests/gpu/results/<gpu>.json at once, so that steps may be run by several calls:

build        the libraries and test programs for this GPU, in --build; without network --source names a folder with the
             pinned llama.cpp: CMakeLists.txt, LICENSE, cmake, ggml, include, licenses, src and vendor
ops          all cases of the op against a reference in double precision
identities   a session with a policy that evicts nothing gives stock's logits, compaction moves the right rows
sanitizer    compute-sanitizer (memory, races, barriers) over cases of the op
speed        the op beside ggml_flash_attn_ext, and the share of the speed at which the device copies
sessions     what `windowkv-edge bench` measures, with all layers on the GPU: 16k and 128k positions with random cells, a prompt of
             32k. Runs this folder's package with the libraries of the build

``--table`` prints the table of all results and what they say about the targets, ``--readme FILE`` writes the table into a README.
Needs Python alone; identities numpy and gguf, unless the models are there; sessions what the package imports
(llama-cpp-python, cffi, gguf, numpy, platformdirs, psutil, rich), but not the package.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from report import RESULTS, STEPS, Json, all_results, table, target_lines, targets, write_readme

ROOT = Path(__file__).parents[2]
# few cells each: a sanitizer is some hundred times slower
SANITIZED = ("n_tokens=8,n_cells=[45", "n_tokens=1,n_cells=[38", "n_gqa=8,n_tokens=40,n_cells=[9]", "n_cells=[0,0,0]")

# The address sanitizer's shadow covers addresses that CUDA wants; what a driver never frees is not ours
ASAN_ON_DEVICE = "protect_shadow_gap=0:detect_leaks=0"

# Plans for windowkv_edge.bench. Random weights, so no head scores but made-up ones
SESSIONS: Json = {
    "model": "llama-8b",
    "plans": {
        "filled": {"lengths": [16384, 131072], "fill": True},
        "prompt": {"lengths": [32768], "baselines": ["f16"], "references": [], "rounds": 8},
    },
    "common": {"policies": ["auto", "windowkv", "headkv-r2"], "budgets": [0.12]},
}


class Failed(Exception):
    """A step found something wrong; its message says what."""


class Check:
    """The steps on one machine.

    Args:
        build: folder of the build.
        programs: folder of the test programs: that of the build, or the one of an installed package.
        backend: ggml's name of the device, such as CUDA0.
        source: llama.cpp of the pinned version; None = download.
        results: file of the results.
    """

    def __init__(self, build: Path, programs: Path, backend: str, source: Path | None, results: Path) -> None:
        self.folder, self.programs, self.backend, self.source, self.file = build, programs, backend, source, results
        self.results: Json = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}

    @property
    def on_device(self) -> bool:
        return self.backend != "CPU"

    def run(self, command: Sequence[str | Path], timeout: float = 3600, **env: str) -> str:
        """Output of a command that has to succeed; ``env`` is added to the environment."""
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=timeout, env={**os.environ, **env}
        )
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
        layers = "99" if self.on_device else "0"
        options = [os.environ.get("ASAN_OPTIONS", ""), ASAN_ON_DEVICE if self.on_device else ""]
        env = {"ASAN_OPTIONS": ":".join(option for option in options if option)}
        for model in models:
            if self.run([self.programs / "test-ragged", model, layers], **env).strip() != "ok":
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
        plans = json.dumps({**SESSIONS, "gpu_layers": -1 if self.on_device else 0})
        path = os.pathsep.join(part for part in (str(self.package()), os.environ.get("PYTHONPATH", "")) if part)
        return dict(json.loads(self.run([sys.executable, ROOT / "tests/gpu/sessions.py", plans], PYTHONPATH=path)))

    def package(self) -> Path:
        """Folder with a copy of this folder's package that has the libraries of the build, or of the programs' package."""
        own = self.programs.parent
        built = {"lib": own / "lib", "include": own / "include", "_stamp.py": own / "_stamp.py"}
        if not built["_stamp.py"].exists():
            built = {
                "lib": self.folder / "bin",
                "include": ROOT / "native" / "include",
                "_stamp.py": self.folder / "_stamp.py",
            }
        if missing := [str(path) for path in built.values() if not path.exists()]:
            raise Failed(f"no {', '.join(missing)}; run the step build first")
        folder = self.folder / "package"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            ROOT / "windowkv_edge",
            folder / "windowkv_edge",
            ignore=shutil.ignore_patterns("__pycache__", "_tests", *built),
        )
        for name, path in built.items():
            (folder / "windowkv_edge" / name).symlink_to(path.resolve())
        # its version is asked for when it is imported
        about = folder / "windowkv_edge-0+check.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text("Metadata-Version: 2.1\nName: windowkv-edge\nVersion: 0+check\n", encoding="utf-8")
        return folder


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--source", type=Path)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument(
        "--programs", type=Path, help="folder of test programs, or of a package's; default: the build's"
    )
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
        args.programs or args.build / "tests" / "native",
        args.backend or default_backend(),
        args.source,
        args.results / f"{name}.json",
    )
    return 0 if all([check.step(name) for name in steps]) else 1


if __name__ == "__main__":
    sys.exit(main())
