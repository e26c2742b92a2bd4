"""Tiny models of every kind of memory that a session has, and the logits of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import tiny_model

from windowkv_edge import Llama

WRITERS: dict[str, Callable[..., Path]] = {
    "llama": tiny_model.write_llama,
    "gpt-oss": tiny_model.write_gpt_oss,  # windows
    "lfm2": tiny_model.write_lfm2,  # convolutions
    "granite": tiny_model.write_granite_hybrid,  # recurrent states
}


def logits(llm: Llama) -> npt.NDArray[np.float32]:
    """Of the last token, float32 [n_vocab]."""
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()
