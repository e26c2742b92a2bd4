"""The tiny llama model in NumPy, one token at a time over given cells: an oracle that shares no code with llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class TinyLlama:
    """The weights of :func:`tiny_model.write_llama`."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.weights = {t.name: np.array(t.data, dtype=np.float64) for t in reader.tensors}
        value = lambda key: reader.fields[f"llama.{key}"].contents()  # noqa: E731
        self.n_layer, self.n_head = value("block_count"), value("attention.head_count")
        self.n_head_kv, self.head_dim = value("attention.head_count_kv"), value("rope.dimension_count")

    def norm(self, x: Array, name: str) -> Array:
        return np.asarray(x / np.sqrt((x * x).mean() + 1e-5) * self.weights[name])

    def rope(self, x: Array, pos: int) -> Array:
        """Rotate neighbouring pairs of [heads, head_dim] for position pos."""
        angle = pos * 10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        a, b = x[:, 0::2], x[:, 1::2]
        res = np.empty_like(x)
        res[:, 0::2] = a * np.cos(angle) - b * np.sin(angle)
        res[:, 1::2] = a * np.sin(angle) + b * np.cos(angle)
        return res

    def step(self, token: int, pos: int, cells: list[list[tuple[Array, Array]]]) -> Array:
        """Logits after one token. `cells` holds K and V, [cells, head_dim], of every (layer, kv head) and is appended to."""
        w = self.weights
        group = self.n_head // self.n_head_kv
        x = w["token_embd.weight"][token]
        for il in range(self.n_layer):
            h = self.norm(x, f"blk.{il}.attn_norm.weight")
            q, k, v = (
                (w[f"blk.{il}.attn_{name}.weight"] @ h).reshape(-1, self.head_dim) for name in ("q", "k", "v")
            )
            q, k = self.rope(q, pos), self.rope(k, pos)
            heads = []
            for ih in range(self.n_head_kv):
                keys, values = cells[il][ih]
                cells[il][ih] = keys, values = np.vstack([keys, k[ih]]), np.vstack([values, v[ih]])
                for iq in range(ih * group, (ih + 1) * group):
                    logits = keys @ q[iq] / np.sqrt(self.head_dim)
                    weights = np.exp(logits - logits.max())
                    heads.append(weights @ values / weights.sum())
            x = x + w[f"blk.{il}.attn_output.weight"] @ np.concatenate(heads)
            h = self.norm(x, f"blk.{il}.ffn_norm.weight")
            gate = w[f"blk.{il}.ffn_gate.weight"] @ h
            x = x + w[f"blk.{il}.ffn_down.weight"] @ (gate / (1 + np.exp(-gate)) * (w[f"blk.{il}.ffn_up.weight"] @ h))
        return np.asarray(w["output.weight"] @ self.norm(x, "output_norm.weight"))
