"""Triptych: the Vision Transformer sees, the Swin Transformer parses, latent diffusion paints.

Importing this package imports nothing heavy: each public name is fetched when it is first used.
"""

from typing import TYPE_CHECKING

from triptych.lazy_imports import lazy_attributes
from triptych.version import __version__ as __version__

# Public name -> the module that holds it.
_PUBLIC = {
    "list_models": "triptych.models.registry",
    "create": "triptych.models.registry",
    "load": "triptych.weights",
    "save": "triptych.weights",
    "export": "triptych.weights",
    "quantize": "triptych.weights",
    "load_lora": "triptych.weights",
    "load_embedding": "triptych.weights",
    "train": "triptych.api.training",
    "evaluate": "triptych.api.evaluation",
    "ClassificationPipeline": "triptych.pipelines.classification",
    "SegmentationPipeline": "triptych.pipelines.segmentation",
    "DiffusionPipeline": "triptych.pipelines.diffusion.pipeline",
    "explain": "triptych.pipelines.explain.vit",
    "capture": "triptych.layers.capture",
    "TriptychError": "triptych.errors",
    "ConfigError": "triptych.errors",
    "DataError": "triptych.errors",
    "CheckpointError": "triptych.errors",
    "DeviceError": "triptych.errors",
    "StorageError": "triptych.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from triptych.api.evaluation import evaluate as evaluate
    from triptych.api.training import train as train
    from triptych.errors import CheckpointError as CheckpointError
    from triptych.errors import ConfigError as ConfigError
    from triptych.errors import DataError as DataError
    from triptych.errors import DeviceError as DeviceError
    from triptych.errors import StorageError as StorageError
    from triptych.errors import TriptychError as TriptychError
    from triptych.layers.capture import capture as capture
    from triptych.models.registry import create as create
    from triptych.models.registry import list_models as list_models
    from triptych.pipelines.classification import ClassificationPipeline as ClassificationPipeline
    from triptych.pipelines.diffusion.pipeline import DiffusionPipeline as DiffusionPipeline
    from triptych.pipelines.explain.vit import explain as explain
    from triptych.pipelines.segmentation import SegmentationPipeline as SegmentationPipeline
    from triptych.weights import export as export
    from triptych.weights import load as load
    from triptych.weights import load_embedding as load_embedding
    from triptych.weights import load_lora as load_lora
    from triptych.weights import quantize as quantize
    from triptych.weights import save as save


__getattr__, __dir__ = lazy_attributes(__name__, _PUBLIC)
