"""Fixtures of the patch queue's tests; workshop.py holds the invented upstream they work on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from workshop import Workshop


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    for name in ("WINDOWKV_SDIST", "WINDOWKV_CACHE"):
        monkeypatch.delenv(name, raising=False)
    yield Workshop(tmp_path)
