"""Tiny GGUF models with random weights, for tests of mechanics; never for quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 128
N_FF = 64


class _Writer:
    """One file: keys that all models share, random weights, norms of ones."""

    def __init__(self, path: Path, arch: str, n_head: int, kv_heads: Sequence[int], head_dim: int, seed: int) -> None:
        self.path, self.head_dim, self.n_head = path, head_dim, n_head
        self.n_embd = n_head * head_dim
        self.rng = np.random.default_rng(seed)
        self.gguf = gguf.GGUFWriter(path, arch)
        self.gguf.add_block_count(len(kv_heads))
        self.gguf.add_context_length(4096)
        self.gguf.add_embedding_length(self.n_embd)
        self.gguf.add_feed_forward_length(N_FF)
        self.gguf.add_head_count(n_head)
        self.gguf.add_head_count_kv(kv_heads[0] if len(set(kv_heads)) == 1 else kv_heads)
        self.gguf.add_layer_norm_rms_eps(1e-5)
        self.gguf.add_rope_dimension_count(head_dim)
        self.gguf.add_vocab_size(N_VOCAB)
        self.gguf.add_tokenizer_model("none")
        self.gguf.add_file_type(gguf.LlamaFileType.ALL_F32)

    def weight(self, name: str, *shape: int) -> None:
        data = self.rng.standard_normal(shape) / np.sqrt(shape[-1])
        self.gguf.add_tensor(name, data.astype(np.float32))

    def const(self, name: str, value: float, *shape: int) -> None:
        self.gguf.add_tensor(name, np.full(shape, value, dtype=np.float32))

    def norm(self, name: str) -> None:
        self.const(name, 1.0, self.n_embd)

    def embeddings(self, *, output: bool = True) -> None:
        self.weight("token_embd.weight", N_VOCAB, self.n_embd)
        if output:
            self.weight("output.weight", N_VOCAB, self.n_embd)

    def attention(self, il: int, n_head_kv: int) -> None:
        self.weight(f"blk.{il}.attn_q.weight", self.n_embd, self.n_embd)
        self.weight(f"blk.{il}.attn_k.weight", n_head_kv * self.head_dim, self.n_embd)
        self.weight(f"blk.{il}.attn_v.weight", n_head_kv * self.head_dim, self.n_embd)
        self.weight(f"blk.{il}.attn_output.weight", self.n_embd, self.n_embd)

    def mlp(self, il: int) -> None:
        self.norm(f"blk.{il}.ffn_norm.weight")
        self.weight(f"blk.{il}.ffn_gate.weight", N_FF, self.n_embd)
        self.weight(f"blk.{il}.ffn_up.weight", N_FF, self.n_embd)
        self.weight(f"blk.{il}.ffn_down.weight", self.n_embd, N_FF)

    def ssm_keys(self) -> None:
        self.d_conv, self.d_state, self.n_ssm_head, self.d_inner = 4, 16, 4, 2 * self.n_embd
        self.gguf.add_ssm_conv_kernel(self.d_conv)
        self.gguf.add_ssm_inner_size(self.d_inner)
        self.gguf.add_ssm_state_size(self.d_state)
        self.gguf.add_ssm_time_step_rank(self.n_ssm_head)
        self.gguf.add_ssm_group_count(1)

    def ssm(self, il: int) -> None:
        d_all = self.d_inner + 2 * self.d_state
        self.weight(f"blk.{il}.ssm_in.weight", self.d_inner + d_all + self.n_ssm_head, self.n_embd)
        self.weight(f"blk.{il}.ssm_conv1d.weight", d_all, self.d_conv)
        self.const(f"blk.{il}.ssm_conv1d.bias", 0.0, d_all)
        self.const(f"blk.{il}.ssm_dt.bias", 0.1, self.n_ssm_head)
        self.const(f"blk.{il}.ssm_a", -1.0, self.n_ssm_head, 1)
        self.const(f"blk.{il}.ssm_d", 1.0, self.n_ssm_head, 1)
        self.const(f"blk.{il}.ssm_norm.weight", 1.0, 1, self.d_inner)
        self.weight(f"blk.{il}.ssm_out.weight", self.n_embd, self.d_inner)

    def close(self) -> Path:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()
        return self.path


def write_llama(
    path: Path,
    *,
    arch: str = "llama",
    n_layer: int = 3,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 32,
    seed: int = 0,
) -> Path:
    """A model with the tensors of the llama architecture, without a tokenizer.

    Args:
        path: file to write.
        arch: an architecture that has the same tensors; "eurobert", which has no output matrix, goes without.
        n_layer: layers.
        n_head: query heads per layer.
        n_head_kv: kv heads per layer.
        head_dim: size of a head, even.
        seed: of the random weights.
    """
    out = _Writer(path, arch, n_head, [n_head_kv] * n_layer, head_dim, seed)
    if arch == "qwen2vl":
        out.gguf.add_rope_dimension_sections([8, 4, 4, 0])
    out.embeddings(output=arch != "eurobert")
    out.norm("output_norm.weight")
    for il in range(n_layer):
        out.norm(f"blk.{il}.attn_norm.weight")
        out.attention(il, n_head_kv)
        out.mlp(il)
    return out.close()


def write_lfm2(path: Path, *, kv_heads: Sequence[int] = (0, 2, 0, 2), window: int = 0, seed: int = 0) -> Path:
    """Short convolutions where a layer has no kv heads, attention elsewhere; with a window in all of its layers."""
    out = _Writer(path, "lfm2", 4, kv_heads, 32, seed)
    out.gguf.add_shortconv_l_cache(3)
    if window:
        out.gguf.add_sliding_window(window)
    out.embeddings()
    out.norm("token_embd_norm.weight")  # the name of the output norm here
    for il, n_head_kv in enumerate(kv_heads):
        out.norm(f"blk.{il}.attn_norm.weight")
        if n_head_kv:
            out.attention(il, n_head_kv)
            out.const(f"blk.{il}.attn_q_norm.weight", 1.0, out.head_dim)
            out.const(f"blk.{il}.attn_k_norm.weight", 1.0, out.head_dim)
        else:
            out.weight(f"blk.{il}.shortconv.conv.weight", out.n_embd, 3)
            out.weight(f"blk.{il}.shortconv.in_proj.weight", 3 * out.n_embd, out.n_embd)
            out.weight(f"blk.{il}.shortconv.out_proj.weight", out.n_embd, out.n_embd)
        out.mlp(il)
    return out.close()


def write_granite_hybrid(path: Path, *, kv_heads: Sequence[int] = (0, 2, 0, 2), seed: int = 0) -> Path:
    """Mamba-2 where a layer has no kv heads, attention elsewhere."""
    out = _Writer(path, "granitehybrid", 4, kv_heads, 32, seed)
    out.ssm_keys()
    out.embeddings()
    out.norm("output_norm.weight")
    for il, n_head_kv in enumerate(kv_heads):
        out.norm(f"blk.{il}.attn_norm.weight")
        if n_head_kv:
            out.attention(il, n_head_kv)
        else:
            out.ssm(il)
        out.mlp(il)
    return out.close()


def write_mamba2(path: Path, *, n_layer: int = 2, seed: int = 0) -> Path:
    """Mamba-2 in all layers: no KV cache."""
    out = _Writer(path, "mamba2", 4, [0] * n_layer, 32, seed)
    out.ssm_keys()
    out.embeddings()
    out.norm("output_norm.weight")
    for il in range(n_layer):
        out.norm(f"blk.{il}.attn_norm.weight")
        out.ssm(il)
    return out.close()


def write_minimax_m3(path: Path, *, n_layer: int = 2, seed: int = 0) -> Path:
    """A cache of its own kind, with keys of an indexer beside the cells; two experts but in the first layer."""
    n_head_kv, n_expert, d_index = 2, 2, 32
    out = _Writer(path, "minimax-m3", 4, [n_head_kv] * n_layer, 32, seed)
    n_embd = out.n_embd
    out.gguf.add_leading_dense_block_count(1)
    out.gguf.add_expert_count(n_expert)
    out.gguf.add_expert_used_count(1)
    out.gguf.add_expert_feed_forward_length(N_FF)
    out.gguf.add_expert_shared_count(1)
    out.gguf.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    index = {"head_count": n_head_kv, "key_length": d_index, "top_k": 2, "block_size": 16, "local_blocks": 1}
    for key, value in index.items():
        out.gguf.add_uint32(f"minimax-m3.attention.indexer.{key}", value)
    out.embeddings()
    out.norm("output_norm.weight")
    for il in range(n_layer):
        out.norm(f"blk.{il}.attn_norm.weight")
        out.attention(il, n_head_kv)
        out.const(f"blk.{il}.attn_q_norm.weight", 1.0, out.head_dim)
        out.const(f"blk.{il}.attn_k_norm.weight", 1.0, out.head_dim)
        if il == 0:
            out.mlp(il)
            continue
        out.norm(f"blk.{il}.ffn_norm.weight")
        out.weight(f"blk.{il}.ffn_gate_inp.weight", n_expert, n_embd)
        out.const(f"blk.{il}.exp_probs_b.bias", 0.0, n_expert)
        for name, rows, cols in (("gate", N_FF, n_embd), ("up", N_FF, n_embd), ("down", n_embd, N_FF)):
            out.weight(f"blk.{il}.ffn_{name}_exps.weight", n_expert, rows, cols)
            out.weight(f"blk.{il}.ffn_{name}_shexp.weight", rows, cols)
        out.weight(f"blk.{il}.indexer.q_proj.weight", n_head_kv * d_index, n_embd)
        out.weight(f"blk.{il}.indexer.k_proj.weight", d_index, n_embd)
        out.const(f"blk.{il}.indexer.q_norm.weight", 1.0, d_index)
        out.const(f"blk.{il}.indexer.k_norm.weight", 1.0, d_index)
    return out.close()


def write_grok(path: Path, *, n_layer: int = 2, seed: int = 0) -> Path:
    """Plain attention whose logits go through a tanh of its own; two experts."""
    n_head_kv, n_expert = 2, 2
    out = _Writer(path, "grok", 4, [n_head_kv] * n_layer, 32, seed)
    out.gguf.add_expert_count(n_expert)
    out.gguf.add_expert_used_count(1)
    out.embeddings()
    out.norm("output_norm.weight")
    for il in range(n_layer):
        for name in ("attn_norm", "attn_output_norm", "ffn_norm", "layer_output_norm"):
            out.norm(f"blk.{il}.{name}.weight")
        out.attention(il, n_head_kv)
        out.weight(f"blk.{il}.ffn_gate_inp.weight", n_expert, out.n_embd)
        for name, rows, cols in (("gate", N_FF, out.n_embd), ("up", N_FF, out.n_embd), ("down", out.n_embd, N_FF)):
            out.weight(f"blk.{il}.ffn_{name}_exps.weight", n_expert, rows, cols)
    return out.close()


def write_gpt_oss(path: Path, *, n_layer: int = 4, window: int = 64, sink: float = 1.0, seed: int = 0) -> Path:
    """Every other layer sees a window only; learned attention sinks, two experts.

    Args:
        path: file to write.
        n_layer: layers.
        window: positions that the layers 0, 2, ... see.
        sink: logit of the sink in every head; the larger, the less attention goes to the cells.
        seed: of the random weights.
    """
    n_expert, n_head, n_head_kv = 2, 4, 2
    out = _Writer(path, "gpt-oss", n_head, [n_head_kv] * n_layer, 32, seed)
    n_embd = out.n_embd
    out.gguf.add_key_length(32)
    out.gguf.add_value_length(32)
    out.gguf.add_sliding_window(window)
    out.gguf.add_expert_count(n_expert)
    out.gguf.add_expert_used_count(1)
    out.gguf.add_expert_feed_forward_length(N_FF)
    out.embeddings()
    out.norm("output_norm.weight")
    for il in range(n_layer):
        out.norm(f"blk.{il}.attn_norm.weight")
        out.norm(f"blk.{il}.post_attention_norm.weight")
        out.attention(il, n_head_kv)
        out.const(f"blk.{il}.attn_output.bias", 0.0, n_embd)
        out.const(f"blk.{il}.attn_sinks.weight", sink, n_head)
        out.weight(f"blk.{il}.ffn_gate_inp.weight", n_expert, n_embd)
        out.const(f"blk.{il}.ffn_gate_inp.bias", 0.0, n_expert)
        for name, rows, cols in (("gate", N_FF, n_embd), ("up", N_FF, n_embd), ("down", n_embd, N_FF)):
            out.weight(f"blk.{il}.ffn_{name}_exps.weight", n_expert, rows, cols)
            out.const(f"blk.{il}.ffn_{name}_exps.bias", 0.0, n_expert, rows)
    return out.close()
