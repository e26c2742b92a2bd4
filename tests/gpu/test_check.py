"""The command that proves the kernels on a GPU, run on the CPU: its steps, its results, the table of README.md."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import check
import pytest
import report
import steps

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(native_tests: Path, tmp_path: Path) -> Path:
    """A build tree as CMake leaves it: libraries in bin/, test programs in tests/native/, _stamp.py."""
    folder = tmp_path / "build"
    (folder / "tests/native").mkdir(parents=True)
    (folder / "bin").symlink_to((native_tests.parent / "lib").resolve())
    (folder / "_stamp.py").symlink_to((native_tests.parent / "_stamp.py").resolve())
    for name in ("test-backend-ops-ragged", "test-ragged"):
        shutil.copy2(native_tests / name, folder / "tests/native")
    return folder


def test_steps_record_what_they_find(
    native_tests: Path, build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that computes with the CPU's kernels, but has memory of its own and comes to its programs as a GPU does."""
    monkeypatch.setattr(check, "gpu_name", lambda: "Test 1")
    monkeypatch.setenv("GGML_BACKEND_PATH", str(native_tests / "test-device.so"))
    common = ["--backend", "TEST0", "--build", str(build), "--results", str(tmp_path)]
    assert check.main(["--steps", "ops,identities", *common]) == 0
    found = json.loads((tmp_path / "test-1.json").read_text())
    assert found["ops"]["tested"] >= 200 and found["ops"]["failed"] == 0 and found["ops"]["worst_nmse"] < 1e-9
    assert len(found["identities"]["models"]) == 3
    text = report.table([found])
    assert "| Test 1 | " + f"{found['ops']['tested']} cases" in text
    assert text.count("not run") >= 3


def test_sessions_need_no_installation(
    build: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what the package needs at run time: the command line's libraries are not there."""
    for name in ("typer", "pydantic", "click"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(check, "gpu_name", lambda: "Test 4")
    plans = {
        "filled": {"lengths": [256, 512], "fill": True},
        "prompt": {"lengths": [300], "references": [64]},
    }
    common = {"policies": ["auto", "windowkv"], "budgets": [0.25], "baselines": ["f16"], "rounds": 4, "references": []}
    own = {"model": str(tiny), "plans": plans, "common": common}
    monkeypatch.setattr(steps, "FULL", replace(steps.FULL, sessions=own))
    assert (
        check.main(["--steps", "sessions", "--backend", "CPU", "--build", str(build), "--results", str(tmp_path)]) == 0
    )
    found = json.loads((tmp_path / "test-4.json").read_text())
    rows = found["sessions"]["filled"]["rows"]
    assert [(row["session"], row["length"]) for row in rows] == [
        (name, length) for length in (256, 512) for name in ("stock f16", "auto 25 % f16", "windowkv 25 % f16")
    ]
    assert all(row["decode_ms"] > 0 for row in rows)
    compacted = [row["compaction_ms"] for row in found["sessions"]["prompt"]["rows"] if row["budget"]]
    assert len(compacted) == 2 and min(compacted) > 0
    names = {target["name"] for target in found["targets"]}
    assert "auto 25 % f16: compaction by prefill" in names


def test_steps_follow_a_build(build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the build makes is looked for when a step needs it, not before."""
    made, later = tmp_path / "later", build.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(check.build, "build", lambda *args: made.symlink_to(later))
    monkeypatch.setattr(check, "gpu_name", lambda: "Test 6")
    common = ["--small", "--backend", "CPU", "--build", str(made), "--results", str(tmp_path)]
    assert check.main(["--steps", "build,sessions,identities", *common]) == 0
    found = json.loads((tmp_path / "test-6.json").read_text())
    assert found["build"]["ok"] and found["identities"]["models"] == ["gqa2-64.gguf"]
    assert len(found["sessions"]["filled"]["rows"]) == 6


def test_the_sanitizer_has_cases(native_tests: Path) -> None:
    for case in steps.SANITIZED:
        program = [native_tests / "test-backend-ops-ragged", "test", "-b", "CPU", "-p", case]
        run = subprocess.run(program, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0 and " 0 failed" in run.stdout, case + run.stdout


def test_a_build_without_libraries_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "gpu_name", lambda: "Test 5")
    assert (
        check.main(["--steps", "sessions", "--backend", "CPU", "--build", str(tmp_path), "--results", str(tmp_path)])
        == 1
    )
    error = json.loads((tmp_path / "test-5.json").read_text())["sessions"]["error"]
    assert "_stamp.py; run the step build first" in error


def test_a_failed_step_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "gpu_name", lambda: "Test 2")
    common = ["--backend", "CPU", "--build", str(tmp_path), "--results", str(tmp_path)]
    assert check.main(["--steps", "ops", *common]) == 1
    found = json.loads((tmp_path / "test-2.json").read_text())
    assert not found["ops"]["ok"] and "test-backend-ops-ragged" in found["ops"]["error"]
    assert "| Test 2 | failed |" in report.table([found])


def test_targets_follow_from_what_was_measured() -> None:
    def row(session: str, length: int, budget: float | None, **values: float) -> dict[str, object]:
        common = {"kv_bytes_start": 4000, "device_bytes": 9000, "decode_ms": 5.0, "compaction_ms": None}
        return {"session": session, "length": length, "budget": budget, **common, **values}

    speed = [
        ["128", "f16", "8 x 4", "1", "1048576", "1", "900.0", "700.0", "1.29", "81 %"],
        ["128", "q8_0", "8 x 4", "1", "1048576 ragged", "1", "900.0", "700.0", "1.29", "59 %"],
        ["128", "q4_0", "8 x 4", "1", "1048576", "1", "900.0", "700.0", "1.29", "10 %"],
        ["128", "f16", "8 x 4", "1", "131072", "1", "900.0", "700.0", "1.29", "10 %"],
        ["128", "f16", "8 x 4", "8", "1048576", "1", "900.0", "700.0", "1.29", ""],
    ]
    filled = [
        row("stock f16", 16384, None, decode_ms=4.6),
        row("stock f16", 131072, None, decode_ms=30.0),
        row("auto 12 % f16", 16384, 0.12, kv_bytes_start=500, device_bytes=5500),
        row("auto 12 % f16", 131072, 0.12, kv_bytes_start=500, device_bytes=5700),
    ]
    prompt = [
        row("stock f16", 32768, None, prefill_tokens_per_s=5000.0),
        row("auto 12 % f16", 32768, 0.12, prefill_tokens_per_s=4096.0, compaction_ms=170.0),
    ]
    sessions = {"ok": True, "filled": {"rows": filled}, "prompt": {"rows": prompt}}
    found = report.targets({"speed": {"ok": True, "rows": speed}, "sessions": sessions})
    assert [(target["value"], target["met"]) for target in found] == [
        (0.81, True), (0.59, False),  # share of the speed at which the device copies
        (1.0, True), (0.92, True), (1.0364, False),  # bytes at 16k, speed and bytes at 128k
        (0.0213, False),  # of 8 s
    ]  # fmt: skip
    own = [row("stock f16", 4042, None, decode_ms=1.24), row("auto 12 % f16", 4042, 0.12, decode_ms=2.18)]
    (token,) = report.targets({"model": {"ok": True, "model": "m.gguf", "speed": {"rows": own}}})
    assert (token["name"], token["value"], token["met"]) == (
        "m.gguf, auto 12 % f16: time of a token by stock's",
        1.7581,
        False,
    )
    text = report.target_lines([{"gpu": "Test 3", "targets": found}])
    assert text.count("MISSED") == 3 and "0.59 (>= 0.6): MISSED" in text
    assert report.targets({"speed": {"ok": False, "error": "x"}}) == []


def test_plans_are_plans() -> None:
    """Of the sizes that no test here runs."""
    import sessions

    own = steps.FULL.sessions
    plans = {name: sessions.plan_of({**own["common"], **fields}) for name, fields in own["plans"].items()}
    assert plans["filled_q8_0"].types == ("q8_0",) and plans["filled_q8_0"].lengths == (16384,)
    assert sessions.plan_of(steps.FULL.model["speed"]).lengths == (4096,)


def test_a_dirty_tree_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*args: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *own, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    git("tag", "v1")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert check.commit_here() == git("rev-parse", "--short", "HEAD")
    (tmp_path / "a").write_text("2")
    assert check.commit_here() == git("rev-parse", "--short", "HEAD") + "-dirty"


def test_unknown_steps_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--steps", "speeed", "--backend", "CPU", "--results", str(tmp_path)])
    assert "--steps has speeed, expected some of build, ops" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_readme_has_the_table_of_the_results() -> None:
    text = (ROOT / "tests" / "gpu" / "README.md").read_text(encoding="utf-8")
    assert text.split(report.BEGIN)[1].split(report.END)[0].strip() == report.table(report.all_results())


def test_the_targets_in_the_results_follow_from_them() -> None:
    found = report.all_results()
    assert found
    for res in found:
        assert report.targets(res) == res["targets"], res["gpu"]
