"""``import llama_cpp, windowkv_edge`` works in either order, and nothing else notices."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import windowkv_edge
from windowkv_edge import _libs

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(windowkv_edge.__file__).resolve().parent
LLAMA_CPP = Path(importlib.util.find_spec("llama_cpp").origin).parent  # type: ignore[union-attr, arg-type]
STOCK_ERROR = "Shared library with base name 'llama' not found"

PATH = "import llama_cpp.llama_cpp as l, os; assert 'LLAMA_CPP_LIB_PATH' not in os.environ; print(l._lib._name)"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder as pip fills it: the package, the hook, and llama_cpp without libraries."""
    res = tmp_path / "site-packages"
    res.mkdir()
    for file in ("windowkv_edge.pth", "windowkv_edge_hook.py"):
        shutil.copy(ROOT / "windowkv_edge" / "_hook" / file, res)
    ours = res / "windowkv_edge"
    ours.mkdir()
    for entry in PACKAGE.iterdir():
        (ours / entry.name).symlink_to(entry)
    for name in ("lib", "include", "_stamp.py"):
        if not (ours / name).exists():
            (ours / name).symlink_to(_libs.BUILT / name)
    # no symlink: the libraries lie beside the file
    shutil.copytree(LLAMA_CPP, res / "llama_cpp", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return res


def python(site: Path, code: str, *flags: str, hook: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python whose first site folder is this one, processed as site.py does at the start; the others follow."""
    head = f"import site, sys; sys.path.insert(0, {str(site)!r})\n"
    if hook:
        head += f"site.addsitedir({str(site)!r})\n"
    rest = [path for path in sys.path if path.endswith("site-packages")]
    head += f"sys.path.extend({rest!r})\n"
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LLAMA_CPP_LIB_PATH")}
    return subprocess.run(
        [sys.executable, "-S", *flags, "-c", head + code],
        capture_output=True, text=True, cwd=site.parent, timeout=120, env={**clean, **env},
    )  # fmt: skip


@pytest.mark.parametrize("order", ["llama_cpp, windowkv_edge", "windowkv_edge, llama_cpp"])
@pytest.mark.parametrize("flags", [(), ("-I",)])
def test_both_orders(site: Path, order: str, flags: tuple[str, ...]) -> None:
    run = python(site, f"import {order}\n{PATH}", *flags)
    assert Path(run.stdout.strip()).resolve().parent == (site / "windowkv_edge" / "lib").resolve(), run.stderr


def test_where_the_hook_is_not_run(site: Path) -> None:
    """``python -S`` and ``pip install --target`` process no .pth: stock's error stays, and our order works."""
    assert STOCK_ERROR in python(site, "import llama_cpp, windowkv_edge", hook=False).stderr
    run = python(site, f"import windowkv_edge, llama_cpp\n{PATH}", hook=False)
    assert run.returncode == 0, run.stderr


def test_a_llama_cpp_with_libraries_keeps_them(site: Path) -> None:
    shutil.copytree(_libs.LIB_DIR, site / "llama_cpp" / "lib")
    run = python(site, PATH)
    assert Path(run.stdout.strip()).parent == site / "llama_cpp" / "lib", run.stderr


def test_what_the_user_says_goes_first(site: Path) -> None:
    run = python(site, "import llama_cpp", LLAMA_CPP_LIB_PATH=str(site))
    assert STOCK_ERROR in run.stderr and str(site) in run.stderr


@pytest.mark.parametrize(
    "breakage",
    [
        "import importlib.metadata as m; m.version = lambda name: '0.3.1'",
        "import importlib.metadata as m; m.version = lambda name: 1 / 0",
        "import shutil; shutil.move({site!r} + '/windowkv_edge', {site!r} + '/gone')",
    ],
    ids=["another-version", "an-error", "no-libraries"],
)
def test_what_is_not_ours_stays_stock(site: Path, breakage: str) -> None:
    run = python(site, f"{breakage.format(site=str(site))}\nimport llama_cpp")
    assert STOCK_ERROR in run.stderr


@pytest.mark.parametrize("text", ["raise RuntimeError", "def (", "import no_such_module"])
def test_a_broken_hook_does_not_stop_python(site: Path, text: str) -> None:
    (site / "windowkv_edge_hook.py").write_text(text)
    run = python(site, "print('started')")
    assert run.returncode == 0 and run.stdout.strip() == "started"


def test_the_start_costs_no_import(site: Path) -> None:
    """The hook itself needs what Python has loaded by then, and one module of its own."""
    code = "print(sorted(set(sys.modules) - before))"
    text = f"import site, sys, os\nbefore = set(sys.modules)\nsite.addsitedir({str(site)!r})\n{code}"
    run = subprocess.run([sys.executable, "-S", "-c", text], capture_output=True, text=True)
    assert run.stdout.strip() == "['windowkv_edge_hook']", run.stderr


def test_the_pin_is_the_same() -> None:
    spec = importlib.util.spec_from_file_location("hook_under_test", ROOT / "windowkv_edge" / "_hook" / "windowkv_edge_hook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.meta_path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.meta_path[:] = before
    assert module.LLAMA_CPP_PYTHON == _libs.LLAMA_CPP_PYTHON


def test_the_build_installs_it() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "install(FILES windowkv_edge/_hook/windowkv_edge.pth windowkv_edge/_hook/windowkv_edge_hook.py DESTINATION .)" in text
    assert '"windowkv_edge/_hook/*"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # once is enough
