"""The archive for a machine with a GPU, used as there: a Python that has numpy and cffi only, no network, no compiler.

It is packed from what the tests were built with, and runs on the CPU and on a device that computes with the CPU's kernels, but
has memory of its own (tests/native/device).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import archive
import build
import check
import numpy as np
import pytest
import report
import steps

ROOT = Path(__file__).parents[2]
README = ROOT / "tests/gpu/README.md"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="archives are for Linux")

ABOUT = {"commit": "abc1234", "backend": "CPU", "arch": "none"}


def sanitizers(native_tests: Path) -> list[str]:
    """Libraries of the compiler that the installed test programs need, and those for a GPU do not."""
    return sorted(name for name in archive.needed_by(native_tests / "test-ragged") if "san.so" in name)


def built_by(native_tests: Path) -> archive.Built:
    own = native_tests.parent
    return archive.Built(own / "lib", own / "include", own / "_stamp.py", native_tests)


@pytest.fixture(scope="module", autouse=True)
def hardly_compressed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "PRESET", 0)
        yield


@pytest.fixture(scope="module")
def packed(native_tests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("archive") / "windowkv-gpu-90.tar.xz"
    needed = {"needed": sanitizers(native_tests)}
    about = archive.pack(
        file,
        built_by(native_tests),
        {**ABOUT, **needed},
        build.runtime_libraries(),
        modules=[native_tests / "test-device.so"],
    )
    assert about["bytes"] == file.stat().st_size < archive.MAX_BYTES
    return file


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter whose packages are numpy and cffi."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in ("numpy", "cffi"):
        found = importlib.metadata.distribution(name)
        tops = {Path(str(file)).parts[0] for file in found.files or ()} - {"..", "__pycache__"}
        for top in tops:
            (packages / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    python = folder / "bin" / "python"
    for name, there in (
        ("cffi", True),
        ("gguf", False),
        ("llama_cpp", False),
        ("windowkv_edge", False),
        ("rich", False),
    ):
        assert (subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0) is there, name
    return python


def command_of_the_readme() -> str:
    """What a person types on the machine with the GPU."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    (block,) = (text for text in blocks if "-m tarfile" in text)
    (line,) = block.splitlines()
    return str(line)


def run_readme(
    packed: Path, python: Path, folder: Path, model: Path | None, more: list[str], env: dict[str, str]
) -> dict[str, Any]:
    """Results of the README's command in a clean folder, which stands for /tmp too, with further options."""
    (folder / packed.name).symlink_to(packed)
    if model:
        (folder / "model.gguf").symlink_to(model)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GGML_", "WINDOWKV_"))}
    command = command_of_the_readme().replace(" /tmp", f" {folder}")
    if not model:
        command = command.replace(" --model model.gguf", "")
    done = subprocess.run(
        f"{command} --small {shlex.join(more)}", shell=True, cwd=folder, capture_output=True, text=True, timeout=300,
        env={**clean, "HOME": str(folder), "OMP_WAIT_POLICY": "passive", **env, "PATH": f"{python.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (file,) = (folder / "results").glob("*.json")
    log = (folder / "results/log.txt").read_text(encoding="utf-8")
    assert log.count("test-backend-ops-ragged test -b") == 1 and " tested, 0 failed, 0 not supported" in log
    found = dict(json.loads(file.read_text(encoding="utf-8")))
    assert {found[name]["commit"] for name in report.STEPS if name in found} == {"abc1234"}
    return {**found, "printed": done.stdout}


def check_steps(found: dict[str, Any], n_ops: int) -> None:
    assert found["ops"]["tested"] >= n_ops and found["ops"]["failed"] == 0
    assert found["speed"]["rows"] and all(float(row[7]) > 0 for row in found["speed"]["rows"])
    for plan in ("filled", "prompt"):
        rows = found["sessions"][plan]["rows"]
        assert {"stock f16", "auto 25 % f16", "windowkv 25 % f16"} == {row["session"] for row in rows}
        assert all(row["decode_ms"] > 0 for row in rows)
    assert found["identities"]["models"] == ["gqa2-64.gguf"]
    for name in ("sanitizer", "profile"):
        assert name not in found and f"{name}: not run: the tool is for CUDA" in found["printed"]


def test_on_the_cpu(packed: Path, bare_python: Path, tmp_path: Path) -> None:
    found = run_readme(packed, bare_python, tmp_path, None, ["--backend", "CPU"], {})
    check_steps(found, 1)
    assert "model: not run: no --model" in found["printed"] and "model" not in found


def test_on_a_device_with_a_model(packed: Path, bare_python: Path, smollm2: Path, tmp_path: Path) -> None:
    env = {
        "GGML_BACKEND_PATH": str(tmp_path / "windowkv-gpu/package/windowkv_edge/_tests/test-device.so"),
        "TEST_DEVICE_KERNEL": "cpu",
    }
    found = run_readme(packed, bare_python, tmp_path, smollm2, ["--backend", "TEST0"], env)
    check_steps(found, 1)
    own = found["model"]
    assert own["model"] == "model.gguf"
    for where in ("needles", "needles_cpu"):
        assert own[where] == {"n": 1, "found": {"full": 1, "auto 50%": 1}}
    # what the device chooses in another order of sums may differ in a few cells
    assert own["cells_shared"]["mean"] >= 0.9 and own["cells_shared"]["budget"] == 0.25
    assert all(0 <= value < 0.02 for value in own["divergence"].values()) and own["divergence"]["ours_to_stock_on_cpu"] < 0.005
    assert [row["session"] for row in own["speed"]["rows"]] == ["stock f16", "auto 50 % f16"]
    assert any("model.gguf, auto 50 % f16: time of a token" in target["name"] for target in found["targets"])
    assert "full: 1 of 1 needles" in report.table([found])


def test_from_a_checkout(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README says, too: the archive's programs, and its commit in the results."""
    assert "--prebuilt windowkv-gpu-90.tar.xz" in README.read_text(encoding="utf-8")
    monkeypatch.setattr(check, "gpu_name", lambda: "Test 7")
    command = ["--prebuilt", str(packed), "--steps", "ops", "--small", "--backend", "CPU"]
    for _ in range(2):  # what an earlier one left is in nobody's way
        assert check.main([*command, "--build", str(tmp_path / "build"), "--results", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "test-7.json").read_text())
    assert found["ops"]["tested"] >= 1 and found["ops"]["commit"] == "abc1234"
    assert (tmp_path / "build/prebuilt/windowkv-gpu/archive.json").exists()


def test_nothing_in_it_is_compiled_for_one_python(packed: Path) -> None:
    with tarfile.open(packed) as file:
        names = [member.name.removeprefix("windowkv-gpu/package/") for member in file if member.isfile()]
    libraries = [name for name in names if ".so" in name]
    assert [name for name in libraries if not re.match(r"windowkv_edge/(lib|_tests)/|.*\.abi3\.so$", name)] == []
    assert "windowkv_edge/lib/libllama.so" in libraries and "windowkv_edge/lib/libggml-base.so.0" in libraries
    assert not [name for name in names if "/test_" in name or "__pycache__" in name]


def test_an_archive_that_is_too_large_is_refused(native_tests: Path, tmp_path: Path) -> None:
    about = {**ABOUT, "needed": ["libgomp.so.1", *sanitizers(native_tests)]}
    with pytest.raises(archive.ArchiveError, match="the archive has 1?[0-9] MiB, at most 1 travel"):
        archive.pack(tmp_path / "a.tar.xz", built_by(native_tests), about, max_bytes=1 << 20)
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_would_be_missing_is_named(native_tests: Path, tmp_path: Path) -> None:
    """OpenMP's here, as if nobody had thought of it."""
    with pytest.raises(archive.ArchiveError, match=r"would lack libgomp\.so\.1 \(of libggml-base\.so\.0\)"):
        archive.pack(tmp_path / "a.tar.xz", built_by(native_tests), {**ABOUT, "needed": sanitizers(native_tests)})


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_what_is_no_archive_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.tar.xz"
    file.write_bytes(content)
    with pytest.raises(archive.ArchiveError, match="cannot be unpacked"):
        archive.unpack(file, tmp_path)
    with pytest.raises(archive.ArchiveError, match="no archive.json"):
        archive.unpack(tmp_path, tmp_path)
    with pytest.raises(SystemExit, match="there is no"):
        check.main(["--prebuilt", str(tmp_path / "b.tar.xz"), "--backend", "CPU"])


#
# a machine that is slow, or lacks something
#


def target(folder: Path, **values: Any) -> steps.Target:
    return steps.Target(folder, lambda: folder, "CUDA0", folder, **values)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_step_ends_in_time_with_its_children(tmp_path: Path) -> None:
    script = tmp_path / "test-backend-ops-ragged"
    row = ["64", "f16", "3 x 3", "1", "49152", "1", "14.0", "12.0", "1.17", "40 %"]
    lines = [
        "| size | " + " | ".join("c" for _ in row[1:]) + " |",
        "|" + " --- |" * len(row),
        f"| {' | '.join(row)} |",
        "| 64 | cut",
    ]
    (tmp_path / "rows").write_text("\n".join(lines))
    script.write_text(f"#!/bin/sh\ncat {tmp_path}/rows\nsleep 60 & echo $! > {tmp_path}/child\nwait\n")
    script.chmod(0o755)
    slow = check.Check(target(tmp_path), tmp_path / "results.json", "abc", 0.14, dict)
    start = time.monotonic()
    assert not slow.step("speed")
    assert time.monotonic() - start < 30
    found = json.loads((tmp_path / "results.json").read_text())["speed"]
    assert "was not done after 2 s and was ended" in found["error"] and found["rows"] == [row]
    child = int((tmp_path / "child").read_text())
    while time.monotonic() - start < 30 and is_alive(child):  # on a busy machine it dies later
        time.sleep(0.1)
    assert not is_alive(child)

    slow.left = 0.0  # what is not run leaves no trace
    assert slow.step("ops") and "ops" not in json.loads((tmp_path / "results.json").read_text())


def test_a_model_step_that_fails_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's run fails behind its first needles: those of the device and the cells stay under their names."""
    outputs = iter(
        [
            {"needles": {"n": 24}},
            {},
            {"divergence": {"ours_to_cpu": 0.001}},
            steps.Failed("out of time", {"cells_shared": {"mean": 0.9}, "needles_cpu": {"n": 1}}),
        ]
    )
    asked: list[tuple[str, Any, Any]] = []

    def python(self: steps.Target, *args: Any) -> Any:
        asked.append(args)  # type: ignore[arg-type]
        found = next(outputs)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(steps.Target, "python", python)
    with pytest.raises(steps.Failed, match="out of time") as error:
        steps.model(target(tmp_path, model=tmp_path / "m.gguf"))
    expected = {
        "needles": {"n": 24}, "divergence": {"ours_to_cpu": 0.001}, "cells_shared": {"mean": 0.9}, "needles_cpu": {"n": 1},
    }  # fmt: skip
    assert error.value.found == {"model": "m.gguf", **expected}
    assert [(script, wanted["gpu_layers"]) for script, wanted, _ in asked] == [
        ("answers.py", -1),
        ("logits.py", 0),
        ("logits.py", -1),
        ("answers.py", 0),
    ]
    assert asked[1][2] == asked[3][2] == {"CUDA_VISIBLE_DEVICES": "", "GGML_BACKEND_PATH": None}


def test_cases_that_fail_are_counted(tmp_path: Path) -> None:
    script = tmp_path / "test-backend-ops-ragged"
    script.write_text(
        "#!/bin/sh\necho 'a: OK (1e-07)'\necho 'b: FAIL (1)'\necho '2 tested, 1 failed, 0 not supported'\nexit 1\n"
    )
    script.chmod(0o755)
    with pytest.raises(steps.Failed, match="b: FAIL") as error:
        steps.ops(target(tmp_path))
    assert error.value.found == {"tested": 2, "failed": 1, "not_supported": 0, "worst_nmse": 1e-07}
    script.write_text("#!/bin/sh\necho 'Backend CUDA0'\nexit 139\n")
    with pytest.raises(steps.Failed, match="gave 139") as error:
        steps.ops(target(tmp_path))
    assert error.value.found == {}
    script.write_text("#!/bin/sh\necho 'a: OK (1e-07)'\necho 'b: OK (2e-07)'\nprintf 'c: O'\nsleep 60\n")
    with pytest.raises(steps.Failed, match="was ended") as error:
        steps.ops(target(tmp_path, deadline=time.monotonic() + 2))
    assert error.value.found == {"tested": 2, "failed": 0, "worst_nmse": 2e-07}
    script.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(steps.Failed, match="were not counted"):
        steps.ops(target(tmp_path))


def test_what_was_measured_stays_when_a_tool_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"sanitizer": {"ok": True, "commit": "old"}}))
    again = check.Check(target(tmp_path), file, "new", 4, dict)
    assert again.step("sanitizer") and again.step("profile") and again.step("model")
    assert json.loads(file.read_text()) == {"sanitizer": {"ok": True, "commit": "old"}}


def test_cells_are_compared(tmp_path: Path) -> None:
    """Over all cells, and in the head that has the fewest."""
    import answers

    np.savez(tmp_path / "a.npz", **{"0/0": np.arange(90), "0/1": np.array([3, 5, 8, 9, 11, 12, 13, 14, 15, 16])})
    np.savez(tmp_path / "b.npz", **{"0/0": np.arange(100), "0/1": np.array([3, 5, 8, 9, 20, 21])})
    assert answers.compare(str(tmp_path / "a.npz"), str(tmp_path / "b.npz")) == {"mean": 0.94, "least_head": 0.4}
    np.savez(tmp_path / "b.npz", **{"0/0": np.arange(100)})
    with pytest.raises(ValueError, match="other heads"):
        answers.compare(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"))


def test_found_needles_are_counted() -> None:
    import answers

    full = {"policy": "full", "budget": None, "score": 1.0}
    auto = [{"policy": "auto", "budget": budget, "score": score} for budget, score in ((0.12, 1.0), (0.03, 0.5))]
    rows = [{"results": [full, *auto]}, {"results": [{**full, "score": 0.0}]}]
    assert answers.tally(rows) == {"n": 2, "found": {"full": 1, "auto 12%": 1, "auto 3%": 0}}


NCU = """==PROF== Connected to process 7
| 64 | f16 |
==PROF== Disconnected
"ID","Process ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"
"0","7","flash_attn_ext_vec","(3, 1, 132)","gpu__time_duration.sum","nsecond","12,100"
"0","7","flash_attn_ext_vec","(3, 1, 132)","launch__registers_per_thread","register/thread","151"
"1","7","flash_attn_ext_vec","(3, 1, 132)","gpu__time_duration.sum","nsecond","14,100"
"2","7","flash_attn_ragged_combine","(12, 1, 1)","gpu__time_duration.sum","nsecond","174,000.5"
"2","7","flash_attn_ragged_combine","(12, 1, 1)","launch__registers_per_thread","register/thread","n/a"
"""


def test_kernels_are_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/args\ncat {tmp_path}/out\n")
    ncu.chmod(0o755)
    (tmp_path / "out").write_text(NCU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = steps.profile(target(tmp_path))
    assert list(found["cases"]) == list(steps.FULL.profiled)
    assert found["cases"][steps.FULL.profiled[0]] == [
        {"kernel": "flash_attn_ext_vec", "grid": "(3, 1, 132)", "n": 2, "ns": 13100.0, "registers": 151.0},
        {"kernel": "flash_attn_ragged_combine", "grid": "(12, 1, 1)", "n": 1, "ns": 174000.5},
    ]
    assert (tmp_path / "args").read_text().split()[-5:] == ["perf", "-b", "CUDA0", "-p", steps.FULL.profiled[-1]]
    (tmp_path / "out").write_text("==PROF== nothing\n")
    with pytest.raises(steps.Failed, match="ncu profiled no kernel"):
        steps.profile(target(tmp_path))


def test_profiled_cases_exist() -> None:
    """Each text is in the description of one measured case of the GPU's list."""
    source = (ROOT / "tests/native/ragged-perf.h").read_text(encoding="utf-8")
    names = re.search(r"perf_case::vars\(\) const \{\n(.*?)\n\}", source, re.S)
    assert names and re.findall(r'",?(\w+)="', names[1]) == ["hs", "type", "n_tokens", "n_cells", "n_threads", "ragged"]

    def vars_of(hs: int, kind: str, n_tokens: int, n_cells: int, ragged: int) -> str:
        return f"hs={hs},type={kind},n_tokens={n_tokens},n_cells={n_cells},n_threads=1,ragged={ragged}"

    cases = []
    for kind in ("f16", "q8_0", "q4_0"):
        for n_cells in (4096, 16384, 131072):
            cases += [vars_of(128, kind, 1, n_cells, ragged) for ragged in (0, 1)]
            cases.append(vars_of(128, kind, 8, n_cells, 0))
        cases += [vars_of(128, kind, 512, 16384, 0), vars_of(64, kind, 1, 16384, 0)]
    for case in (*steps.FULL.profiled, steps.SMALL.speed):
        assert sum(case in own for own in cases) == 1, case


SANITIZER = """#!/bin/sh
echo "$@" >> {folder}/args
echo "========= COMPUTE-SANITIZER"
echo "  a row of ours"
case "$*" in *racecheck*) echo "========= Error: Race reported"; echo "========= RACECHECK SUMMARY: 1 hazard"; exit 9;; esac
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_what_the_sanitizer_says_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that finds something does not stop the next one."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    log = tmp_path / "log.txt"
    with pytest.raises(steps.Failed, match="racecheck, n_tokens=8.*gave 9") as error:
        steps.sanitizer(target(tmp_path, log=log))
    found = error.value.found
    assert found["tools"] == ["memcheck", "synccheck"] and "cases" not in found
    right = ["========= COMPUTE-SANITIZER", "========= ERROR SUMMARY: 0 errors"]
    assert found["said"] == {
        "memcheck": right * len(steps.SANITIZED),
        "racecheck": [
            "========= COMPUTE-SANITIZER",
            "========= Error: Race reported",
            "========= RACECHECK SUMMARY: 1 hazard",
        ],
        "synccheck": right * len(steps.SANITIZED),
    }
    text = log.read_text()
    assert text.count("--error-exitcode 9") == 2 * len(steps.SANITIZED) + 1 and text.count("# gave 9") == 1
    assert text.count("a row of ours") == 2 * len(steps.SANITIZED) + 1


def test_sessions_say_what_they_have_after_every_length(tmp_path: Path) -> None:
    """The last line counts, and one that is cut off does not."""
    script = 'import time; print(\'{"a": {"rows": [1]}}\\n{"a": {"rows": [1, 2]}}\\n{"b": 3}\\n{"a": {"rows"\', end="", flush=True); time.sleep(60)'
    slow = target(tmp_path, deadline=time.monotonic() + 3)
    with pytest.raises(steps.Failed) as error:
        slow.run([sys.executable, "-c", script])
    assert steps._json_lines(error.value.output) == {"a": {"rows": [1, 2]}, "b": 3}


def test_libraries_of_cuda_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the wheels that PyTorch installs, for one."""
    wheel = tmp_path / "site/nvidia/cu13/lib"
    wheel.mkdir(parents=True)
    (wheel / "libcublas.so.99").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert steps.folder_of_library("libcublas.so.99") == wheel
    assert steps.folder_of_library("libcublas.so.98") is None
    assert target(tmp_path, needed=("libcublas.so.99",)).run(["sh", "-c", "echo $LD_LIBRARY_PATH"]).split(":")[
        0
    ].strip() == str(wheel)


#
# results and builds
#


def test_results_of_another_machine_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    old = {
        "ops": {"ok": True, "commit": "a"},
        "speed": {"ok": True, "commit": "a", "rows": [], "columns": ["size"]},
        "gpu": "G",
        "backend": "CUDA0",
    }
    new = {"speed": {"ok": True, "commit": "b", "rows": []}, "gpu": "G", "backend": "CUDA0"}
    (tmp_path / "here/g.json").write_text(json.dumps(old))
    (tmp_path / "there/results.json").write_text(json.dumps(new))
    assert check.main(["--take", str(tmp_path / "there/results.json"), "--results", str(tmp_path / "here")]) == 0
    found = json.loads((tmp_path / "here/g.json").read_text())
    assert (found["ops"]["commit"], found["speed"]["commit"], found["targets"]) == ("a", "b", [])
    # a step that did not start says nothing, one that failed behind its first rows does
    for speed, stays in (
        ({"rows": [["64", "f16", "3 x 3", "1", "49152", "1", "14.0", "12.0", "1.17", "40 %"]]}, False),
        ({}, True),
    ):
        failed = {"ok": False, "error": "x", "commit": "c", "date": "d", "seconds": 1.0, **speed}
        ops = {"ok": False, "error": "x", "commit": "c"}
        (tmp_path / "there/results.json").write_text(
            json.dumps({"ops": ops, "speed": failed, "gpu": "G", "backend": "CUDA0"})
        )
        (tmp_path / "here/g.json").write_text(json.dumps(old))
        assert check.main(["--take", str(tmp_path / "there/results.json"), "--results", str(tmp_path / "here")]) == 0
        found = json.loads((tmp_path / "here/g.json").read_text())
        assert (found["speed"]["commit"] == "a") is stays and found["ops"]["commit"] == "c"
        assert ("speed: failed without a measurement" in capsys.readouterr().out) is stays
    for nothing in (
        {},
        {"cases": {}},
        {"model": "m.gguf"},
        {"tools": [], "said": {"memcheck": []}},
        {"rows": [], "columns": []},
    ):
        assert not report._has_data({"ok": False, "error": "x", **nothing})
    (tmp_path / "there/results.json").write_text("{}")
    with pytest.raises(SystemExit, match="it names no GPU"):
        check.main(["--take", str(tmp_path / "there/results.json"), "--results", str(tmp_path / "here")])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arch", "90", "--steps", "build,ops"], "only --steps build runs here"),
        (["--prebuilt", "x", "--steps", "build"], "--prebuilt brings what the step build makes"),
        (["--model", "/no/model.gguf"], "there is no model"),
    ],
)
def test_options_that_contradict_each_other(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(args)
    assert message in capsys.readouterr().err


needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc: install the CUDA toolkit")


@needs_nvcc
def test_the_linker_gets_a_driver_library(tmp_path: Path) -> None:
    nvcc = build.find_nvcc()
    assert nvcc is not None
    stub = build.write_driver_stub(build.toolkit_of(nvcc), tmp_path)
    listed = subprocess.run(["nm", "-D", "--defined-only", stub], capture_output=True, text=True, check=True).stdout
    assert {"cuMemCreate", "cuDeviceGet", "cuGetErrorString", "cuMemAlloc_v2"} <= {
        line.split()[-1] for line in listed.splitlines()
    }
    about = subprocess.run(["readelf", "-d", stub], capture_output=True, text=True, check=True).stdout
    assert "libcuda.so.1" in about


@needs_nvcc
def test_a_build_for_another_machine(
    native_tests: Path,
    tiny: Path,
    smollm2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CMake is told so, and what it made is packed with CUDA's runtime; cmake itself and the libraries are not run here."""
    folder = tmp_path / "build"
    own = native_tests.parent
    (folder / "tests").mkdir(parents=True)
    for name, path in {"bin": own / "lib", "_stamp.py": own / "_stamp.py", "tests/native": native_tests}.items():
        (folder / name).symlink_to(path)
    monkeypatch.setattr(build, "has_driver_library", lambda toolkit: False)
    monkeypatch.setattr(build, "has_cublas", lambda toolkit: False)
    monkeypatch.setattr(build, "fetch_cublas", lambda major, folder: folder)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cmake = tmp_path / "cmake"
    cmake.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >> {tmp_path}/args\n")
    cmake.chmod(0o755)
    needed_by, of_tests = archive.needed_by, set(sanitizers(native_tests))
    monkeypatch.setattr(archive, "needed_by", lambda path: needed_by(path) - of_tests)
    command = ["--steps", "build", "--arch", "90", "--build", str(folder), "--model"]
    assert check.main([*command, str(smollm2)]) == 0
    assert f"There was no room for {smollm2.name}" in capsys.readouterr().out
    assert check.main([*command, str(tiny)]) == 0
    given = (tmp_path / "args").read_text().split()
    for option in (
        "GGML_CUDA=ON",
        "CMAKE_CUDA_ARCHITECTURES=90",
        "GGML_NATIVE=OFF",
        "GGML_CUDA_NCCL=OFF",
        "WINDOWKV_SANITIZE=OFF",
    ):
        assert f"-D{option}" in given
    assert f"-DCMAKE_CUDA_FLAGS=-isystem={folder}/cublas/include" in given
    assert f"-DCUDA_cuda_driver_LIBRARY={folder}/stubs/libcuda.so" in given and (folder / "stubs/libcuda.so").exists()
    assert set(build.TARGETS) <= set(given)

    file = folder / "windowkv-gpu-90.tar.xz"
    assert capsys.readouterr().out.startswith(f"{file}: ")
    top = archive.unpack(file, tmp_path / "there")
    about = archive.about(top)
    assert (
        about["arch"] == "90"
        and about["needed"][0] == "libcuda.so.1"
        and re.match(r"libcublas\.so\.1\d", about["needed"][1])
    )
    assert list((top / "package/windowkv_edge/lib").glob("libcudart.so.1*"))
    assert (top / "models" / tiny.name).read_bytes() == tiny.read_bytes() and about["model"] == tiny.name
    assert not list(tmp_path.glob("*.json"))
