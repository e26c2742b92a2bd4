"""llama-cpp-python's own tests, read from the pinned sdist, with our class and SmolLM2 (see upstream_plugin.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

# tests that need another model than SmolLM2; everything else has to pass
NEEDS_ANOTHER_MODEL = {
    "test_recurrent_model_prompt_cache_reset": "a recurrent model",
    "test_hybrid_model_prompt_cache_reset": "a hybrid model",
    "[llama_cpp_recurrent_model_path-True-False]": "a recurrent model",
    "[llama_cpp_hybrid_model_path-False-True]": "a hybrid model",
    "test_real_llama_embeddings": "an embedding model",
}
# with a policy: expects that a state of the same prompt is loaded, which saves nothing where that was compacted to its end
NOT_LOADED = "test_ram_cache_exact_prompt_hit_matches_fresh[llama_cpp_transformer_model_path-False-False]"
PASS_WITH_POLICY = {
    "test_real_llama",
    "test_loaded_exact_cached_prompt_reuse_matches_fresh[llama_cpp_transformer_model_path-False-False]",
    "test_real_model",
    "test_real_llama_repeated_prompt_cache",
    "test_exact_cached_prompt_reuse_matches_fresh[llama_cpp_transformer_model_path-False-False]",
    "test_shorter_prompt_prefix_reuse_matches_fresh[llama_cpp_transformer_model_path-False-False]",
    "test_llama_cpp_tokenization",
    "test_grammar_from_string",
    "test_find_candidate_pred_tokens",
}

# what upstream's tests expect of their model, and the same of SmolLM2, asked from the stock library
STOCK = """
import sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=32, n_batch=32, n_ubatch=32, flash_attn=True, verbose=False)
text = "The quick brown fox jumps over the lazy dog. The quick brown fox"
print(llm.tokenize(b"Hello, world!", add_bos=True, special=True))
print(repr(llm.create_completion(text, max_tokens=6, top_k=50, top_p=0.9, temperature=0.0, seed=1337)["choices"][0]["text"]))
"""


def run_upstream(upstream: Path, model: Path, native_tests: Path, policy: str, tmp_path: Path) -> dict[str, str | None]:
    """Outcome of every test: None when it passed, else the failure."""
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(native_tests / "stock")}
    ask = subprocess.run(
        [sys.executable, "-c", STOCK, model], env=env, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    tokens, answer = ask.stdout.strip().split("\n")

    tests = tmp_path / "tests"
    shutil.copytree(upstream / "tests", tests)
    source = (tests / "test_llama.py").read_text()
    same_text = '["choices"][0]["text"] == " jumps over the lazy dog."'
    assert source.count("[9419, 11, 1814, 0]") == 1 and source.count(same_text) == 2
    source = source.replace("[9419, 11, 1814, 0]", tokens)
    source = source.replace(same_text, '["choices"][0]["text"]' + ("" if policy else f" == {answer}"))
    (tests / "test_llama.py").write_text(source)
    (tmp_path / "vendor").symlink_to(upstream / "vendor")

    report = tmp_path / "report.xml"
    plugin_env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "WINDOWKV_UPSTREAM_MODEL": str(model),
        "WINDOWKV_UPSTREAM_POLICY": policy,
    }
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "upstream_plugin", "-p", "no:cacheprovider", "--rootdir", str(tmp_path),
         "-c", os.devnull, f"--junitxml={report}", "tests"],
        cwd=tmp_path, env=plugin_env, capture_output=True, timeout=1200,
    )  # fmt: skip
    outcome: dict[str, str | None] = {}
    for case in ET.parse(report).iter("testcase"):
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        outcome[case.attrib["name"]] = None if problem is None else problem.text or problem.attrib["message"]
    return outcome


@pytest.mark.parametrize("policy", ["", "windowkv"])
def test_upstream_tests(policy: str, upstream: Path, smollm2: Path, native_tests: Path, tmp_path: Path) -> None:
    outcome = run_upstream(upstream, smollm2, native_tests, policy, tmp_path)
    assert len(outcome) >= 26
    mine = {name: why for name, why in outcome.items() if not any(part in name for part in NEEDS_ANOTHER_MODEL)}
    if policy:
        assert "assert load_state_calls == 1" in (mine.pop(NOT_LOADED) or "passed")
        assert PASS_WITH_POLICY <= set(mine)
    assert len(mine) >= 12
    assert {name: why for name, why in mine.items() if why is not None} == {}
