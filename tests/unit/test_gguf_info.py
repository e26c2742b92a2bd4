"""Headers of tiny GGUF files of many architectures, of two real models, and the generator against the upstream."""

from __future__ import annotations

import json
import os
import re
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest

from windowkv_edge import gguf_info, models
from windowkv_edge.errors import FormatError, UnsupportedModelError, WindowKVError
from windowkv_edge.gguf_info import GGUFInfo, architecture_table, cost_table, read_info, support

BASE: dict[str, Any] = {
    "block_count": 4,
    "context_length": 2048,
    "embedding_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
GROUPS: dict[str, list[str]] = gguf_info._UPSTREAM["groups"]
MLA = {"attention__kv_lora_rank": 512, "attention__key_length_mla": 192, "attention__value_length_mla": 128}
README = Path(__file__).parents[2] / "windowkv_edge" / "README.md"

needs_models = pytest.mark.skipif(bool(os.environ.get("WINDOWKV_OFFLINE")), reason="WINDOWKV_OFFLINE is set")


def write(folder: Path, arch: str, general: dict[str, Any] | None = None, **keys: Any) -> Path:
    """A GGUF file without tensors; dots of keys are written as double underscores, None leaves a key out."""
    path = folder / f"{arch}.gguf"
    writer = gguf.GGUFWriter(path, arch)
    values = {f"{arch}.{k}": v for k, v in {**BASE, **{k.replace("__", "."): v for k, v in keys.items()}}.items()}
    for key, value in {**values, **(general or {})}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def info_of(folder: Path, arch: str, **keys: Any) -> GGUFInfo:
    return read_info(write(folder, arch, **keys))


# Reading


def test_a_plain_model_is_read(tmp_path: Path) -> None:
    general = {
        "general.name": "Tiny",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q4_K_M),
        "tokenizer.chat_template": "{{ x }}",
    }
    path = write(tmp_path, "llama", general)
    info = read_info(path)
    assert (info.path, info.architecture, info.name, info.file_type) == (path, "llama", "Tiny", "Q4_K_M")
    assert info.file_size == path.stat().st_size
    assert (info.n_layer, info.n_embd, info.n_ctx_train) == (4, 64, 2048)
    assert (info.n_head, info.n_head_kv) == ((4,) * 4, (2,) * 4)
    assert (info.head_dim_k, info.head_dim_v) == (16, 16)
    assert (info.sliding_window, info.window_layers) == (0, (False,) * 4)
    assert info.has_chat_template and info.causal and not info.mla
    assert info.bytes_per_position == 4 * 2 * (16 + 16) * 2


def test_missing_keys_get_upstreams_defaults(tmp_path: Path) -> None:
    info = info_of(tmp_path, "llama", attention__head_count_kv=None)
    assert info.n_head_kv == (4,) * 4
    assert (info.name, info.file_type, info.has_chat_template) == ("llama", "unknown", False)


def test_per_layer_arrays_and_explicit_head_sizes(tmp_path: Path) -> None:
    info = info_of(
        tmp_path,
        "openelm",
        attention__head_count=[4, 4, 8, 8],
        attention__head_count_kv=[1, 1, 2, 2],
        attention__key_length=32,
        attention__value_length=24,
    )
    assert (info.n_head, info.n_head_kv) == ((4, 4, 8, 8), (1, 1, 2, 2))
    assert [info.layer_bytes(il) for il in range(4)] == [1 * 56 * 2, 1 * 56 * 2, 2 * 56 * 2, 2 * 56 * 2]


def test_next_token_prediction_layers_hold_no_cells(tmp_path: Path) -> None:
    info = info_of(tmp_path, "glm4moe", nextn_predict_layers=1)
    assert info.n_layer == 3 and len(info.n_head_kv) == 3
    assert support(info)[0]


def test_looped_layers_have_cells_of_their_own(tmp_path: Path) -> None:
    info = info_of(tmp_path, "nanbeige", num_loops=3)
    assert info.n_layer == 12 and len(info.n_head_kv) == 12 and len(info.window_layers) == 12


def test_a_long_vocabulary_is_stepped_over(tmp_path: Path) -> None:
    n = 150_000
    general = {
        "tokenizer.ggml.tokens": [f"token{i}" for i in range(n)],
        "tokenizer.ggml.scores": [0.5] * n,
        "tokenizer.chat_template": "after the lists",
    }
    path = write(tmp_path, "llama", general)
    start = time.perf_counter()
    info = read_info(path)
    assert time.perf_counter() - start < 2  # 0.03 s; the reader of the gguf package needs 7 s
    assert info.has_chat_template and info.n_layer == 4


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\3\4 not a GGUF file at all", b"GGUF\3\0\0\0" + b"\xff" * 64])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(WindowKVError, match=r"broken\.gguf is not a readable GGUF file: got .*expected .*download"):
        read_info(path)


def test_every_truncated_header_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path, "llama", {"tokenizer.ggml.tokens": ["abc"] * 5000}).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(1, 400, 7), *range(400, len(whole) - 40, 9973)]:
        path.write_bytes(whole[:size])
        with pytest.raises(WindowKVError):
            read_info(path)


HUGE = 2**32 - 1


@pytest.mark.parametrize(
    ("arch", "keys", "message"),
    [
        ("llama", {"block_count": 1 << 30}, "block_count is 1073741824, llama.cpp has at most 512 layers"),
        ("llama", {"block_count": HUGE}, "at most 512 layers"),
        ("llama", {"block_count": "four"}, "block_count is 'four', expected a number"),
        ("llama", {"block_count": -4}, "block_count is -4, expected a number from 0"),
        ("nanbeige", {"num_loops": HUGE}, "num_loops 4294967295, llama.cpp has at most 512 layers"),
        ("nanbeige", {"num_loops": 129}, "at most 512 layers"),
        ("glm4moe", {"nextn_predict_layers": -1}, "nextn_predict_layers is -1"),
        ("llama", {"attention__head_count_kv": [2, 2]}, "head_count_kv has 2 entries for 4 layers"),
        ("llama", {"attention__head_count_kv": -1}, "head_count_kv is -1, expected a number from 0"),
        ("llama", {"attention__head_count_kv": [2, 2, -1, 2]}, "head_count_kv is -1"),
        ("llama", {"attention__head_count": ["4"] * 4}, "head_count is '4'"),
        ("llama", {"attention__key_length": -16}, "key_length is -16"),
        ("llama", {"context_length": "long"}, "context_length is 'long'"),
        ("gemma3", {"attention__sliding_window": -512}, "sliding_window is -512"),
        ("gemma3", {"attention__sliding_window": 512, "attention__sliding_window_pattern": -6}, "pattern is -6"),
        ("qwen3next", {"full_attention_interval": -2}, "full_attention_interval is -2"),
        ("minimax-01", {"attention__recurrent_layers": [True]}, "recurrent_layers has 1 entries for 4 layers"),
        ("glm4", {"rope__dimension_sections": [8, -1, 0, 0]}, "dimension_sections is -1"),
        ("llama", {"attn_logit_softcapping": float("nan")}, "attn_logit_softcapping is nan, expected a finite"),
        ("mpt", {"attention__max_alibi_bias": float("inf")}, "max_alibi_bias is inf"),
    ],
)
def test_nonsense_in_the_header_is_refused(tmp_path: Path, arch: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=f"not a readable GGUF file: got ValueError: .*{message}"):
        info_of(tmp_path, arch, **keys)


def test_numbers_that_llama_cpp_takes_cost_nothing_to_read(tmp_path: Path) -> None:
    """Counts of heads and positions of 2^32 - 1 are only multiplied."""
    keys = {f"attention__{name}": HUGE for name in ("head_count", "head_count_kv", "key_length", "value_length")}
    info = info_of(tmp_path, "llama", block_count=512, context_length=HUGE, embedding_length=HUGE, **keys)
    assert info.bytes_per_position == 512 * HUGE * 2 * HUGE * 2
    assert not support(info)[0]  # odd sizes


def raw(path: Path, kind: int, payload: bytes, n_kv: int = 1) -> Path:
    """A header with one key; what it claims is up to the caller."""
    path.write_bytes(struct.pack("<4sIQQQ3sI", b"GGUF", 3, 0, n_kv, 3, b"key", kind) + payload)
    return path


ARRAY, TEXT, UINT32 = 9, 8, 4


@pytest.mark.parametrize(
    ("kind", "payload", "n_kv", "message"),
    [
        (ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000 + struct.pack("<IQI", UINT32, 1, 7), 1, "an array of arrays"),
        (ARRAY, struct.pack("<IQ", UINT32, 2**64 - 1), 1, "goes on to byte"),
        (ARRAY, struct.pack("<IQ", UINT32, 2**62) + b"abcd" * 9, 1, "goes on to byte"),
        (ARRAY, struct.pack("<IQ", TEXT, 2**61) + b"abcd" * 9, 1, "goes on to byte"),
        (ARRAY, struct.pack("<IQ", TEXT, 5000) + struct.pack("<Q", 2**63) * 5000, 1, "goes on to byte"),
        (ARRAY, struct.pack("<IQ", 99, 1), 1, "99 is not a valid GGUFValueType"),
        (TEXT, struct.pack("<Q", 2**64 - 1) + b"text", 1, "goes on to byte"),
        (TEXT, struct.pack("<Q", 5) + b"text", 1, "goes on to byte"),
        (UINT32, struct.pack("<I", 7), 2**64 - 1, "goes on to byte"),
        (UINT32, struct.pack("<I", 7), 2**32, "goes on to byte"),
    ],
)
def test_what_a_header_promises_has_to_be_there(
    tmp_path: Path, kind: int, payload: bytes, n_kv: int, message: str
) -> None:
    tracemalloc.start()
    try:
        start = time.perf_counter()
        with pytest.raises(FormatError, match=message):
            read_info(raw(tmp_path / "a.gguf", kind, payload, n_kv))
        assert time.perf_counter() - start < 5
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(WindowKVError, match=r"pipe\.gguf: it is a FIFO, expected a regular file; give the path"):
        read_info(tmp_path / "pipe.gguf")


def test_a_missing_file_and_a_folder_are_reported(tmp_path: Path) -> None:
    with pytest.raises(WindowKVError, match=r"cannot read .*none\.gguf.*give the path"):
        read_info(tmp_path / "none.gguf")
    with pytest.raises(WindowKVError, match="cannot read"):
        read_info(tmp_path)


# Sliding windows, as the pinned llama.cpp applies them


@pytest.mark.parametrize(
    ("arch", "keys", "window", "layers"),
    [
        ("gemma3", {"attention__sliding_window": 512}, 512, "wwww"),  # period 6
        ("gemma3", {"attention__sliding_window": 0}, 0, "...."),
        ("gemma3", {}, 0, "...."),
        ("gemma3", {"attention__sliding_window": 8, "attention__sliding_window_pattern": 2}, 8, "w.w."),
        ("gpt-oss", {"attention__sliding_window": 128}, 128, "w.w."),
        ("gpt-oss", {"attention__sliding_window": 128, "attention__sliding_window_pattern": [True, True, False, False]}, 128, "ww.."),
        ("mimo2", {"attention__sliding_window": 128, "attention__sliding_window_pattern": [True]}, 128, "w..."),
        ("gemma2", {}, 4096, "w.w."),
        ("cohere2moe", {"attention__sliding_window": 64}, 64, ".www"),  # the first layer of each four is full
        ("llama4", {}, 8192, "www."),
        ("llama4", {"attention__sliding_window": 0}, 0, "...."),
        ("smallthinker", {"attention__sliding_window": 77}, 4096, ".www"),
        ("exaone4", {"attention__sliding_window": 4096}, 0, "...."),  # only the 64-layer model has windows
        ("exaone4", {"block_count": 64}, 4096, "www." * 16),
        ("phi3", {"attention__sliding_window": 2047}, 0, "...."),  # llama.cpp switches phi3's window off
        ("llama", {"attention__sliding_window": 4096}, 0, "...."),  # and reads none for llama
    ],
)  # fmt: skip
def test_window(tmp_path: Path, arch: str, keys: dict[str, Any], window: int, layers: str) -> None:
    info = info_of(tmp_path, arch, **keys)
    assert info.sliding_window == window
    assert "".join("w" if is_window else "." for is_window in info.window_layers) == layers
    if window:
        assert support(info)[0] == ("." in layers)


# Support


@pytest.mark.parametrize(
    "arch", ["llama", "qwen2", "qwen3", "qwen3moe", "mistral3", "phi2", "phi3", "gemma", "granite", "smollm3", "olmo2"]
)
def test_plain_decoders_are_supported(tmp_path: Path, arch: str) -> None:
    assert support(info_of(tmp_path, arch)) == (True, f"plain causal attention ({arch}, 4 layers)")


@pytest.mark.parametrize(
    ("arch", "keys", "reason"),
    [
        ("mamba", {"ssm__state_size": 16}, "recurrent state"),
        ("rwkv7", {"wkv__head_size": 64}, "recurrent state"),
        ("jamba", {"ssm__state_size": 16, "attention__head_count_kv": [0, 0, 0, 0]}, "nothing to compress"),
        ("lfm2", {"attention__head_count_kv": [0, 2, 0, 2], "attention__sliding_window": 64}, "windows beside recurrent layers"),
        ("kimi-linear", {"attention__kv_lora_rank": 512, "attention__key_length_mla": 192, "attention__value_length_mla": 128}, "MLA"),
        ("qwen35", {}, "M-RoPE"),
        ("bailingmoe3", {}, "compressed or indexed"),
        ("llama", {"ssm__state_size": 16}, r"recurrent layers \(llama.ssm.state_size\)"),
        ("gemma3", {"attention__sliding_window": 512}, "no layer attends to all positions"),  # 4 layers of a period of 6
        ("gemma2", {"attention__sliding_window_pattern": 0}, "no layer attends to all positions"),
        ("gemma2", {"attention__head_count_kv": [2, 1, 2, 2]}, r"different numbers of KV heads \(1 to 2\)"),
        ("gemma4-assistant", {"attention__sliding_window": 512}, "draft head"),
        ("deepseek2", {"attention__kv_lora_rank": 512, "attention__key_length_mla": 192, "attention__value_length_mla": 128}, "MLA"),
        ("minimax-m3", {}, "compressed or indexed"),
        ("bloom", {}, "ALiBi"),
        ("refact", {}, "ALiBi"),
        ("mpt", {"attention__max_alibi_bias": 8.0}, "ALiBi"),
        ("baichuan", {"block_count": 40}, "ALiBi"),
        ("bert", {"attention__causal": False}, "not causal"),
        ("llama", {"attention__causal": False}, "not causal"),
        ("llada", {}, "not causal"),
        ("dream", {}, "not causal"),
        ("llama-embed", {}, "no KV cache"),
        ("t5", {}, "encoder"),
        ("eagle3", {}, "draft head"),
        ("qwen2vl", {"rope__dimension_sections": [16, 24, 24, 0]}, "M-RoPE"),
        ("qwen3vl", {"rope__dimension_sections": [24, 20, 20, 0]}, "M-RoPE"),
        ("glm4", {"rope__dimension_sections": [8, 12, 12, 0]}, "M-RoPE"),
        ("grok", {"attn_logit_softcapping": 30.0}, "logits"),
        ("gemma3n", {"attention__sliding_window": 512, "block_count": 30}, "last 10 layers reuse the cells"),
        ("llama", {"attention__shared_kv_layers": 2}, "reuse the cells"),
        ("graniteswitch", {}, "router"),
        ("deci", {"attention__head_count_kv": [2, 0, 2, 2]}, "no KV heads"),
        ("openelm", {"attention__head_count_kv": [1, 1, 2, 2]}, r"different numbers of KV heads \(1 to 2\)"),
        ("llama", {"attention__key_length": 33}, "even"),
        ("llama", {"block_count": 0}, "no KV heads"),
        ("clip", {"block_count": None}, "no KV cache"),
        ("a-model-of-tomorrow", {}, "not known"),
    ],
)  # fmt: skip
def test_others_are_refused_with_a_reason(tmp_path: Path, arch: str, keys: dict[str, Any], reason: str) -> None:
    supported, why = support(info_of(tmp_path, arch, **keys))
    assert not supported
    assert f"{arch!r}" in why
    assert re.search(reason, why), why


@pytest.mark.parametrize(
    ("arch", "keys"),
    [
        ("mpt", {}),  # no ALiBi key: learned positions
        ("baichuan", {"block_count": 32}),  # the 7B rotates
        ("glm4", {}),
        ("glm4", {"rope__dimension_sections": [0, 0, 0, 0]}),
        ("phi3", {"attention__sliding_window": 2047}),
        ("deepseek2", {"attention__kv_lora_rank": 512}),  # files from before MLA expand K and V into plain rows
        ("minicpm3", {"attention__kv_lora_rank": 256}),
        ("deci", {}),
    ],
)
def test_a_key_or_its_absence_decides(tmp_path: Path, arch: str, keys: dict[str, Any]) -> None:
    assert support(info_of(tmp_path, arch, **keys))[0]


@pytest.mark.parametrize(
    ("arch", "keys", "layers", "reason"),
    [
        ("gemma2", {}, (1, 3), "2 of 4 layers attend to all .* the others keep their window of 4,096 positions"),
        ("gemma3", {"attention__sliding_window": 512, "attention__sliding_window_pattern": 2}, (1, 3), "2 of 4 layers"),
        ("gpt-oss", {"attention__sliding_window": 128}, (1, 3), "window of 128 positions"),
        ("gpt-oss", {"attention__sliding_window": 128, "attention__head_count_kv": [1, 2, 1, 2]}, (1, 3), "2 of 4 layers"),
        ("lfm2", {"shortconv__l_cache": 3, "attention__head_count_kv": [0, 2, 0, 0]}, (1,), "1 of 4 layers .* recurrent state"),
        ("jamba", {"ssm__state_size": 16, "attention__head_count_kv": [0, 2, 0, 2]}, (1, 3), "their recurrent state"),
        ("falcon-h1", {"ssm__state_size": 16}, (0, 1, 2, 3), "all keep their recurrent state besides"),
        ("qwen3next", {}, (3,), "1 of 4 layers"),
        ("qwen3next", {"full_attention_interval": 2}, (1, 3), "2 of 4 layers"),
        ("minimax-01", {"attention__recurrent_layers": [True, False, True, True]}, (1,), "1 of 4 layers"),
    ],
)  # fmt: skip
def test_layers_that_attend_to_all_positions_are_compressed(
    tmp_path: Path, arch: str, keys: dict[str, Any], layers: tuple[int, ...], reason: str
) -> None:
    info = info_of(tmp_path, arch, **keys)
    assert info.compressed_layers == layers
    supported, why = support(info)
    assert supported and re.search(reason, why), why


def test_each_architecture_is_in_one_group() -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names)) > 120
    assert set(GROUPS["plain"]) == gguf_info.PLAIN_ARCHITECTURES
    assert set(GROUPS) - set(gguf_info._MAYBE) == set(gguf_info._WHY_NOT)


def test_rules_written_by_hand_cover_the_generated_lists() -> None:
    by_key = {*gguf_info._ALIBI_BY_KEY, "baichuan"}
    assert by_key == set(gguf_info._UPSTREAM["alibi_by_key_or_size"])
    assert set(gguf_info._ALIBI_FIXED) - {"baichuan"} == set(GROUPS["alibi"])
    # All others of this group apply their window if, and only if, the file's key is above 0.
    assert {"exaone4", "llama4", "smallthinker"} < set(GROUPS["window-by-key"])


# Cost


def test_cost_of_a_plain_model(tmp_path: Path) -> None:
    info = info_of(tmp_path, "llama")
    per_position = 4 * 2 * (16 + 16) * 2
    rows = cost_table(info, [100, 7], [0.25, 0.1], ["windowkv", "snapkv"])
    assert [(r.policy, r.budget, r.n_tokens, r.cells_per_head) for r in rows] == [
        ("stock", 1.0, 100, 100), ("windowkv", 0.25, 100, 25), ("windowkv", 0.1, 100, 10),
        ("snapkv", 0.25, 100, 25), ("snapkv", 0.1, 100, 10),
        ("stock", 1.0, 7, 7), ("windowkv", 0.25, 7, 1), ("windowkv", 0.1, 7, 1),
        ("snapkv", 0.25, 7, 1), ("snapkv", 0.1, 7, 1),
    ]  # fmt: skip
    assert all(r.n_bytes == r.cells_per_head * per_position for r in rows)
    assert [r.ratio for r in rows[:3]] == pytest.approx([1.0, 0.25, 0.1])


def test_windowed_layers_hold_at_most_their_window(tmp_path: Path) -> None:
    info = info_of(tmp_path, "gpt-oss", attention__sliding_window=128)
    layer = 2 * (16 + 16) * 2
    rows = cost_table(info, [100, 1000], [0.5], ["windowkv"])
    assert [(r.policy, r.n_bytes) for r in rows] == [
        ("stock", layer * 4 * 100),
        ("windowkv", layer * (2 * 100 + 2 * 50)),
        ("stock", layer * (2 * 128 + 2 * 1000)),
        ("windowkv", layer * (2 * 128 + 2 * 500)),
    ]


def test_recurrent_layers_hold_no_cells(tmp_path: Path) -> None:
    info = info_of(tmp_path, "lfm2", shortconv__l_cache=3, attention__head_count_kv=[0, 2, 0, 2])
    rows = cost_table(info, [1000], [0.5], ["windowkv"])
    assert [row.n_bytes for row in rows] == [2 * 1000 * 2 * (16 + 16) * 2, 2 * 500 * 2 * (16 + 16) * 2]


def test_layers_that_share_cells_are_counted_once(tmp_path: Path) -> None:
    info = info_of(
        tmp_path,
        "gemma4",
        attention__sliding_window=64,
        attention__sliding_window_pattern=[True, False, True, False],
        attention__shared_kv_layers=2,
        attention__key_length=32,
        attention__value_length=32,
        attention__key_length_swa=16,
        attention__value_length_swa=16,
    )
    assert cost_table(info, [1000], [], [])[0].n_bytes == 2 * (16 + 16) * 2 * 64 + 2 * (32 + 32) * 2 * 1000


@pytest.mark.parametrize("arch", ["mamba", "deepseek32", "bert", "a-model-of-tomorrow"])
def test_no_figure_is_given_for_other_kinds_of_cache(tmp_path: Path, arch: str) -> None:
    with pytest.raises(UnsupportedModelError, match="no KV cost known.*expected one K and one V row"):
        cost_table(info_of(tmp_path, arch), [100], [0.5], ["windowkv"])


@pytest.mark.parametrize(("length", "budget"), [(0, 0.5), (-1, 0.5), (10, 0.0), (10, 1.1), (10, float("nan"))])
def test_bad_lengths_and_budgets_are_refused(tmp_path: Path, length: int, budget: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        cost_table(info_of(tmp_path, "llama"), [length], [budget], ["windowkv"])


# Real files


@needs_models
def test_smollm2(tmp_path: Path) -> None:
    path = models.fetch_smollm2(progress=False)
    start = time.perf_counter()
    info = read_info(path)
    assert time.perf_counter() - start < 2
    assert (info.architecture, info.n_layer, info.head_dim_k, info.head_dim_v) == ("llama", 30, 64, 64)
    assert (set(info.n_head), set(info.n_head_kv), info.n_embd) == ({9}, {3}, 576)
    assert (info.n_ctx_train, info.file_type, info.file_size) == (8192, "Q4_1", 98_362_432)
    assert info.has_chat_template and info.sliding_window == 0
    assert support(info)[0]
    assert cost_table(info, [4096], [], [])[0].n_bytes == 94_371_840  # 94 MB

    # The weights are not read: the header alone gives the same.
    header = tmp_path / path.name
    with path.open("rb") as file:
        header.write_bytes(file.read(4 << 20))
    assert read_info(header).n_head_kv == info.n_head_kv


@needs_models
def test_gemma3() -> None:
    info = read_info(models.fetch_gemma3_270m(progress=False))
    assert (info.architecture, info.n_layer, info.head_dim_k, info.head_dim_v) == ("gemma3", 18, 256, 256)
    assert (set(info.n_head), set(info.n_head_kv), info.n_ctx_train) == ({4}, {1}, 32768)
    assert (info.file_type, info.has_chat_template) == ("Q4_K_M", False)
    assert info.sliding_window == 512
    assert [il for il, windowed in enumerate(info.window_layers) if not windowed] == [5, 11, 17]
    supported, why = support(info)
    assert supported and why.startswith("3 of 18 layers attend to all positions")
    assert [r.n_bytes for r in cost_table(info, [4096], [0.1], ["windowkv"])] == [
        (15 * 512 + 3 * 4096) * 1024, (15 * 512 + 3 * 409) * 1024,
    ]  # fmt: skip


# The generator


def test_the_forecast_agrees_with_the_upstream_sources(upstream: Path) -> None:
    source = upstream / "vendor" / "llama.cpp" / "src"
    generated = gguf_info.classify_upstream(source)
    shipped = json.loads(gguf_info._DATA.read_text(encoding="utf-8"))
    assert generated == shipped, f"run: python -m windowkv_edge.gguf_info --regenerate {source}"


def test_every_architecture_of_the_gguf_package_has_a_verdict(tmp_path: Path) -> None:
    for arch in gguf.MODEL_ARCH_NAMES.values():
        supported, why = support(info_of(tmp_path, arch))
        assert why and supported == bool(re.match("plain causal attention|[0-9]+ of [0-9]+ layers attend", why))


def test_a_folder_without_sources_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no llama-arch\.cpp in .*give llama\.cpp's src folder"):
        gguf_info.classify_upstream(tmp_path)


# The table of the README


def verdicts(table: str) -> list[tuple[str, str]]:
    """Architecture and verdict of every name in the table's second column."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [(arch, row[0]) for row in rows if row[0] not in ("verdict", "---") for arch in row[1].split(", ")]


def test_the_readme_has_the_generated_table() -> None:
    text = README.read_text(encoding="utf-8")
    begin, end = text.index(gguf_info._TABLE_BEGIN) + len(gguf_info._TABLE_BEGIN), text.index(gguf_info._TABLE_END)
    shown = text[begin:end].strip("\n")
    assert shown == architecture_table(), "run: python -m windowkv_edge.gguf_info --readme windowkv_edge/README.md"


def test_the_table_names_every_architecture_once() -> None:
    names = [arch for arch, _ in verdicts(architecture_table())]
    assert sorted(names) == sorted(arch for group in GROUPS.values() for arch in group)
    counts = [int(n) for n in re.findall(r"\d+", re.findall("<summary>.*</summary>", architecture_table())[0])]
    assert counts[0] == len(names) == sum(counts[1:])


def test_the_table_agrees_with_the_forecast(tmp_path: Path) -> None:
    for arch, verdict in verdicts(architecture_table()):
        keys = MLA if arch in gguf_info._ALWAYS_MLA else {}
        supported, why = support(info_of(tmp_path, arch, block_count=30, **keys))
        assert supported == (verdict != "stock only"), (arch, verdict, why)


@pytest.mark.parametrize(
    ("arch", "keys"),
    [
        *((arch, MLA) for arch in GROUPS["mla-by-key"]),
        *((arch, {"attention__max_alibi_bias": 8.0, "block_count": 40}) for arch in ("baichuan", "jais", "mpt")),
        *((arch, {"rope__dimension_sections": [8, 12, 12, 0]}) for arch in ("glm4", "glm4moe", "hunyuan_vl")),
        ("gemma4", {"attention__shared_kv_layers": 2}),
        ("lfm2", {"attention__sliding_window": 64}),
        *((arch, {"attention__head_count_kv": [1, 1, 2, 2]}) for arch in ("deci", "openelm")),
    ],
)
def test_the_keys_that_the_table_names_decide(tmp_path: Path, arch: str, keys: dict[str, Any]) -> None:
    assert dict(verdicts(architecture_table()))[arch] == "its keys decide"
    assert support(info_of(tmp_path, arch))[0]
    assert not support(info_of(tmp_path, arch, **keys))[0]


def test_no_model_has_more_layers(upstream: Path) -> None:
    text = (upstream / "vendor" / "llama.cpp" / "src" / "llama-hparams.h").read_text(encoding="utf-8")
    assert re.search(rf"#define LLAMA_MAX_LAYERS +{gguf_info._MAX_LAYERS}\n", text)


def test_the_upstream_sources_leave_these_no_choice(upstream: Path) -> None:
    models_cpp = upstream / "vendor" / "llama.cpp" / "src" / "models"
    for arch in gguf_info._ALWAYS_MLA:
        text = (models_cpp / f"{arch}.cpp").read_text(encoding="utf-8")
        assert re.search(r"KEY_LENGTH_MLA,\s*hparams\.n_embd_head_k_mla_impl\);", text)  # no third argument: required
    for arch in gguf_info._ALWAYS_SHARED:
        text = (models_cpp / f"{arch}.cpp").read_text(encoding="utf-8")
        assert "n_layer_kv_from_start = 20;" in text


def test_the_table_is_rewritten_in_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{gguf_info._TABLE_BEGIN}\nold\n{gguf_info._TABLE_END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        gguf_info.main(["--readme", str(readme)])
        assert readme.read_text(encoding="utf-8") == (
            f"before\n{gguf_info._TABLE_BEGIN}\n{architecture_table()}\n{gguf_info._TABLE_END}\nafter\n"
        )
    readme.write_text("nothing here", encoding="utf-8")
    with pytest.raises(SystemExit):
        gguf_info.main(["--readme", str(readme)])
    assert "lacks the lines of the table" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == "nothing here"
