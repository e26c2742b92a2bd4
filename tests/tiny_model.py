"""Tiny GGUF models with random weights, for tests of mechanics; never for quality."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 128


def write_llama(
    path: Path, *, n_layer: int = 3, n_head: int = 4, n_head_kv: int = 2, head_dim: int = 32, seed: int = 0
) -> Path:
    """A llama-architecture model without a tokenizer.

    Args:
        path: file to write.
        n_layer: layers.
        n_head: query heads per layer.
        n_head_kv: kv heads per layer.
        head_dim: size of a head, even.
        seed: of the random weights.
    """
    n_embd, n_ff = n_head * head_dim, 64
    rng = np.random.default_rng(seed)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_layer)
    writer.add_context_length(4096)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    def weight(name: str, *shape: int) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(n_embd, dtype=np.float32))

    weight("token_embd.weight", N_VOCAB, n_embd)
    weight("output.weight", N_VOCAB, n_embd)
    norm("output_norm.weight")
    for il in range(n_layer):
        norm(f"blk.{il}.attn_norm.weight")
        norm(f"blk.{il}.ffn_norm.weight")
        weight(f"blk.{il}.attn_q.weight", n_embd, n_embd)
        weight(f"blk.{il}.attn_k.weight", n_head_kv * head_dim, n_embd)
        weight(f"blk.{il}.attn_v.weight", n_head_kv * head_dim, n_embd)
        weight(f"blk.{il}.attn_output.weight", n_embd, n_embd)
        weight(f"blk.{il}.ffn_gate.weight", n_ff, n_embd)
        weight(f"blk.{il}.ffn_up.weight", n_ff, n_embd)
        weight(f"blk.{il}.ffn_down.weight", n_embd, n_ff)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
