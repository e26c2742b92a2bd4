"""Memory that runs out: an error, never a crash that stock has not, and a session that goes on as if nothing had been."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from allocation_runs import PHASES, Found, Sample, explored, report, write_model


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the allocator stands on glibc")


@pytest.mark.parametrize(
    ("arch", "steps", "sample"),
    [
        ("llama", "native", Sample(None, 20)),
        ("gpt-oss", "native", Sample(40, 5)),
        ("lfm2", "native", Sample(40, 5)),
        ("llama", "session", Sample(40, 5)),
        ("llama", "limited", Sample(40, 5)),
    ],
)
def test_any_allocation_may_fail(native_tests: Path, tmp_path: Path, arch: str, steps: str, sample: Sample) -> None:
    """Every one of them: ``python tests/session/allocation_runs.py``."""
    check(explored(native_tests, write_model(arch, tmp_path), arch, steps, sample), arch, steps)


@pytest.mark.slow
def test_every_allocation_may_fail(native_tests: Path, tmp_path: Path) -> None:
    """Of a load, a prompt, a compaction and 64 tokens, with one layer."""
    found = explored(native_tests, write_model("llama", tmp_path, n_layer=1), "llama", "native", None)
    check(found, "llama", "native")
    assert sum(counts["tried"] for counts in found.counts.values()) > 5000


def check(found: Found, arch: str, steps: str) -> None:
    said = report(arch, steps, found)
    print(said)
    assert not found.faults, said
    assert list(found.counts) == list(PHASES)
    for counts in found.counts.values():
        assert counts["refused"] > 10 and counts["ours"] > 20, said
