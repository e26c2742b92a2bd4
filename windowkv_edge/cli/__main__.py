"""``python -m windowkv_edge.cli``."""

from . import app

app(prog_name="windowkv-edge")
