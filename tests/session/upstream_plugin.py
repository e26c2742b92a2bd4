"""Pytest plugin: llama-cpp-python's own tests with our class in place of theirs and SmolLM2 in place of hub models.

Reads WINDOWKV_UPSTREAM_MODEL (path) and WINDOWKV_UPSTREAM_POLICY ("" or a name).
"""

from __future__ import annotations

import os
from typing import Any

import windowkv_edge  # before llama_cpp

import huggingface_hub
import llama_cpp
import llama_cpp.llama

MODEL = os.environ["WINDOWKV_UPSTREAM_MODEL"]
POLICY = os.environ["WINDOWKV_UPSTREAM_POLICY"]


class Llama(windowkv_edge.Llama):
    """Ours with the policy under test, compacting every prompt."""

    def __init__(self, model_path: str, **kwargs: Any) -> None:
        if POLICY and not kwargs.get("vocab_only"):
            if not kwargs.get("flash_attn", True):
                del kwargs["flash_attn"]
            kwargs = {"kv_policy": POLICY, "kv_budget": 0.75, "kv_min_prompt": 0, **kwargs}
        super().__init__(model_path, **kwargs)


huggingface_hub.hf_hub_download = lambda repo_id, filename, **kwargs: MODEL
llama_cpp.Llama = llama_cpp.llama.Llama = Llama
