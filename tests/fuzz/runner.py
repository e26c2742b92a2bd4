"""Runs inputs in processes of their own, with bounds of time and memory, and keeps those that end in the wrong way."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windowkv_edge._libs import BUILT

from .targets import TARGETS, fault

SECONDS = 60  # of one input, on a machine that has other work
MIB = 512  # of one input, beyond what its process holds
LOAD_MIB = 2048  # of a process that loads models
LOAD_EVERY = 10  # one header of so many is loaded

STOCK = BUILT / "_tests" / "stock"


@dataclass
class Report:
    """What came of the inputs of one target.

    Attributes:
        outcomes: how many ended in which way.
        findings: file of the input, and what happened.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[Path, str]] = field(default_factory=list)


def make(name: str, base: Any, seed: str, i: int) -> bytes:
    """The input with this number."""
    return TARGETS[name].make(base, random.Random(f"{name} {seed} {i}"))


def run(name: str, n: int, seed: str, out: Path, loads: bool = False) -> Report:
    """Try n inputs; those that are findings are kept in ``out``. ``loads``: some headers are loaded as models, too."""
    out.mkdir(parents=True, exist_ok=True)
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = TARGETS[name].prepare(folder)

        def keep(i: int, what: str) -> None:
            path = out / f"{name}-{seed}-{i}{TARGETS[name].suffix}"
            path.write_bytes(make(name, base, seed, i))
            report.findings.append((path, what))
            report.outcomes["finding"] += 1

        first = 0
        while first < n:
            first = _batch(name, base, seed, first, n, folder, report, keep)
        if loads:
            with Loader(None) as stock, Loader("auto") as auto, Loader("headkv") as headkv:
                for i in range(0, n, LOAD_EVERY):
                    path = folder / f"load{TARGETS[name].suffix}"
                    path.write_bytes(make(name, base, seed, i))
                    ours = (auto if i % (2 * LOAD_EVERY) else headkv).load(path)
                    report.outcomes[f"load {ours.split()[0]}"] += 1
                    if ours.startswith("died") and not stock.load(path).startswith("died"):
                        keep(i, f"ours {ours}, stock does not")
                    elif ours.startswith("raw") and stock.load(path) != ours:
                        keep(i, f"{ours}, which stock does not raise")
    return report


def _batch(name: str, base: Any, seed: str, first: int, n: int, folder: Path, report: Report, keep: Any) -> int:
    """Inputs from ``first`` on, in one process, until one kills it. Returns the number of the next."""
    context = multiprocessing.get_context("fork")  # a process that has imported everything costs milliseconds
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(name, base, seed, first, n, folder, theirs), daemon=True)
    worker.start()
    theirs.close()
    i = first
    while True:
        try:
            if not ours.poll(SECONDS):
                worker.kill()
                worker.join()
                keep(i, f"more than {SECONDS} s")
                return i + 1
            ended = ours.recv()
        except EOFError:
            worker.join()
            if i < n:
                keep(i, f"the process died with {worker.exitcode}")
            return i + 1
        if ended.startswith("!"):
            keep(i, ended[1:])
        else:
            report.outcomes[ended] += 1
        i += 1


def _work(name: str, base: Any, seed: str, first: int, n: int, folder: Path, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    target = TARGETS[name]
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (MIB << 20), resource.RLIM_INFINITY))
    path = folder / f"input{target.suffix}"
    for i in range(first, n):
        path.write_bytes(make(name, base, seed, i))
        try:
            target.use(path)
            ended = "used"
        except Exception as error:  # the point of it all
            found = fault(target, error)
            ended = "refused" if found is None else f"!{found}"
        pipe.send(ended)


class Loader:
    """Loads models with a policy, or with stock llama.cpp (None)."""

    def __init__(self, policy: str | None) -> None:
        env = os.environ | {"GGML_NO_BACKTRACE": "1"}  # it calls a debugger
        if policy is None:
            env["LLAMA_CPP_LIB_PATH"] = str(STOCK)
        command = [sys.executable, str(Path(__file__).with_name("loads.py")), str(SECONDS), str(LOAD_MIB), policy or ""]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self._read()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.child.communicate()  # the end of its input ends it

    def _read(self) -> str:
        assert self.child.stdout is not None
        said = self.child.stdout.readline().strip()
        if not said:
            raise RuntimeError(f"the process that loads models ended with exit code {self.child.wait()}")
        return said

    def load(self, path: Path) -> str:
        """ "ok", "refused", "raw ..." for an error of the wrong kind, or "died ..."."""
        assert self.child.stdin is not None
        self.child.stdin.write(f"{path}\n")
        self.child.stdin.flush()
        return self._read()
