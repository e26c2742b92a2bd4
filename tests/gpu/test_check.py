"""The command that proves the kernels on a GPU, run on the CPU: its steps, its results, the README's table."""

from __future__ import annotations

import json
from pathlib import Path

import check
import pytest

ROOT = Path(__file__).parents[2]


def test_steps_record_what_they_find(native_tests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "gpu_name", lambda: "Test 1")
    common = ["--backend", "CPU", "--programs", str(native_tests), "--build", str(tmp_path), "--results", str(tmp_path)]
    assert check.main(["--steps", "ops,identities", *common]) == 0
    found = json.loads((tmp_path / "test-1.json").read_text())
    assert found["ops"]["tested"] >= 200 and found["ops"]["failed"] == 0 and found["ops"]["worst_nmse"] < 1e-9
    assert len(found["identities"]["models"]) == 3
    text = check.table([found])
    assert "| Test 1 | " + f"{found['ops']['tested']} cases" in text
    assert text.count("not run") >= 3


def test_a_failed_step_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "gpu_name", lambda: "Test 2")
    common = ["--backend", "CPU", "--programs", str(tmp_path), "--build", str(tmp_path), "--results", str(tmp_path)]
    assert check.main(["--steps", "ops", *common]) == 1
    found = json.loads((tmp_path / "test-2.json").read_text())
    assert not found["ops"]["ok"] and "test-backend-ops-ragged" in found["ops"]["error"]
    assert "| Test 2 | failed |" in check.table([found])


def test_unknown_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--steps has speeed, expected some of build, ops"):
        check.main(["--steps", "speeed", "--backend", "CPU", "--results", str(tmp_path)])


def test_the_readme_has_the_table_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.split(check.BEGIN)[1].split(check.END)[0].strip() == check.table(check.all_results())
