"""Speed and memory of policies beside stock llama.cpp: ``windowkv-edge bench``."""

from __future__ import annotations

from .plot import plot
from .run import Bench, GateError, Plan, Row
from .shapes import SHAPES, Shape, fetch_shape

__all__ = ["SHAPES", "Bench", "GateError", "Plan", "Row", "Shape", "fetch_shape", "plot"]
