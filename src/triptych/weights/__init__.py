"""Checkpoints in and out: `load`, `save`, `export`, `inspect`. Models never see any of it.

Read `rules.py` first (what a table of names is), then `vit/timm.py` (one table), `loading.py`.
"""

from triptych.weights.adapt import fine_tuning_head, map_head, resize_positions, resize_windows
from triptych.weights.diffusion.embeddings import load_embedding, save_embedding
from triptych.weights.diffusion.lora import load_lora
from triptych.weights.exporting import export, formats
from triptych.weights.loading import inspect, load
from triptych.weights.store import save

__all__ = [
    "export",
    "fine_tuning_head",
    "formats",
    "inspect",
    "load",
    "load_embedding",
    "load_lora",
    "map_head",
    "resize_positions",
    "resize_windows",
    "save",
    "save_embedding",
]
