"""Which models get a cache with cells per head: what llama.cpp creates for them decides, and every other kind is refused at load."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import tiny_model
from device_runs import on_device, refusal

from windowkv_edge import Llama, UnsupportedModelError
from windowkv_edge.gguf_info import read_info, support

Open = Callable[..., Llama]

LLAMA = tiny_model.write_llama

# what the memory that llama.cpp creates is not
KINDS: dict[str, tuple[Callable[..., Path], str]] = {
    "mamba2": (tiny_model.write_mamba2, "recurrent layers alone"),
    "lfm2": (functools.partial(tiny_model.write_lfm2, window=64), "recurrent layers beside sliding-window attention"),
    "eurobert": (functools.partial(LLAMA, arch="eurobert"), "no KV cache"),
    # of all kinds that are named nowhere
    "minimax-m3": (tiny_model.write_minimax_m3, "a cache of its own kind"),
}
# a plain cache, but not plain attention
PROPERTIES: dict[str, tuple[Callable[..., Path], str]] = {
    "refact": (functools.partial(LLAMA, arch="refact"), "ALiBi positions"),
    "qwen2vl": (functools.partial(LLAMA, arch="qwen2vl"), "M-RoPE positions"),
    "llada": (functools.partial(LLAMA, arch="llada"), "non-causal attention"),
    "grok": (tiny_model.write_grok, "a tanh of its own on the attention logits"),
}


@pytest.mark.parametrize("arch", [*KINDS, *PROPERTIES])
def test_what_is_not_served_is_refused_at_load(arch: str, tmp_path: Path, opened: Open) -> None:
    write, reason = {**KINDS, **PROPERTIES}[arch]
    model = write(tmp_path / f"{arch}.gguf")
    with pytest.raises(
        UnsupportedModelError, match=f"a {arch} model with {re.escape(reason)}.*use it without a policy"
    ):
        Llama(str(model), kv_policy="snapkv", n_ctx=512, verbose=False)
    assert not support(read_info(model))[0]  # what `windowkv-edge info` says

    # without a policy it loads as ever, on the thread that was just refused
    assert opened(model, n_ctx=512).n_ctx() == 512


def test_served_kinds(tmp_path: Path, opened: Open) -> None:
    """Plain, with sliding windows, with recurrent layers."""
    for write, layers in (
        (LLAMA, (0, 1, 2)),
        (tiny_model.write_gpt_oss, (1, 3)),
        (tiny_model.write_lfm2, (1, 3)),
        (tiny_model.write_granite_hybrid, (1, 3)),
    ):
        model = write(tmp_path / f"{write.__name__}.gguf")
        assert opened(model, kv_policy="snapkv", n_ctx=512).kv_stats().layers == layers
        assert support(read_info(model))[0]


def test_a_context_that_fails_otherwise_leaves_no_request_behind(tmp_path: Path, opened: Open) -> None:
    model = LLAMA(tmp_path / "tiny.gguf")
    with pytest.raises(UnsupportedModelError, match="type q5_0"):
        opened(model, kv_policy="snapkv", type_k=llama_cpp.GGML_TYPE_Q5_0)
    assert opened(model, n_ctx=512).kv_stats().policy == "stock"
    assert opened(model, n_ctx=512, kv_policy="snapkv").kv_stats().policy == "snapkv"


@pytest.mark.parametrize("cells", ["F16", "Q8_0"])
def test_cells_are_rotated_as_stocks_are(
    cells: str, tmp_path: Path, opened: Open, capfd: pytest.CaptureFixture[str]
) -> None:
    """Quantised cells without the rotation would be worth less; it follows from layers that the cell metadata does not have."""
    types = dict.fromkeys(("type_k", "type_v"), getattr(llama_cpp, f"GGML_TYPE_{cells}"))
    # heads of 64 are rotated, heads of 32 are not
    for write, rotated in (
        (functools.partial(LLAMA, head_dim=64), cells != "F16"),
        (tiny_model.write_gpt_oss, False),
        (tiny_model.write_lfm2, False),
    ):
        model = write(tmp_path / "model.gguf")
        found = []
        for kwargs in ({}, {"kv_policy": "snapkv"}):
            opened(model, n_ctx=512, flash_attn=True, swa_full=False, verbose=True, **types, **kwargs)
            found.append(re.findall(r"attn_rot_[kv] = \d, .*", capfd.readouterr().err))
        stock, ours = found
        assert stock == ours
        assert stock and all(f" = {int(rotated)}, " in line for line in stock)


def test_the_log_says_what_was_created(tmp_path: Path, opened: Open, capfd: pytest.CaptureFixture[str]) -> None:
    model = LLAMA(tmp_path / "tiny.gguf", n_layer=3, n_head_kv=2, head_dim=32)
    opened(model, n_ctx=1024, kv_policy="snapkv", verbose=True)
    log = capfd.readouterr().err
    found = re.search(
        r"llama_kv_cache_ragged: +CPU buffer size = +([\d.]+) MiB \((\d+) observed queries\)", log
    )
    assert found, log
    n_bytes = 2 * 3 * 4 * 32 * 2 * int(found[2])  # and a prompt's; layers, query heads, head size, f16
    assert float(found[1]) == pytest.approx(n_bytes / 2**20, abs=0.01)
    # K and V of 1,024 cells in 2 heads of 3 layers
    half = 1024 * 2 * 3 * 32 * 2 / 2**20
    assert (
        f"llama_kv_cache_ragged: size = up to {2 * half:7.2f} MiB (  1024 cells,   3 layers,  2 kv heads), "
        f"K (f16): {half:7.2f} MiB, V (f16): {half:7.2f} MiB" in log
    )


@pytest.fixture
def device(native_tests: Path) -> Callable[..., Any]:
    return functools.partial(on_device, native_tests / "test-device.so", "cpu", refusal)


@pytest.mark.parametrize("lacking", ["FLASH_ATTN_EXT", "FLASH_ATTN_RAGGED", "both ways over ragged heads"])
def test_sinks_are_probed_at_creation(
    lacking: str, device: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device whose attention takes no sinks: the first decode behind a compaction would be too late to say so."""
    sinks, plain = tiny_model.write_gpt_oss(tmp_path / "sinks.gguf"), LLAMA(tmp_path / "plain.gguf")
    assert device(sinks, "snapkv") is None and device(sinks, "adakv") is None

    monkeypatch.setenv("TEST_DEVICE_NO_SINKS", "FLASH_ATTN_EXT" if lacking == "FLASH_ATTN_EXT" else "FLASH_ATTN_RAGGED")
    assert device(plain, "snapkv") is None and device(plain, "adakv") is None
    if lacking == "both ways over ragged heads":
        monkeypatch.setenv("TEST_DEVICE_LACKS", "CONCAT")
    if lacking == "FLASH_ATTN_EXT":
        want = r"UnsupportedModelError: .*TEST0 lacks FLASH_ATTN_EXT for layer 1 \(.*learned attention sinks\)"
        assert re.match(want, device(sinks, "snapkv"))
        assert re.match(want, device(sinks, "adakv"))
    elif lacking == "FLASH_ATTN_RAGGED":  # it attends head by head
        assert device(sinks, "snapkv") is None and device(sinks, "adakv") is None
    else:
        assert device(sinks, "snapkv") is None
        want = r"UnsupportedModelError: .*heads of different lengths \(layer 1, .*learned attention sinks\).* it lacks CONCAT"
        assert re.match(want, device(sinks, "adakv"))
