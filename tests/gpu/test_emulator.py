"""The GPU kernels, executed on the CPU: tests/native/simt has the emulator."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

N_PARTS = 4


def test_planted_faults_are_found(native_tests: Path) -> None:
    """A race, a read behind the end, a missing barrier, a barrier for some, in small kernels and in ours."""
    run = subprocess.run([native_tests / "test-simt-ragged", "faults"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert sum("without the barrier in line" in line for line in lines) >= 14
    assert lines[-1] == "0 failed"


def test_cost_of_a_token(native_tests: Path) -> None:
    """Waits for memory, loads, barriers and bytes of a token are within bounds, whose reasons test-simt-ragged.cpp tells."""
    run = subprocess.run([native_tests / "test-simt-ragged", "cost"], capture_output=True, text=True, timeout=600)
    failed = [line for line in run.stdout.splitlines() if "FAIL (" in line]
    assert run.returncode == 0, "\n".join([*failed, run.stderr[-4000:]])
    bounds = ["blocks", "rounds over cells", "loads for cells", "barriers over cells", "k", "v"]
    bounds += ["rounds over parts", "barriers of combine", "bytes of results", "bytes of parts"]
    for bound in bounds:
        assert sum(line.startswith(f"  {bound}: OK") for line in run.stdout.splitlines()) == 27, bound
    assert sum(line.startswith("  sm_80:") for line in run.stdout.splitlines()) == 11


@pytest.mark.parametrize("device", ["cuda", "metal"])
def test_kernels_compute_the_op(native_tests: Path, device: str) -> None:
    """The cases of the CPU's kernel, those that the backend says it supports."""

    def run(part: int) -> subprocess.CompletedProcess[str]:
        command = [native_tests / "test-simt-ragged", device, "--part", f"{part}/{N_PARTS}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=1200)

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(run, range(N_PARTS)))
    for done in runs:
        failed = [line for line in done.stdout.splitlines() if "FAIL (" in line]
        assert done.returncode == 0, "\n".join([*failed, done.stderr[-4000:]])
    counts = [done.stdout.splitlines()[-1].split() for done in runs]
    assert sum(int(count[0]) for count in counts) >= 200
    # head sizes that are no multiples of eight, which no model of ours has
    assert sum(int(count[4]) for count in counts) <= 10
