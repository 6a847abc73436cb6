"""Checkpoints in and out: `load`, `save`, `export`, `inspect`. Models never see any of it.

Read `rules.py` first (what a table of names is), then `vit/timm.py` (one table), `loading.py`.
"""

from typing import TYPE_CHECKING

from triptych.lazy import public

# A ViT is loaded without the tables of Stable Diffusion.
_PUBLIC = {
    "export": "triptych.weights.exporting",
    "fine_tuning_head": "triptych.weights.adapt",
    "inspect": "triptych.weights.loading",
    "load": "triptych.weights.loading",
    "load_embedding": "triptych.weights.diffusion.embeddings",
    "load_lora": "triptych.weights.diffusion.lora",
    "map_head": "triptych.weights.adapt",
    "quantize": "triptych.weights.quantizing",
    "resize_positions": "triptych.weights.adapt",
    "resize_windows": "triptych.weights.adapt",
    "save": "triptych.weights.store",
    "save_embedding": "triptych.weights.diffusion.embeddings",
}

__all__ = [*_PUBLIC]

if TYPE_CHECKING:
    from triptych.weights.adapt import fine_tuning_head as fine_tuning_head
    from triptych.weights.adapt import map_head as map_head
    from triptych.weights.adapt import resize_positions as resize_positions
    from triptych.weights.adapt import resize_windows as resize_windows
    from triptych.weights.diffusion.embeddings import load_embedding as load_embedding
    from triptych.weights.diffusion.embeddings import save_embedding as save_embedding
    from triptych.weights.diffusion.lora import load_lora as load_lora
    from triptych.weights.exporting import export as export
    from triptych.weights.loading import inspect as inspect
    from triptych.weights.loading import load as load
    from triptych.weights.quantizing import quantize as quantize
    from triptych.weights.store import save as save


__getattr__, __dir__ = public(__name__, _PUBLIC)
