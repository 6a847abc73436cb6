"""Checkpoints: `load`, `save`, `export`, `inspect`. Networks know nothing of them.

Read `mapping/rules.py` first (what a table of rules is), then `vit/timm.py` (one table) and `loading.py`.
"""

from typing import TYPE_CHECKING

from triptych.lazy_imports import lazy_attributes

# A ViT is loaded without the tables of Stable Diffusion.
_PUBLIC = {
    "export": "triptych.weights.exporting",
    "fine_tuning_head": "triptych.weights.resize",
    "inspect": "triptych.weights.inspection",
    "load": "triptych.weights.loading",
    "load_embedding": "triptych.weights.diffusion.textual_inversion",
    "load_lora": "triptych.weights.diffusion.lora",
    "map_head": "triptych.weights.resize",
    "quantize": "triptych.weights.quantization",
    "resize_positions": "triptych.weights.resize",
    "resize_windows": "triptych.weights.resize",
    "save": "triptych.weights.native",
    "save_embedding": "triptych.weights.diffusion.textual_inversion",
}

__all__ = [*_PUBLIC]

if TYPE_CHECKING:
    from triptych.weights.diffusion.lora import load_lora as load_lora
    from triptych.weights.diffusion.textual_inversion import load_embedding as load_embedding
    from triptych.weights.diffusion.textual_inversion import save_embedding as save_embedding
    from triptych.weights.exporting import export as export
    from triptych.weights.inspection import inspect as inspect
    from triptych.weights.loading import load as load
    from triptych.weights.native import save as save
    from triptych.weights.quantization import quantize as quantize
    from triptych.weights.resize import fine_tuning_head as fine_tuning_head
    from triptych.weights.resize import map_head as map_head
    from triptych.weights.resize import resize_positions as resize_positions
    from triptych.weights.resize import resize_windows as resize_windows


__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC)
