"""What a GGUF file says about its KV cache: shapes, a forecast of support, and memory in bytes.

Only the header is read: the file is memory-mapped, and the weights and the tokenizer's lists are skipped.

The forecast of :func:`support` follows ``data/architectures.json``, which is generated from the pinned llama.cpp
(``python -m windowkv_edge.gguf_info --regenerate SRC``); the table in README.md beside this file is written from it
(``--readme FILE``). The refusal that counts is made natively when a context is created; this one only comes earlier and
says why. Generator and reader share the names of the groups, hence one file.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, LlamaFileType

from windowkv_edge._files import regular_size
from windowkv_edge._json import shown
from windowkv_edge.budget import TYPES, bits, n_cells
from windowkv_edge.errors import FormatError, UnsupportedModelError, WindowKVError

__all__ = [
    "PLAIN_ARCHITECTURES",
    "CostRow",
    "GGUFInfo",
    "architecture_table",
    "classify_upstream",
    "cost_table",
    "main",
    "read_info",
    "support",
]

_DATA = Path(__file__).parent / "data" / "architectures.json"
_UPSTREAM: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
_GROUP_OF: dict[str, str] = {arch: group for group, archs in _UPSTREAM["groups"].items() for arch in archs}

PLAIN_ARCHITECTURES: frozenset[str] = frozenset(_UPSTREAM["groups"]["plain"])
"""Architectures whose graph in the pinned llama.cpp reads one plain KV cache; a file's keys may still rule it out."""

# groups whose files may be supported; the keys of a file decide
_MAYBE = ("plain", "window", "window-by-key", "hybrid", "mla-by-key")

_WHY_NOT = {
    "recurrent": "it keeps a recurrent state instead of KV cells",
    "no-cache": "it is an encoder or a diffusion model: its attention is not causal and keeps no KV cache",
    "encoder": "it has an encoder beside its decoder, or is a draft head of another model",
    "other-cache": "it keeps compressed or indexed KV cells, not one K and one V row per head",
    "scaled-logits": "it rescales its attention logits outside the attention operator",
    "router": "it hides an adapter router in an extra attention layer, whose cells must all stay",
    "mrope": "its positions have several components (M-RoPE)",
    "alibi": "its attention scores carry ALiBi biases",
}
# Hard-coded in the architectures' load_arch_hparams(); for these the key of the file is ignored or only a default.
_WINDOW_FORCED = {"llama4": 8192, "smallthinker": 4096}
_WINDOW_DEFAULT = {"gemma2": 4096, "exaone4": 4096}
_ALIBI_BY_KEY = frozenset({"jais", "mpt"})
_ALIBI_FIXED = {"baichuan": 8.0, "bloom": 8.0, "refact": 8.0}  # baichuan: only the 13B, known by its 40 layers
_ROW_GROUPS = (*_MAYBE, "scaled-logits", "mrope", "alibi")  # K and V rows
# Hybrids mark recurrent layers by 0 KV heads, but these by attention.recurrent_layers, or else all but every n-th are
# recurrent, n being the key full_attention_interval or this.
_ATTENTION_INTERVAL = {"qwen3next": 4, "minimax-01": 8}
_WINDOW_HYBRIDS = frozenset({"lfm2"})
# For the table in README.md: architectures whose published files are all refused, or that a key of their own decides.
_ALWAYS_SHARED = frozenset({"gemma3n"})  # its files have 30 or 35 layers, of which 20 have cells
_ALWAYS_MLA = frozenset({"kimi-k3", "kimi-linear"})  # llama.cpp does not load them without the keys of MLA
_SHARED_BY_KEY = frozenset({"gemma4"})
_HEADS_BY_LAYER = frozenset({"deci", "openelm"})  # made to have different numbers of KV heads
_RECURRENT_KEYS = ("ssm.", "wkv.", "kda.", "shortconv.", "attention.recurrent_layers", "token_shift_count")
_F16_BYTES = 2


@dataclass(frozen=True)
class GGUFInfo:
    """Shape of a model as the pinned llama.cpp will build it. All ``tuple`` fields have one entry per layer."""

    path: Path
    architecture: str
    name: str  # general.name, or the file's stem
    file_size: int  # bytes
    file_type: str  # such as "Q4_1"; "unknown" where the file does not say
    n_layer: int  # layers that hold KV cells for generation; next-token-prediction layers are left out
    n_embd: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    head_dim_k: int
    head_dim_v: int
    head_dims_window: tuple[int, int]  # K and V head size of the windowed layers; the same except in gemma4
    n_ctx_train: int  # positions
    sliding_window: int  # positions; 0 where llama.cpp applies no window (it ignores phi3's, for one)
    window_layers: tuple[bool, ...]  # True: this layer sees only the window
    recurrent_layers: tuple[bool, ...]  # True: this layer keeps a recurrent state instead of KV cells
    has_chat_template: bool
    causal: bool
    mla: bool  # multi-head latent attention: one compressed row per position instead of K and V
    kv_lora_rank: int  # 0 for none; without mla, K and V are expanded into plain rows
    recurrent_keys: tuple[str, ...]  # SSM, RWKV, KDA and short-convolution keys found
    max_alibi_bias: float  # above 0: ALiBi
    attn_logit_softcap: float  # 0 for none
    rope_sections: tuple[int, ...]  # M-RoPE sections, up to 4
    shared_kv_layers: int  # last layers that reuse the cells of earlier ones

    @property
    def compressed_layers(self) -> tuple[int, ...]:
        """Layers that a policy compresses: those that attend to all positions."""
        rows = zip(self.window_layers, self.recurrent_layers, strict=True)
        return tuple(il for il, (windowed, recurrent) in enumerate(rows) if not windowed and not recurrent)

    @property
    def bytes_per_position(self) -> int:
        """Bytes of f16 K and V that one position takes over all layers, no window and no policy."""
        return sum(self.layer_bytes(il) for il in range(self.n_layer))

    def layer_bytes(self, il: int) -> int:
        """Bytes of f16 K and V per position in layer ``il``; 0 in recurrent layers and where cells are reused."""
        if il >= self.n_layer - self.shared_kv_layers or self.recurrent_layers[il]:
            return 0
        dims = self.head_dims_window if self.window_layers[il] else (self.head_dim_k, self.head_dim_v)
        return self.n_head_kv[il] * sum(dims) * _F16_BYTES


@dataclass(frozen=True)
class CostRow:
    """Memory of one KV cache holding a text of ``n_tokens``."""

    policy: str  # "stock" or the policy's name
    budget: float  # fraction of the cells kept, or of f16's bytes for a policy with its own cells; 1.0 for stock
    n_tokens: int
    cells_per_head: int  # mean over all heads of the layers that attend to all positions
    n_bytes: int  # K and V; the state of recurrent layers, which is the same at every length, is left out
    ratio: float  # n_bytes over stock's at the same length


_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of the pinned llama.cpp


class _HeaderReader(GGUFReader):
    """GGUFReader that refuses what the file does not hold, and steps over long arrays and tensors: 0.05 s instead of
    6 s for a vocabulary of 49,152."""

    _LONG = 4096  # no per-layer array is longer; vocabularies are

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> npt.NDArray[Any]:
        self._holds(offset + int(count) * np.dtype(dtype).itemsize)  # a slice would be cut without a word
        return super()._get(offset, dtype, count, override_order)

    def _holds(self, end: int) -> None:
        if end > len(self.data):
            raise ValueError(f"its header goes on to byte {end:,} of {len(self.data):,}")

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        if item == GGUFValueType.ARRAY:  # llama.cpp has none either; thousands inside each other would end the stack
            raise ValueError("an array of arrays")
        is_text, end = item == GGUFValueType.STRING, orig_offs + 12
        self._holds(end + count * (8 if is_text else np.dtype(self.gguf_scalar_to_np[item]).itemsize))
        if count <= self._LONG:
            return super()._get_field_parts(orig_offs, raw_type)
        if is_text:
            swapped = ">" if sys.byteorder == "little" else "<"
            length = struct.Struct("=Q" if self.byte_order == "I" else swapped + "Q")
            view = self.data.data
            for _ in range(count):
                self._holds(end + 8)
                end += 8 + length.unpack_from(view, end)[0]
            self._holds(end)
        else:
            end += count * np.dtype(self.gguf_scalar_to_np[item]).itemsize
        return end - orig_offs, [], [], [GGUFValueType.ARRAY, item]

    def _build_fields(self, offs: int, count: int) -> int:
        self._holds(offs + int(count) * 13)  # a key's length, its type, a value of a byte
        return super()._build_fields(offs, int(count))

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[Any]]:
        return offs, []

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        self.tensors = []


def read_info(path: str | Path) -> GGUFInfo:
    """Read the header of the GGUF file at ``path``; the weights are not touched.

    Raises:
        WindowKVError: the file cannot be opened.
        FormatError: it is not a complete GGUF header, or its numbers are impossible.
    """
    path = Path(path)
    try:
        size = regular_size(path)
        fields = _HeaderReader(path).fields
        values = {key: f.contents() for key, f in fields.items() if f.data}
        return _info(path, size, set(fields), values)
    except OSError as err:
        raise WindowKVError(f"cannot read {path}: {err.strerror or err}; give the path of a GGUF file") from err
    except FormatError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as err:
        raise FormatError(
            f"{path} is not a readable GGUF file: got {type(err).__name__}: {str(err)[:400]}; expected a GGUF version "
            "2 or 3 header; download the file again, or give another one"
        ) from err


@dataclass(frozen=True)
class _Keys:
    """The values of a header by the name behind the architecture's, checked for their type as llama.cpp does."""

    arch: str
    values: Mapping[str, Any]

    def get(self, key: str, default: Any = 0) -> Any:
        return self.values.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: int = 0) -> int:
        return self.count(key, self.get(key, default))

    def count(self, key: str, value: Any) -> int:
        """A count: not negative, and 32 bits wide as llama.cpp's."""
        if not isinstance(value, int) or not 0 <= value < 2**32:
            raise ValueError(f"{key} is {shown(value)}, expected a number from 0 to 2^32 - 1")
        return int(value)

    def real(self, key: str) -> float:
        value = self.get(key, 0.0)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{key} is {shown(value)}, expected a finite number")
        return float(value)

    def counts(self, key: str, value: Any, n: int) -> tuple[int, ...]:
        """A count for each of n layers, from an array or one number for all."""
        row = value if isinstance(value, list) else [value] * n
        if len(row) < n:
            raise ValueError(f"{key} has {len(row)} entries for {n} layers")
        return tuple(self.count(key, item) for item in row[:n])


def _text(values: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = values[key] if default is None else values.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {shown(value)}, expected text")
    return value


def _info(path: Path, size: int, keys: set[str], values: dict[str, Any]) -> GGUFInfo:
    arch = _text(values, "general.architecture")
    of = _Keys(arch, values)
    # nanbeige runs its layers num_loops times, each time with cells of its own.
    loops = max(1, of.number("num_loops", 1)) if arch == "nanbeige" else 1
    n_block = of.number("block_count")
    n_layer = max(0, n_block - of.number("nextn_predict_layers"))
    if n_block > _MAX_LAYERS or n_layer * loops > _MAX_LAYERS:
        looped = f" and num_loops {loops}" if loops > 1 else ""
        raise ValueError(f"block_count is {n_block}{looped}, llama.cpp has at most {_MAX_LAYERS} layers")

    n_head = of.counts("attention.head_count", of.get("attention.head_count"), n_layer) * loops
    given_kv = of.get("attention.head_count_kv", of.get("attention.head_count"))
    n_head_kv = of.counts("attention.head_count_kv", given_kv, n_layer) * loops
    n_embd = of.number("embedding_length")
    head_dim = n_embd // n_head[0] if n_head and n_head[0] else 0
    dim_k, dim_v = (of.number(f"attention.{name}_length", head_dim) for name in ("key", "value"))
    recurrent_layers = _recurrent(of, n_head_kv)
    window, window_layers = _window(of, n_layer * loops)
    if window and arch in _WINDOW_HYBRIDS:  # all of the others
        window_layers = tuple(not recurrent for recurrent in recurrent_layers)
    fixed_alibi = 0.0 if arch == "baichuan" and n_layer != 40 else _ALIBI_FIXED.get(arch, 0.0)
    sections = of.get("rope.dimension_sections", [])
    sections = sections if isinstance(sections, list) else [sections]
    return GGUFInfo(
        path=path,
        architecture=arch,
        name=_text(values, "general.name", path.stem),
        file_size=size,
        file_type=_file_type_name(values.get("general.file_type")),
        n_layer=n_layer * loops,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim_k=dim_k,
        head_dim_v=dim_v,
        head_dims_window=(of.number("attention.key_length_swa", dim_k), of.number("attention.value_length_swa", dim_v)),
        n_ctx_train=of.number("context_length"),
        sliding_window=window,
        window_layers=window_layers,
        recurrent_layers=recurrent_layers,
        has_chat_template="tokenizer.chat_template" in keys,
        causal=bool(of.get("attention.causal", True)),
        mla=of.number("attention.key_length_mla") > 0 and of.number("attention.value_length_mla") > 0,
        kv_lora_rank=of.number("attention.kv_lora_rank"),
        recurrent_keys=tuple(sorted(k for k in keys if k.startswith(tuple(f"{arch}.{r}" for r in _RECURRENT_KEYS)))),
        max_alibi_bias=of.real("attention.max_alibi_bias") if arch in _ALIBI_BY_KEY else fixed_alibi,
        attn_logit_softcap=of.real("attn_logit_softcapping"),
        rope_sections=tuple(of.count("rope.dimension_sections", s) for s in sections[:4]),
        shared_kv_layers=max(0, n_layer - 20) if arch == "gemma3n" else of.number("attention.shared_kv_layers"),
    )


def _file_type_name(value: Any) -> str:
    try:
        return LlamaFileType(int(value)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (TypeError, ValueError, OverflowError):
        return "unknown" if value is None else f"type {shown(value)}"


def _recurrent(of: _Keys, n_head_kv: tuple[int, ...]) -> tuple[bool, ...]:
    """The layers that keep a recurrent state instead of KV cells, as the pinned llama.cpp applies them."""
    if _GROUP_OF.get(of.arch) != "hybrid":
        return (False,) * len(n_head_kv)
    if of.arch not in _ATTENTION_INTERVAL:
        return tuple(n == 0 for n in n_head_kv)
    marks = of.get("attention.recurrent_layers", None)
    if marks is not None:
        return tuple(map(bool, of.counts("attention.recurrent_layers", marks, len(n_head_kv))))
    interval = max(1, of.number("full_attention_interval", _ATTENTION_INTERVAL[of.arch]))
    return tuple((il + 1) % interval != 0 for il in range(len(n_head_kv)))


def _window(of: _Keys, n_layer: int) -> tuple[int, tuple[bool, ...]]:
    """Window in positions and the layers it holds for, as the pinned llama.cpp applies them."""
    arch, key = of.arch, "attention.sliding_window"
    window = 0
    if _GROUP_OF.get(arch) == "window":
        window = of.number(key, _WINDOW_DEFAULT.get(arch, 0))
    elif arch == "exaone4":
        window = of.number(key, _WINDOW_DEFAULT[arch]) if n_layer == 64 else 0
    elif arch == "llama4":
        window = 0 if of.get(key, None) == 0 else _WINDOW_FORCED[arch]
    elif (_GROUP_OF.get(arch) == "window-by-key" or arch in _WINDOW_HYBRIDS) and of.number(key):
        window = _WINDOW_FORCED.get(arch, of.number(key))
    if not window:
        return 0, (False,) * n_layer
    period, dense_first = _UPSTREAM["window_pattern"].get(arch, [1, False])
    pattern = of.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, list):
        return window, tuple(bool(p) for p in [*pattern, *[0] * n_layer][:n_layer])
    period = of.count("attention.sliding_window_pattern", pattern)
    full = 0 if dense_first else period - 1
    return window, tuple(period == 0 or il % period != full for il in range(n_layer))


def support(info: GGUFInfo) -> tuple[bool, str]:
    """Whether this release can run a KV policy on the model, and the reason in words.

    This is a forecast; loading decides. Supported are decoders with causal attention and one K and one V row per KV
    head, layer and position, in the layers that attend to all positions. Layers with a sliding window or a recurrent
    state may stand beside them and stay as they are.
    """
    arch = info.architecture
    group = _GROUP_OF.get(arch)
    if group is None:
        return False, f"architecture {arch!r} is not known to the pinned llama.cpp"
    layers = info.compressed_layers
    heads, dims = {info.n_head_kv[il] for il in layers}, (info.head_dim_k, info.head_dim_v)
    is_hybrid = group == "hybrid"
    checks = (
        (group in _WHY_NOT, _WHY_NOT.get(group, "")),
        (not info.causal, "its attention is not causal"),
        (bool(info.recurrent_keys) and not is_hybrid, f"it has recurrent layers ({', '.join(info.recurrent_keys)})"),
        (info.mla, "it uses multi-head latent attention (MLA)"),
        (is_hybrid and info.sliding_window > 0, "it has windows beside recurrent layers"),
        (info.n_layer > 0 and not layers, "no layer attends to all positions, so that there is nothing to compress"),
        (info.max_alibi_bias > 0, _WHY_NOT["alibi"]),
        (arch in _UPSTREAM["mrope_by_key"] and min((*info.rope_sections, 0, 0)[:2]) > 0, _WHY_NOT["mrope"]),
        (info.shared_kv_layers > 0, f"its last {info.shared_kv_layers} layers reuse the cells of earlier layers"),
        (0 in heads or not heads, "some layers have no KV heads"),
        (
            len(heads) > 1,
            f"its layers have different numbers of KV heads ({min(heads, default=0)} to {max(heads, default=0)})",
        ),
        (any(d % 2 or d < 2 for d in dims), f"its K and V head sizes are {dims}, expected even numbers"),
    )
    for failed, reason in checks:
        if failed:
            return False, f"architecture {arch!r} is not supported with a KV policy: {reason}"
    if len(layers) == info.n_layer and not is_hybrid:
        return True, f"plain causal attention ({arch}, {info.n_layer} layers)"
    others = "their recurrent state" if is_hybrid else f"their window of {info.sliding_window:,} positions"
    keep = f"all keep {others} besides" if len(layers) == info.n_layer else f"the others keep {others}"
    return True, f"{len(layers)} of {info.n_layer} layers attend to all positions and are compressed, {keep} ({arch})"


def _is_whole(info: GGUFInfo, cells: str) -> bool:
    """Whether the rows of all heads consist of whole blocks of a type."""
    block = GGML_QUANT_SIZES[GGMLQuantizationType(TYPES[cells])][0]
    return info.head_dim_k % block == info.head_dim_v % block == 0


def cost_table(
    info: GGUFInfo,
    lengths: Sequence[int],
    budgets: Sequence[float],
    policies: Sequence[str],
    cells_of: Mapping[str, str | None] | None = None,
) -> list[CostRow]:
    """KV bytes of the stock cache (f16) and of every policy x budget, for texts of ``lengths`` tokens.

    A budget is the fraction of cells kept per head, ``max(1, floor(budget * length))`` on average: policies that
    divide it unevenly have the same mean. Policies that prefer a type of cells (``cells_of``) hold more of them for the
    same bytes, if the rows of the heads consist of whole blocks. Layers with a sliding window hold at most that window,
    with a policy and without: what llama.cpp reserves beyond it, or for all positions with ``swa_full=True``, is not
    counted. A model that :func:`support` refuses gets stock rows only.

    Raises:
        ValueError: a length below 1 or a budget outside (0, 1].
        UnsupportedModelError: a cache that is not made of K and V rows, so that this formula would be wrong.
    """
    if bad := [n for n in lengths if n < 1]:
        raise ValueError(f"got a length of {bad[0]} tokens, expected at least 1")
    if off := [b for b in budgets if not 0 < b <= 1]:
        raise ValueError(f"got a budget of {off[0]}, expected a fraction of the cells above 0 and up to 1")
    group = _GROUP_OF.get(info.architecture)
    if group not in _ROW_GROUPS or info.mla or info.n_layer == 0:
        raise UnsupportedModelError(f"no KV cost known: {support(info)[1]}; expected one K and one V row per head")
    rows = []
    for n in lengths:
        cells = [min(n, info.sliding_window) if windowed else n for windowed in info.window_layers]
        stock = sum(info.layer_bytes(il) * kept for il, kept in enumerate(cells))
        rows.append(CostRow("stock", 1.0, n, n, stock, 1.0))
        for policy in policies if support(info)[0] else ():
            for budget in budgets:
                own = (cells_of or {}).get(policy)
                types = (own,) if own and _is_whole(info, own) else ()
                kept = n_cells(budget, n, *types)
                windows = sum(info.layer_bytes(il) * cells[il] for il in range(info.n_layer) if info.window_layers[il])
                size = sum(info.layer_bytes(il) for il in info.compressed_layers)
                n_bytes = windows + kept * (round(size * bits(*types) / 16) if types else size)
                rows.append(CostRow(policy, budget, n, kept, n_bytes, n_bytes / stock))
    return rows


# Generator of data/architectures.json: reads llama.cpp's sources, so that the forecast cannot drift from the pin.


def classify_upstream(src: str | Path) -> dict[str, Any]:
    """Sort llama.cpp's architectures by the memory and the attention input that their graphs use.

    ``src`` is llama.cpp's ``src`` folder, its root, or the root of llama-cpp-python's source distribution.

    Raises:
        FileNotFoundError: no llama-arch.cpp in any of these places.
    """
    tried = [Path(src), Path(src, "src"), Path(src, "vendor", "llama.cpp", "src")]
    root = next((p for p in tried if (p / "llama-arch.cpp").is_file()), None)
    if root is None:
        raise FileNotFoundError(f"no llama-arch.cpp in {' or '.join(map(str, tried))}; give llama.cpp's src folder")
    arch_cpp, model_cpp, graph_cpp = (
        (root / f"llama-{name}.cpp").read_text(encoding="utf-8") for name in ("arch", "model", "graph")
    )
    models = "\n".join(p.read_text(encoding="utf-8") for p in sorted((root / "models").glob("*.cpp")))
    structs = {
        m[1]: (m[2], m[3])
        for m in re.finditer(
            r"^struct (llama_model_\w+) : public (\w+) \{(.*?)^\};",
            (root / "models" / "models.h").read_text(encoding="utf-8"),
            re.MULTILINE | re.DOTALL,
        )
    }
    name_of = dict(re.findall(r'\{ *(LLM_ARCH_\w+), *"([^"]+)" *\}', arch_cpp))
    class_of = re.findall(r"case (LLM_ARCH_\w+):\s*return new (llama_model_\w+)\(", model_cpp)
    memory = _body(model_cpp, r"^llama_memory_i \* llama_model::create_memory\(")
    no_cache, special = memory.split("res = nullptr;", 1)
    tables = {
        "recurrent": _cases(_body(arch_cpp, r"^bool llm_arch_is_recurrent\(")),
        "no-cache": _cases(no_cache),
        "encoder": _cases(_body(model_cpp, r"^bool llama_model_has_encoder\("))
        | set(re.findall(r"arch == (LLM_ARCH_\w+)\) \{\s*llama_memory_t mem_other", memory)),
        "other-cache": _cases(special),
        "scaled-logits": set(
            re.findall(
                r"arch == (LLM_ARCH_\w+)", _body(graph_cpp, r"^ggml_tensor \* llm_graph_context::build_attn_mha\(")
            )
        ),
    }
    rope = _body(model_cpp, r"^llama_rope_type llama_model_rope_type\(")
    mrope: dict[str, set[str]] = {"always": set(), "by key": set()}
    for labels, result in re.findall(r"((?:case LLM_ARCH_\w+:\s*)+)(?://[^\n]*\s*)*return ([^;]+);", rope):
        if "MROPE" in result:
            mrope["by key" if "use_mrope()" in result else "always"] |= _cases(labels)
    tables["mrope"] = mrope["always"]
    hybrids = _cases(_body(arch_cpp, r"^bool llm_arch_is_hybrid\("))
    out: dict[str, Any] = {
        "groups": {g: [] for g in (*_MAYBE, *_WHY_NOT)},
        "mrope_by_key": sorted(name_of[a] for a in mrope["by key"]),
        "alibi_by_key_or_size": [],
        "window_pattern": {},
    }
    for arch, cls in class_of:
        name, hparams, inputs = name_of[arch], _inherited(cls, "load_arch_hparams", models, structs), set[str]()
        if arch != "LLM_ARCH_CLIP":  # a vision projector, never loaded as a language model
            inputs = _graph_inputs(cls, models, structs)
        group = next((g for g, archs in tables.items() if arch in archs), None)
        if group is None and arch in hybrids:
            group = "hybrid" if "build_inp_mem_hybrid" in inputs else "other-cache"
        group = group or _group(inputs, hparams)
        out["groups"][group].append(name)
        if group == "plain" and "f_max_alibi_bias" in hparams:
            out["alibi_by_key_or_size"].append(name)
        if m := re.search(r"load_swa_pattern\(ml, (\d+)(, (?:/\*\w+=\*/)?true)?\)", hparams):
            out["window_pattern"][name] = [int(m[1]), m[2] is not None]
    return {k: {g: sorted(v) for g, v in out[k].items()} if k == "groups" else out[k] for k in out}


def _group(inputs: set[str], hparams: str) -> str:
    """Group of an architecture with the default memory, by its graph's attention inputs and its hparams."""
    if re.search(r"router_layer\s*=", hparams):
        return "router"
    if re.search(r"^    hparams\.f_max_alibi_bias = ", hparams, re.MULTILINE):  # four spaces: under no condition
        return "alibi"
    inputs = {name.removeprefix("build_attn_inp_") for name in inputs}
    may_window = re.search(r"swa_type\s*= LLAMA_SWA_TYPE_(?!NONE)", hparams) is not None
    if inputs == {"kv"} or (inputs == {"kv", "kv_iswa"} and not may_window):
        return "plain"
    if inputs == {"k", "kv"}:
        return "mla-by-key"
    if inputs == {"kv", "kv_iswa"}:
        return "window-by-key"
    if inputs == {"kv_iswa"}:
        return "window"
    return "no-cache" if inputs <= {"no_cache"} else "other-cache"


def _cases(text: str) -> set[str]:
    return set(re.findall(r"case (LLM_ARCH_\w+):", text))


def _body(text: str, start: str) -> str:
    """The braces of the first definition that matches ``start``, or '' if there is none."""
    found = re.search(start, text, re.MULTILINE)
    if found is None:
        return ""
    begin = text.index("{", found.end())
    depth = 0
    for brace in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[begin : begin + brace.end()]
    raise ValueError(f"unbalanced braces after {start}")


def _inherited(cls: str, method: str, models: str, structs: dict[str, tuple[str, str]]) -> str:
    """Body of a method of a model class, its own or the nearest base's."""
    own = _body(models, rf"^\S[^\n]*\b{cls}::{method}\(")
    return own if own or cls not in structs else _inherited(structs[cls][0], method, models, structs)


def _graph_inputs(cls: str, models: str, structs: dict[str, tuple[str, str]]) -> set[str]:
    """The attention inputs that the class's main graph builds, with the template arguments it is built with."""
    flags = set(re.findall(r"graph<(\w+)>", _inherited(cls, "build_arch_graph", models, structs)))
    owner = cls
    while not re.search(r"struct graph\b", structs[owner][1]):
        alias = re.search(r"using graph = (llama_model_\w+)::graph(?:<(true|false)>)?", structs[owner][1])
        flags |= {alias[2]} if alias and alias[2] else set()
        owner = alias[1] if alias else structs[owner][0]
    text = _body(models, rf"^{owner}::graph(?:<\w+>)?::graph\(")
    text = re.sub(
        r"if constexpr \(\w+\) \{([^{}]*)\} else \{([^{}]*)\}",
        lambda m: (m[1] if "true" in flags else "") + (m[2] if "false" in flags else ""),
        text,
    )
    return set(re.findall(r"\b(build_attn_inp_\w+|build_inp_mem_\w+|build_rs_inp)\b", text))


# The table in README.md, from the same groups.

_TABLE_BEGIN = "<!-- architectures: written by python -m windowkv_edge.gguf_info --readme windowkv_edge/README.md -->"
_TABLE_END = "<!-- end of architectures -->"
_SUPPORTED, _BY_KEY, _STOCK_ONLY = "supported", "its keys decide", "stock only"


def architecture_table() -> str:
    """Markdown of all architectures of the pinned llama.cpp: supported, or stock only and why; each is named once.

    One row per group, folded under a line with the counts. The second column lists names, separated by ", ".
    """
    rows = _table_rows()
    count = {verdict: sum(len(archs) for v, archs, _ in rows if v == verdict) for verdict, _, _ in rows}
    return "\n".join(
        [
            "<details>",
            f"<summary>{sum(count.values())} architectures: {count[_SUPPORTED]} are supported, for {count[_BY_KEY]} "
            f"the keys of the file decide, {count[_STOCK_ONLY]} are stock only</summary>",
            "",
            "| verdict | architectures | why |",
            "| --- | --- | --- |",
            *(f"| {verdict} | {', '.join(archs)} | {why} |" for verdict, archs, why in rows),
            "",
            "</details>",
        ]
    )


def _table_rows() -> list[tuple[str, list[str], str]]:
    """Verdict, architectures and reason of every row."""
    groups: dict[str, list[str]] = _UPSTREAM["groups"]
    maybe = {arch for group in _MAYBE for arch in groups[group]}
    by_key: list[tuple[Iterable[str], str]] = [
        (
            groups["mla-by-key"],
            "stock only with multi-head latent attention (MLA: `attention.key_length_mla` and "
            "`attention.value_length_mla`)",
        ),
        (
            _UPSTREAM["alibi_by_key_or_size"],
            "stock only with ALiBi biases: `attention.max_alibi_bias` above 0; in Baichuan, 40 layers (the 13B)",
        ),
        (
            maybe.intersection(_UPSTREAM["mrope_by_key"]),
            "stock only with M-RoPE: the first two of `rope.dimension_sections` above 0",
        ),
        (
            _SHARED_BY_KEY,
            "as those with windows; stock only if layers reuse the cells of others "
            "(`attention.shared_kv_layers` above 0)",
        ),
        (
            _WINDOW_HYBRIDS,
            "as those with a recurrent state; stock only with windows besides (`attention.sliding_window` above 0)",
        ),
        (
            _HEADS_BY_LAYER,
            "stock only if layers have different numbers of KV heads, or none (`attention.head_count_kv`)",
        ),
    ]
    special = set[str]().union(_ALWAYS_SHARED, _ALWAYS_MLA, *(archs for archs, _ in by_key))
    rows: list[tuple[str, Iterable[str], str]] = [
        (_SUPPORTED, set(groups["plain"]) - special, "all layers attend to all positions and are compressed"),
        (
            _SUPPORTED,
            {*groups["window"], *groups["window-by-key"]} - special,
            "layers that attend to all positions are compressed, those with a window keep it",
        ),
        (
            _SUPPORTED,
            set(groups["hybrid"]) - special,
            "layers that attend to all positions are compressed, those with a recurrent state keep it",
        ),
        *((_BY_KEY, archs, why) for archs, why in by_key),
        (_STOCK_ONLY, _ALWAYS_SHARED, "its layers from the 21st on reuse the cells of earlier layers"),
        (_STOCK_ONLY, _ALWAYS_MLA, "it uses multi-head latent attention (MLA) beside its recurrent layers"),
        *((_STOCK_ONLY, groups[group], why) for group, why in _WHY_NOT.items()),
    ]
    return [(verdict, sorted(archs), why) for verdict, archs, why in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the data file from llama.cpp's sources, or the table in README.md from the data file."""
    parser = argparse.ArgumentParser(prog="python -m windowkv_edge.gguf_info", description=__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--regenerate", metavar="SRC", help="llama.cpp's sources; rewrites the data file")
    task.add_argument("--readme", metavar="FILE", type=Path, help="rewrites the table of architectures in this file")
    args = parser.parse_args(argv)
    if args.readme is None:
        table = classify_upstream(args.regenerate)
        _DATA.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {_DATA}: {len(table['groups']['plain'])} plain architectures")
        return
    before, begin, rest = args.readme.read_text(encoding="utf-8").partition(_TABLE_BEGIN)
    _, end, after = rest.partition(_TABLE_END)
    if not end:
        parser.error(f"{args.readme} lacks the lines of the table, expected {_TABLE_BEGIN} and {_TABLE_END}")
    args.readme.write_text(f"{before}{begin}\n{architecture_table()}\n{end}{after}", encoding="utf-8")
    print(f"wrote the architectures in {args.readme}")


if __name__ == "__main__":
    main()
