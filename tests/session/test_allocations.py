"""Memory that runs out: an error, never a crash that stock has not, and a session that goes on as if nothing had been."""

from __future__ import annotations

import sys
from pathlib import Path

import allocation_runs
import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator stands on glibc")
@pytest.mark.parametrize(
    ("arch", "steps", "n_sample"),
    [("llama", "native", 20), ("gpt-oss", "native", 4), ("lfm2", "native", 4), ("llama", "session", 4)],
)
def test_every_allocation_may_fail(native_tests: Path, tmp_path: Path, arch: str, steps: str, n_sample: int) -> None:
    """Of every stack with a function of ours; all of them: ``python tests/session/allocation_runs.py``."""
    model = allocation_runs.write_model(arch, tmp_path)
    found = allocation_runs.explored(native_tests, model, arch, steps, n_sample)
    print(allocation_runs.report(arch, steps, found))
    assert not found.faults, allocation_runs.report(arch, steps, found)
    assert list(found.counts) == list(allocation_runs.PHASES)
    for phase, counts in found.counts.items():
        assert counts["refused"] > 5 and counts["ours"] > 15, (phase, counts)
