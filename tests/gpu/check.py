"""Prove and measure the GPU kernels on the GPU of this machine; one file of results per GPU.

    python -m tests.gpu.check [--steps build,ops,speed,...] [--source PATH] [--model FILE]
    python -m tests.gpu.check --steps build --arch 90
    python -m tests.gpu.check --prebuilt ARCHIVE [--model FILE]

Every step writes what it found into tests/gpu/results/<gpu>.json at once, so that steps may be run by several calls; beside it
log.txt gets every command and what it printed. The most telling come first, each has a time of its own, and one that fails does
not stop the next:

build        the libraries and test programs for this GPU, in --build; without network --source names the pinned llama.cpp, a folder
             (CMakeLists.txt, LICENSE, cmake, ggml, include, licenses, src and vendor) or llama-cpp-python's source distribution
ops          all cases of the op against a reference in double precision
sanitizer    compute-sanitizer (memory, races, barriers) over cases of the op
speed        the op beside ggml_flash_attn_ext, and the share of the speed at which the device copies
identities   a session with a policy that evicts nothing gives stock's logits, compaction moves the right rows
sessions     what `windowkv-edge bench` measures, with all layers on the GPU: 16k and 128k positions with random cells, a prompt of
             32k. Runs this folder's package with the libraries of the build
profile      time, bandwidth and registers of the kernels by ncu
model        a real model, if --model names one: its speed, needles on the GPU and the CPU, and the cells they choose

With --arch the build is for another machine: it needs no GPU, and packs all that the other steps need into one archive. There
--prebuilt runs them within 8.5 minutes, without a network, a compiler, or more of Python than numpy and cffi. What such
a machine wrote, --take writes into the results here; steps that were not measured stay as they are.

--table prints the table of all results and what they say about the targets, --readme FILE writes the table into a README.
Needs Python alone; identities numpy and gguf; sessions and model what the package imports (llama-cpp-python, cffi, gguf, numpy,
platformdirs, psutil, rich), but not the package.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import archive
import build
import steps
from archive import ArchiveError, Built
from report import RESULTS, STEPS, Json, all_results, file_name, table, take, target_lines, targets, write_readme
from steps import Failed, Skipped, Target

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 4 * 3600
# an archive is for machines that one has for ten minutes, of which unpacking and the way there take some
MINUTES, MINUTES_PREBUILT = 60.0, 8.5
# of the minutes that all have, at most; on an H100 they need less
SHARES = {
    "ops": 0.15,
    "sanitizer": 0.25,
    "speed": 0.25,
    "identities": 0.15,
    "sessions": 0.4,
    "profile": 0.25,
    "model": 0.4,
}


class Check:
    """The steps on one machine.

    Args:
        target: what they run.
        results: file of the results.
        commit: of the sources.
        minutes: for all steps but the build.
        builder: the step build.
    """

    def __init__(self, target: Target, results: Path, commit: str, minutes: float, builder: Callable[[], Json]) -> None:
        self.target, self.file, self.commit, self.builder = target, results, commit, builder
        self.seconds, self.left = 60 * minutes, 60 * minutes
        self.results: Json = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}

    def step(self, name: str) -> bool:
        """Run a step and record it; whether it found nothing wrong."""
        start = time.monotonic()
        limit = BUILD_SECONDS if name == "build" else min(self.left, SHARES[name] * self.seconds)
        self.target.deadline = start + limit
        try:
            if limit <= 0:
                raise Skipped(f"the {self.seconds / 60:g} minutes were over")
            found = {"ok": True, **(self.builder() if name == "build" else getattr(steps, name)(self.target))}
        except Skipped as reason:
            print(f"{name}: not run: {reason}", flush=True)
            return True
        except Failed as error:
            found = {"ok": False, "error": str(error), **error.found}
        except (ArchiveError, OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        seconds = time.monotonic() - start
        if name != "build":
            self.left -= seconds
        found["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        found["commit"] = self.commit
        found["seconds"] = round(seconds, 1)
        self._write(name, found)
        print(f"{name}: {'ok' if found['ok'] else 'FAILED: ' + found['error']} ({seconds:.0f} s)", flush=True)
        return bool(found["ok"])

    def _write(self, name: str, found: Json) -> None:
        about = {"gpu": gpu_name(), "backend": self.target.backend, "host": platform.platform()}
        self.results = {**self.results, name: found, **about}
        self.results["targets"] = targets(self.results)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        part.rename(self.file)


#
# what the steps run
#


def built_in(folder: Path) -> Built:
    """The native side that CMake left in a build folder."""
    return Built(folder / "bin", ROOT / "native/include", folder / "_stamp.py", folder / "tests/native")


def linked_package(built: Built, folder: Path) -> Path:
    """A folder for PYTHONPATH: this folder's package with the libraries of a build."""
    if missing := built.missing(programs=False):
        raise Failed(f"no {', '.join(missing)}; run the step build first")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    own = archive.add_package(folder)
    for name, path in {"lib": built.lib, "include": built.include, "_stamp.py": built.stamp}.items():
        (own / name).symlink_to(path.resolve())
    return folder


def target_here(folder: Path, args: argparse.Namespace) -> Target:
    """The build of this machine."""
    built = built_in(folder)
    return Target(built.programs, lambda: linked_package(built, folder / "package"), args.backend, folder, args.model)


def target_of_archive(top: Path, folder: Path, args: argparse.Namespace) -> Target:
    """An unpacked archive."""
    package = top / "package"
    model = args.model or next(iter(sorted((top / "models").glob("*.gguf"))), None)
    needed = tuple(archive.about(top).get("needed", ()))
    programs = package / "windowkv_edge/_tests"
    return Target(programs, lambda: package, args.backend, folder, model, python_path=[package], needed=needed)


def run_build(folder: Path, args: argparse.Namespace) -> Json:
    """Build; for a named architecture, pack as well."""
    runner = Target(folder, lambda: folder, "", folder, deadline=time.monotonic() + BUILD_SECONDS)
    build.build(runner.run, folder, args.source, args.arch, args.jobs)
    if not args.arch:
        return {}
    file = args.archive or folder / f"{archive.NAME}-{args.arch}.tar.xz"
    nvcc = build.find_nvcc()
    assert nvcc is not None
    about = {"commit": commit_here(), "backend": "CUDA0", "arch": args.arch}
    about["needed"] = ["libcuda.so.1", f"libcublas.so.{build.major_of(nvcc)}"]
    return archive.pack(file, built_in(folder), about, build.runtime_libraries(), model=args.model)


def commit_here() -> str:
    """With -dirty behind it where files differ from the commit."""
    if (ROOT / "archive.json").exists():
        return str(archive.about(ROOT)["commit"])
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def gpu_name() -> str:
    """As its driver says, or this machine's processor."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/local/nvidia/bin")
    if smi:
        command = [smi, "--query-gpu=name", "--format=csv,noheader"]
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


#
# command line
#


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", help=f"some of {','.join(STEPS)}; default: all, without build of what is built")
    parser.add_argument("--source", type=Path, help="pinned llama.cpp: a folder, or the source distribution")
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build" / "gpu", help="folder of the build and of files of the run"
    )
    parser.add_argument("--arch", help="build for this CUDA architecture, such as 90, and pack an archive")
    parser.add_argument("--archive", type=Path, help="file of the archive; default: in the folder of the build")
    parser.add_argument("--jobs", type=int, help="compilers at a time; default: one per core")
    parser.add_argument("--prebuilt", type=Path, help="an archive, or the folder of an unpacked one")
    parser.add_argument(
        "--model", type=Path, help="a GGUF file for the step model; with --arch packed if there is room"
    )
    parser.add_argument(
        "--minutes", type=float, help=f"for all steps; default: {MINUTES:g}, with --prebuilt {MINUTES_PREBUILT:g}"
    )
    parser.add_argument("--small", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--backend", help="ggml's name of the device; default: the first GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--take", type=Path, metavar="FILE", help="write the steps of this results file into the results"
    )
    parser.add_argument("--table", action="store_true", help="print the results")
    parser.add_argument("--readme", type=Path, help="write the table of the results into this file")
    args = parser.parse_args(argv)
    if args.prebuilt is None and (ROOT / "archive.json").exists():
        args.prebuilt = ROOT  # this file lies in an unpacked archive
    default = ["build"] if args.arch else [name for name in STEPS if name != "build" or args.prebuilt is None]
    args.steps = args.steps.split(",") if args.steps else default
    if unknown := [name for name in args.steps if name not in STEPS]:
        parser.error(f"--steps has {', '.join(unknown)}, expected some of {', '.join(STEPS)}")
    if args.arch and args.steps != ["build"]:
        parser.error("--arch builds for another machine: only --steps build runs here")
    if args.prebuilt and "build" in args.steps:
        parser.error("--prebuilt brings what the step build makes")
    if args.model and not args.model.is_file():
        parser.error(f"there is no model {args.model}")
    return args


def build_for_another(args: argparse.Namespace) -> int:
    """Build and pack, without results of this machine."""
    try:
        made = run_build(args.build, args)
    except (Failed, ArchiveError, OSError, subprocess.SubprocessError) as error:
        print(f"build: FAILED: {error}", flush=True)
        return 1
    print(f"{made['file']}: {made['bytes'] / (1 << 20):.1f} MiB")
    if args.model and "model" not in made:
        print(f"There was no room for {args.model.name}: bring it along, for --model")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.table:
        found = all_results(args.results)
        print(table(found))
        print(target_lines(found))
        return 0
    if args.readme:
        write_readme(args.readme)
        return 0
    if args.take:
        path, left_out = take(args.take, args.results)
        print(path)
        for name in left_out:
            print(f"{name}: failed without a measurement, what was measured before stays")
        return 0
    if args.arch:
        return build_for_another(args)

    args.backend = args.backend or default_backend()
    commit, minutes = commit_here(), args.minutes or MINUTES
    if args.prebuilt:
        try:
            top = archive.unpack(args.prebuilt, args.build / "prebuilt")
        except ArchiveError as error:
            raise SystemExit(str(error)) from error
        target = target_of_archive(top, args.build, args)
        commit, minutes = archive.about(top)["commit"], args.minutes or MINUTES_PREBUILT
    else:
        target = target_here(args.build, args)
    target.sizes = steps.SMALL if args.small else steps.FULL
    target.log = args.results / "log.txt"
    check = Check(target, args.results / file_name(gpu_name()), commit, minutes, lambda: run_build(args.build, args))
    return 0 if all([check.step(step) for step in args.steps]) else 1


if __name__ == "__main__":
    sys.exit(main())
