"""The native tests under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import tiny_model


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_head": 3, "n_head_kv": 1, "head_dim": 96, "n_layer": 1},
        {"n_head": 4, "n_head_kv": 4, "head_dim": 64, "n_layer": 5},
    ],
    ids=["gqa2", "mqa", "mha"],
)
def test_sanitizers_are_clean(native_tests: Path, tmp_path: Path, shape: dict[str, int]) -> None:
    model = tiny_model.write_llama(tmp_path / "tiny.gguf", **shape)
    run = subprocess.run([native_tests / "test-ragged", model], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "ok"
