"""Fixtures shared by all tests: the real models, tiny ones, the stock library, upstream's source."""

from __future__ import annotations

import functools
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# the tests run beside compilers and each other; spinning threads would only fight for the cores. Read when the library
# is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import windowkv_edge  # noqa: E402  (before llama_cpp)
import llama_cpp  # noqa: E402
from windowkv_edge import Llama, _files  # noqa: E402
from windowkv_edge.models import fetch_gemma3_270m, fetch_smollm2  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "ggml_patch")]
import kinds  # noqa: E402
import patchq  # noqa: E402
import tiny_model  # noqa: E402

TESTS_DIR = Path(windowkv_edge.__file__).parent / "_tests"


# files that take minutes, the longest first. Two processes share the files in this order: one that got a long file last
# would run alone at the end
LONG = (
    "gpu/test_emulator.py",
    "session/test_native.py",
    "session/test_eval.py",
    "session/test_runtime.py",
    "session/test_windows.py",
    "session/test_soak.py",
    "session/test_allocations.py",
    "session/test_fuzz.py",
    "session/test_states.py",
    "session/test_limit.py",
    "session/test_answers.py",
    "session/test_shift.py",
    "session/test_upstream.py",
    "session/test_cli.py",
    "session/test_eval_prompts.py",
    "session/test_device.py",
    "session/test_ragged.py",
    "session/test_off_is_stock.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {ROOT / "tests" / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: llama architecture, 30 layers, 9 query and 3 kv heads, head size 64."""
    return fetch_smollm2(progress=False)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270m: 18 layers, a window of 512 positions in all but 5, 11 and 17; 4 query and 1 kv heads, head size 256."""
    return fetch_gemma3_270m(progress=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, 3 layers, 4 query and 2 kv heads, head size 32, no tokenizer."""
    return tiny_model.write_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every kind: llama, gpt-oss, lfm2, granite; see kinds.py."""
    folder = tmp_path_factory.mktemp("kinds")
    return {name: write(folder / f"{name}.gguf") for name, write in kinds.WRITERS.items()}


@pytest.fixture(scope="session")
def native_tests() -> Path:
    """Folder of the stock library and the native tests, built with -DWINDOWKV_TESTS=ON."""
    if not TESTS_DIR.exists():
        pytest.fail(
            "this install has no test libraries; install with: "
            'CMAKE_ARGS="-DLLAMA_BUILD=OFF -DWINDOWKV_TESTS=ON" pip install ".[test]"'
        )
    return TESTS_DIR


@pytest.fixture(scope="session")
def real_sdist(request: pytest.FixtureRequest) -> Path:
    """The pinned source distribution: $WINDOWKV_SDIST, else one download kept in pytest's cache, for all processes."""
    if given := os.environ.get("WINDOWKV_SDIST"):
        return Path(given)
    assert request.config.cache is not None
    return patchq.download(patchq.read_pin(ROOT / "ggml_patch"), request.config.cache.mkdir("sdist"))


@pytest.fixture(scope="session")
def upstream(request: pytest.FixtureRequest, real_sdist: Path) -> Path:
    """The pinned sdist, unpacked."""
    assert request.config.cache is not None
    cache = Path(request.config.cache.mkdir("sdist"))
    name = "llama_cpp_python-0.3.36"
    with _files.lock(cache / "unpack.lock"):
        if not (cache / name).exists():  # complete: it comes here by a rename
            with tempfile.TemporaryDirectory(dir=cache) as half, tarfile.open(real_sdist) as archive:
                archive.extractall(half, filter="data")
                os.rename(Path(half) / name, cache / name)
    return cache / name


@pytest.fixture
def opened() -> Iterator[Callable[..., Llama]]:
    """Sessions on any model, of 2,048 positions and two threads if not said otherwise, closed after the test."""
    sessions: list[Llama] = []

    def make(model: Path, **kwargs: Any) -> Llama:
        kwargs = {"n_ctx": 2048, "n_threads": 2, "n_threads_batch": 2, "verbose": False, **kwargs}
        sessions.append(Llama(str(model), **kwargs))
        return sessions[-1]

    yield make
    for llm in sessions:
        llm.close()


@pytest.fixture
def session(opened: Callable[..., Llama], smollm2: Path) -> Callable[..., Llama]:
    """Sessions on SmolLM2."""
    return functools.partial(opened, smollm2, n_ctx=1024)


@pytest.fixture(scope="session")
def document() -> str:
    """The shipped text, about 3,800 tokens."""
    return (Path(windowkv_edge.__file__).parent / "data" / "document.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def of_stock(smollm2: Path, document: str) -> Callable[[int, int], tuple[list[list[int]], np.ndarray]]:
    """Parts of a text and the logits of SmolLM2 without a policy behind each, float32 [parts, n_vocab], by the types of K and V, with
    flash attention: 500 tokens, 64 single ones and another."""

    @functools.cache
    def read(type_k: int, type_v: int) -> tuple[list[list[int]], np.ndarray]:
        threads = {"n_threads": 2, "n_threads_batch": 2}
        llm = Llama(str(smollm2), n_ctx=1024, **threads, verbose=False, flash_attn=True, type_k=type_k, type_v=type_v)
        tokens = llm.tokenize(document.encode())[:564]
        parts = [tokens[:500], *([token] for token in tokens[500:]), [tokens[7]]]
        rows = []
        for part in parts:
            llm.eval(part)
            pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
            rows.append(np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy())
        llm.close()
        return parts, np.array(rows)

    return read
