"""The native tests, also under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from reference.attention import flash_attn_ragged


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


@pytest.mark.parametrize("kind", ["gpt_oss", "granite_hybrid", "lfm2"])
def test_states_with_windows_and_recurrent_layers(native_tests: Path, tmp_path: Path, kind: str) -> None:
    model = getattr(tiny_model, f"write_{kind}")(tmp_path / "tiny.gguf")
    run = subprocess.run([native_tests / "test-ragged", model, "0", "state"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "ok"


def test_policies_with_extreme_options(native_tests: Path) -> None:
    """Of the largest and the smallest numbers, most are valid: nothing overflows, and every head keeps a cell."""
    run = subprocess.run([native_tests / "test-policy", "30000"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    n_valid, n_held = map(int, run.stdout.split())
    assert n_valid > 15_000
    assert n_held > 1_000  # by a device that counts and marks


def test_scores_on_the_cpu(native_tests: Path) -> None:
    run = subprocess.run([native_tests / "test-scores", "200"], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == "200\n"


@pytest.mark.parametrize("program", ["test-backend-ops-ragged", "test-backend-ops-ragged-asan"])
def test_ragged_attention(native_tests: Path, program: str) -> None:
    run = subprocess.run([native_tests / program, "test"], capture_output=True, text=True, timeout=1200)
    failed = [line for line in run.stdout.splitlines() if "FAIL (" in line]
    assert run.returncode == 0, "\n".join([*failed, run.stderr[-4000:]])
    assert int(run.stdout.splitlines()[-1].split()[0]) >= 200


@pytest.mark.slow
def test_ragged_attention_all(native_tests: Path) -> None:
    run = subprocess.run([native_tests / "test-backend-ops-ragged", "test", "--all"], capture_output=True, text=True)
    assert run.returncode == 0, "\n".join(line for line in run.stdout.splitlines() if "FAIL (" in line)


def test_ragged_attention_is_the_reference(native_tests: Path, tmp_path: Path) -> None:
    subprocess.run([native_tests / "test-backend-ops-ragged", "dump", tmp_path], check=True)
    cases = sorted({path.name.split("_")[0] for path in tmp_path.glob("*.npy")})
    assert len(cases) == 4
    for case in cases:
        names = ("q", "k", "v", "ranges", "sinks", "out", "params")
        q, k, v, ranges, sinks, out, params = (np.load(tmp_path / f"{case}_{name}.npy") for name in names)
        layer, scale, softcap, causal = params
        want = flash_attn_ragged(
            q, k, v, ranges, int(layer), float(scale), float(softcap), bool(causal), sinks if len(sinks) else None
        )
        assert np.isnan(k).any() and np.isfinite(out).all()
        # sums of some hundred F32 products: 1e-6 of the largest value
        assert np.abs(out - want).max() <= 2e-6 * np.abs(want).max()
