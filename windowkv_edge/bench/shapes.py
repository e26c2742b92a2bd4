"""Models with the shapes of real ones and random weights: for speed and memory, never for quality."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from .._files import lock, writing
from ..errors import WindowKVError
from ..models import cache_dir

__all__ = ["SHAPES", "Shape", "fetch_shape", "write_shape"]

Progress = Callable[[int, int], None]

# Q4_0: a half as scale, 16 bytes of nibbles
_BLOCK, _BLOCK_BYTES = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_0]
_N_RANDOM = 1 << 16  # blocks of random weights, repeated as often as needed


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama-architecture model; its matrices are Q4_0, its norms F32."""

    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int = 131_072
    tied: bool = False  # the output matrix is that of the token embeddings

    def matrices(self) -> dict[str, tuple[int, int]]:
        """[rows, columns] by name, in the order of the file."""
        n_q, n_kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        res = {"token_embd": (self.n_vocab, self.n_embd)}
        if not self.tied:
            res["output"] = (self.n_vocab, self.n_embd)
        for il in range(self.n_layer):
            own = {
                "attn_q": (n_q, self.n_embd),
                "attn_k": (n_kv, self.n_embd),
                "attn_v": (n_kv, self.n_embd),
                "attn_output": (self.n_embd, n_q),
                "ffn_gate": (self.n_ff, self.n_embd),
                "ffn_up": (self.n_ff, self.n_embd),
                "ffn_down": (self.n_embd, self.n_ff),
            }
            res |= {f"blk.{il}.{name}": size for name, size in own.items()}
        return res

    @property
    def n_bytes(self) -> int:
        """Bytes of all matrices."""
        return sum(rows * columns for rows, columns in self.matrices().values()) // _BLOCK * _BLOCK_BYTES


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("llama-1b", 16, 2048, 8192, 32, 8, 64, 128_256, tied=True),  # Llama 3.2 1B
        Shape("llama-8b", 32, 4096, 14_336, 32, 8, 128, 128_256),  # Llama 3.1 8B
    )
}
"""Shapes of real models by name."""


def fetch_shape(name: str, progress: Progress | None = None) -> Path:
    """The file of a shape; written into the cache folder once.

    Raises:
        KeyError: no such shape.
        WindowKVError: too little disk, or a cache folder that cannot be written.
    """
    shape = SHAPES[name]
    path = cache_dir() / f"shape-{name}.q4_0.gguf"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_suffix(".lock")):
            if not path.exists():
                _write(shape, path, progress)
    except OSError as error:
        raise WindowKVError(
            f"cannot write {path}: {error.strerror or error}; set WINDOWKV_CACHE_DIR to a folder that can be written"
        ) from error
    return path


def _write(shape: Shape, path: Path, progress: Progress | None) -> None:
    if (free := shutil.disk_usage(path.parent).free) < shape.n_bytes * 1.05:
        raise WindowKVError(
            f"{path.parent} has {free >> 20:,} MiB free, the shape {shape.name} needs {shape.n_bytes >> 20:,} MiB; "
            "free some space or set WINDOWKV_CACHE_DIR to another folder"
        )
    with writing(path) as part:
        write_shape(shape, part, progress)


def write_shape(shape: Shape, path: Path, progress: Progress | None = None) -> None:
    """Write a model with random weights and without a tokenizer. Only one matrix at a time is in memory."""
    rng = np.random.default_rng(0)
    blocks = np.empty((_N_RANDOM, _BLOCK_BYTES), dtype=np.uint8)
    # nibbles minus 8 have a deviation of 4.6: this scale keeps activations near 1
    scale = np.float16(1 / (4.6 * np.sqrt(shape.n_embd)))
    blocks[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    blocks[:, 2:] = rng.integers(0, 256, (_N_RANDOM, _BLOCK_BYTES - 2), dtype=np.uint8)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"{shape.name} shape, random weights")
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    norm = np.ones(shape.n_embd, dtype=np.float32)
    norms = ["output_norm", *(f"blk.{il}.{at}_norm" for il in range(shape.n_layer) for at in ("attn", "ffn"))]
    matrices = shape.matrices()
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", norm.shape, norm.dtype, norm.nbytes)
    for name, (rows, columns) in matrices.items():
        n_bytes = columns // _BLOCK * _BLOCK_BYTES
        writer.add_tensor_info(
            f"{name}.weight", (rows, n_bytes), np.dtype(np.uint8), rows * n_bytes, gguf.GGMLQuantizationType.Q4_0
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _ in norms:
            writer.write_tensor_data(norm)
        done = 0
        for rows, columns in matrices.values():
            n = rows * columns // _BLOCK
            writer.write_tensor_data(_repeated(blocks, n))
            done += n * _BLOCK_BYTES
            if progress:
                progress(done, shape.n_bytes)
    finally:
        writer.close()


def _repeated(blocks: npt.NDArray[np.uint8], n: int) -> npt.NDArray[np.uint8]:
    return np.resize(blocks, (n, blocks.shape[1]))
