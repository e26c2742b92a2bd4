"""A session that lives long: random operations leave neither memory nor a trace behind."""

from __future__ import annotations

from pathlib import Path

import soak


def test_random_operations(smollm2: Path) -> None:
    """1,000 of them: ``python -m tests.soak``."""
    sizes = soak.run(smollm2, 150)
    assert len(sizes) == 10
    assert soak.growth(sizes) < 8 << 20, [f"{size / 2**20:.1f} MiB" for size in sizes]
