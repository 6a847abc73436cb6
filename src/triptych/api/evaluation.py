"""`triptych.evaluate`: metrics of a model on data in one call."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triptych import weights
from triptych.errors import ConfigError, near_names_hint
from triptych.evaluation.results import (
    ClassificationResult,
    GenerationResult,
    ReconstructionResult,
    SegmentationResult,
)
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.network import Network
from triptych.training.evaluate_run import evaluate as evaluate_run

Result = ClassificationResult | SegmentationResult | ReconstructionResult | GenerationResult


def evaluate(
    model: str | Path | Network | None = None,
    data: str | Path | None = None,
    *,
    samples: str | Path | None = None,
    **options: Any,
) -> Result:
    """Evaluate a model on data.

    ```python
    import triptych as tp

    result = tp.evaluate("run")                          # a RUN folder, on the images that it held out
    result.top1, result.to_json()
    tp.evaluate("vit-emoji", "photos", split="test", batch_size=256).per_class
    tp.evaluate(tp.load("net.safetensors"), "photos").confusion
    tp.evaluate("stable-diffusion.safetensors", "photos", num_samples=5000).frechet
    tp.evaluate(samples="generated", data="photos", extractor="inception").frechet    # FID of a folder
    ```

    Args:
        model: a network, or anything `triptych.load` takes: a file, folder, RUN, hub id or shipped name.
        data: as in `triptych.train`; None is the data of the RUN.
        samples: a folder of generated images, instead of a model.
        options: of a classifier, segmenter or autoencoder those of `triptych.training.evaluate`; of a latent
            diffusion model or of samples those of `triptych.api.generation.evaluate_generator` or `evaluate_samples`.

    Returns:
        By what the model is: `ClassificationResult`, `SegmentationResult`, `ReconstructionResult` or
        `GenerationResult`, each with its metrics as attributes and `to_json()`.

    Raises:
        ConfigError: neither or both of model and samples, or an option of another kind of model, with similar names.
        DataError: data that cannot be read or does not fit the model.
        CheckpointError: a model that cannot be loaded.
    """
    if (model is None) == (samples is None):
        sources = (
            "neither a model nor a folder of samples" if model is None else "a model and a folder of samples"
        )
        raise ConfigError(f"{sources} is given; give one of the two")
    data = None if data is None else str(data)
    if samples is not None:
        from triptych.api.generation import evaluate_samples

        return _call(evaluate_samples, samples, data, options)
    if _generates(model):
        from triptych.api.generation import evaluate_generator

        return _call(evaluate_generator, model, data, options)
    return _call(evaluate_run, model, data, options)


def _generates(model: Any) -> bool:
    if isinstance(model, Network):
        return isinstance(model, LatentDiffusion)
    return weights.inspect(model).get("family") == "latent-diffusion"


def _call(function: Callable[..., Any], subject: Any, data: str | None, options: dict[str, Any]) -> Any:
    """Call a function with options, refusing those that it does not have."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ConfigError(f"{function.__name__} has no option {name!r}; {near_names_hint(name, known)}")
    return function(subject, data, **options)
