"""Fixtures of the patch queue's tests; workshop.py holds the invented upstream they work on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "ggml_patch"))

import patchq
from workshop import Workshop

REAL_QUEUE = Path(patchq.__file__).parent


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    for name in ("WINDOWKV_SDIST", "WINDOWKV_CACHE"):
        monkeypatch.delenv(name, raising=False)
    yield Workshop(tmp_path)


@pytest.fixture(scope="session")
def real_sdist(request: pytest.FixtureRequest) -> Path:
    """The pinned source distribution: $WINDOWKV_SDIST, else one download kept in pytest's cache."""
    if given := os.environ.get("WINDOWKV_SDIST"):
        return Path(given)
    assert request.config.cache is not None
    return patchq.download(patchq.read_pin(REAL_QUEUE), request.config.cache.mkdir("sdist"))
